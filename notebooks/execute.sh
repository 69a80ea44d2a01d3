#!/usr/bin/env bash
# Executes the notebooks, two at once, each in a fresh kernel; one that raises has failed. `make notebooks` calls it,
# after it has built what they start.
#
#     notebooks/execute.sh [-o FOLDER] [NAME...]      NAME: only notebooks whose names contain it
#
#   -o               write the executed copies there and leave the notebooks as they are; without it they are executed
#                    into place. What differs from machine to machine is stripped (tests/check_notebooks.py --tidy)
#   NOTEBOOK_STEPS   in the environment: the most training steps of a run, for a quick look (runs.py)
#
# Needs a Python with NumPy, Matplotlib, nbconvert and ipykernel: the python3 of PATH or that of the distribution. One
# line per notebook, its error below when it has failed; the last line is "N passed, N failed".
set -uo pipefail
here=$(cd "$(dirname "$0")" && pwd)
jobs=2

# One notebook: $1 the Python, $2 the folder for the result or nothing, $3 the file.
if [ "${1:-}" = --one ]; then
    name=$(basename "$4" .ipynb)
    log=$(mktemp)
    trap 'rm -f "$log"' EXIT
    begin=$SECONDS
    to=(--inplace)
    [ -z "$3" ] || to=(--output-dir "$3")
    export PYTHONDONTWRITEBYTECODE=1 PYDEVD_DISABLE_FILE_VALIDATION=1
    if "$2" -m nbconvert --log-level=ERROR --to notebook --execute "${to[@]}" --ExecutePreprocessor.timeout=600 \
        --ExecutePreprocessor.record_timing=False "$4" >"$log" 2>&1 &&
        "$2" "$here/../tests/check_notebooks.py" --tidy "${3:-$here}/$name.ipynb" >>"$log" 2>&1; then
        echo "ok    $name: $((SECONDS - begin)) s"
    else
        echo "FAIL  $name"
        grep -v 'frozen_modules\|frozen modules\|make the debugger\|to python to disable\|Debugging will' "$log" |
            sed 's/\x1b\[[0-9;]*m//g' | tail -n 25 | sed 's/^/      | /'
    fi
    exit
fi

out=
if [ "${1:-}" = -o ]; then
    [ -n "${2:-}" ] || { echo "execute.sh: -o needs a folder" >&2; exit 1; }
    mkdir -p "$2" && out=$(cd "$2" && pwd) || exit 1
    shift 2
fi
python=
for candidate in python3 /usr/bin/python3; do
    if "$candidate" -c 'import numpy, matplotlib, nbconvert, ipykernel' 2>/dev/null; then
        python=$candidate
        break
    fi
done
if [ -z "$python" ]; then
    echo "execute.sh: no Python with NumPy, Matplotlib, nbconvert and ipykernel here: run make notebooks, or sudo" \
        "apt-get install python3-numpy python3-matplotlib jupyter-nbconvert python3-ipykernel" >&2
    exit 1
fi
files=()
for file in "$here"/[0-9]*.ipynb; do
    wanted=$([ $# = 0 ] && echo 1)
    for name in "$@"; do
        [[ $(basename "$file") != *"$name"* ]] || wanted=1
    done
    [ -z "$wanted" ] || files+=("$file")
done
[ ${#files[@]} -gt 0 ] || { echo "execute.sh: no notebook has a name like that: $*" >&2; exit 1; }

results=$(mktemp)
trap 'rm -f "$results"' EXIT
printf '%s\n' "${files[@]}" | xargs -P "$jobs" -I{} "$0" --one "$python" "$out" {} | tee "$results"
passed=$(grep -c '^ok ' "$results")
failed=$((${#files[@]} - passed))
echo "$passed passed, $failed failed"
[ "$failed" = 0 ]
