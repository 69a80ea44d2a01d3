#!/usr/bin/env bash
# Tests of whole runs of ./train: what one leaves behind and prints, and that a run which is stopped, killed or resumed,
# or meets a full disk, ends in the same bits or in one clear line.
#
#     tests/test_cli_runs.sh [NAME...]        from the repository's root; NAME: only the tests whose names contain it
#
# Called by run_tests.sh. Read next: cli_checks.sh, train.c.
# shellcheck disable=SC2015,SC2046  # A && B || C is meant so: B ends the same way in both; numbers of seq are split
# shellcheck source=tests/cli_checks.sh
. "$(dirname "$0")/cli_checks.sh"

# Options of a run whose steps are hardly more than training.
QUICK=(--eval-every 0 --log-every 500)

# ---- what a run leaves behind and prints

# A signal in the middle of an evaluation leaves a checkpoint of the step, and no line of its evaluation.
test_an_evaluation_that_was_cut_short_is_made_up_for() {
    run --out whole
    cp -r whole cut
    sed -i '/^{"step":6,.*"val_loss"/d' cut/log.jsonl
    resumes cut whole
    resume cut
    succeeds
    check "the evaluation is there once" test "$(grep -c '^{"step":6,.*"val_loss"' cut/log.jsonl)" = 1
}

test_run_directory() {
    run
    succeeds
    is_sound run
    check "files of the run" test "$(cd run && echo * checkpoint/*)" = "checkpoint config.json log.jsonl report.html \
checkpoint/manifest.json checkpoint/model.safetensors checkpoint/optimizer.safetensors checkpoint/state.json"
    check "no peak of memory" grep -qE '^memory +peak [0-9.]+ MiB: weights [0-9.]+, gradients' out
    check "no memory by category" grep -qE '^memory +arena [0-9.]+ MiB: weights [0-9.]+, gradients' out
    check "escape codes or carriage returns off a terminal" lacks $'\r|\033' out
    check "not six lines of steps" test "$(grep -c '^step .*/6 ' out)" = 6
    check "not three evaluations" test "$(grep -c 'validation' out)" = 3
    run --log-every 4 --out sparse
    check "--log-every 4" test "$(sed -n 's/^{"step":\([0-9]*\),.*"loss":.*"aux".*/\1/p' sparse/log.jsonl |
        tr '\n' ' ')" = "4 6 "
}

test_prints_no_nan() {
    run
    check "a run of domains without tokens" lacks 'nan|inf\b' out
    run --steps 0 --warmup 0 --out none
    check "a run without steps" lacks 'nan|inf\b' out
}

test_help() {
    run --help
    succeeds
    for option in data router top-k resume out sample profile objective mask-share slots force chain-steps bias-rate \
        threshold-warmup dump-routing; do
        check "--help without --$option" grep -qE -- "^  --$option " out
    done
}

test_zero_steps() {
    run --steps 0
    succeeds
    check "no evaluation" grep -q '^{"step":0,.*"val_loss"' run/log.jsonl
    resume run --steps 6
    succeeds
    is_sound run
    run --out whole
    same_state run whole
}

test_same_command_same_bits() {
    run --out once
    run --out again
    OMP_NUM_THREADS=2 run --out threads
    for other in again threads; do
        same_state once $other
        same_figures once $other
    done
    run --out seed --seed 2
    check "another seed has the same weights" \
        test "$(cmp once/checkpoint/model.safetensors seed/checkpoint/model.safetensors)"
    run --out again
    succeeds
    same_state once again
    same_figures once again
}

test_samples_and_profile() {
    run --sample 40 --profile
    succeeds
    is_sound run
    local domains
    domains=$(sed -n '1s/.*"domains":\[\([^]]*\)\].*/\1/p' run/log.jsonl | tr -d '"' | tr ',' ' ')
    check "fewer than five domains" test "$(wc -w <<<"$domains")" -ge 5
    for domain in $domains; do
        check "no sample of $domain printed" grep -aq -- "^--- $domain ---" out
        check "not one sample of $domain in the log" \
            test "$(grep -c "\"event\":\"sample\",\"domain\":\"$domain\"" run/log.jsonl)" = 1
    done
    for stage in attention route permute dispatch experts combine head optimizer; do
        check "no stage $stage" grep -aqE "^$stage +[0-9.]+ +[0-9.]+ %" out
    done
    run --sample 12 --temperature 0 --prompt 'say "</script>", a prompt longer than the sequence' --out prompt
    succeeds
    is_sound prompt
    check "not one sample" test "$(grep -c '"event":"sample"' prompt/log.jsonl)" = 1
    check "the prompt is not printed" grep -aqF 'say "</script>", a prompt' out
}

# A model that has learned nothing samples any byte; a terminal would obey some of them.
test_samples_hold_no_control_codes() {
    run --sample 300 --temperature 100
    check "escape codes or carriage returns" lacks $'\r|\033' out
}

