#!/usr/bin/env bash
# Learning to specialise where each rank has data of its own: the builtin domains are dealt out to the ranks, which hold
# the experts between them. Trains the arms one after the other, appends one JSON line for each to OUT.jsonl and prints
# the table (specialise_table.py). Minutes on a laptop.
#
#   experiments/specialise.sh [-r RANKS] [-s SEEDS] [-l RATE] [-n STEPS] [-a ARMS] [-p OPTIONS] TRAIN OUT.jsonl
#
#   TRAIN        the program (./train)        OUT.jsonl  a run that it has a line of is not repeated; a line of the same
#                arm, rate and seed with other options is refused
#   -r -s -l -n  4   "1 2 3"   4e-3   450
#   -a           only these arms, separated by commas
#   -p           further options of ./train for all arms, each with its value, such as "--dim 32"; they come last
#
#   together         all ranks read from all domains
#   joint            each rank reads from its own domains, as in all that follow
#   gate             experts stay as they were drawn
#   experts          the gate stays as it was drawn
#   decoupled        half of the steps with the gate as it was drawn; then the gate alone, all else frozen
#   decoupled-trunk  the same; then all but the experts
#
# Four ranks share six domains as story and sort, arithmetic and echo, brackets, recall, so joint sees another mixture
# than together: the difference of the two is that of the text too. An expert's gradient is summed over the ranks that
# sent it tokens, which is all that "aggregated from the clients that used it" means here. MPIRUN starts the ranks,
# default: mpirun --oversubscribe --bind-to none. The same question on one rank: recipes/r7_specialise.sweep.
set -euo pipefail

here=$(cd "$(dirname "$0")" && pwd)
# shellcheck source=experiments/script_options.sh
. "$here/script_options.sh"
say() { echo "specialise.sh: $*" >&2; }
ranks=4 seeds='1 2 3' rate=4e-3 steps=450 only='' extra=''
read_options 'r=ranks s=seeds l=rate n=steps a=only p=extra' 2 "$@"
if [[ ! $ranks =~ ^[1-9][0-9]*$ || $ranks = 1 ]]; then fail "-r $ranks: give two ranks or more"; fi
if [[ ! $steps =~ ^[1-9][0-9]*$ || $((steps % 2)) = 1 ]]; then
    fail "-n $steps: give an even number of steps, which have two halves"
fi
number=$(python3 -c "print(float('$rate'))" 2>/dev/null) || fail "-l $rate: give a number"
train=${arguments[0]} out=${arguments[1]}
[ -x "$train" ] || fail "$train is not a program: run make first"
train=$(realpath "$train")
read -ra mpirun <<<"${MPIRUN:-mpirun --oversubscribe --bind-to none --quiet}"
if ! command -v "${mpirun[0]}" >/dev/null; then
    fail "${mpirun[0]} is not found: install Open MPI, or name another in MPIRUN"
fi
if [ "$(id -u)" = 0 ] && [ -z "${MPIRUN:-}" ]; then mpirun+=(--allow-run-as-root); fi
touch "$out" || exit 1
help=$("$train" --help) || fail "$train --help fails: build it again"

# name, options; "first" stands for a run of half of the steps with the gate as it was drawn, which the arm starts from
arms='
together         --domains all
joint            --domains by-rank
gate             --domains by-rank --freeze experts
experts          --domains by-rank --freeze router
decoupled        --domains by-rank --freeze all-but-router first
decoupled-trunk  --domains by-rank --freeze experts first'
for arm in ${only//,/ }; do
    grep -q "^$arm " <<<"$arms" || fail "-a $arm: there is no such arm"
done
options=(--data builtin --router topk --experts 8 --top-k 2 --layers 2 --dim 64 --heads 2 --expert-dim 64 --seq 128
         --batch 8 --min-lr 0.02 --eval-every 150 --eval-batches 32)
read -ra extra <<<"$extra"

runs=$(mktemp -d "${TMPDIR:-/tmp}/specialise.XXXXXX")
trap 'rm -rf "$runs"' EXIT
# More ranks than cores: who waits lets others work.
export OMP_NUM_THREADS=${OMP_NUM_THREADS:-1} OMP_WAIT_POLICY=${OMP_WAIT_POLICY:-passive} OMPI_MCA_mpi_yield_when_idle=1

# compose OPTION...: all options of a run in $kept, later ones in place of those before; the command in $command.
compose() {
    local words=() seen=' ' i
    kept=()
    words=("${options[@]}" --ep "$ranks" --lr "$rate" --seed "$seed" "$@" ${extra[@]+"${extra[@]}"})
    for ((i = ${#words[@]} - 2; i >= 0; i -= 2)); do
        [[ $seen == *" ${words[i]} "* ]] || kept=("${words[i]}" "${words[i + 1]}" "${kept[@]}")
        seen+="${words[i]} "
    done
    command="mpirun -n $ranks ./train ${kept[*]}"
}

# train_on FOLDER OPTION...: in $runs.
train_on() {
    compose "${@:2}"
    (cd "$runs" && "${mpirun[@]}" -n "$ranks" "$train" "${kept[@]}" --out "$1" </dev/null >output 2>&1) ||
        fail "stopped: $(grep -am 1 moelab "$runs/output" || tail -n 1 "$runs/output")"
}

# has_line ARM: whether OUT has a line of $command.
has_line() {
    local line
    line=$(grep -F -- "\"arm\": \"$1\", \"rate\": $number, \"seed\": $seed," "$out" | tail -n 1) || return 1
    [[ $line == *"\"command\": \"$command\""* ]] ||
        fail "$out has $1, seed $seed, made with other options than $command: give another file"
}

for seed in $seeds; do
    while read -r arm words; do
        if [ -z "$arm" ] || [[ -n $only && ,$only, != *",$arm,"* ]]; then continue; fi
        read -ra words <<<"$words"
        if [[ "${words[*]}" == *all-but-router* && $help != *all-but-router* ]]; then
            say "$arm is left out: this program cannot freeze all but the router"
            continue
        fi
        first='' more=()
        if [ "${words[-1]}" = first ]; then
            unset 'words[-1]'
            first=first-$seed
            words+=(--init-from "$first" --steps $((steps / 2)))
            more=("steps_before=$((steps / 2))")
        else
            words+=(--steps "$steps")
        fi
        compose "${words[@]}"
        if has_line "$arm"; then continue; fi
        if [ -n "$first" ] && [ ! -e "$runs/$first" ]; then
            train_on "$first" --domains by-rank --freeze router --steps $((steps / 2))
        fi
        say "seed $seed, $arm"
        train_on "$arm-$seed" "${words[@]}"
        "$here/specialise_table.py" line "$runs/$arm-$seed" sweep=specialise_by_rank size=small "arm=$arm" \
            "rate=$rate" "seed=$seed" phase=seeds budget=tokens "command=$command" \
            ${more[@]+"${more[@]}"} >>"$out"
        rm -rf "${runs:?}/$arm-$seed"
    done <<<"$arms"
    rm -rf "$runs/first-$seed"
done
"$here/specialise_table.py" "$out"
