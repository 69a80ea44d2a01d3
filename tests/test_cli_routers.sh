#!/usr/bin/env bash
# Tests of ./train with every router: each trains, evaluates, samples, reports and goes on from a checkpoint with the
# same bits; what a router sees is in the log; masked prediction; recorded routing replayed; alarms.
#
#     tests/test_cli_routers.sh [NAME...]     from the repository's root; NAME: only the tests whose names contain it
#
# Called by run_tests.sh. Read next: cli_checks.sh, model/router.h.
# shellcheck disable=SC2015  # A && B || C is meant so: B ends the same way in both
# shellcheck source=tests/cli_checks.sh
. "$(dirname "$0")/cli_checks.sh"

# All that --help lists, so that a router is tested from the day it is there.
routers() {
    "$TRAIN" --help | sed -n 's/^  --router NAME .*: \([^:]*\) \[.*/\1/p' | tr -d ,
}

# needs_leak OPTION...: whether the program asks for --allow-leak.
needs_leak() {
    run --steps 0 "$@" --out leak
    rm -rf leak
    [ "$status" = 1 ] && grep -q 'add --allow-leak' err
}

# What makes a few steps tell more about a router than its defaults do.
options_of() {
    case $1 in
    threshold) echo --threshold-warmup 2 ;;
    sigmoid) echo --router-groups 4 --router-kept-groups 2 --bias-rate 0.01 ;;
    forced) echo --force zipf:1 ;;
    esac
}

# header_says KEY VALUE DIR
header_says() {
    check "the header of $3 does not say $1 $2" test "$(head -n 1 "$3/log.jsonl" | grep -c "\"$1\":$2[,}]")" = 1
}

# ---- every router

test_every_router() {
    seq 400 | tr -d '\n' >text.txt
    local count=0 leaky=0
    for router in $(routers); do
        local options=(--router "$router" --layers 2) leak=false
        # shellcheck disable=SC2207  # words
        options+=($(options_of "$router"))
        if needs_leak "${options[@]}"; then
            leak=true
            leaky=$((leaky + 1))
            options+=(--allow-leak)
        fi
        rm -rf whole parts text
        run "${options[@]}" --sample 3 --out whole
        succeeds
        is_sound whole
        is_finite whole
        header_says leaky $leak whole
        check "no sample" grep -q '"event":"sample"' whole/log.jsonl
        run "${options[@]}" --sample 3 --steps 3 --out parts
        resumes parts whole --steps 6
        is_sound parts
        run "${options[@]}" --data text.txt --steps 3 --out text
        succeeds
        is_sound text
        is_finite text
        # shellcheck disable=SC2031  # set by the checks above, in this shell
        [ "$failed" = 0 ] || { fail "... with --router $router" && return; }
        count=$((count + 1))
    done
    check "--help lists $count routers" test $count -ge 16
    check "$leaky routers need --allow-leak" test $leaky -ge 2
}

test_what_a_router_sees_is_logged() {
    run --router soft-batch --out batch
    header_says leaky false batch
    header_says sees_batch true batch
    run --router expert-choice --allow-leak --out both
    header_says leaky true both
    header_says sees_batch true both
    check "the terminal does not warn" grep -q '^warning .*later tokens' out
    check "a step line that is not leaky" lacks '"leaky":false' both/log.jsonl
    run --capacity-factor 1 --drop weight --allow-leak --out drops
    header_says leaky true drops
    header_says sees_batch false drops
    run --allow-leak --out innocent
    header_says leaky false innocent
    check "a warning without reason" lacks '^warning' out
}

# With a chain and slices, with dense layers in between, and with places that run out: only dense and soft layers make
# no chain, and only those where nobody is dropped have no capacity.
test_routers_in_other_layers() {
    local trained=0
    for router in $(routers); do
        for options in "--chain-steps 2 --grad-accum 2" "--moe-every 2 --shared-experts 1" \
            "--capacity-factor 1 --layout padded"; do
            # shellcheck disable=SC2086  # words
            run --router "$router" --allow-leak --layers 2 --steps 2 --out run $options
            case "$router $options" in
            dense*chain* | soft\ --chain* | soft-batch\ --chain* | *uniform*chain* | soft-identity*chain*)
                refused '--chain-steps 2 with --router' ;;
            dense*capacity* | soft*capacity* | uniform*capacity* | expert-choice*capacity*)
                refused '--router .* drop --capacity-factor' ;;
            *)
                succeeds
                is_finite run
                trained=$((trained + 1)) ;;
            esac
            rm -rf run
        done
    done
    check "only $trained runs trained" test $trained -ge 40
}

# ---- masked prediction

