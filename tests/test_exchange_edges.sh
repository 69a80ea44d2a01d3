#!/usr/bin/env bash
# The odd cases of the exchange (model/exchange.h), on 1, 2 and 4 ranks: nothing to send, one token, all to one expert,
# several steps through the same buffers, gradients against differences. As test_exchange.sh, which has the shapes.
#
#     tests/test_exchange_edges.sh [NAME...]  from the repository's root; NAME: only the tests whose names contain it
#
# Called by run_tests.sh. Read next: rank_checks.sh, exchange_ranks.c.
PROGRAM=$PWD/build/exchange_ranks
# shellcheck source=tests/rank_checks.sh
. "$(dirname "$0")/rank_checks.sh"

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
