#!/bin/sh
# Runs test programs, as many at once as there are cores, and counts their tests; the last line is "N passed, N failed".
#
#     tests/run_tests.sh PROGRAM...
#
# Called by `make test`. A PROGRAM is one of
#   - a cmocka program (build/test*/test_NAME), which reports each test in TAP, the Test Anything Protocol;
#   - a script (*.sh) whose last line is "N passed, N failed";
#   - any other file that has been built before ("train"): one test, that it is there.
# A program that crashes, ends early, runs longer than TIMEOUT seconds or was not built is a failure. The output of a
# program is shown when one of its tests failed. BUILD=failed in the environment counts as one more failure: programs
# that could not be built again may be those of an earlier state.
#
#     TIMEOUT   of a program, seconds (300)
#     JOBS      programs at once (the cores)
TIMEOUT=${TIMEOUT:-300}
JOBS=${JOBS:-$(nproc 2>/dev/null || echo 2)}

# Two threads everywhere: enough to meet what threads do, and the same on every machine. Idle ones sleep: on a busy
# machine threads that spin take the cores from those that work.
export OMP_NUM_THREADS=2 OMP_WAIT_POLICY=passive CMOCKA_MESSAGE_OUTPUT=TAP UBSAN_OPTIONS=print_stacktrace=1

# From the TAP lines in $log: "PASSED FAILED SKIPPED MISSING", missing being planned tests that never reported.
count_tap() {
    awk '/^1\.\.[0-9]+/ { planned += substr($1, 4) }
         /^ok /         { if (/# SKIP/) { skipped++ } else { passed++ } }
         /^not ok /     { if (/# SKIP/) { skipped++ } else { failed++ } }
         END            { print passed + 0, failed + 0, skipped + 0, planned - passed - failed - skipped }' "$log"
}

count_script() {
    tail -n 1 "$log" | awk '/^[0-9]+ passed, [0-9]+ failed$/ { print $1, $3, 0, 0; found = 1 }
                            END                              { if (!found) { print 0, 0, 0, 1 } }'
}

split_counts() {
    passed=$1 failed=$2 skipped=$3 missing=$4
}

# run_program NUMBER PROGRAM: leaves its counts in $work/NUMBER.counts and what there is to read in $work/NUMBER.
run_program() {
    program=$2
    log=$work/$1.log
    if [ ! -x "$program" ]; then
        echo "FAIL  $program: not built, or not executable" >"$work/$1"
        echo 0 1 >"$work/$1.counts"
        return
    fi
    case $program in
    build/test-asan*) fast=1 ;;
    *) fast=${MOELAB_FAST_TESTS:-} ;;
    esac

    status=0
    begin=$(date +%s)
    case $program in
    *.sh)
        timeout "$TIMEOUT" "$program" </dev/null >"$log" 2>&1 || status=$?
        counts=$(count_script)
        ;;
    build/test*)
        MOELAB_FAST_TESTS=$fast timeout "$TIMEOUT" "$program" </dev/null >"$log" 2>&1 || status=$?
        counts=$(count_tap)
        ;;
    *)
        : >"$log"
        counts="1 0 0 0"
        ;;
    esac
    seconds=$(($(date +%s) - begin))

    # shellcheck disable=SC2086  # the four counts are meant to be split
    split_counts $counts

    reason=
    if [ "$status" = 124 ]; then
        reason=", stopped after $TIMEOUT s"
    elif [ "$status" -gt 128 ]; then
        reason=", killed by signal $((status - 128))"
    elif [ "$missing" -gt 0 ]; then
        reason=", ended before its last test (exit status $status)"
    elif [ "$status" != 0 ] && [ "$failed" = 0 ]; then
        reason=", exit status $status"
    elif [ $((passed + failed + skipped)) = 0 ]; then
        reason=", ran no test"
    fi
    [ -z "$reason" ] || failed=$((failed + 1))
    [ "$skipped" = 0 ] || reason="$reason, $skipped skipped"
    if [ "$failed" = 0 ]; then
        echo "ok    $program: $passed passed$reason, $seconds s" >"$work/$1"
    else
        echo "FAIL  $program: $passed passed, $failed failed$reason, $seconds s" >"$work/$1"
        sed 's/^/      | /' "$log" >>"$work/$1"
    fi
    echo "$passed $failed" >"$work/$1.counts"
}

# The script calls itself like this to run programs side by side.
if [ "${1:-}" = --program ]; then
    work=$2
    run_program "$3" "$4"
    exit
fi

work=$(mktemp -d)
trap 'kill "$runner" 2>/dev/null; rm -rf "$work"' EXIT
trap 'exit 130' INT TERM
number=0
for program in "$@"; do
    number=$((number + 1))
    echo "$number $program"
done >"$work/programs"
xargs -P "$JOBS" -n 2 "$0" --program "$work" <"$work/programs" &
runner=$!

all_passed=0
all_failed=0
if [ "${BUILD:-}" = failed ]; then
    echo "FAIL  build: see the compiler's messages above"
    all_failed=1
fi
for number in $(seq "$number"); do
    while [ ! -s "$work/$number.counts" ] && kill -0 "$runner" 2>/dev/null; do
        sleep 0.1
    done
    if [ ! -s "$work/$number.counts" ]; then
        echo "FAIL  $(sed -n "${number}p" "$work/programs"): was not run"
        echo 0 1 >"$work/$number.counts"
    fi
    cat "$work/$number" 2>/dev/null
    read -r passed failed <"$work/$number.counts"
    all_passed=$((all_passed + passed))
    all_failed=$((all_failed + failed))
done

echo "$all_passed passed, $all_failed failed"
[ "$all_failed" = 0 ]