test_masked_prediction() {
    seq 400 | tr -d '\n' >text.txt
    for router in topk soft expert-choice; do
        rm -rf whole parts text
        run --objective mlm --router $router --out whole
        succeeds
        is_sound whole
        is_finite whole
        header_says leaky false whole
        check "not a vocabulary of bytes and a mask" grep -q '"vocab":	257' whole/config.json
        run --objective mlm --router $router --steps 3 --out parts
        resumes parts whole --steps 6
        run --objective mlm --mask-share 0.5 --router $router --data text.txt --out text
        succeeds
        is_sound text
        is_finite text
    done
}

# ---- recorded routing

# A recorded run is replayed by its own options and --router forced: the same losses, weights and choices.
test_replay() {
    local options cases=("--layers 1" "--layers 2 --grad-accum 2 --renorm 0" "--chain-steps 2"
                         "--top-k 1 --capacity-factor 1" "--moe-every 2 --layers 2")
    for options in "${cases[@]}"; do
        rm -rf recorded replayed
        # shellcheck disable=SC2086  # words
        run $options --dump-routing trace --out recorded
        succeeds
        # shellcheck disable=SC2086
        run $options --router forced --force trace --dump-routing again --out replayed
        succeeds
        same_figures recorded replayed
        check "other weights with $options" cmp recorded/checkpoint/model.safetensors \
            replayed/checkpoint/model.safetensors
        check "other choices with $options" cmp trace again
    done
}

# A resumed run goes on with its trace, and what was recorded past the checkpoint is recorded anew.
test_trace_of_a_resumed_run() {
    run --dump-routing whole_trace --out whole
    run --dump-routing trace --steps 3 --out parts
    resume parts --steps 6
    succeeds
    check "another trace than without a break" cmp trace whole_trace
    truncate -s -2 trace
    resume parts --steps 8
    refused "--dump-routing trace does not hold the steps before 7, with which this run goes on"
}

test_replay_of_another_router() {
    run --router hash --dump-routing trace --out recorded
    check "not 6 steps of 32 tokens to 2 experts in the trace" test "$(stat -c %s trace)" = $((1024 + 6 * 32 * 2 * 2))
    run --router forced --force trace --out replayed
    succeeds
    is_sound replayed
    for run in recorded replayed; do
        grep -o '"counts":[^"]*' $run/log.jsonl >counts_$run
    done
    check "other experts" cmp counts_recorded counts_replayed
}

test_replay_of_what_does_not_fit() {
    run --dump-routing trace --out recorded
    run --router forced --force trace --steps 9 --out longer
    refused 'trace does not hold step 7: record a longer run, or lower --steps'
    check "not the six steps that there are" test "$(grep -c '"aux"' longer/log.jsonl)" = 6
    run --router forced --force trace --batch 4 --out wider
    refused 'trace records 32 tokens x 2 of 8 experts, .*; this run has 64 x 2 of 8, .*use the options'
    run --router forced --force trace --layers 2 --out deeper
    refused '1 routers, 1 slices; this run has 32 x 2 of 8, 2, 1: '
    run --router forced --force trace --out shorter --steps 3
    succeeds
}

# ---- alarms

test_alarms() {
    local one=(--router forced --force one --top-k 1 --experts 4 --batch 8)
    run "${one[@]}" --out collapsed
    succeeds
    is_sound collapsed
    for reason in 'collapse: nearly all tokens' '3 of 4 experts got no token'; do
        check "no alarm, or more than one, of: $reason" test "$(grep -c "^alarm: step 3: .*$reason" out)" = 1
        check "not in the log: $reason" \
            test "$(grep -c "\"event\":\"alarm\",\"step\":3,\"layer\":0,\"router\":0.*$reason" collapsed/log.jsonl)" = 1
    done
    check "more than two alarms" test "$(grep -c '"event":"alarm"' collapsed/log.jsonl)" = 2
    run "${one[@]}" --log-every 2 --out sparse
    check "three logged steps end with step 6" test "$(grep -c '^alarm: step 6: ' out)" = 2
    run "${one[@]}" --steps 2 --out young
    check "an alarm after two steps" lacks '^alarm' out
    run --experts 1 --top-k 1 --out silent
    check "a weight that is always 1 is not told" grep -q '^alarm: step 1: .*no gradient from the main loss' out
    run --freeze router --out frozen
    check "an alarm of a frozen router" lacks 'alarm' out
    run --router random --out unlearned
    check "an alarm of a router that learns nothing by design" lacks 'no gradient' out
    run --batch 8 --out healthy
    check "an alarm without reason" lacks '^alarm' out
}

run_tests "$@"
