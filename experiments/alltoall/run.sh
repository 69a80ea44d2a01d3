#!/bin/bash
# Builds the levels of the exchange, runs them under mpirun, a rank to a GPU, and prints what they reach.
#
#     experiments/alltoall/run.sh                        all levels on 1, 2 and 4 ranks, all shapes
#     experiments/alltoall/run.sh "2 4" "6 7" "b1 t2"    these numbers of ranks, levels, shapes
#
# Numbers of ranks above that of GPUs are left out. The results' lines, one JSON object each with the command and the
# date, are appended to experiments/results/alltoall_ladder.jsonl, and table.py prints those of this run. A copy of the
# tree without git runs the programs that it finds, so that they name the commit they were built from.
# shellcheck disable=SC2086  # lists of words are meant to be split
set -e
command="experiments/alltoall/run.sh${1:+ \"$1\"}${2:+ \"$2\"}${3:+ \"$3\"}"
ranks=${1:-1 2 4} levels=${2:-0 1 2 3 4 5 6 7 8} shapes=$3
cd "$(dirname "$0")/../.."
out=build/alltoall
results=experiments/results/alltoall_ladder.jsonl
seconds=900 # for one program
export OMPI_ALLOW_RUN_AS_ROOT=1 OMPI_ALLOW_RUN_AS_ROOT_CONFIRM=1
export OMPI_MCA_rmaps_base_oversubscribe=1 OMPI_MCA_hwloc_base_binding_policy=none
if [ -e .git ] || [ ! -d $out ]; then make -j"$(nproc)" alltoall >&2; fi

gpus=$(nvidia-smi -L 2>/dev/null | grep -c ^GPU || true)
lines=$(mktemp) failed=()
trap 'rm -f "$lines"' EXIT
for n in $ranks; do
    if [ "$n" -gt "$gpus" ]; then
        echo "left out: $n ranks, there are $gpus GPUs" >&2
        continue
    fi
    for level in $levels; do
        program=$out/$(basename experiments/alltoall/level_"$level"_*.cu .cu)
        timeout $seconds mpirun -n "$n" "$program" $shapes >>"$lines" </dev/null ||
            failed+=("level $level on $n ranks")
    done
done
[ -s "$lines" ] || { echo "no results${failed[*]:+; failed: ${failed[*]}}" >&2; exit 1; }
python3 - "$lines" "$results" "$command" <<'PY'
import datetime
import json
import sys

lines = [json.loads(line) for line in open(sys.argv[1]) if line.startswith("{")]
with open(sys.argv[2], "a") as results:
    for line in lines:
        date = datetime.date.today().isoformat()
        results.write(json.dumps({**line, "command": sys.argv[3], "date": date}) + "\n")
PY
python3 experiments/alltoall/table.py "$lines"
[ ${#failed[@]} -eq 0 ] || { printf 'failed, or a result is wrong: %s\n' "${failed[@]}" >&2; exit 1; }
