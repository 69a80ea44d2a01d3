#!/usr/bin/env bash
# Conformance of the exchange (model/exchange.h): every way of it, on 1, 2 and 4 ranks, against what one rank computes
# by itself and against the reference of the MoE all-to-all benchmark "amd_distributed".
#
#     tests/test_exchange.sh [NAME...]        from the repository's root; NAME: only the tests whose names contain it
#
#     TOKENS=256    the benchmark's shapes as large as they are there, and all of them on 4 ranks; 16 GiB of memory
#                   must be free
#
# Called by run_tests.sh. Read next: rank_checks.sh, exchange_ranks.c; test_exchange_edges.sh.
PROGRAM=$PWD/build/exchange_ranks
# shellcheck source=tests/rank_checks.sh
. "$(dirname "$0")/rank_checks.sh"

# experts, experts of a token, row length, tokens, seed: the smallest one, then the benchmark's tests t1 to t9 and its
# timed shapes b1 to b5. A rank has fewer tokens than that, and than TOKENS: the tokens of 12 of these 15 are cut,
# nothing else is.
SHAPES="8,2,16,4,123
    8,2,6144,4,1236 64,6,2048,4,1234 64,6,2048,8,542 128,4,2880,16,347 128,4,2880,32,51 128,8,4096,64,175
    128,8,4096,128,534 256,8,7168,64,897 256,8,7168,128,4
    8,2,6144,16,6635 64,6,2048,32,1234 128,4,2880,128,51 128,8,4096,256,175 256,8,7168,256,4"
TOKENS=${TOKENS:-6}

# The smallest one, and one of each size: with all types on the wire and half as many tokens, and on 4 ranks, which
# share what cores there are.
EACH_SIZE="8,2,16,4,123
    8,2,6144,4,1236 64,6,2048,8,542 128,4,2880,32,51 128,8,4096,64,175 256,8,7168,128,4"

# cut_to TOKENS SHAPE...: prints the shapes with at most that many tokens.
cut_to() {
    for shape in "${@:2}"; do
        IFS=, read -r experts choices length tokens seed <<<"$shape"
        echo "$experts,$choices,$length,$((tokens < $1 ? tokens : $1)),$seed"
    done
}

test_example() {
    alone example
    all_ranks_expect 1
}

test_shapes() {
    local on_four=$EACH_SIZE
    [ "$TOKENS" -lt 256 ] || on_four=$SHAPES
    # shellcheck disable=SC2046,SC2086  # words without blanks
    {
        COUNTS='1 2' on_all_counts shapes $(cut_to "$TOKENS" $SHAPES)
        COUNTS=4 on_all_counts shapes $(cut_to "$TOKENS" $on_four)
    }
}

test_wires() {
    # shellcheck disable=SC2046,SC2086  # words without blanks
    {
        COUNTS='1 2' on_all_counts wires $(cut_to $((TOKENS / 2)) $EACH_SIZE)
        COUNTS=4 on_all_counts wires 8,2,16,4,123 64,6,2048,3,542
    }
}

run_tests "$@"
