#!/usr/bin/env bash
# Tests of training on several ranks, under mpirun: the same command is the same run on 1, 2 and 4 of them, with experts
# spread (--ep) or not; a checkpoint of one is a checkpoint of the others; what cannot be spread is refused in one line.
#
#     tests/test_ranks.sh [NAME...]           from the repository's root; NAME: only the tests whose names contain it
#
# Numbers are compared by ranks_compare.py: losses, norms and statistics of every step, then weights and moments. Runs
# in float differ in the last bits, because sums over ranks have another order than sums over tokens.
#
# Called by run_tests.sh. Read next: cli_checks.sh, model/exchange.h.
# shellcheck disable=SC2015  # A && B || C is meant so: B ends the same way in both
# shellcheck source=tests/cli_checks.sh
. "$(dirname "$0")/cli_checks.sh"
HERE=$(cd "$(dirname "$0")" && pwd)

# Four ranks share what cores there are.
MPIRUN=(mpirun --oversubscribe --bind-to none --quiet)
[ "$(id -u)" != 0 ] || MPIRUN+=(--allow-run-as-root)

if ! command -v mpirun >/dev/null || ! "${MPIRUN[@]}" -n 2 "$TRAIN" --help >/dev/null 2>&1; then
    echo "skip  training on several ranks: no mpirun, or a build without MPI"
    echo "1 passed, 0 failed"
    exit 0
fi

# on RANKS OPTION...: as run, on so many ranks.
on() {
    local ranks=$1
    shift
    with_defaults "$@"
    on_ranks "$ranks" "${arguments[@]}"
}

# on_resumed RANKS RUN OPTION...: as resume.
on_resumed() {
    on_ranks "$1" --resume "${@:2}"
}

on_ranks() {
    "${MPIRUN[@]}" -n "$1" "$TRAIN" "${@:2}" >out 2>err
    status=$?
    sed -i 's/\r$//' out err # the ends of lines on a terminal, which mpirun makes for rank 0
}

# same RUN OTHER: equal within rounding.
same() {
    python3 "$HERE/ranks_compare.py" "$1" "$2" >compared 2>&1 || fail "$1 and $2 differ: $(tail -n 3 compared)"
}

# All options that a test of several runs shares.
SHAPE=(--batch 8 --experts 8 --layers 2 --dim 32 --eval-batches 2)

# Ranks, and how many of them hold the experts between them.
WAYS=("4 2" "4 4")

