#!/usr/bin/env bash
# The exchange between ranks, ours against PyTorch's, in one job on the same GPUs: dispatch to experts and combine, T
# tokens on every rank. Prints a table of the best way of each side and appends every line to a JSONL file.
#
#   experiments/alltoall_compare.sh [-n RANKS] [-x SHAPES] [-v VERSIONS] [-r REPEATS] [-s SECONDS] [-p PYTHON] PROG OUT
#
#   PROG         bench_alltoall_cuda (make build/bench_alltoall_cuda), or bench_alltoall
#   OUT          JSONL: what was printed, plus command and time; PyTorch's lines get the commit of ours
#   -n RANKS     default: as many as there are GPUs
#   -x SHAPES    space-separated names and E,k,H,T; default: b1 to b5 and the training shapes
#   -v VERSIONS  the ways that PyTorch may choose from; default: sorted,gather,gather+compile,graphs,graphs+compile
#   -r REPEATS   of each timing, default 100; -s SECONDS: at most, default 10
# Ours a process for each shape, PyTorch one for all; without it, or without a GPU, ours alone. What fails leaves the
# rest as it is; the table says what is missing. MPIRUN starts the ranks, default: mpirun. Builds nothing.
set -euo pipefail

here=$(cd "$(dirname "$0")" && pwd)
# shellcheck source=experiments/script_options.sh
. "$here/script_options.sh"
shapes='b1 b2 b3 b4 b5 train-1024 train-2048 train-768'
versions=sorted,gather,gather+compile,graphs,graphs+compile
ranks='' repeats=100 seconds=10 python=python3
read_options 'n=ranks x=shapes v=versions r=repeats s=seconds p=python' 2 "$@"
program=${arguments[0]} out=${arguments[1]}
# shellcheck source=experiments/keep_lines.sh
. "$here/keep_lines.sh"
if [ -z "$ranks" ]; then ranks=$(nvidia-smi --list-gpus 2>/dev/null | wc -l) || ranks=0; fi
if ! [ "$ranks" -ge 1 ]; then fail "no GPU is here: give the number of ranks, -n"; fi

# The words that ask either side for a shape.
words() { case $1 in *,*) echo "--shape $1" ;; *) echo "$1" ;; esac; }

read -ra mpirun <<<"${MPIRUN:-mpirun --bind-to none}"
if [ "$(id -u)" = 0 ]; then export OMPI_ALLOW_RUN_AS_ROOT=1 OMPI_ALLOW_RUN_AS_ROOT_CONFIRM=1; fi
mpirun+=(-n "$ranks")
common=(--full-tokens --repeats "$repeats" --seconds "$seconds")
asked=()
for shape in $shapes; do
    read -ra one <<<"$(words "$shape")"
    asked+=("${one[@]}")
    keep "${mpirun[@]}" "$program" "${one[@]}" "${common[@]}"
done
if "$python" -c 'import sys, torch; sys.exit(not torch.cuda.is_available())' 2>/dev/null; then
    keep "${mpirun[@]}" "$python" "$here/baselines/torch_alltoall.py" "${asked[@]}" --versions "$versions" --check \
        "${common[@]}"
else
    echo "alltoall_compare.sh: no PyTorch that finds a GPU: ours alone" >&2
fi

# shellcheck disable=SC2086  # words
"$python" - "$lines" $shapes <<'PYTHON'
import json, sys
rows = [json.loads(line) for line in open(sys.argv[1])]

def best(shape, impl):
    ways = [r for r in rows if r["shape"] == shape and r["impl"] == impl and r["version"] != "empty"]
    return min(ways, key=lambda r: r["us_p50"], default=None)

print("%-20s %10s %10s %7s %10s  %s" % ("", "ours us", "torch us", "ratio", "plain us", "best ways"))
for shape in sys.argv[2:]:
    ours, theirs = best(shape, "moelab"), best(shape, "torch")
    print("%-20s %10s %10s %7s %10s  %s" % (
          shape, *("%.1f" % side["us_p50"] if side else "missing" for side in (ours, theirs)),
          "%.2fx" % (theirs["us_p50"] / ours["us_p50"]) if ours and theirs else "",
          "%.1f" % ours["plain_us_p50"] if ours else "", "; ".join(s["version"] for s in (ours, theirs) if s)))
PYTHON
