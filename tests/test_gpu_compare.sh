#!/usr/bin/env bash
# Tests of experiments/gpu_compare.sh, with programs that stand in for both sides: no GPU and no PyTorch is needed.
#
#     tests/test_gpu_compare.sh [NAME...]    from the repository's root; NAME: only the tests whose names contain it
#
# Called by run_tests.sh. Read next: cli_checks.sh, experiments/gpu_compare.sh.
# shellcheck source=tests/cli_checks.sh
. "$(dirname "$0")/cli_checks.sh"

EXPERIMENTS=$(realpath experiments)

# Both sides: ours print a line for the name they are given, but for "none_of_ours"; the peer one for each of its names,
# ends at "ends" and leaves out "spoils" and all behind it. `calls` has what the peer was asked for.
sides() {
    mkdir bin
    cat >bin/bench_layer_cuda <<'PROGRAM'
#!/bin/sh
[ "$2" != none_of_ours ] || exit 1
echo "starting"
echo "{\"${1#--}\":\"$2\",\"impl\":\"moelab\",\"ms\":2,\"peak_mib\":10,\"commit\":\"abc\"}" | sed 's/"config"/"layer"/'
PROGRAM
    cp bin/bench_layer_cuda bin/bench_train_cuda
    cat >bin/python <<'PROGRAM'
#!/bin/bash
case $1 in *torch_gpu.py) ;; *) exec python3 "$@" ;; esac
echo "${@:2}" >>calls
kind=${2/train/model}
for name in "${@:3}"; do
    case $name in --*) exit ;; ends) exit 9 ;; spoils) exit 0 ;; esac
    for ms in 5 3; do
        echo "{\"$kind\": \"$name\", \"impl\": \"torch\", \"way\": \"way$ms\", \"ms\": $ms, \"peak_mib\": 20}"
    done
done
PROGRAM
    chmod +x bin/*
}

# torch_gpu ARGUMENT...: the real peer with the modules of this test.
torch_gpu() {
    PYTHONPATH=modules PYTHONDONTWRITEBYTECODE=1 timeout 20 python3 "$EXPERIMENTS/baselines/torch_gpu.py" "$@" \
        >out 2>err
}

# compares ARGUMENT...: gpu_compare.sh with the stand-ins, its table in `out`.
compares() {
    timeout 20 "$EXPERIMENTS/gpu_compare.sh" -p bin/python -w W -k K "$@" bin lines >out 2>err
    status=$?
    ends 0
}

# row NAME OURS THEIRS: the table's line for NAME begins so.
row() {
    check "no line '$1 $2 $3': $(cat out)" grep -qE "^$1 +$2 +$3( |\$)" out
}

test_one_process_for_all() {
    sides
    compares -l a,b -d '1,2,3,1 4,5,6,1' -m m,n
    printf '%s\n' 'layer a b --ways W' 'dispatch 1,2,3,1 4,5,6,1' 'train m n --ways W --weights K' >wanted
    check "not one process a kind" diff wanted calls
    for name in a b 1,2,3,1 4,5,6,1 m n; do
        row $name 2.000 3.000
    done
    check "ratio to the best way" test "$(grep -c ' 1.50x .*way3' out)" = 6
    check "not every measurement is kept" test "$(wc -l <lines)" = 18
    check "lines say what they are of" python3 - lines <<'PYTHON'
import json, sys
rows = [json.loads(line) for line in open(sys.argv[1])]
assert all(row["commit"] == "abc" and row["time"] for row in rows)
assert rows[0]["command"] == "bin/bench_layer_cuda --config a" and "torch_gpu.py layer a b" in rows[2]["command"]
PYTHON
}

test_failures_leave_the_others() {
    sides
    compares -l a,none_of_ours,ends,b,spoils,c -d none -m none
    printf '%s\n' 'layer a none_of_ours ends b spoils c --ways W' 'layer b spoils c --ways W' 'layer c --ways W' >wanted
    check "what the peer was asked for" diff wanted calls
    for name in a b c; do
        row $name 2.000 3.000
    done
    for name in ends spoils; do
        row $name 2.000 missing
    done
    row none_of_ours missing 3.000
    check "a failure is not told" grep -q 'failed: bin/bench_layer_cuda --config none_of_ours' err
}

test_time_limit() {
    sides
    compares -s 0 -l a -d 1,2,3,1 -m m
    check "a peer was started" test ! -e calls
    for name in a 1,2,3,1 m; do
        row $name 2.000 missing
    done
    compares -s 1000 -l a -d none -m none
    check "the limit is not handed on: $(cat calls)" grep -qE '^layer a --ways W --seconds (1000|9[0-9]{2})$' calls
    row a 2.000 3.000
    timeout 20 "$EXPERIMENTS/gpu_compare.sh" -s soon bin lines >out 2>err
    check "a limit that is no number" grep -q 'whole seconds' err
}

# torch_gpu.py itself, with a PyTorch that can do nothing: within the limit a way is tried, after it none is.
test_peer_limit() {
    mkdir -p modules/torch/nn
    cat >modules/torch/__init__.py <<'PYTHON'
class Anything:
    def __getattr__(self, name):
        return lambda *words: True

cuda = _dynamo = Anything()
set_float32_matmul_precision = print
PYTHON
    printf 'class Module: pass\n' >modules/torch/nn/__init__.py
    : >modules/torch/nn/functional.py
    : >modules/torch/distributed.py
    torch_gpu layer tiny fine --ways loop --seconds 0
    printf '%s\n' 'tiny loop: not begun, 0 s are over' 'fine loop: not begun, 0 s are over' >wanted
    check "after the limit" diff wanted err
    torch_gpu layer tiny --ways loop --seconds 1000
    check "before the limit: $(cat err)" grep -q '^tiny loop: left out' err
}

run_tests "$@"
