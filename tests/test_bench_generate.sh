#!/usr/bin/env bash
# Tests of experiments/bench_generate.c: its lines, fresh weights and those of a run, and that a text does not depend on
# how many are written beside it or on how its prompt is read.
#
#     tests/test_bench_generate.sh [NAME...]   from the repository's root; NAME: only the tests whose names contain it
#
# Called by run_tests.sh. Read next: cli_checks.sh, tests/test_generate.c.
# shellcheck source=tests/cli_checks.sh
. "$(dirname "$0")/cli_checks.sh"

PROGRAM=$PWD/build/bench_generate
SMALL=(--model cpu-default --layers 2 --dim 32 --heads 2 --expert-dim 16 --seq 24)

# generate OPTION...: its lines are added to `out`.
generate() {
    timeout 60 "$PROGRAM" "$@" >>out 2>err
    status=$?
    check "exit status $status: $(cat err)" test $status = 0
}

# lines COUNT: so many lines; the program on standard input, in Python, says what holds for all of them, `lines`.
lines() {
    check "$1 lines: $(head -c 300 out)" python3 -c '
import json, sys
lines = [json.loads(text) for text in open("out")]
assert len(lines) == int(sys.argv[1]), len(lines)
exec(sys.stdin.read())' "$1"
}

test_lines() {
    generate "${SMALL[@]}" --batches 1,2,5 --prompt 7 --new 6 --repeats 2 --sequences 11
    lines 3 <<'PYTHON'
from math import ceil, isclose
assert [line["batch"] for line in lines] == [1, 2, 5] and len({line["text"] for line in lines}) == 1
for line in lines:
    first, token, eta = line["first_ms"], line["token_ms"], line["eta"]
    assert line["kind"] == "inference" and line["weights"] == "fresh" and line["at_once"] and not line["sees_batch"]
    assert first["count"] == 2 and token["count"] == 2 * 5 and 0 < token["p50"] <= token["p95"]
    assert isclose(line["prompt_tok_s"], 1e3 * line["batch"] * 7 / first["avg"], rel_tol=1e-3)
    assert isclose(line["tok_s"], 1e3 * line["batch"] / token["avg"], rel_tol=1e-3)
    assert 0 < line["draw_ms"] < token["avg"] + first["avg"] and line["waits_per_token"] == 0
    seconds = eta["fixed_s"] + ceil(11 / line["batch"]) * (first["avg"] + 5 * token["avg"]) / 1e3
    assert isclose(eta["seconds"], seconds, rel_tol=1e-3) and eta["sequences"] == 11
    assert line["memory_mib"]["gradients"] == 0 < line["memory_mib"]["weights"] < line["peak_mib"]
    assert isclose(line["memory_mib"]["cache"], line["batch"] * 2 * 2 * 24 * 32 * 4 / 2**20, abs_tol=2e-3)
    assert line["commit"] and line["device"] and line["ts"] and line["versions"]
PYTHON
    check "no estimate for each batch: $(cat err)" test "$(grep -c '^eta: 11 texts of 7 + 6 tokens, ' err)" = 3
}

# One text: at once or token by token, alone or beside others, greedy or drawn, of a run or of its export.
test_same_text() {
    run --steps 4 --layers 2 --dim 32 --heads 2 --seq 24 --expert-dim 16 --export-hf hf
    succeeds
    rm out
    for at_once in 1 0; do
        for model in run hf; do
            generate --checkpoint $model --batches 1,4 --at-once $at_once --temperature 1 --repeats 1 --new 10
        done
    done
    generate --checkpoint run --batches 3 --repeats 1 --new 10 --seed 4 --temperature 1
    lines 9 <<'PYTHON'
assert len({line["text"] for line in lines[:8]}) == 1 and lines[8]["text"] != lines[0]["text"]
assert [line["at_once"] for line in lines[:8]] == [True] * 4 + [False] * 4
assert all(line["weights"] == "trained" and line["prompt"] == 12 for line in lines)
PYTHON
}

test_refusals() {
    local wrong=('--model nothing' '--batches 0' '--batches ,' '--batches 1,x' '--batches 999' '--prompt 25'
                 '--prompt 20 --new 9' '--repeats 0' '--temperature -1' '--new' '--checkpoint nowhere'
                 '--objective mlm' '--no-such-option 1')
    for arguments in "${wrong[@]}"; do
        local words=("${SMALL[@]}")
        [[ $arguments != *--checkpoint* && $arguments != *--model* ]] || words=()
        # shellcheck disable=SC2086  # words
        timeout 20 "$PROGRAM" "${words[@]}" $arguments >out 2>err
        status=$?
        refused "${arguments%% *}"
        check "$arguments: printed something" test ! -s out
    done
}

run_tests "$@"
