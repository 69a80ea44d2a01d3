#!/usr/bin/env bash
# Ours against PyTorch on one CPU, in one job: ours, theirs, ours, theirs, on the same cores, so that a busy or warm
# machine touches both. Prints a table with the ratio and appends every single measurement to a JSONL file.
#
#   experiments/cpu_compare.sh [-t THREADS] [-p PYTHON] [-r ROUNDS] [-m MODELS] [-v WAYS] BENCH_CPU OUT.jsonl
#
#   BENCH_CPU  our benchmark (build/bench_train, made by `make bench`): prints one JSON line per model on stdout, with
#              at least "model", "ms", "tok_s" and "commit"
#   OUT.jsonl  one line per model, side and round: what was printed, plus round, device, command, time; PyTorch's lines
#              get the commit that our program names as its own
#   -p PYTHON  a Python that has PyTorch (default: the first of python3, /usr/bin/python3 that imports it)
#   -m MODELS  comma-separated, default: cpu-default,cpu-mid,cpu-c512; others that BENCH_CPU prints are left out
#   -v WAYS    the ways of writing the experts that PyTorch may choose from (torch_cpu.py --variant), default: all
# Builds nothing. The ratio compares the better round of each side.
set -euo pipefail

here=$(cd "$(dirname "$0")" && pwd)
# shellcheck source=experiments/script_options.sh
. "$here/script_options.sh"
threads=2 python='' rounds=2 models=cpu-default,cpu-mid,cpu-c512 ways=best
read_options 't=threads p=python r=rounds m=models v=ways' 2 "$@"
bench=${arguments[0]} out=${arguments[1]}

[ -x "$bench" ] || fail "$bench is not a program: run make bench first, or give its path"
if [ -z "$python" ]; then
    for candidate in python3 /usr/bin/python3; do
        if "$candidate" -c 'import torch' 2>/dev/null; then python=$candidate; break; fi
    done
fi
[ -n "$python" ] || fail "no Python with PyTorch found: apt-get install python3-torch, or name one with -p"
"$python" -c 'import torch' || fail "$python cannot import torch: name another Python with -p"
touch "$out" 2>/dev/null || fail "cannot write $out: give a path in a folder that exists"

device=$(sed -n 's/^model name[[:space:]]*: //p' /proc/cpuinfo | head -n 1)
device=${device:-$(uname -m)}
if grep -qw avx512f /proc/cpuinfo; then device="$device, AVX-512"; fi

# One logical processor of each of the first THREADS cores we may use: two threads of one core would halve both sides.
allowed=$("$python" -c 'import os; print(" ".join(map(str, sorted(os.sched_getaffinity(0)))))')
cores=$(lscpu -p=CPU,CORE,SOCKET | awk -F, -v allowed="$allowed" -v n="$threads" '
    BEGIN { count = split(allowed, list, " "); for (i = 1; i <= count; i++) may[list[i]] = 1 }
    /^[0-9]/ && ($1 in may) && !(($2, $3) in seen) && taken < n {
        seen[$2, $3] = 1; taken++; s = s (s == "" ? "" : ",") $1
    }
    END { if (taken < n) exit 1; print s }') || fail "fewer than $threads cores here: lower -t"

# Neither side may be pinned to the kernels of another processor; both get the same number of threads.
unset OPENBLAS_CORETYPE OMP_WAIT_POLICY GOMP_SPINCOUNT GOMP_CPU_AFFINITY OMP_PROC_BIND
export OMP_NUM_THREADS=$threads

record=$(mktemp) fresh=$(mktemp) commit=unknown
trap 'rm -f "$record" "$fresh"' EXIT

# side ROUND LABEL COMMAND...: runs it on the chosen cores, keeps its JSON lines with what identifies them.
side() {
    local round=$1 label=$2 lines
    shift 2
    echo "round $round, $label: $*" >&2
    lines=$(taskset -c "$cores" "$@" | grep '^{') || fail "$label printed no result: run it alone to see why: $*"
    "$python" - "$round" "$label" "$device" "$commit" "$cores" "$*" "$lines" "$models" >"$fresh" <<'PY'
import json, sys, time
round_, label, device, commit, cores, command, lines, models = sys.argv[1:]
for line in lines.split("\n"):
    row = {"commit": commit, **json.loads(line)}
    if row.get("model") not in models.split(","):
        continue
    row.update(side=label, round=int(round_), device=device, cores=cores, command=command,
               ts=time.strftime("%Y-%m-%dT%H:%M:%SZ", time.gmtime()))
    print(json.dumps(row))
PY
    cat "$fresh" >>"$record"
    cat "$fresh" >>"$out"
}

for round in $(seq "$rounds"); do
    side "$round" ours "$bench"
    ours=$("$python" -c 'import json, sys
print(",".join(dict.fromkeys(json.loads(line)["model"] for line in sys.stdin)))' <"$fresh")
    [ -n "$ours" ] || fail "$bench printed none of the models asked for: $models"
    commit=$("$python" -c 'import json, sys; print(json.loads(sys.stdin.readline())["commit"])' <"$fresh")
    side "$round" theirs "$python" "$here/baselines/torch_cpu.py" \
        --threads "$threads" --models "$ours" --variant "$ways"
done

"$python" - "$record" "$device" "$threads" "$commit" <<'PY'
import json, sys
record, device, threads, commit = sys.argv[1:]
rows = [json.loads(line) for line in open(record)]
torch = next(row for row in rows if row["side"] == "theirs")
print("%s, %s threads, commit %s; PyTorch %s, %s" % (device, threads, commit, torch["torch"], torch["blas"]))
print("tokens/s by round, and the ratio of the better rounds")
print("%-12s %20s %20s %7s  %s" % ("model", "ours", "PyTorch", "ratio", "PyTorch's fastest way"))
for model in dict.fromkeys(row["model"] for row in rows):
    ours, theirs = ([r for r in rows if r["model"] == model and r["side"] == side] for side in ("ours", "theirs"))
    best = max(theirs, key=lambda row: row["tok_s"])
    print("%-12s %20s %20s %6.2fx  %s, threads wait %s" % (
        model, *(" ".join("%9.0f" % row["tok_s"] for row in side) for side in (ours, theirs)),
        max(row["tok_s"] for row in ours) / best["tok_s"], best["variant"], best["wait"]))
PY
