#!/usr/bin/env bash
# Trains every router on the builtin corpus, several seeds and learning rates side by side, and writes one JSON line per
# run. `experiments/router_table.py table OUT.jsonl` makes the table.
#
#   experiments/router_table.sh [-o lm|mlm] [-w] [-j JOBS] [-t THREADS] [-s SEEDS] [-l RATES] [-n STEPS] [-e BATCHES]
#                               [-a ARMS] [-b] [-T] TRAIN OUT.jsonl
#
#   TRAIN      the program (./train)        OUT.jsonl  lines are appended
#   -o         objective: next token (lm) or masked tokens (mlm); each has its own arms
#   -w         a narrow model: width 32, experts of width 16, which has too few parameters for this corpus
#   -j -t      runs side by side, threads of each (default: 1 run of all cores)
#   -s -l -n   "1 2 3"   "2e-3 4e-3 8e-3"   900
#   -e         batches of 8 x 128 tokens of the evaluation at the end (1024)
#   -b         each arm at the learning rate that was best for it in OUT.jsonl so far, instead of -l
#   -a         only these arms, separated by commas
#   -T         timing: each arm alone, one after the other, 40 steps; "ms" of such lines is what a step costs
#
# A run that OUT.jsonl has a line of is not repeated, so the same command goes on where it was interrupted.
#
# Arms share seed, data order and the initial values of all tensors of the same name. K x H = 512 (narrow: 32) is the
# active width unless the name says otherwise; what the arms differ in stands in the table below.
set -euo pipefail

here=$(cd "$(dirname "$0")" && pwd)
# shellcheck source=experiments/script_options.sh
. "$here/script_options.sh"
objective=lm jobs=1 threads='' seeds='1 2 3' rates='4e-3' steps=900 batches=1024 only='' w=0 b=0 T=0
read_options 'o=objective w j=jobs t=threads s=seeds l=rates n=steps e=batches a=only b T' 2 "$@"
best=$b timing=$T size=wide
[ "$w" = 0 ] || size=narrow
train=$(realpath "${arguments[0]}") out=$(realpath "${arguments[1]}")
[ -x "$train" ] || fail "${arguments[0]} is not a program: run make first"

# name, work per token against topk's experts, options
lm_arms='
dense               1    --router dense
dense-half          0.5  --router dense --top-k 1
top1                0.5  --router top1 --top-k 1
top1-wide           1    --router top1 --top-k 1 --expert-dim 512
topk                1    --router topk
topk-plain          1    --router topk --renorm 0
topk-cf1            1    --router topk --capacity-factor 1
noisy               1    --router noisy
sigmoid             1    --router sigmoid
hash                1    --router hash
position            1    --router position
random              1    --router random
random-step         1    --router random-step
threshold           1    --router threshold
soft-batch          1    --router soft-batch
soft-token          4    --router soft-token --top-k 8
soft-token-narrow   1    --router soft-token --top-k 8 --expert-dim 64
coe                 2    --router coe
coe-k1              1    --router coe --top-k 1
coe-norm-k1         1    --router coe --top-k 1 --chain-norm 1
expert-choice       1    --router expert-choice --allow-leak
soft                1    --router soft --allow-leak
'
mlm_arms='
dense               1    --router dense
topk                1    --router topk
sigmoid             1    --router sigmoid
hash                1    --router hash
random              1    --router random
threshold           1    --router threshold
expert-choice       1    --router expert-choice
soft                1    --router soft
soft-batch          1    --router soft-batch
'
case $objective in
    lm) arms=$lm_arms ;;
    mlm) arms=$mlm_arms ;;
    *) usage ;;
esac
dim=128 heads=4 width=256
if [ "$size" = narrow ]; then
    dim=32 heads=2 width=16
    arms=${arms//--expert-dim 512/--expert-dim 32}
    arms=${arms//--expert-dim 64/--expert-dim 4}
fi

folder=$(mktemp -d)
trap 'rm -rf "$folder"' EXIT
touch "$out"
python3 "$here/router_table.py" "done" "$out" >"$folder/done"
common="--data builtin --batch 8 --seq 128 --layers 4 --dim $dim --heads $heads --experts 8 --top-k 2"
common="$common --expert-dim $width --min-lr 0.02 --objective $objective --eval-every 0"
if [ "$timing" = 1 ]; then
    jobs=1 seeds=1 rates=4e-3 steps=40
    common="$common --log-every 1 --eval-batches 1"
else
    common="$common --log-every 20 --eval-batches $batches" # the same text for all arms
fi

# One line per run: arm, work, rate, seed, then the options. Later options of an arm replace the common ones.
list() {
    local name work options
    while read -r name work options; do
        [ -n "$name" ] || continue
        if [ -n "$only" ] && [[ ",$only," != *",$name,"* ]]; then continue; fi
        [ "$best" = 0 ] || rates=$(python3 "$here/router_table.py" rate "$out" "$objective" "$size" "$name")
        for rate in $rates; do
            for seed in $seeds; do
                grep -qxF "$objective $size $timing $name $(printf %g "$rate") $seed" "$folder/done" ||
                    echo "$name $work $rate $seed $options"
            done
        done
    done <<<"$arms"
}

run() {
    local name=$1 work=$2 rate=$3 seed=$4 option value line=()
    shift 4
    local directory=$folder/$name-$rate-$seed
    # shellcheck disable=SC2206  # words are meant to be split
    local words=($common --steps "$steps" --lr "$rate" --seed "$seed")
    for ((i = 0; i < ${#words[@]}; i += 2)); do
        option=${words[i]} value=${words[i + 1]}
        [[ " $* " == *" $option "* ]] || line+=("$option" "$value")
    done
    line+=("$@")
    if ! "$train" "${line[@]}" --out "$directory" >"$directory.txt" 2>&1; then
        echo "router_table.sh: $name, rate $rate, seed $seed failed: $(tail -n 1 "$directory.txt")" >&2
        return 0
    fi
    python3 "$here/router_table.py" line "$directory/log.jsonl" arm="$name" work="$work" rate="$rate" seed="$seed" \
        objective="$objective" size="$size" timing="$timing" threads="${OMP_NUM_THREADS:-all}" side_by_side="$jobs" \
        command="./train ${line[*]}" >>"$out"
    rm -rf "$directory"
}
export -f run
export train out here folder common steps objective size timing jobs
[ -z "$threads" ] || export OMP_NUM_THREADS=$threads
[ "$jobs" = 1 ] || export OMP_WAIT_POLICY=passive
# shellcheck disable=SC2016  # $@ is the inner shell's
list | xargs -P "$jobs" -I{} bash -c 'set -- {}; run "$@"'
