#!/usr/bin/env bash
# Training steps on 1, 2, 4 .. GPUs, ours against PyTorch's DistributedDataParallel, in one job. Prints a table and
# appends every measurement to a JSONL file.
#
#   experiments/scaling_compare.sh [-m MODELS] [-n RANKS] [-r STEPS] [-o OPTIONS] [-w WAYS] [-k WEIGHTS] [-b BUCKETS]
#                                  [-s LIMIT] [-p PYTHON] DIR OUT
#
#   DIR         where bench_train_cuda is (make build/bench_train_cuda)
#   OUT         JSONL: what was printed, plus command and time; PyTorch's lines get the commit of ours
#   -m MODELS   comma-separated, default: d12,d12-fine
#   -n RANKS    space-separated numbers of ranks, default: "1 2 4" and so on, as far as there are GPUs
#   -r STEPS    that are timed, of either side, default: 20
#   -o OPTIONS  of ours, space-separated, as ./train has them, such as "--exchange p2p"; default: none
#   -w WAYS     the ways PyTorch may choose from, default: grouped+compile,grouped+blocks
#   -k WEIGHTS  how it keeps the weights: rounded, copies (torch_gpu.py), default: both
#   -b BUCKETS  MiB of gradients that it averages at once, default: 25
#   -s LIMIT    seconds after which nothing further is begun; what runs is finished; default: none
# Ours for each model and number of ranks n with experts held by every --ep that divides n, each rank with the model's
# batch (weak), and with --ep n also on ranks that share it (strong); a process each. PyTorch in both modes: a start on
# each number of ranks, since that takes long. What fails or is not begun leaves the rest as it is; the table says what
# is missing. Efficiency: tokens/s, of n times those of one rank. exchange: all that travels between ranks, ms of one
# step timed stage by stage, on the rank that waits least for others. MPIRUN starts the ranks, default:
# mpirun --bind-to none. Builds nothing.
set -euo pipefail

here=$(cd "$(dirname "$0")" && pwd)
# shellcheck source=experiments/script_options.sh
. "$here/script_options.sh"
models=d12,d12-fine counts='' steps=20 ways=grouped+compile,grouped+blocks weights=rounded,copies buckets=25
limit='' python=python3 options=''
read_options 'm=models n=counts r=steps o=options w=ways k=weights b=buckets s=limit p=python' 2 "$@"
if [[ ! $limit =~ ^[0-9]*$ ]]; then fail "-s $limit: give whole seconds"; fi
dir=${arguments[0]} out=${arguments[1]}
# shellcheck source=experiments/keep_lines.sh
. "$here/keep_lines.sh"
if [ -z "$counts" ]; then
    gpus=$(nvidia-smi --list-gpus 2>/dev/null | wc -l) || gpus=0
    for ((n = 1; n <= gpus; n *= 2)); do counts+=" $n"; done
fi
read -ra counts <<<"$counts"
read -ra models <<<"${models//,/ }"
read -ra options <<<"$options"
if [ ${#counts[@]} = 0 ]; then fail "no GPU is here: give numbers of ranks, -n"; fi
for n in "${counts[@]}"; do
    if [[ ! $n =~ ^[1-9][0-9]*$ ]]; then fail "-n $n: give numbers of ranks"; fi
done

read -ra mpirun <<<"${MPIRUN:-mpirun --bind-to none}"
if [ "$(id -u)" = 0 ]; then export OMPI_ALLOW_RUN_AS_ROOT=1 OMPI_ALLOW_RUN_AS_ROOT_CONFIRM=1; fi

# begins WHAT..: whether there is time for it.
begins() {
    if [ -n "$limit" ] && [ "$SECONDS" -ge "$limit" ]; then
        echo "scaling_compare.sh: $limit s are over: not begun: $*" >&2
        return 1
    fi
}

# ours MODEL RANKS EP OPTION..
ours() {
    if begins "ours, $1, $2 ranks, ep $3 ${*:4}"; then
        keep "${mpirun[@]}" -n "$2" "$dir/bench_train_cuda" --model "$1" --steps "$steps" --ep "$3" \
            "${options[@]}" "${@:4}"
    fi
}

# peer RANKS MODEL..: PyTorch on all of them. Where one ends the ranks, those behind it get others.
peer() {
    local n=$1 seconds=() missing
    shift
    while [ $# != 0 ] && begins "PyTorch, $*, $n ranks"; do
        if [ -n "$limit" ]; then seconds=(--seconds $((limit - SECONDS))); fi
        keep "${mpirun[@]}" -n "$n" "$python" "$here/baselines/torch_gpu.py" train "$@" --ways "$ways" \
            --weights "$weights" --modes weak,strong --buckets "$buckets" --repeats "$steps" "${seconds[@]}"
        missing=()
        for model; do
            grep -F "\"model\": \"$model\", \"impl\": \"torch\"" "$lines" | grep -qF "\"ranks\": $n," ||
                missing+=("$model")
        done
        set -- "${missing[@]:1}"
    done
}

for model in "${models[@]}"; do
    for n in "${counts[@]}"; do
        for ((ep = 1; ep <= n; ep++)); do
            if [ $((n % ep)) = 0 ]; then ours "$model" "$n" "$ep"; fi
        done
        if [ "$n" -gt 1 ]; then ours "$model" "$n" "$n" --strong 1; fi
    done
done
if "$python" -c 'import sys, torch; sys.exit(not torch.cuda.is_available())' 2>/dev/null; then
    for n in "${counts[@]}"; do peer "$n" "${models[@]}"; done
else
    echo "scaling_compare.sh: no PyTorch that finds a GPU: ours alone" >&2
fi

"$python" - "$lines" "${models[*]}" "${counts[*]}" <<'PYTHON'
import json, sys
rows = [json.loads(line) for line in open(sys.argv[1])]

def best(**wanted):
    fitting = [row for row in rows if all(row.get(key) == value for key, value in wanted.items())]
    return max(fitting, key=lambda row: row["tok_s"], default=None)

def figures(row):
    """Tokens/s and efficiency, as the table has them."""
    if not row:
        return "missing", ""
    one = best(model=row["model"], impl=row["impl"], ranks=1)
    return "%.0f" % row["tok_s"], "%.1f %%" % (100 * row["tok_s"] / (row["ranks"] * one["tok_s"])) if one else ""

layout = "%-12s %5s %3s %-6s %10s %8s %11s %10s %8s %6s  %s"
print((layout % ("", "ranks", "ep", "mode", "tokens/s", "effic.", "exchange ms", "PyTorch's", "effic.", "ratio",
                 "its way")).rstrip())
for model in sys.argv[2].split():
    for n in map(int, sys.argv[3].split()):
        for ep, mode in [(ep, "weak") for ep in range(1, n + 1) if n % ep == 0] + [(n, "strong")] * (n > 1):
            ours = best(model=model, impl="moelab", ranks=n, ep=ep, mode=mode)
            theirs = best(model=model, impl="torch", ranks=n, mode=mode)
            exchange = min(ours.get("exchange_ms", [ours["stages_ms"].get("exchange")])) if ours else None
            print((layout % (model, n, ep, mode, *figures(ours), "" if exchange is None else "%.2f" % exchange,
                             *figures(theirs), "%.2fx" % (ours["tok_s"] / theirs["tok_s"]) if ours and theirs else "",
                             theirs["way"] if theirs else "")).rstrip())
PYTHON
