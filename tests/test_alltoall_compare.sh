#!/usr/bin/env bash
# Tests of experiments/alltoall_compare.sh, with programs that stand in for both sides: no GPU and no PyTorch is needed.
#
#     tests/test_alltoall_compare.sh [NAME...]   from the repository's root; NAME: only the tests whose names contain it
#
# Called by run_tests.sh. Read next: cli_checks.sh, experiments/alltoall_compare.sh.
# shellcheck source=tests/cli_checks.sh
. "$(dirname "$0")/cli_checks.sh"

EXPERIMENTS=$(realpath experiments)

# Ours prints three lines for the shape it is asked for, but for "none_of_ours"; the peer two for each of its shapes.
# mpirun starts a program once; `calls` has what the peer was asked for. NO_GPU=1: PyTorch finds none.
sides() {
    mkdir bin
    cat >bin/ours <<'PROGRAM'
#!/bin/bash
if [ "$1" = --shape ]; then shift; fi
[ "$1" != none_of_ours ] || exit 1
echo "starting"
us=0
for way in empty flat dedup; do
    echo "{\"shape\":\"$1\",\"impl\":\"moelab\",\"version\":\"$way\",\"us_p50\":$us,\"plain_us_p50\":5,"\
        "\"commit\":\"abc\"}"
    us=$((us == 0 ? 20 : 10))
done
PROGRAM
    cat >bin/python <<'PROGRAM'
#!/bin/bash
case $1 in
    -c) case $2 in *torch*) exit "${NO_GPU:-0}" ;; esac ;;
    *torch_alltoall.py)
        echo "${@:2}" >>calls
        for word in "${@:2}"; do
            case $word in --shape) continue ;; --*) exit 1 ;; esac
            for us in 15 25; do
                echo "{\"shape\": \"$word\", \"impl\": \"torch\", \"version\": \"way$us\", \"us_p50\": $us}"
            done
        done ;;
esac
exec python3 "$@"
PROGRAM
    printf '#!/bin/sh\nshift 2\nexec "$@"\n' >bin/mpirun
    chmod +x bin/*
}

# compares ARGUMENT...: alltoall_compare.sh with the stand-ins, its table in `out`.
compares() {
    MPIRUN=bin/mpirun timeout 20 "$EXPERIMENTS/alltoall_compare.sh" -p bin/python "$@" bin/ours lines >out 2>err
    status=$?
    ends 0
}

# row NAME OURS THEIRS: the table's line for NAME begins so.
row() {
    check "no line '$1 $2 $3': $(cat out)" grep -qE "^$1 +$2 +$3( |\$)" out
}

test_best_ways_of_both() {
    sides
    compares -n 4 -x 'b1 8,2,64,100' -v graphs -r 7 -s 3
    echo 'b1 --shape 8,2,64,100 --versions graphs --check --full-tokens --repeats 7 --seconds 3' >wanted
    check "what the peer was asked for" diff wanted calls
    for name in b1 8,2,64,100; do
        row $name 10.0 15.0
    done
    check "ratio, bound and ways" test "$(grep -c ' 1.50x  *5.0  dedup; way15$' out)" = 2
    check "lines say what they are of" python3 - lines <<'PYTHON'
import json, sys
rows = [json.loads(line) for line in open(sys.argv[1])]
assert len(rows) == 10 and all(row["commit"] == "abc" and row["time"] for row in rows)
assert rows[0]["command"] == "bin/mpirun -n 4 bin/ours b1 --full-tokens --repeats 7 --seconds 3"
assert "torch_alltoall.py b1 --shape 8,2,64,100" in rows[9]["command"]
PYTHON
}

test_failures_leave_the_others() {
    sides
    compares -n 2 -x 'none_of_ours b2'
    row none_of_ours missing 15.0
    row b2 10.0 15.0
    check "a failure is not told" grep -q 'failed: bin/mpirun -n 2 bin/ours none_of_ours' err
}

test_without_peer() {
    sides
    NO_GPU=1 compares -n 2 -x b1
    row b1 10.0 missing
    check "no word on the peer" grep -q 'ours alone' err
    check "the peer was started" test ! -e calls
}

test_without_gpu() {
    sides
    printf '#!/bin/sh\nexit 1\n' >bin/nvidia-smi
    chmod +x bin/nvidia-smi
    PATH=$PWD/bin:$PATH timeout 20 "$EXPERIMENTS/alltoall_compare.sh" bin/ours lines >out 2>err
    status=$?
    ends 1
    check "stderr does not ask for -n: $(cat err)" grep -q 'no GPU is here: give the number of ranks, -n' err
}

run_tests "$@"
