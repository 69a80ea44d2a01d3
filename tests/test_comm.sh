#!/usr/bin/env bash
# Tests of what ranks say to each other (kernels/comm.h): build/comm_ranks as one process and as several of mpirun's.
#
#     tests/test_comm.sh [NAME...]           from the repository's root; NAME: only the tests whose names contain it
#
#     HUGE=1    also a message of more than 2^31 bytes, for which 5 GiB of memory must be free
#
# Called by run_tests.sh. Read next: rank_checks.sh, comm_ranks.c.
# shellcheck disable=SC2015  # in A && B || C, B ends alike
SOURCE=$PWD
PROGRAM=$SOURCE/build/comm_ranks
CC=${CC:-gcc}
# shellcheck source=tests/rank_checks.sh
. "$(dirname "$0")/rank_checks.sh"

# one_line PATTERN: all ranks ended soon, with one line of moelab's that matches; mpirun adds lines of its own.
one_line() {
    [ "$status" != 0 ] && [ "$status" != 124 ] || fail "exit status $status"
    check "ended after $seconds s" test "$seconds" -le 15
    check "not one line of moelab's: $(grep '^moelab' err)" test "$(grep -c '^moelab: ' err)" = 1
    check "no line says '$1': $(grep '^moelab' err)" grep -qE -- "^moelab: $1" err
}

# ---- what goes well

test_alone() {
    alone results
    all_ranks_expect 1
}

test_results() {
    needs_mpi || return
    for count in 1 2 4; do
        ranks $count results
        all_ranks_expect $count
    done
}

test_many_calls() {
    needs_mpi || return
    ranks 2 many 5000
    succeeds
}

test_huge_message() {
    needs_mpi || return
    if [ "${HUGE:-0}" != 1 ]; then
        skip "a message above 2^31 bytes: HUGE=1 sends one"
        return
    fi
    ranks 2 huge
    succeeds
}

# ---- who is waited for

test_patience() {
    needs_mpi || return
    local where='at step 12, layer 2, dispatch: is it stopped or gone\? The last checkpoint is whole'
    ranks 4 asleep 3
    one_line "rank 0 waited 2 s for rank 3 $where"
    ranks 4 asleep 0
    one_line "rank 1 waited 2 s for rank 0 $where"
}

test_killed_rank() {
    needs_mpi || return
    ranks 4 killed 1
    [ "$status" != 0 ] && [ "$status" != 124 ] || fail "exit status $status"
    check "ended after $seconds s" test "$seconds" -le 15
}

# ---- ranks that have gone apart

test_other_count_of_rows() {
    needs_mpi || return
    ranks 4 two_expected 3
    one_line 'rank 0 expected 16 bytes of rank 1 at step 7, combine, but 24 bytes came'
    ranks 2 two_expected 0
    one_line 'rank 0 expected 16 bytes of rank 1 at step 7, combine, but 1 bytes of another call came'
    ranks 2 none_expected 1
    one_line 'rank 0 expected 1 bytes of rank 1 at step 0, the start, but 1 bytes of another call came'
}

test_other_text() {
    needs_mpi || return
    ranks 4 differ 2
    one_line 'rank 2 has another configuration than rank 0'
}

# ---- one line

test_errors_of_all_and_of_one() {
    needs_mpi || return
    ranks 4 all_wrong
    one_line '--top-k 9 is wrong everywhere .*rank 0 on'
    ranks 4 one_wrong 3
    one_line 'wrong on rank 3 alone .*rank 3 on'
    ranks 4 uneven_groups 3
    one_line '--ep 3 does not divide the 4 ranks'
}

# The mpirun of another MPI starts processes that cannot find each other: here its part is played by its variables.
test_foreign_mpirun() {
    needs_mpi || return
    PMI_RANK=0 PMI_SIZE=4 timeout 60 "$PROGRAM" results >out 2>err
    status=$?
    check "not refused" grep -q '^moelab: 4 ranks were started, but each finds 1' err
    ends 1
}

test_built_without_mpi() {
    needs_mpi || return
    local kernels=("$SOURCE"/kernels/{comm,check,checksum,arena,device}.c)
    check "does not compile" "$CC" -std=gnu11 "$SOURCE/tests/comm_ranks.c" "${kernels[@]}" -lm -o comm_ranks
    PROGRAM=$PWD/comm_ranks
    ranks 2 results
    one_line '2 ranks were started, but this program was built without MPI: apt-get install libopenmpi-dev openmpi-bin'
    ranks 1 results
    all_ranks_expect 1
}

run_tests "$@"
