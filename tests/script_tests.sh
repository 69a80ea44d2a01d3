# shellcheck shell=bash
# What test scripts share: checks, and the loop over their tests. A script makes a folder $ROOT, sources this, defines
# functions test_NAME and ends with
#
#     each_test "$@"
#
# Every test runs in a subshell and a directory of its own below $ROOT; it passes when no check in it failed. Sourced by
# cli_checks.sh, which has more for tests of ./train, test_report_page.sh and test_scripts.sh.

fail() {
    echo "  $*"
    failed=1
}

# check WHAT COMMAND...: COMMAND must succeed.
check() {
    local what=$1
    shift
    "$@" >check.out 2>&1 || { fail "$what"; tail -n 5 check.out; }
}

# each_test [NAME...]: all tests of the script, in its order; with names, those whose names contain one. Its status is
# the script's.
each_test() {
    all_passed=0
    all_failed=0
    mapfile -t names < <(sed -n 's/^test_\([a-z0-9_]*\)() {$/\1/p' "$0")
    for name in "${names[@]}"; do
        wanted=$#
        for word; do
            [[ $name != *$word* ]] || wanted=0
        done
        [ "$wanted" = 0 ] || continue
        mkdir "$ROOT/$name"
        begin=${EPOCHREALTIME/./}
        # shellcheck disable=SC2030,SC2031  # failed is the subshell's own
        if (cd "$ROOT/$name" && failed=0 && { "test_$name"; exit "$failed"; }); then
            all_passed=$((all_passed + 1))
            word=ok
        else
            all_failed=$((all_failed + 1))
            word=FAIL
        fi
        printf '%-5s %s, %d ms\n' $word "$name" $(((${EPOCHREALTIME/./} - begin) / 1000))
    done
    echo "$all_passed passed, $all_failed failed"
    [ $all_failed = 0 ]
}
