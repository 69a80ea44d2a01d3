#!/usr/bin/env bash
# Tests of what ranks say to each other (kernels/comm.h): build/comm_ranks as one process and as several of mpirun's.
#
#     tests/test_comm.sh [NAME...]           from the repository's root; NAME: only the tests whose names contain it
#
#     PROGRAM=build/comm_ranks_cuda    the ranks of GPUs instead
#     RANKS="1 2 4"                    how many ranks; the last is the most, and with GPUs there must be so many
#     HUGE=1                           also a message of more than 2^31 bytes: 10 GiB of memory must be free
#
# Called by run_tests.sh and cuda.sh. Read next: rank_checks.sh, comm_ranks.c.
# shellcheck disable=SC2015  # in A && B || C, B ends alike
PROGRAM=${PROGRAM:-build/comm_ranks}
case $PROGRAM in
*_cuda) variant=cuda soon=45 ;; # to open GPUs and to connect them takes its time
*) variant=cpu soon=15 ;;
esac
TRAIN=$PROGRAM # the program that cli_checks.sh looks for
SOURCE=$PWD
RANKS=${RANKS:-1 2 4}
MOST=${RANKS##* }
LAST=$((MOST - 1))
CC=${CC:-gcc}
# shellcheck source=tests/rank_checks.sh
. "$(dirname "$0")/rank_checks.sh"
PROGRAM=$TRAIN

needs_several() {
    needs_mpi && { [ "$MOST" -gt 1 ] || { skip "one rank"; return 1; }; }
}

has_gpus() {
    [ $variant = cuda ]
}

# one_line PATTERN: all ranks ended soon, with one line of moelab's that matches; mpirun adds lines of its own.
one_line() {
    [ "$status" != 0 ] && [ "$status" != 124 ] || fail "exit status $status"
    check "ended after $seconds s" test "$seconds" -le $soon
    check "not one line of moelab's: $(grep '^moelab' err)" test "$(grep -c '^moelab: ' err)" = 1
    check "no line says '$1': $(grep '^moelab' err)" grep -qE -- "^moelab: $1" err
}

# ---- what goes well

test_alone() {
    "$PROGRAM" results >out 2>err
    status=$?
    all_ranks_expect 1
}

test_results() {
    needs_mpi || return
    for count in $RANKS; do
        ranks "$count" results
        all_ranks_expect "$count"
    done
}

# Stores in each other's memory instead of messages.
test_open_memory() {
    alone peers 100
    all_ranks_expect 1
    needs_mpi || return
    for count in $RANKS; do
        ranks "$count" peers 100
        all_ranks_expect "$count"
    done
}

test_many_calls() {
    needs_several || return
    ranks 2 many 5000
    succeeds
}

test_huge_message() {
    needs_several || return
    if [ "${HUGE:-0}" != 1 ]; then
        skip "a message above 2^31 bytes: HUGE=1 sends one"
        return
    fi
    ranks 2 huge
    succeeds
}

# ---- who is waited for

# one_line_beside PATTERN COUNT ARGUMENT...: ranks that end so, in a folder of their own beside those of other calls,
# for they do little but wait. GPUs take one call after the other. wait_for_all sees to all of them.
one_line_beside() {
    local folder
    folder=$(mktemp -d -p .)
    (
        cd "$folder" && ranks "${@:2}"
        one_line "$1"
        exit "$failed"
    ) &
    ! has_gpus || wait_for_all
}

wait_for_all() {
    for job in $(jobs -p); do
        wait "$job" || failed=1
    done
}

test_patience() {
    needs_several || return
    local where='at step 12, layer 2, dispatch, and' why='is it stopped or gone\? The last checkpoint is whole'
    local last="rank $LAST" first="rank 0"
    ! has_gpus || last="the other ranks" first=$last # a GPU does not know for whom it waits
    for mode in asleep asleep_at_meeting; do
        one_line_beside "rank 0 waited 2 s for $last $where rank $LAST does not answer: $why" "$MOST" $mode $LAST
        one_line_beside "rank 1 waited 2 s for $first $where rank 0 does not answer: $why" "$MOST" $mode 0
    done
    wait_for_all
}

# The rank for which a rank waits may itself wait: who is named in the end is the one that is stopped.
test_chain_of_waiting_ranks() {
    needs_several || return
    if [ "$MOST" -lt 4 ]; then
        skip "fewer than four ranks"
        return
    fi
    local whom="rank 1"
    ! has_gpus || whom="the other ranks"
    for at_meeting in 0 1; do
        one_line_beside "rank 0 waited 2 s for $whom at step 12, layer 2, dispatch, and rank 3 does not answer: is it" \
            4 chain $at_meeting
    done
    wait_for_all
}

test_wait_for_any() {
    needs_several || return
    local where="rank 0 waited 2 s for the other ranks at step 12, layer 2, dispatch, and"
    one_line_beside "$where all ranks answer: does a device hang, or have they gone apart" "$MOST" asleep_for_any 0
    one_line_beside "$where rank $LAST does not answer: is it stopped or gone" "$MOST" asleep_for_any 1
    if [ "$MOST" -gt 2 ]; then
        one_line_beside "$where rank $((MOST - 2)) and 1 more do not answer: is one stopped or gone" \
            "$MOST" asleep_for_any 2
    fi
    wait_for_all
}

test_ranks_that_wait_for_each_other() {
    needs_several || return
    local whom="rank 1" why="ranks wait for each other: have they gone apart"
    ! has_gpus || whom="the other ranks" why="all ranks answer: does a device hang, or have they gone apart"
    ranks 2 each_for_other
    one_line "rank 0 waited 1 s for $whom at step 7, combine, and $why"
}

test_killed_rank() {
    needs_several || return
    ranks "$MOST" killed 1
    [ "$status" != 0 ] && [ "$status" != 124 ] || fail "exit status $status"
    check "ended after $seconds s" test "$seconds" -le $soon
}

# ---- ranks that have gone apart

test_other_count_of_rows() {
    needs_several || return
    if has_gpus; then # NCCL does not compare counts, but what does not come is waited for
        ranks "$MOST" two_expected 0
        one_line 'rank 0 waited 2 s for the other ranks at step 7, combine'
        return
    fi
    ranks "$MOST" two_expected 3
    one_line 'rank 0 expected 16 bytes of rank 1 at step 7, combine, but 24 bytes came'
    ranks 2 two_expected 0
    one_line 'rank 0 expected 16 bytes of rank 1 at step 7, combine, but 1 bytes of another call came'
    ranks 2 none_expected 1
    one_line 'rank 0 expected 1 bytes of rank 1 at step 0, the start, but 1 bytes of another call came'
}

test_other_text() {
    needs_several || return
    ranks "$MOST" differ $LAST
    one_line "rank $LAST has another configuration than rank 0"
}

# ---- one line

test_errors_of_all_and_of_one() {
    needs_several || return
    ranks "$MOST" all_wrong
    one_line '--top-k 9 is wrong everywhere .*rank 0 on'
    ranks "$MOST" one_wrong $LAST
    one_line "wrong on rank $LAST alone .*rank $LAST on"
    ranks "$MOST" uneven_groups $((MOST + 1))
    one_line "--ep $((MOST + 1)) does not divide the $MOST ranks"
}

test_more_ranks_than_gpus() {
    needs_mpi || return
    local gpus=0
    ! has_gpus || gpus=$(nvidia-smi -L | wc -l)
    if [ "$gpus" = 0 ]; then
        skip "no GPUs"
        return
    fi
    ranks $((gpus + 1)) results
    one_line "$((gpus + 1)) ranks were started on this machine, and they see $gpus GPUs?: .*rank 0 on"
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
    if has_gpus; then
        skip "compiled for the CPU alone"
        return
    fi
    local kernels=("$SOURCE"/kernels/{comm,comm_host,comm_wait,check,checksum,arena,device,dispatch,experts,peers}.c)
    check "does not compile" "$CC" -std=gnu11 "$SOURCE/tests/comm_ranks.c" "${kernels[@]}" -lm -o comm_ranks
    PROGRAM=$PWD/comm_ranks
    ranks 2 results
    one_line '2 ranks were started, but this program was built without MPI: apt-get install libopenmpi-dev openmpi-bin'
    ranks 1 results
    all_ranks_expect 1
}

run_tests "$@"
