#!/usr/bin/env bash
# Ours against PyTorch on one GPU, in one job: MoE layers, training steps, dispatch + combine. Prints a table with the
# ratio to the best way that PyTorch has and appends every measurement to a JSONL file.
#
#   experiments/gpu_compare.sh [-l LAYERS] [-m MODELS] [-d SHAPES] [-w WAYS] [-k WEIGHTS] [-p PYTHON] DIR OUT
#
#   DIR        where bench_layer_cuda and bench_train_cuda are (make build/bench_layer_cuda build/bench_train_cuda)
#   OUT        JSONL: one line per measurement: what was printed, plus command and time; PyTorch's lines get the commit
#              that our program, which ran just before, names as its own
#   -l LAYERS  comma-separated names of torch_gpu.py's layer configurations, "none": no layers; default: all
#   -m MODELS  .. of its models; default: d12,d12-fine,tiny,tiny-byte,d12-dense
#   -d SHAPES  space-separated tokens,width,experts,k of dispatch + combine; "none": none
#   -w WAYS    the ways PyTorch may choose from, default: grouped+compile,grouped+graphs
#   -k WEIGHTS how it keeps the weights of training steps: rounded, copies (torch_gpu.py), default: both
# Builds nothing.
set -euo pipefail

here=$(cd "$(dirname "$0")" && pwd)
layers=course-mid,course-big,course-top1,olmoe,fine,tiny
models=d12,d12-fine,tiny,tiny-byte,d12-dense
shapes='16384,4096,128,2 32768,2048,64,8'
ways=grouped+compile,grouped+graphs weights=rounded,copies python=python3
while getopts 'l:m:d:w:k:p:' option; do
    case $option in
        l) layers=$OPTARG ;;
        m) models=$OPTARG ;;
        d) shapes=$OPTARG ;;
        w) ways=$OPTARG ;;
        k) weights=$OPTARG ;;
        p) python=$OPTARG ;;
        *) sed -n '5p' "$0" | sed 's/^#  */usage: /' >&2; exit 1 ;;
    esac
done
shift $((OPTIND - 1))
if [ $# != 2 ]; then sed -n '5p' "$0" | sed 's/^#  */usage: /' >&2; exit 1; fi
dir=$1 out=$2 commit=unknown
lines=$(mktemp)
trap 'rm -f "$lines"' EXIT

# Runs a command and keeps the JSON lines that it prints.
keep() {
    echo "+ $*" >&2
    "$@" | grep '^{' | COMMAND="$*" COMMIT=$commit "$python" -c '
import json, os, sys, time
for line in sys.stdin:
    print(json.dumps({"commit": os.environ["COMMIT"], **json.loads(line), "command": os.environ["COMMAND"],
                      "time": time.strftime("%Y-%m-%dT%H:%M:%SZ", time.gmtime())}))' | tee -a "$out" >>"$lines" ||
        echo "gpu_compare.sh: failed: $*" >&2
    commit=$(tail -n 1 "$lines" | sed -n 's/.*"commit": "\([^"]*\)".*/\1/p')
    commit=${commit:-unknown}
}

for layer in ${layers//,/ }; do
    [ "$layer" = none ] && continue
    keep "$dir/bench_layer_cuda" --config "$layer"
    keep "$python" "$here/baselines/torch_gpu.py" layer "$layer" --ways "$ways"
done
for shape in $shapes; do
    [ "$shape" = none ] && continue
    keep "$dir/bench_layer_cuda" --dispatch "$shape"
    keep "$python" "$here/baselines/torch_gpu.py" dispatch "$shape"
done
for model in ${models//,/ }; do
    [ "$model" = none ] && continue
    keep "$dir/bench_train_cuda" --model "$model"
    keep "$python" "$here/baselines/torch_gpu.py" train "$model" --ways "$ways" --weights "$weights"
done

"$python" - "$lines" <<'PYTHON'
import json, sys
rows = [json.loads(line) for line in open(sys.argv[1])]
print("%-22s %10s %10s %7s  %9s %9s  %s" % ("", "ours ms", "torch ms", "ratio", "our MiB", "their MiB",
                                                     "its way; ours"))
names = []
for row in rows:
    kind = next(k for k in ("layer", "dispatch", "model") if k in row)
    if (kind, row[kind]) not in names:
        names.append((kind, row[kind]))
for kind, name in names:
    ours = [r for r in rows if r.get(kind) == name and r["impl"] == "moelab"]
    theirs = [r for r in rows if r.get(kind) == name and r["impl"] == "torch"]
    if not ours or not theirs:
        print("%-22s one side is missing" % name)
        continue
    best, our = min(theirs, key=lambda r: r["ms"]), ours[0]
    more = {"layer": "%.0f TFLOP/s" % our.get("tflops", 0), "model": "%.0f tokens/s" % our.get("tok_s", 0),
            "dispatch": "%.0f GB/s, %.0f %% of copy, plan %.3f ms" % (our.get("gb_s", 0),
            100 * our.get("share_of_copy", 0), our.get("plan_ms", 0))}[kind]
    print("%-22s %10.3f %10.3f %6.2fx  %9s %9s  %s; %s" % (
          name, our["ms"], best["ms"], best["ms"] / our["ms"], our.get("peak_mib", ""),
          best["peak_mib"], best["way"], more))
PYTHON
