#!/usr/bin/env bash
# Tests of what asks whether experts and gate must learn together: build/specialise_toy says the same twice and what the
# argument in its header says, specialise_table.py computes what its lines mean, specialise.sh trains by rank.
#
#     tests/test_specialise.sh [NAME...]      from the repository's root; NAME: only the tests whose names contain it
#
# Called by run_tests.sh. Read next: rank_checks.sh, experiments/specialise_toy.c, experiments/specialise_table.py.
# shellcheck source=tests/rank_checks.sh
. "$(dirname "$0")/rank_checks.sh"

TOY=$PWD/build/specialise_toy
TABLE=$PWD/experiments/specialise_table.py
SCRIPT=$PWD/experiments/specialise.sh
export PYTHONDONTWRITEBYTECODE=1

# call COMMAND...: output is in the files `out` and `err`, the exit status in $status.
call() {
    timeout 60 "$@" </dev/null >out 2>err
    status=$?
}

# says_no TEXT: status 1 and one line on stderr that holds TEXT.
says_no() {
    ends 1
    check "stderr is not one line: $(head -n 2 err)" test "$(wc -l <err)" = 1
    check "stderr does not say '$1': $(head -n 1 err)" grep -qF -- "$1" err
}

# ---- the toy

test_toy_lines() {
    call "$TOY" --seeds 2 --steps 40
    succeeds
    sed 's/"ts":"[^"]*"//' out >first
    call "$TOY" --seeds 2 --steps 40
    sed 's/"ts":"[^"]*"//' out >second
    check "two runs differ" cmp first second
    check "the lines" python3 - out <<'PYTHON'
import json, math, sys
lines = [json.loads(line) for line in open(sys.argv[1])]
arms = ["joint", "joint-balance", "joint-explore", "decoupled", "decoupled-drawn", "gate", "experts"]
assert [(line["arm"], line["seed"]) for line in lines] == [(arm, seed) for arm in arms for seed in (1, 2)]
for line in lines:
    assert line["kind"] == "toy" and line["ts"] and line["commit"] and line["device"]
    assert line["command"] == "build/specialise_toy --seeds 2 --steps 40" and line["config"]["steps"] == 40
    steps = [point[0] for point in line["curve"]]
    assert steps == list(range(0, 41, 2)), steps
    assert math.isclose(line["curve"][-1][1], line["loss"], rel_tol=1e-4)
    assert line["oracle"] <= line["loss"] and 0 <= line["nmi"] <= 1 and 0 <= line["entropy"] <= 1.3863
    assert line["solved"] == (line["loss"] < line["floor"] / 100)
start = {line["arm"]: line["curve"][0] for line in lines if line["seed"] == 1}
assert start["joint"] == start["joint-balance"] == start["decoupled"] == start["gate"]
PYTHON
}

# One seed in full: the floor holds, and only those that learn together come below it by much.
test_toy_has_its_floor() {
    call "$TOY" --seeds 1
    succeeds
    check "the outcome" python3 - out <<'PYTHON'
import json, sys
arm = {line["arm"]: line for line in map(json.loads, open(sys.argv[1]))}
floor = arm["joint"]["floor"]
assert abs(arm["decoupled"]["loss"] / floor - 1) < 1e-4 and abs(arm["decoupled"]["oracle"] / floor - 1) < 1e-4
assert arm["joint-balance"]["solved"] and arm["joint-balance"]["nmi"] == 1 and arm["joint-balance"]["entropy"] < 0.1
assert 0.1 * floor < arm["experts"]["loss"] < floor < arm["gate"]["loss"]
PYTHON
}

test_toy_refuses() {
    for words in "--seeds 0" "--seeds" "--seeds 1.5" "--steps 99999999" "--step 5" "5"; do
        # shellcheck disable=SC2086  # several words
        call "$TOY" $words
        ends 1
        check "stderr is not one line: $(head -n 2 err)" test "$(wc -l <err)" = 1
        check "stdout is not empty" test ! -s out
    done
}

# ---- the table

# run_line ARM SEED LOSS [MORE]
run_line() {
    printf '{"kind":"run","sweep":"s","size":"small","arm":"%s","rate":0.1,' "$1"
    printf '"seed":%s,"val_loss":%s%s}\n' "$2" "$3" "${4:-}"
}

test_table_of_runs() {
    local more=',"val_floor":1,"mi":[0.5,0.25],"entropy":0.125,"val_domains":{"a":{"tokens":30},"b":{"tokens":10}},
        "domain_expert":[[[1,0],[0,1]],[[0.5,0.5],[0.5,0.5]]],"commit":"c1","device":"d"'
    {
        run_line joint 1 1.0 "${more//$'\n'/}"
        run_line joint 2 2.0
        run_line joint 3 6.0
        run_line other 1 1.5
        run_line other 2 2.25
        run_line other 3 7.0
        run_line other 4 null
        echo '{"kind":"timing","arm":"joint"}'
        run_line other 5 3.0 | sed 's/"run"/"failed"/'
        run_line joint 3 9.0
        run_line joint 3 6.0
        echo
        echo '{"kind":"run","sweep":"s","size":"small","arm":"other","rate":0.2,"seed":1,"val_loss":0.5}'
    } >lines.jsonl
    call "$TABLE" lines.jsonl
    succeeds
    # t = 4.30265 for two degrees of freedom; deviations sqrt(7) and 0.3819; NMI 1 in one layer, 0 in the other
    check "joint" grep -qF '| joint | 3 | 3.000 ± 6.572 | – | 1.000 | 0.000 | 0.500 | 0.375 | 0.125 | – |' out
    check "other's row" grep -qF '| 3 (2 without a loss) | 3.583 ± 7.409 | +0.583 ± 0.949 (not resolved) |' out
    call "$TABLE" lines.jsonl --baseline other
    check "against other" grep -qF '| joint | 3 | 3.000 ± 6.572 | -0.583 ± 0.949 (not resolved) |' out
}

