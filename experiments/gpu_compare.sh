#!/usr/bin/env bash
# Ours against PyTorch on one GPU, in one job: MoE layers, training steps, dispatch + combine. Prints a table with the
# ratio to the best way that PyTorch has and appends every measurement to a JSONL file.
#
#   experiments/gpu_compare.sh [-l LAYERS] [-m MODELS] [-d SHAPES] [-w WAYS] [-k WEIGHTS] [-s LIMIT] [-p PYTHON] DIR OUT
#
#   DIR        where bench_layer_cuda and bench_train_cuda are (make build/bench_layer_cuda build/bench_train_cuda)
#   OUT        JSONL: one line per measurement: what was printed, plus command and time; PyTorch's lines get the commit
#              that our program, which ran just before, names as its own
#   -l LAYERS  comma-separated names of torch_gpu.py's layer configurations, "none": no layers; default: all
#   -m MODELS  .. of its models; default: d12,d12-fine,tiny,tiny-byte,d12-dense
#   -d SHAPES  space-separated tokens,width,experts,k of dispatch + combine; "none": none
#   -w WAYS    the ways PyTorch may choose from, default: grouped+compile,grouped+graphs
#   -k WEIGHTS how it keeps the weights of training steps: rounded, copies (torch_gpu.py), default: both
#   -s LIMIT   seconds after which nothing further of PyTorch is begun; what runs is finished; default: none
# Layers, then shapes, then models: ours a process for each, PyTorch one for all of a kind, since it takes seconds to
# start. What fails or is not begun leaves the rest as it is; the table says what is missing.
# Builds nothing.
set -euo pipefail

here=$(cd "$(dirname "$0")" && pwd)
# shellcheck source=experiments/script_options.sh
. "$here/script_options.sh"
layers=course-mid,course-big,course-top1,olmoe,fine,tiny
models=d12,d12-fine,tiny,tiny-byte,d12-dense
shapes='16384,4096,128,2 32768,2048,64,8'
ways=grouped+compile,grouped+graphs weights=rounded,copies python=python3 limit=
read_options 'l=layers m=models d=shapes w=ways k=weights s=limit p=python' 2 "$@"
if [[ ! $limit =~ ^[0-9]*$ ]]; then fail "-s $limit: give whole seconds"; fi
dir=${arguments[0]} out=${arguments[1]}
# shellcheck source=experiments/keep_lines.sh
. "$here/keep_lines.sh"

# peer KIND KEY OPTION... -- NAME...: PyTorch on all names, whose lines have the name under KEY. Where one of them ends
# the process or spoils it for those behind, these get another.
peer() {
    local kind=$1 key=$2 options=() missing
    shift 2
    while [ "$1" != -- ]; do options+=("$1"); shift; done
    shift
    while [ $# != 0 ]; do
        local seconds=()
        if [ -n "$limit" ]; then
            if [ "$SECONDS" -ge "$limit" ]; then echo "gpu_compare.sh: $limit s are over: not begun: $*" >&2; return; fi
            seconds=(--seconds $((limit - SECONDS)))
        fi
        keep "$python" "$here/baselines/torch_gpu.py" "$kind" "$@" "${options[@]}" "${seconds[@]}"
        missing=()
        for name; do
            grep -qF "\"$key\": \"$name\", \"impl\": \"torch\"" "$lines" || missing+=("$name")
        done
        set -- "${missing[@]:1}"
    done
}

# names LIST: its words; none for "none".
names() { if [ "$1" != none ]; then echo "${1//,/ }"; fi; }

read -ra layers <<<"$(names "$layers")"
read -ra models <<<"$(names "$models")"
if [ "$shapes" = none ]; then shapes=; fi
read -ra shapes <<<"$shapes"
for layer in "${layers[@]}"; do keep "$dir/bench_layer_cuda" --config "$layer"; done
peer layer layer --ways "$ways" -- "${layers[@]}"
for shape in "${shapes[@]}"; do keep "$dir/bench_layer_cuda" --dispatch "$shape"; done
peer dispatch dispatch -- "${shapes[@]}"
for model in "${models[@]}"; do keep "$dir/bench_train_cuda" --model "$model"; done
peer train model --ways "$ways" --weights "$weights" -- "${models[@]}"

"$python" - "$lines" "${layers[@]/#/layer }" "${shapes[@]/#/dispatch }" "${models[@]/#/model }" <<'PYTHON'
import json, sys
rows = [json.loads(line) for line in open(sys.argv[1])]
print("%-22s %10s %10s %7s  %9s %9s  %s" % ("", "ours ms", "torch ms", "ratio", "our MiB", "their MiB",
                                                     "its way; ours"))
for kind, name in (asked.split(" ") for asked in sys.argv[2:]):
    ours = [r for r in rows if r.get(kind) == name and r["impl"] == "moelab"]
    theirs = [r for r in rows if r.get(kind) == name and r["impl"] == "torch"]
    if not ours or not theirs:
        print("%-22s %10s %10s" % (name, *("%.3f" % min(r["ms"] for r in side) if side else "missing"
                                           for side in (ours, theirs))))
        continue
    best, our = min(theirs, key=lambda r: r["ms"]), ours[0]
    more = {"layer": "%.0f TFLOP/s" % our.get("tflops", 0), "model": "%.0f tokens/s" % our.get("tok_s", 0),
            "dispatch": "%.0f GB/s, %.0f %% of copy, plan %.3f ms" % (our.get("gb_s", 0),
            100 * our.get("share_of_copy", 0), our.get("plan_ms", 0))}[kind]
    print("%-22s %10.3f %10.3f %6.2fx  %9s %9s  %s; %s" % (
          name, our["ms"], best["ms"], best["ms"] / our["ms"], our.get("peak_mib", ""),
          best["peak_mib"], best["way"], more))
PYTHON
