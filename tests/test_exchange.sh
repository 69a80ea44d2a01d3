#!/usr/bin/env bash
# Conformance of the exchange (model/exchange.h): every way of it, on 1, 2 and 4 ranks, against what one rank computes
# by itself and against the reference of the MoE all-to-all benchmark "amd_distributed".
#
#     tests/test_exchange.sh [NAME...]        from the repository's root; NAME: only the tests whose names contain it
#
#     TOKENS=256    the benchmark's shapes as large as they are there; 16 GiB of memory must be free
#
# Called by run_tests.sh. Read next: rank_checks.sh, exchange_ranks.c.
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

# Of these with all types on the wire, and half as many tokens: the smallest one, and one of each size.
WIRE_SHAPES="8,2,16,4,123
    8,2,6144,4,1236 64,6,2048,8,542 128,4,2880,32,51 128,8,4096,64,175 256,8,7168,128,4"

# cut_to TOKENS SHAPE...: prints the shapes with at most that many tokens.
cut_to() {
    for shape in "${@:2}"; do
        IFS=, read -r experts choices length tokens seed <<<"$shape"
        echo "$experts,$choices,$length,$((tokens < $1 ? tokens : $1)),$seed"
    done
}

# on_all_counts ARGUMENT...: without mpirun, then on 2 and 4 ranks. Four have a thread each, or they would wait for
# cores more than they work.
on_all_counts() {
    alone "$@"
    all_ranks_expect 1
    needs_mpi || return
    for count in 2 4; do
        OMP_NUM_THREADS=$((4 / count)) ranks $count "$@"
        all_ranks_expect $count
    done
}

test_example() {
    alone example
    all_ranks_expect 1
}

test_shapes() {
    # shellcheck disable=SC2046,SC2086  # words without blanks
    on_all_counts shapes $(cut_to "$TOKENS" $SHAPES)
}

test_wires() {
    # shellcheck disable=SC2046,SC2086  # words without blanks
    on_all_counts wires $(cut_to $((TOKENS / 2)) $WIRE_SHAPES)
}

test_edges() {
    on_all_counts edges
}

test_steps() {
    on_all_counts steps
}

test_adjoint() {
    on_all_counts adjoint
}

test_adjoint_in_double() {
    PROGRAM=${PROGRAM}_double
    on_all_counts adjoint
}

# Arrays of exact length, so that a row too many is found. What MPI does not free is not ours.
test_sanitized() {
    needs_mpi || return
    PROGRAM=${PROGRAM}_asan
    [ -x "$PROGRAM" ] || { skip "built without sanitizers"; return; }
    export ASAN_OPTIONS=detect_leaks=0
    for mode in edges steps; do
        ranks 2 $mode
        all_ranks_expect 2
    done
}

run_tests "$@"
