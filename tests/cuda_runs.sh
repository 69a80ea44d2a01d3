#!/usr/bin/env bash
# Tests of whole training runs on a GPU: the losses of the CPU, no wait of the host inside a step, a recorded step's
# bits, what happens without a GPU or without enough memory. All routers and everything else that ./train is asked for:
# AHEAD=1 TRAIN=./train_cuda tests/test_cli_routers.sh, tests/test_cli_runs.sh.
#
#     CPU=./train FP32=./train_cuda_fp32 TRAIN=./train_cuda tests/cuda_runs.sh [NAME...]
#
# FP32 is train_cuda built with PRECISION=fp32; without it its tests are skipped. Called by cuda.sh. Read next:
# cli_checks.sh.
# shellcheck disable=SC2015  # A && B || C is meant so: B ends the same way in both
TRAIN=${TRAIN:-./train_cuda}
CPU=$(realpath "${CPU:-./train}")
FP32=$(realpath "${FP32:-./train_cuda_fp32}")
# shellcheck source=tests/cli_checks.sh
. "$(dirname "$0")/cli_checks.sh"

MODEL=(--schedule constant --layers 2 --dim 128 --heads 2 --seq 128 --expert-dim 128 --experts 8 --batch 8
       --warmup 2 --lr 3e-4 --eval-every 0 --log-every 1)

# losses_agree DIR DIR TOLERANCE [STEPS]: in every step, and the gradient norms within that share, in the first STEPS
# steps. Prints both differences.
losses_agree() {
    check "losses of $1 and $2 within $3" python3 - "$@" <<'PYTHON'
import json, sys
a, b = ([line for line in map(json.loads, open(run + "/log.jsonl")) if "loss" in line] for run in sys.argv[1:3])
tolerance = float(sys.argv[3])
assert len(a) == len(b) == 10, (len(a), len(b))
losses = [y["loss"] - x["loss"] for x, y in zip(a, b)]
norms = [y["grad_norm"] / x["grad_norm"] - 1 for x, y in zip(a, b)]
for name, differences in ("losses", losses), ("norms, relative", norms):
    print("   ", *sys.argv[1:3], name, *("%.1e" % difference for difference in differences))
compared = int(sys.argv[4]) if sys.argv[4:] else 10
for x, loss, norm in zip(a, losses, norms):
    assert abs(loss) <= tolerance, (x["step"], loss)
    assert abs(norm) <= tolerance or x["step"] > compared, (x["step"], norm)
PYTHON
    grep '^ ' check.out
}

# ---- the CPU's losses

test_ten_steps() {
    for extra in "" "--router dense" "--act gelu --shared-experts 1" "--router sigmoid" \
        "--router soft --slots 4 --allow-leak" "--kv-heads 1 --grad-accum 2" "--capacity-factor 1 --layout padded" \
        "--layout block --renorm 0" "--perft r --perft-rank 16 --lora attention" \
        "--perft e --perft-rank 5 --perft-act silu --grad-accum 2"; do
        rm -rf cpu fp32 run
        # shellcheck disable=SC2086  # words
        OMP_NUM_THREADS=4 "$CPU" --steps 10 "${MODEL[@]}" $extra --out cpu >out 2>err ||
            { fail "the CPU's run: $extra"; continue; }
        echo "  $extra"
        # shellcheck disable=SC2086
        run --steps 10 "${MODEL[@]}" $extra
        succeeds
        # Adapters beside untrained weights: on the CPU, in float, rounding those weights to bf16 once changes the norms
        # of the first two steps by 1e-3 and 7e-3, later ones by up to 3e-2 (3e-4 without adapters).
        case $extra in
        *--perft*) losses_agree cpu run 1e-2 2 ;;
        *) losses_agree cpu run 1e-2 ;;
        esac
        if [ -x "$FP32" ]; then
            # shellcheck disable=SC2086
            "$FP32" --steps 10 "${MODEL[@]}" $extra --out fp32 >out 2>err || fail "the run in float"
            losses_agree cpu fp32 1e-4
        fi
    done
}

# ---- a step waits for nothing, and is recorded

test_no_waits() {
    for router in top1 topk sigmoid hash position random random-step soft soft-batch soft-uniform soft-token coe \
        expert-choice dense noisy threshold forced; do
        # shellcheck disable=SC2086  # words
        run --steps 10 "${MODEL[@]}" --router $router --trace-syncs --allow-leak --out "run_$router"
        ends 0
        check "$router waits" grep -q '^syncs .* 0 times inside 10 training steps' out
    done
}

test_recorded_steps_give_the_same_bits() {
    run "${MODEL[@]}" --steps 30 --graph 1 --out recorded
    succeeds
    run "${MODEL[@]}" --steps 30 --graph 0 --out queued
    succeeds
    run "${MODEL[@]}" --steps 30 --recompute experts --out again
    succeeds
    same_state recorded queued
    same_state recorded again
    same_figures recorded queued
    run "${MODEL[@]}" --steps 12 --router topk --grad-accum 2 --dump-routing trace --out traced
    ends 0
    for router in sigmoid soft expert-choice noisy "noisy --grad-accum 2" random-step "threshold --threshold-warmup 6" \
        "forced --force zipf:1.2" "forced --force trace --grad-accum 2"; do
        rm -rf recorded queued
        echo "  $router"
        # shellcheck disable=SC2086  # words
        run "${MODEL[@]}" --steps 12 --allow-leak --graph 1 --out recorded --router $router
        ends 0
        # shellcheck disable=SC2086
        run "${MODEL[@]}" --steps 12 --allow-leak --graph 0 --out queued --router $router
        ends 0
        same_state recorded queued
    done
}

# ---- bad input

test_without_a_gpu() {
    CUDA_VISIBLE_DEVICES='' run
    refused 'no GPU was found.*use ./train on the CPU'
}

test_too_little_memory() {
    run --dim 4096 --heads 32 --expert-dim 16384 --experts 64 --layers 64
    refused 'the run needs [0-9]+ MiB \(weights [0-9]+, gradients [0-9]+, optimizer [0-9]+.*lower --batch'
}

run_tests "$@"