test_terminal() {
    if ! script -qec true /dev/null </dev/null >/dev/null 2>&1; then
        skip "the progress bar: no script(1), or no pseudo-terminal to be had"
        return
    fi
    with_defaults
    script -qec "'$TRAIN' ${arguments[*]}" /dev/null </dev/null >out 2>err
    status=$?
    ends 0
    check "no progress bar" grep -aqE $'\r\[#+\.*\] [0-9]+/6 ' out
    check "no time left" grep -aqE '[0-9]:[0-9]{2} left' out
    script -qec "'$TRAIN' --resume run --steps 8" /dev/null </dev/null >out 2>err
    check "a resumed run's validation loss before it has one" lacks 'val -?nan' out
}

# Without a standard output, what is printed must not end up in the first file that is opened.
test_closed_output() {
    with_defaults
    "$TRAIN" "${arguments[@]}" >&- 2>err
    is_sound run
}

test_config_survives_a_resume() {
    run --lr 1.2345678901234567e-3 --router top1 --capacity-factor 1.1 --sample 3
    grep -v '"resume"' run/config.json >before.json
    resume run
    succeeds
    check "config.json has changed" diff before.json <(grep -v '"resume"' run/config.json)
    resume run --out other
    succeeds
    check "config.json has changed" diff <(grep -v '"out"' before.json) <(grep -vE '"(resume|out)"' other/config.json)
    same_state run other
}

# ---- data: which token is read when shows in where a token beyond the vocabulary is met

test_text_file_and_its_last_tenth() {
    { bytes 900 377; bytes 100 141; } >train_bad.txt
    { bytes 900 141; bytes 100 377; } >val_bad.txt
    run --vocab 128 --data val_bad.txt
    refused 'token 900 is 255'
    run --vocab 128 --data train_bad.txt --shuffle 0 --out second
    refused 'token 0 is 255'
    check "the last tenth is not evaluated" grep -q '^{"step":0,.*"val_loss"' second/log.jsonl
    run --data val_bad.txt --out third
    succeeds
}

# steps_until_bad DATA: the run over DATA ends at a bad token after $steps steps.
steps_until_bad() {
    rm -rf run
    run --steps 9 --shuffle 0 --vocab 128 --data "$1"
    refused 'not below the vocabulary'
    steps=$(grep -c '^{"step":.*"aux"' run/log.jsonl)
}

# within_ahead STEPS EXPECTED: as many, or one less where the last one's figures were still to be read.
within_ahead() {
    [ "$1" -le "$2" ] && [ "$1" -ge $(($2 - AHEAD)) ]
}

# Sequence j of step s starts at token (s*B + j)*T: here a step takes 32 tokens and, as a target, one more.
test_unshuffled_order() {
    for at in 95 96 97 128; do
        { bytes $at 141; bytes 1 377; bytes $((399 - at)) 141; } >bad.txt
        steps_until_bad bad.txt
        check "token $at ended the run after $steps steps" within_ahead "$steps" $(((at - 1) / 32))
    done
    mkdir shards
    shard shards/train_0.bin $(seq 50)
    shard shards/train_1.bin $(seq 50) 200 $(seq 50)
    shard shards/val.bin $(seq 50)
    for data in shards 'shards/*.bin'; do
        steps_until_bad "$data"
        check "token 100 of $data ended the run after $steps steps" within_ahead "$steps" 3
    done
}

# ---- stopping and going on

test_resume_extends() {
    run --steps 9 --out whole
    run --steps 4 --out parts
    resume parts --steps 9
    succeeds
    same_state whole parts
    is_sound parts
    same_figures whole parts '"aux"'
}

# What the log holds beyond the checkpoint is done again, and stands there once.
test_resume_cuts_the_log() {
    run --steps 4 --out run
    cp -r run/checkpoint earlier
    resume run --steps 9
    rm -r run/checkpoint
    mv earlier run/checkpoint
    resume run
    succeeds
    is_sound run
    check "not the checkpoint's step" test "$(grep -c '"event":"resume","step":4' run/log.jsonl)" -ge 1
    check "nine steps" test "$(grep -c '"aux"' run/log.jsonl)" = 9
}

test_signals_save_and_resume() {
    for signal in INT TERM; do
        rm -rf run whole
        start --steps 1000000 "${QUICK[@]}"
        wait_for run/log.jsonl
        sleep 0.2
        kill -$signal "$pid"
        finish
        ends 75
        quiet
        local step command
        step=$(sed -n 's/.*stopped by a signal at step \([0-9]*\); saved.*/\1/p' out)
        check "the step is not told" test "${step:=0}" -gt 0
        check "the state is of another step" grep -q "\"step\":$step," run/checkpoint/state.json
        command=$(sed -n 's/.*Go on with: //p' out)
        check "what is printed does not go on: $command" eval "$command --steps $((step + 300))"
        run --steps $((step + 300)) "${QUICK[@]}" --out whole
        same_state run whole
    done
}

