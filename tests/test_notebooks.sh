#!/usr/bin/env bash
# Tests of notebooks/ that need no Jupyter: the committed notebooks are whole (tests/check_notebooks.py), that check
# finds each thing it is for, and runs.py reads logs as they are written. That notebooks can be executed is tested by
# `make notebooks`, which .ci/run calls by itself: what it installs is ten times the rest of `make test`'s needs.
#
#     tests/test_notebooks.sh [NAME...]       from the repository's root; NAME: only the tests whose names contain it
#
# Called by run_tests.sh.
set -u
HERE=$(cd "$(dirname "$0")" && pwd)
NOTEBOOKS=$(cd "$HERE/../notebooks" && pwd)
ROOT=$(mktemp -d "${TMPDIR:-/tmp}/test_notebooks.XXXXXX")
trap 'rm -rf "$ROOT"' EXIT
export PYTHONDONTWRITEBYTECODE=1 LC_ALL=C.UTF-8

fail() {
    echo "  $*"
    failed=1
}

checker() {
    python3 "$HERE/check_notebooks.py" "$@" >out 2>&1
    status=$?
}

# A notebook of two cells, after `change`, a statement of Python on `n`.
notebook() {
    python3 - "$1" <<'PY'
import json, sys
def cell(number, output):
    return {"cell_type": "code", "execution_count": number, "id": f"c{number}", "metadata": {}, "source": ["x = 1"],
            "outputs": [{"output_type": "stream", "name": "stdout", "text": [output]}]}
n = {"cells": [cell(1, "first\n"), cell(2, "see https://example.org/usr/share and kernels/plan.h\n")], "nbformat": 4,
     "nbformat_minor": 5, "metadata": {"kernelspec": {"name": "python3"}, "language_info": {"name": "python"}}}
exec(sys.argv[1])
json.dump(n, open("made.ipynb", "w"))
PY
}

# refuses PATTERN CHANGE: the notebook with this change has a problem that matches, and only one.
refuses() {
    notebook "$2"
    checker made.ipynb
    [ "$status" = 1 ] || fail "exit status $status for: $2"
    grep -qE -- "$1" out || fail "nothing said '$1' for: $2: $(head -n 2 out)"
    [ "$(wc -l <out)" = 1 ] || fail "not one line for: $2: $(cat out)"
}