test_table_of_the_toy() {
    for seed in 1 2 3; do
        local solved=false
        [ $seed != 2 ] || solved=true
        printf '{"kind":"toy","sweep":"t","arm":"joint","seed":%s,"loss":%s,"floor":4,"nmi":1,' $seed $seed
        printf '"entropy":0.5,"solved":%s}\n' $solved
    done >toy.jsonl
    call "$TABLE" toy.jsonl
    succeeds
    local figures='2.000 ± 2.484 | – | 4.000 ± 0.000 | -2.000 ± 2.484 | 1.000 ± 0.000 | – | 0.500 ± 0.000'
    check "the row" grep -qF "| joint | 3 | $figures | 1 of 3 (not 1, 3) |" out
}

test_table_refuses() {
    printf '%s\n' '{"kind":"run"}' '{"kind":' >bad.jsonl
    call "$TABLE" bad.jsonl
    says_no "bad.jsonl:2: not JSON"
    echo '{"kind":"timing"}' >none.jsonl
    call "$TABLE" none.jsonl
    says_no "no line of kind toy or run"
    call "$TABLE" missing.jsonl
    says_no "cannot read missing.jsonl"
    run --steps 1 --eval-every 0 --out cut
    sed -i '/"event":"end"/d' cut/log.jsonl
    call "$TABLE" line cut
    says_no "cut/log.jsonl is not of a finished run"
}

# ---- training

TINY="--layers 1 --dim 16 --expert-dim 8 --seq 16 --eval-batches 1"

test_by_rank() {
    needs_mpi || return
    local command=("$SCRIPT" -r 2 -s 7 -n 4 -a 'joint,decoupled-trunk' -p "$TINY" "$TRAIN" lines.jsonl)
    call "${command[@]}"
    ends 0
    check "the table" grep -q '^| decoupled-trunk | 1 ' out
    check "the lines" python3 - lines.jsonl <<'PYTHON'
import json, sys
joint, trunk = map(json.loads, open(sys.argv[1]))
assert (joint["arm"], trunk["arm"]) == ("joint", "decoupled-trunk") and joint["seed"] == trunk["seed"] == 7
assert joint["kind"] == "run" and joint["sweep"] == "specialise_by_rank" and joint["rate"] == 4e-3
assert (joint["steps"], trunk["steps"], trunk["steps_before"]) == (4, 2, 2)
assert joint["config"]["domains"] == trunk["config"]["domains"] == "by-rank" and joint["config"]["ep"] == 2
assert (joint["config"]["freeze"], trunk["config"]["freeze"]) == ("none", "experts")
assert trunk["config"]["init_from"] and "--freeze experts" in trunk["command"] and "--dim 16" in trunk["command"]
assert set(joint["val_domains"]) == {"story", "arithmetic", "brackets", "recall", "sort", "echo"}
assert 4 < joint["val_loss"] < 6 and len(joint["mi"]) == 1 and joint["val"][-1] == [4, 4 * 8 * 16, joint["val_loss"]]
assert abs(joint["entropy"] - 2.08) < 0.01  # ln 8
PYTHON
    call "${command[@]}"
    ends 0
    check "a run was repeated" test "$(wc -l <lines.jsonl)" = 2
    call "${command[@]/4/6}"
    says_no "lines.jsonl has joint, seed 7, made with other options than mpirun -n 2 ./train"
    check "a line was added" test "$(wc -l <lines.jsonl)" = 2
}

test_script_refuses() {
    call "$SCRIPT" -n 5 "$TRAIN" lines.jsonl
    says_no "-n 5: give an even number of steps"
    call "$SCRIPT" -r 1 "$TRAIN" lines.jsonl
    says_no "-r 1: give two ranks or more"
    call "$SCRIPT" -l fast "$TRAIN" lines.jsonl
    says_no "-l fast: give a number"
    call "$SCRIPT" -a joint,jointly "$TRAIN" lines.jsonl
    says_no "-a jointly: there is no such arm"
    call "$SCRIPT" missing lines.jsonl
    says_no "missing is not a program: run make first"
    call "$SCRIPT" "$TRAIN"
    says_no "usage: experiments/specialise.sh [-r RANKS]"
    needs_mpi || return
    call "$SCRIPT" -r 2 -s 1 -n 2 -a joint -p "$TINY --dim 15" "$TRAIN" lines.jsonl
    ends 1
    check "why it stopped" grep -q 'stopped: .*--dim' err
    check "left a line" test ! -s lines.jsonl
}

run_tests "$@"