# The first signal waits for the end of a step, here of seconds; the second does not.
test_second_signal_ends_at_once() {
    start --batch 16384
    wait_for run/log.jsonl
    kill -TERM "$pid"
    sleep 0.05
    local begin=${EPOCHREALTIME/./}
    kill -TERM "$pid"
    finish
    local micros=$((${EPOCHREALTIME/./} - begin))
    ends 143
    check "took $micros microseconds to end" test $micros -lt 500000
    [ ! -e run/checkpoint ] || fail "saved after the second signal"
}

test_kill_is_always_resumable() {
    run --steps 200 --out whole
    start --steps 200 --save-every 1
    wait_for run/checkpoint/manifest.json
    local kills=0
    RANDOM=${SEED:=$$}
    while [ $kills -lt 8 ] && kill -9 "$pid" 2>/dev/null; do
        kills=$((kills + 1))
        finish
        "$TRAIN" --resume run >out 2>err &
        pid=$!
        sleep "$(printf '0.%03d' $((RANDOM % 150)))"
    done
    finish
    check "killed $kills times" test $kills -ge 2
    resume run
    succeeds
    same_state run whole
    is_sound run
    check "left over (SEED=$SEED)" test -z "$(ls -d run/checkpoint.* 2>/dev/null)"
}

# ---- a loss that is no number

# Decay of lr * weight_decay = 10^4 a step lets the weights explode; those of the last finite gradient stay.
test_non_finite_steps() {
    local explode=(--steps 400 --lr 100 --weight-decay 100 --max-skips 3)
    run "${explode[@]}"
    refused '^moelab: 3 steps in a row .*not finite'
    check "not three skips in the log" test "$(grep -c '"event":"skip"' run/log.jsonl)" = 3
    check "skips are not printed" grep -q 'step skipped (3 in a row)' out
    is_sound run
    if command -v python3 >/dev/null; then
        check "weights are not finite" python3 - <<'PYTHON'
import array, math
data = open("run/checkpoint/model.safetensors", "rb").read()
assert all(map(math.isfinite, array.array("f", data[8 + int.from_bytes(data[:8], "little"):])))
PYTHON
    else
        skip "whether the weights are finite: no python3"
    fi
}

# How many skipped steps are too many has nothing to do with how many are logged.
test_non_finite_steps_between_log_lines() {
    run --steps 400 --lr 100 --weight-decay 100 --max-skips 3 --log-every 100
    refused "^moelab: [3-$((3 + 2 * AHEAD))] steps in a row"
}

# ---- a full disk

test_full_disk() {
    mkdir disk
    if [ "$TEST_CLI_NAMESPACE" != mount ] || ! mount -t tmpfs -o size=8m tmpfs disk 2>/dev/null; then
        skip "a full disk: no right to mount one"
        return
    fi
    local options=(--dim 64 --eval-every 0 --log-every 10 --steps 3000)
    start "${options[@]}" --save-every 500 --out disk/run
    wait_for disk/run/checkpoint/manifest.json
    kill -STOP "$pid"
    while [ -e disk/run/checkpoint.tmp ] || [ -e disk/run/checkpoint.old ]; do # in the middle of a save
        kill -CONT "$pid"
        sleep 0.02
        kill -STOP "$pid"
    done
    cat /dev/zero >disk/filler 2>/dev/null
    cp -r disk/run at_full
    kill -CONT "$pid"
    finish
    ends 1
    check "stderr does not say that step 3000 is not saved" grep -q '^moelab: step 3000 not saved: .*room' err
    check "not heard once that the log has gaps" test "$(grep -c 'cannot write to .*log.jsonl' err)" = 1
    check "a line that is not moelab's" lacks '^($|[^m]|m[^o])' err
    check "the checkpoint has changed" diff -r at_full/checkpoint disk/run/checkpoint
    refuses_resume 'space' disk/run
    rm disk/filler
    resume disk/run
    succeeds
    mv disk/run filled
    umount disk
    is_sound filled 10
    run "${options[@]}" --out whole
    same_state filled whole
}

# A limit on the size of files is met like a full disk; it does not end the program by its signal.
test_file_size_limit() {
    run --steps 9 --out whole
    run --steps 3
    cp -r run before
    bash -c 'ulimit -f 90; exec "$0" --resume run --steps 9' "$TRAIN" >out 2>err
    status=$?
    ends 1
    check "stderr does not say that step 9 is not saved" grep -q '^moelab: step 9 not saved' err
    check "the checkpoint has changed" diff -r before/checkpoint run/checkpoint
    resume run --steps 9
    succeeds
    same_state run whole
}

run_tests "$@"