test_committed_notebooks_are_whole() {
    checker "$NOTEBOOKS"/*.ipynb
    [ "$status" = 0 ] || fail "$(cat out)"
    [ "$(ls "$NOTEBOOKS"/*.ipynb | wc -l)" -ge 7 ] || fail "notebooks are missing"
    for file in "$NOTEBOOKS"/*.ipynb; do
        grep -qF "$(basename "$file")" "$NOTEBOOKS/README.md" || fail "README.md does not name $(basename "$file")"
    done
}

test_check_passes_what_is_right() {
    notebook pass
    checker made.ipynb
    [ "$status" = 0 ] && [ ! -s out ] || fail "exit status $status: $(cat out)"
}

test_check_finds_each_problem() {
    refuses 'ended with ValueError: no' \
        'n["cells"][0]["outputs"] = [{"output_type": "error", "ename": "ValueError", "evalue": "no", "traceback": []}]'
    refuses 'code cell 2 is numbered 1' 'n["cells"][1]["execution_count"] = 1'
    refuses 'code cell 1 is numbered None' 'n["cells"][0]["execution_count"] = None'
    refuses 'printed /home/me' 'n["cells"][1]["outputs"][0]["text"] = ["in /home/me/moelab/train\n"]'
    refuses 'names /root/x' 'n["cells"][1]["source"] = ["open(\"/root/x\")"]'
    refuses 'output of 2[0-9]* bytes' 'n["cells"][0]["outputs"][0]["text"] = ["x" * 250000]'
    refuses 'the file has' 'n["cells"][0]["source"] = ["x" * 800000]'
    refuses 'kernel is not python3' 'n["metadata"]["kernelspec"]["name"] = "julia"'
    refuses 'version of Python' 'n["metadata"]["language_info"]["version"] = "3.9"'
    refuses 'wrote to stderr' 'n["cells"][0]["outputs"][0]["name"] = "stderr"'
    refuses 'has metadata' 'n["cells"][0]["metadata"] = {"execution": {"iopub.execute_input": "2026-01-01"}}'
    refuses 'no code cells' 'n["cells"] = []'
    echo '{"cells": [' >made.ipynb
    checker made.ipynb
    [ "$status" = 1 ] && grep -q 'cannot be read' out || fail "half a file: exit status $status, $(cat out)"
}

test_tidy_strips_and_keeps() {
    notebook 'n["metadata"]["language_info"]["version"] = "3.9"; n["cells"][0]["metadata"] = {"execution": {}}'
    checker --tidy made.ipynb
    [ "$status" = 0 ] || fail "exit status $status: $(cat out)"
    grep -q 'first' made.ipynb || fail "an output is gone"
    notebook 'n["cells"][1]["execution_count"] = 7'
    checker --tidy made.ipynb
    [ "$status" = 1 ] || fail "--tidy made a wrong order right"
}

# Without NumPy there is a line; with it runs.py reads what ./train writes.
test_runs_reads_a_log() {
    python=
    for candidate in python3 /usr/bin/python3; do
        ! "$candidate" -c 'import numpy' 2>/dev/null || { python=$candidate; break; }
    done
    [ -n "$python" ] || { echo "  skip  no NumPy here"; return; }
    mkdir run
    cat >run/log.jsonl <<'LOG'
{"ts":"2026-01-01T00:00:00Z","git_sha":"abc","git_dirty":true,"device":"D","config":{"router":"topk"}}
{"event":"memory","weights":1}
{"step":0,"tokens":0,"val_loss":5.5}
{"step":10,"tokens":100,"loss":2.5,"mfu":null,"counts":[[3,1],[2,2]]}
LOG
    PYTHONPATH=$NOTEBOOKS "$python" - >out 2>&1 <<'PY' || fail "$(tail -n 2 out)"
import os, numpy as np, runs
r = runs.Run("run")
assert (len(r.steps), len(r.evaluations), len(r.events)) == (1, 1, 1)
assert r.counts(1).tolist() == [[2, 2]] and np.isnan(r.column("mfu")[0]) and r.column("loss")[0] == 2.5
assert r.source() == "D, commit abc-dirty" and r.event("memory")["weights"] == 1 and r.event("end") is None
os.environ["NOTEBOOK_STEPS"] = "7"
assert runs.steps(600) == 7 and runs.steps(3) == 3
open("run/log.jsonl", "a").write("{half\n")
try:
    runs.Run("run")
    raise AssertionError("half a line was read")
except runs.ProgramFailed as error:
    assert "line 5" in str(error)
try:
    runs.program("./no_such_program --x")
    raise AssertionError("a missing program was started")
except runs.ProgramFailed as error:
    assert "make" in str(error)
PY
}

passed=0
all_failed=0
for test in $(declare -F | sed -n 's/^declare -f \(test_[a-z0-9_]*\)$/\1/p'); do
    wanted=$([ $# = 0 ] && echo 1)
    for name in "$@"; do
        [[ $test != *"$name"* ]] || wanted=1
    done
    [ -n "$wanted" ] || continue
    mkdir "$ROOT/$test"
    if (cd "$ROOT/$test" && failed=0 && "$test" && [ "$failed" = 0 ]); then
        echo "ok    ${test#test_}"
        passed=$((passed + 1))
    else
        echo "FAIL  ${test#test_}"
        all_failed=$((all_failed + 1))
    fi
done
echo "$passed passed, $all_failed failed"
[ "$all_failed" = 0 ]
