# shellcheck shell=bash disable=SC2015,SC2034  # A && B || C is meant so; variables are read by who sources this
# What tests of programs under mpirun share: starting one as several ranks, and checks of how all of them ended. A
# script sets PROGRAM, and `variant` where it is not of the CPU's build, and sources this. Where there is no mpirun, or
# the build is without MPI, a test that begins with
#
#     needs_mpi || return
#
# is skipped. More ranks than cores are fine. Sourced by test_comm.sh, test_exchange.sh and others. Read next:
# cli_checks.sh.
# shellcheck source=tests/cli_checks.sh
. "$(dirname "$0")/cli_checks.sh"

# Of Open MPI: ranks may share cores and may be root's. Messages between processes are copied through shared memory,
# because containers often forbid a process to read another's.
export OMPI_MCA_rmaps_base_oversubscribe=1 OMPI_MCA_hwloc_base_binding_policy=none OMPI_MCA_mpi_yield_when_idle=1
export OMPI_ALLOW_RUN_AS_ROOT=1 OMPI_ALLOW_RUN_AS_ROOT_CONFIRM=1 OMPI_MCA_btl_vader_single_copy_mechanism=none

grep -q -e -DUSE_MPI "build/${variant:-cpu}/flags" 2>/dev/null && command -v mpirun >/dev/null || NO_MPI=1

needs_mpi() {
    [ -z "${NO_MPI:-}" ] || { skip "no mpirun, or built without MPI"; return 1; }
}

# ranks COUNT ARGUMENT...: output is in the files `out` and `err`, the exit status in $status, seconds in $seconds.
ranks() {
    local begin=$SECONDS
    timeout 120 mpirun -n "$1" "$PROGRAM" "${@:2}" </dev/null >out 2>err
    status=$?
    seconds=$((SECONDS - begin))
}

# The same as one process, without mpirun.
alone() {
    "$PROGRAM" "$@" >out 2>err
    status=$?
}

# all_ranks_expect COUNT: each rank found everything as expected.
all_ranks_expect() {
    succeeds
    for ((r = 0; r < $1; r++)); do
        check "rank $r of $1 did not get through" grep -q "^rank $r of $1: all as expected\$" out
    done
}

# on_all_counts ARGUMENT...: on COUNTS ranks, by default 1 (without mpirun), 2 and 4. Four have a thread each, or they
# would wait for cores more than they work.
on_all_counts() {
    for count in ${COUNTS:-1 2 4}; do
        if [ "$count" = 1 ]; then
            alone "$@"
        else
            needs_mpi || return
            OMP_NUM_THREADS=$((4 / count)) ranks "$count" "$@"
        fi
        all_ranks_expect "$count"
    done
}