# everywhere OPTION...: the same run on one rank and on others.
everywhere() {
    run "${SHAPE[@]}" "$@" --out one
    succeeds
    for way in "${WAYS[@]}"; do
        on ${way% *} "${SHAPE[@]}" "$@" --ep ${way#* } --out "ranks_${way/ /_}"
        succeeds
        same one "ranks_${way/ /_}"
    done
}

test_topk() {
    WAYS=("2 1" "2 2" "4 1" "4 2" "4 4")
    everywhere
}

test_switch() {
    everywhere --router top1 --act gelu --tie 1
}

# Several of a token's experts are on one rank.
test_more_choices_than_ranks() {
    run "${SHAPE[@]}" --top-k 5 --out one
    on 2 "${SHAPE[@]}" --top-k 5 --ep 2 --out two
    succeeds
    same one two
}

test_sigmoid_moves_its_bias_by_all_tokens() {
    everywhere --router sigmoid --shared-experts 1 --aux-coef 0.01
}

test_soft() {
    everywhere --router soft --allow-leak
}

test_chain_of_experts() {
    everywhere --router coe --chain-steps 2
}

# Adapters inside experts are spread with them; those for every token, and routed ones, are on every rank.
test_adapters() {
    WAYS=("4 2")
    everywhere --perft e --perft-rank 4 --lora attention --exchange-chunks 2
    rm -rf one ranks_*
    WAYS=("2 1")
    everywhere --perft r --perft-rank 4
}

test_layouts() {
    everywhere --layout block
    rm -rf one ranks_*
    everywhere --layout padded
}

test_every_way_of_exchange() {
    for way in bucketed dedup padded p2p; do
        everywhere --exchange $way
        rm -rf one ranks_*
    done
}

# Every choice comes back as it was made: the bits of `flat`, in whichever group, with several of a token's experts on a
# rank, in parts that are not alike and in slices.
test_p2p_that_returns_choices() {
    local ways=("2 2" "4 2" "4 4") kinds=("" "--top-k 5" "--top-k 1 --act gelu" "--top-k 8 --shared-experts 1")
    kinds+=("--exchange-chunks 3 --top-k 3" "--grad-accum 2 --recompute experts" "--expert-dim 20")
    kinds+=("--router coe --chain-steps 2" "--router soft --allow-leak" "--perft e --perft-rank 4" "--layout block")
    for kind in "${kinds[@]}"; do
        for way in "${ways[@]}"; do
            for exchange in flat "p2p --exchange-return choice"; do
                # shellcheck disable=SC2086  # words without blanks
                on ${way% *} "${SHAPE[@]}" $kind --ep ${way#* } --exchange $exchange --out "${exchange%% *}"
                succeeds
            done
            same_state flat p2p
            rm -rf flat p2p
        done
        ways=("4 2")
    done
}

# More choices than ranks: several of a token's experts are on one rank.
test_many_choices() {
    WAYS=("4 2")
    for way in flat dedup padded p2p; do
        everywhere --exchange $way --top-k 5
        rm -rf one ranks_*
    done
}

test_one_row_per_rank_with_soft_and_chain() {
    for kind in dedup p2p; do
        everywhere --exchange $kind --router soft --allow-leak
        rm -rf one ranks_*
        everywhere --exchange $kind --router coe --chain-steps 2
        rm -rf one ranks_*
    done
}

# 64 tokens of a rank in 3 parts that are not alike; more parts than a batch has tokens.
test_chunks() {
    WAYS=("2 2" "4 2")
    for kind in flat bucketed dedup p2p; do
        everywhere --exchange $kind --exchange-chunks 3 --top-k 3
        on 4 "${SHAPE[@]}" --exchange $kind --exchange-chunks 3 --top-k 3 --ep 2 --overlap 0 --out in_turn
        succeeds
        same_figures ranks_4_2 in_turn
        rm -rf one ranks_* in_turn
    done
    everywhere --exchange dedup --exchange-chunks 2 --router coe --chain-steps 2 --shared-experts 1
    rm -rf one ranks_*
    everywhere --exchange dedup --exchange-chunks 2 --router soft --allow-leak
}

# Sizes from the first batch: with room enough the run is the same, and less is sent than where all would fit.
test_calibrated_messages() {
    WAYS=("2 2" "4 2")
    everywhere --exchange padded --exchange-margin 2
    on 2 "${SHAPE[@]}" --ep 2 --exchange padded --exchange-margin 1 --steps 12 --out tight
    succeeds
    is_sound tight
    check "the first batch does not fit" lacks '"step":1,.*"drop":0\.[0-9]*[1-9]' tight/log.jsonl
    check "nothing is ever dropped" grep -qE '"drop":0\.[0-9]*[1-9]' tight/log.jsonl
}

# Rounded on the way: close, and the closer the more bits there are; fp32 is what the CPU computes with.
test_wire() {
    run "${SHAPE[@]}" --out one
    on 4 "${SHAPE[@]}" --ep 4 --wire fp32 --wire-back fp32 --out fp32
    succeeds
    same one fp32
    for type in bf16 fp16 fp8; do
        on 4 "${SHAPE[@]}" --ep 4 --wire $type --wire-back $type --exchange dedup --out $type
        succeeds
        is_sound $type
        python3 "$HERE/ranks_compare.py" one $type >compared
        check "$type rounds nothing" grep -q FAIL compared
    done
    check "fp8 is not close" python3 "$HERE/ranks_compare.py" --losses 2e-3 one fp8
    check "bf16 is not close" python3 "$HERE/ranks_compare.py" --losses 3e-4 one bf16
    check "fp16 is not close" python3 "$HERE/ranks_compare.py" --losses 1e-4 one fp16
}

# Messages that are too small: what does not fit is counted, and the run goes on.
test_small_messages_overflow() {
    on 2 "${SHAPE[@]}" --ep 2 --exchange padded --exchange-rows 40
    succeeds
    check "nothing was dropped" grep -qE '"drop":0\.[0-9]*[1-9]' run/log.jsonl
    on 2 "${SHAPE[@]}" --ep 2 --exchange padded --out enough
    check "something was dropped" lacks '"drop":0\.[0-9]*[1-9]' enough/log.jsonl
}

test_forced() {
    everywhere --router forced --force zipf:1.1
    rm -rf one ranks_*
    everywhere --router forced --force one --exchange dedup
}

test_dense() {
    everywhere --router dense
}

test_slices_and_ranks_commute() {
    run "${SHAPE[@]}" --grad-accum 4 --out slices
    on 2 "${SHAPE[@]}" --grad-accum 4 --ep 2 --out both
    succeeds
    same slices both
}

# A rank reads from its domains alone, and the same tokens in however many slices (whose balance losses would differ).
test_domains_by_rank() {
    local dealt=("${SHAPE[@]}" --domains by-rank --aux-coef 0)
    on 2 "${dealt[@]}" --out one
    succeeds
    on 2 "${dealt[@]}" --grad-accum 4 --ep 2 --out slices
    succeeds
    python3 "$HERE/ranks_compare.py" --losses 1e-6 one slices >compared 2>&1 || fail "slices differ: $(cat compared)"
    on 2 "${SHAPE[@]}" --aux-coef 0 --out all
    python3 "$HERE/ranks_compare.py" --losses 1e-6 one all >/dev/null 2>&1 && fail "the text is that of all domains"
    resume one --steps 7
    refused 'by-rank deals the domains out to the ranks, and there is one: .*or give --domains all'
    resume one --steps 7 --domains all
    succeeds
}

test_same_command_same_bits() {
    for out in first second; do
        on 4 "${SHAPE[@]}" --ep 2 --out $out
        succeeds
    done
    same_state first second
}

test_checkpoints_go_from_any_ranks_to_any() {
    run "${SHAPE[@]}" --out whole
    on 4 "${SHAPE[@]}" --ep 4 --steps 3 --out four
    succeeds
    cp -r four two
    cp -r four single
    on_resumed 2 two --ep 2 --steps 6
    succeeds
    same whole two
    resume single --steps 6 --ep 1
    succeeds
    same whole single
}

# samples FILE: what was sampled.
samples() {
    sed -n '/^--- /,/^trained/p' "$1" | grep -v '^trained\|^export'
}

test_samples_and_exports_are_the_same() {
    run "${SHAPE[@]}" --out one
    cp -r one four
    resume one --sample 20 --temperature 0 --export-hf hf_one
    samples out >samples_one
    on_resumed 4 four --ep 4 --sample 20 --temperature 0 --export-hf hf_four
    succeeds
    samples out >samples_four
    check "samples differ" cmp samples_one samples_four
    for way in rank choice; do
        on_resumed 2 four --ep 2 --exchange p2p --exchange-return $way --sample 20 --temperature 0
        succeeds
        samples out >samples_p2p
        check "samples with p2p, $way, differ" cmp samples_one samples_p2p
    done
    check "exports differ" cmp hf_one/model.safetensors hf_four/model.safetensors
}

# From the weights of another run: every rank takes its part of them.
test_init_from() {
    run "${SHAPE[@]}" --steps 3 --out before
    run "${SHAPE[@]}" --init-from before --out one
    on 4 "${SHAPE[@]}" --init-from before --ep 4 --out four
    succeeds
    same one four
}

test_says_who_has_what() {
    on 4 "${SHAPE[@]}" --ep 2
    succeeds
    check "no line for rank 3" grep -q '^rank 3   sequences 6 to 7 of every 8, experts 4 to 7' out
    check "no count of what was sent" grep -qE '^sent +[0-9.]+ MiB in [0-9]+ messages' out
    check "a line came more than once" test "$(grep -c '^model ' out)" = 1
}

# Every token goes to both ranks. There 256 rows of 64 numbers, and back as many, or four times as many (a row for each
# choice), in the forward and in the backward; 8 bytes for each choice there and 4 back; 4 layers.
test_says_what_p2p_stores() {
    for way in "rank 1.1" "choice 2.6"; do
        # shellcheck disable=SC2086  # words
        set -- $way
        on 2 --layers 4 --dim 64 --heads 2 --seq 64 --batch 8 --experts 8 --top-k 8 --expert-dim 16 --ep 2 --steps 1 \
            --warmup 1 --eval-every 0 --eval-batches 1 --exchange p2p --exchange-return "$1" --out "$1"
        succeeds
        check "stored" grep -q "^stored   $2 MiB by rank 0 " out
        grep '^stored' out
    done
}

# refused_on RANKS PATTERN OPTION...: one line, all ranks end.
refused_on() {
    local ranks=$1 pattern=$2
    shift 2
    on "$ranks" "$@" --out refused
    check "status $status" test "$status" = 1
    check "not one line '$pattern'" test "$(grep -c "^moelab: .*$pattern" err)" = 1
    check "more than one line of ours" test "$(grep -c '^moelab: ' err)" = 1
    check "left a checkpoint" test ! -e refused/checkpoint
}

test_refusals() {
    refused_on 4 'experts 6 is not divisible by --ep 4' --ep 4 --experts 6 --batch 4
    refused_on 4 '--ep 3 does not divide the 4 ranks' --ep 3 --experts 6 --batch 4
    refused_on 2 'batch 3 is not divisible by 2 ranks' --batch 3
    refused_on 2 'expert-choice looks at all tokens' --router expert-choice --allow-leak
    refused_on 2 'capacity-factor' --capacity-factor 1.25
    refused_on 2 'exchange-chunks 2 with --exchange padded' --ep 2 --exchange padded --exchange-chunks 2
    refused_on 2 'exchange-margin 0.5' --ep 2 --exchange padded --exchange-margin 0.5
    refuses 'ep 2' --ep 2
}

test_ranks_with_other_options() {
    with_defaults "${SHAPE[@]}"
    "${MPIRUN[@]}" -n 1 "$TRAIN" "${arguments[@]}" : -n 1 "$TRAIN" "${arguments[@]}" --lr 1e-4 >out 2>err
    status=$?
    check "status $status" test "$status" = 1
    check "not one line of it" test "$(grep -c '^moelab: .*options' err)" = 1
}

# ranks_running: the process of each rank that runs below mpirun, $pid.
ranks_running() {
    pgrep -P "$pid" -x "$(basename "$TRAIN")"
}

# A rank that is stopped: the others say where they waited, who is stopped, and end; the checkpoint before is whole.
stopped_rank() {
    with_defaults "${SHAPE[@]}" --steps 100000 --eval-every 0 --save-every 20 "$@"
    "${MPIRUN[@]}" -n 4 "$TRAIN" "${arguments[@]}" --ep 4 --patience 1 >out 2>err &
    pid=$!
    wait_for run/checkpoint/manifest.json
    stopped=$(ranks_running | sed -n 3p)
    kill -STOP "$stopped"
    (sleep 30 && kill -KILL "$stopped" 2>/dev/null) &
    killer=$!
    wait "$pid"
    { kill -KILL "$stopped" "$killer"; wait "$killer"; } 2>/dev/null
    local line='^moelab: rank [013] waited 1 s for rank [0-9] at step [0-9]+, .*, and rank 2 does not answer: '
    check "nobody says who is stopped" grep -qE "$line" err
    grep -qE "$line" err || head -n 5 err
    run "${SHAPE[@]}" --init-from run --out after --steps 1
    succeeds
}

test_stopped_rank() {
    stopped_rank
}

# Where nobody sends anything in a layer.
test_stopped_rank_of_p2p() {
    stopped_rank --exchange p2p
}

# A rank that is killed: mpirun ends the others, and the checkpoint before is whole.
test_killed_rank() {
    with_defaults "${SHAPE[@]}" --steps 100000 --eval-every 0 --save-every 20
    "${MPIRUN[@]}" -n 4 "$TRAIN" "${arguments[@]}" --ep 2 >out 2>err &
    pid=$!
    wait_for run/checkpoint/manifest.json
    begin=$SECONDS
    kill -KILL "$(ranks_running | tail -n 1)"
    wait "$pid"
    check "status $?" test $? != 0
    check "took $((SECONDS - begin)) s to end" test $((SECONDS - begin)) -lt 20
    run "${SHAPE[@]}" --init-from run --out after --steps 1
    succeeds
}

test_term_to_one_rank_saves_on_all() {
    with_defaults "${SHAPE[@]}" --steps 100000 --eval-every 0
    "${MPIRUN[@]}" -n 2 "$TRAIN" "${arguments[@]}" --ep 2 >out 2>err &
    pid=$!
    wait_for run/log.jsonl
    kill -TERM "$(ranks_running | tail -n 1)"
    wait "$pid"
    check "no checkpoint" test -e run/checkpoint/manifest.json
    check "does not say how to go on" grep -q -- '--resume' out
}

run_tests "$@"
