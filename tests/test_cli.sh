#!/usr/bin/env bash
# Tests of the whole program, ./train, as a user meets it: what it refuses and how, what a run leaves behind, and that
# a run which is stopped, killed or resumed, or meets a full disk, ends in the same bits or in one clear line.
#
#     tests/test_cli.sh [NAME...]        from the repository's root; NAME: only the tests whose names contain it
#
# Every test is a function test_NAME in a subshell and a directory of its own; it passes when no check in it failed.
# TRAIN names another program than ./train. Called by run_tests.sh. Read next: train.c.

set -u
# A full disk is a small tmpfs in a mount namespace of our own, which vanishes with this script.
if [ -z "${TEST_CLI_NAMESPACE:-}" ]; then
    export TEST_CLI_NAMESPACE=none
    for flags in --mount --map-root-user\ --mount; do
        # shellcheck disable=SC2086  # two flags
        if unshare $flags true 2>/dev/null; then
            TEST_CLI_NAMESPACE=mount exec unshare $flags "$BASH" "$0" "$@"
        fi
    done
fi

TRAIN=$(realpath "${TRAIN:-./train}")
ROOT=$(mktemp -d "${TMPDIR:-/tmp}/test_cli.XXXXXX")
trap 'rm -rf "$ROOT"' EXIT
chmod 755 "$ROOT"
# One thread: with more, threads of tiny kernels mostly wait for each other. Where it matters a test sets its own.
export OMP_NUM_THREADS=1 OMP_WAIT_POLICY=passive LC_ALL=C

SIZES="--layers 1 --dim 16 --heads 2 --seq 16 --expert-dim 8 --batch 2 --eval-batches 1 --eval-every 3 --log-every 1"
TINY="$SIZES --warmup 1 --schedule constant"

# ---- checks

# check WHAT COMMAND...: COMMAND must succeed.
check() {
    local what=$1
    shift
    "$@" >check.out 2>&1 || { echo "  $what"; head -n 5 check.out; failed=1; } >&3
}

fail() {
    echo "  $*" >&3
    failed=1
}

skip() {
    echo "  skip  $*" >&3
}

# run ARGUMENTS...: the program's output is in `out` and `err`, its exit status in $status.
# shellcheck disable=SC2086  # TINY is several words
run() {
    "$TRAIN" "$@" >out 2>err
    status=$?
}

# ends STATUS: how the last run ended.
ends() {
    [ "$status" = "$1" ] || { fail "exit status $status, expected $1"; head -n 3 err >&3; }
}

quiet() {
    [ ! -s err ] || { fail "stderr is not empty:"; head -n 3 err >&3; }
}

one_line() {
    [ "$(wc -l <err)" = 1 ] && grep -q '^moelab: ' err || { fail "stderr is not one line of moelab:"; head -n 4 err >&3; }
}

says() {
    grep -qE -- "$1" err || { fail "stderr does not say '$1':"; head -n 3 err >&3; }
}

# refuses PATTERN ARGUMENTS...: status 1, one line that matches, and a directory that cannot be taken for a run.
refuses() {
    local pattern=$1
    shift
    rm -rf refused
    run "$@" --out refused
    [ "$status" = 1 ] || fail "exit status $status, not 1: $*"
    one_line
    says "$pattern"
    [ ! -e refused ] || fail "left $(echo refused/*) behind: $*"
}

# tiny OUT ARGUMENTS...: a small run of six steps that must succeed.
# shellcheck disable=SC2086
tiny() {
    local out=$1
    shift
    case " $* " in *" --steps "*) ;; *) set -- --steps 6 "$@" ;; esac
    run $TINY --out "$out" "$@"
    ends 0
    quiet
}

same_state() {
    for file in model.safetensors optimizer.safetensors; do
        check "$1 and $2 differ in $file" cmp "$1/checkpoint/$file" "$2/checkpoint/$file"
    done
    check "$1 and $2 differ in state.json" cmp <(state "$1") <(state "$2")
}

# The numbers of state.json but for the time, which stand before the configuration.
state() {
    sed -n '1s/,"train_seconds".*//p' "$1/checkpoint/state.json"
}

# The lines that a step or an evaluation writes, without the clock's share.
figures() {
    sed -n '/^{"step"/s/"ms":[^,]*,"tok_s":[^,]*,//p' "$1/log.jsonl"
}

log_is_sound() {
    if ! command -v python3 >/dev/null; then
        skip "the log's lines are not parsed: no python3"
        return
    fi
    check "log of $1" python3 - "$1" "${2:-1}" <<'PYTHON'
import json, sys
run, every = sys.argv[1], int(sys.argv[2])
def strict(text):
    raise ValueError(f"{text} is not JSON")
text = open(run + "/log.jsonl", encoding="utf-8").read()
assert text.endswith("\n"), "the last line is not whole"
header, *lines = [json.loads(line, parse_constant=strict) for line in text.splitlines()]
keys = "ts program git_sha git_dirty config device precision versions params_total params_active flops_per_token"
assert list(header) == keys.split() + ["domains", "moe_layers", "leaky"], f"header {list(header)}"
step_keys = """step tokens loss aux z lr grad_norm router_grad_norm ms tok_s mfu drop load_cv load_kl max_vio entropy
    dead leaky skipped counts layer_entropy""".split()
val_keys = "step tokens val_loss val_bpb val_floor val_domains domain_expert mi".split()
config = header["config"]
steps, vals = [], []
for line in lines:
    assert ("event" in line) or list(line) in (step_keys, val_keys), f"line {list(line)}"
    if list(line) == step_keys:
        steps.append(line["step"])
        assert line["tokens"] == line["step"] * config["batch"] * config["seq"]
        routed = config["batch"] * config["seq"] * config["top_k"]
        assert [sum(c) for c in line["counts"]] == [routed] * len(header["moe_layers"]), line["counts"]
    elif list(line) == val_keys:
        vals.append(line["step"])
        assert list(line["val_domains"]) == header["domains"]
known = {"resume", "skip", "sample", "memory", "checkpoint", "alarm", "end"}
assert {line["event"] for line in lines if "event" in line} <= known
assert steps == list(range(every, max(steps, default=0) + 1, every)), f"logged steps {steps}"
assert vals == sorted(set(vals)), f"evaluated steps {vals}"
PYTHON
}

report_is_complete() {
    check "$1/report.html lacks lines of the log" cmp <(sed 's/</\\u003c/g' "$1/log.jsonl") \
        <(sed 's/</\\u003c/g' "$1/log.jsonl" | grep -Fxf <(sed 's/,$//' "$1/report.html"))
}

# wait_for FILE: until it is there, at most 20 s.
wait_for() {
    for _ in {1..2000}; do
        [ ! -e "$1" ] || return 0
        sleep 0.01
    done
    fail "$1 never came"
}

# shard FILE TOKEN...: a token shard of llm.c.
shard() {
    local file=$1
    shift
    { little 4 20240520; little 4 1; little 4 $#; head -c 1012 /dev/zero; for token; do little 2 "$token"; done; } >"$file"
}

little() {
    local bytes=$1 value=$2 text=
    for ((; bytes > 0; bytes--, value >>= 8)); do
        text+=$(printf '\\x%02x' $((value & 255)))
    done
    printf '%b' "$text"
}

# bytes COUNT OCTAL: a text of one byte value.
bytes() {
    head -c "$1" /dev/zero | tr '\0' "\\$2"
}

# ---- refusals

# shellcheck disable=SC2086
test_refuses_bad_data() {
    : >empty.txt
    printf x >one.txt
    bytes 4000 141 >letters.txt
    mkdir no_shards truncated magic
    shard truncated/a_train.bin 1 2 3 4
    truncate -s -1 truncated/a_train.bin
    bytes 1400 141 >magic/a_train.bin
    refuses 'cannot open missing.txt' $TINY --steps 6 --data missing.txt
    refuses 'empty.txt is empty' $TINY --steps 6 --data empty.txt
    refuses 'one.txt has 1 tokens.*--seq' $TINY --steps 6 --data one.txt
    refuses 'letters.txt has 3600 tokens .*lower --seq or give more' ${TINY/--seq 16/--seq 4096} --steps 6 --data letters.txt
    refuses 'no_shards has no \*\.bin' $TINY --steps 6 --data no_shards
    refuses 'a_train.bin.* truncated' $TINY --steps 6 --data truncated
    refuses 'starts with .*20240520' $TINY --steps 6 --data magic
    refuses 'matches no file' $TINY --steps 6 --data 'none_*.bin'
    refuses '/dev/null is not a regular file' $TINY --steps 6 --data /dev/null
    refuses 'cannot open missing.txt' $TINY --steps 6 --data letters.txt --val missing.txt
}

# shellcheck disable=SC2046,SC2086
test_refuses_a_token_beyond_the_vocabulary() {
    mkdir shards
    shard shards/a_train.bin $(seq 40) 300 $(seq 40)
    shard shards/b_val.bin $(seq 40)
    run $TINY --steps 6 --data shards --out run
    ends 1
    one_line
    says 'a_train.bin: token 40 is 300, .*vocab'
    [ ! -e run/checkpoint ] || fail "left a checkpoint behind"
    check "the log tells of an end" eval '! grep -q "\"event\":\"end\"" run/log.jsonl'
    tiny wide --data shards --vocab 301
}

# shellcheck disable=SC2086
test_refuses_bad_options() {
    set -- $TINY --steps 6
    refuses '--top-k 9 is above --experts 8' "$@" --top-k 9
    refuses '--dim 16 is not divisible by --heads 3' ${TINY/--heads 2/--heads 3} --steps 6
    refuses 'odd size' ${TINY/--heads 2/--heads 16} --steps 6
    refuses 'not divisible by --kv-heads' ${TINY/--heads 2/--heads 4} --steps 6 --kv-heads 3
    refuses 'unknown --router tpk: the nearest is topk' "$@" --router tpk
    refuses 'unknown option --expert-din: the nearest is --expert-dim' "$@" --expert-din 4
    refuses 'unknown option --step: the nearest is --steps' $TINY --step 6
    refuses 'top1 with --renorm 1: .*no gradient' "$@" --router top1 --renorm 1
    refuses '--lr takes a number' "$@" --lr fast
    refuses '--lr takes a number' "$@" --lr nan
    refuses '--lr takes a number' "$@" --lr inf
    refuses '--lr 1e30 is out of range' "$@" --lr 1e30
    refuses '--seed takes a whole number' "$@" --seed 1.5
    refuses '--steps takes a whole number' $TINY --steps 6x
    refuses '--steps -1 is out of range' $TINY --steps -1
    refuses '--steps 99999999999999999999 is out of range' $TINY --steps 99999999999999999999
    refuses "--top-k takes a whole number, not ''" "$@" --top-k ''
    refuses '--seed needs a value' "$@" --seed
    refuses '--steps is given twice' "$@" --steps 7
    refuses "unexpected 'fast'" "$@" fast
    refuses '--schedule has no value .cosin.*nearest: cosine' ${TINY/--schedule constant/--schedule cosin} --steps 6
    refuses '--warmup 7 is longer than --steps 6' $SIZES --steps 6 --warmup 7
    refuses '--batch 2 is not divisible by --grad-accum 3' "$@" --grad-accum 3
    refuses '--drop .*--capacity-factor' "$@" --drop slot
    refuses 'vocab 100 is too small' "$@" --vocab 100
    refuses 'router' "$@" --router $'to\npk'
}

# A prompt is bytes; a model of a smaller vocabulary has no embedding for some of them.
# shellcheck disable=SC2086
test_refuses_a_prompt_beyond_the_vocabulary() {
    refuses '--prompt' $TINY --steps 6 --vocab 128 --sample 4 --prompt $'\xc3\xa9'
}

# shellcheck disable=SC2086
test_refuses_absurd_sizes_and_too_little_memory() {
    refuses 'out of memory: the run needs' --layers 1024 --dim 65536 --heads 4096 --experts 4096 --expert-dim 65536 \
        --seq 2 --batch 1 --steps 100
    refuses 'out of memory|2\^31' ${TINY/--batch 2/--batch 1048576} --steps 6 --experts 64
    refuses 'more than 2\^31 rows' ${SIZES/--seq 16/--seq 1048576} --steps 6 --warmup 1 --grad-accum 1 \
        --router dense --experts 2000
    # Some hosts do not run with a limit at all (address sanitizer); then the limit is not the program's to report.
    (ulimit -v 200000 && refuses 'out of memory: the run needs' --dim 512 --layers 4 --batch 16 --steps 100)
    [ "$?" = 0 ] || fail "with a memory limit"
}

# ---- refusals that have to do with --out and --resume

# shellcheck disable=SC2086
test_out_that_cannot_be_used() {
    tiny run
    cp -r run before
    run $TINY --steps 6 --out run --experts 4 --lr 1e-2
    ends 1
    one_line
    says '--out run holds a run with another .*--experts'
    says '--lr'
    check "the run that was there has changed" diff -r run before
    touch file
    for out in file file/below /proc/below; do
        run $TINY --steps 6 --out "$out"
        ends 1
        one_line
        says "$out"
    done
    mkdir foreign
    bytes 20 141 >foreign/config.json
    run $TINY --steps 6 --out foreign
    ends 1
    one_line
    says 'not a run.s configuration'
    mkdir -m 555 locked
    chown -f nobody locked
    local as_nobody=
    [ "$(id -u)" != 0 ] || as_nobody="setpriv --reuid=65534 --clear-groups"
    if ! $as_nobody true 2>/dev/null || $as_nobody touch locked/x 2>/dev/null || ! $as_nobody test -x "$TRAIN"; then
        skip "a directory without the right to write: everything may be written here"
        return
    fi
    $as_nobody "$TRAIN" $TINY --steps 6 --out locked >out 2>err
    status=$?
    ends 1
    one_line
    says 'cannot write into --out locked'
}

# refuses_resume PATTERN DIR: and DIR stays as it is.
refuses_resume() {
    rm -rf before
    [ ! -e "$2" ] || cp -r "$2" before
    run --resume "$2"
    ends 1
    one_line
    says "$1"
    [ ! -e "$2" ] || check "$2 has changed" diff -r "$2" before
}

test_resume_of_what_is_no_checkpoint() {
    tiny good
    tiny wider --experts 4
    refuses_resume 'cannot read missing/config.json' missing
    [ ! -e missing ] || fail "made the missing directory"
    cp -r good none && rm -r none/checkpoint
    refuses_resume 'no checkpoint in none' none
    cp -r good truncated && truncate -s -1 truncated/checkpoint/optimizer.safetensors
    refuses_resume 'truncated' truncated
    cp -r good unfinished && rm unfinished/checkpoint/manifest.json
    refuses_resume 'manifest' unfinished
    cp -r good altered
    printf '\377' | dd of=altered/checkpoint/model.safetensors bs=1 seek=20000 conv=notrunc 2>/dev/null
    refuses_resume 'altered' altered
    cp -r good foreign && rm -r foreign/checkpoint && cp -r wider/checkpoint foreign
    refuses_resume 'another model' foreign
    cp -r good garbled && printf '{"layers":' >garbled/config.json
    refuses_resume 'garbled/config.json is not a run.s configuration' garbled
    run --resume good --experts 4
    ends 1
    one_line
    says '--experts 4 differs'
    # Fewer steps than are done: nothing to do, and a run that says it has 3 steps with the weights of step 6.
    run --resume good --steps 3
    ends 1
    one_line
    says '--steps'
}

# ---- what a run leaves behind and prints

test_run_directory() {
    tiny run
    log_is_sound run
    report_is_complete run
    check "files of the run" test "$(cd run && echo * checkpoint/*)" = "checkpoint config.json log.jsonl report.html \
checkpoint/manifest.json checkpoint/model.safetensors checkpoint/optimizer.safetensors checkpoint/state.json"
    check "no line on the peak of memory" grep -qE '^memory +[0-9.]+ MiB at the peak' out
    check "no line on the memory's parts" grep -qE '^memory +weights [0-9.]+ MiB, gradients' out
    check "escape codes or carriage returns off a terminal" eval '! grep -q $'"'[\\r\\033]'"' out'
    check "numbers that are none" eval '! grep -iE "nan|inf\b" out'
    check "not six step lines" test "$(grep -c '^step .*/6 ' out)" = 6
    check "not three evaluations" test "$(grep -c 'validation' out)" = 3
    tiny sparse --log-every 4
    check "step lines of --log-every 4" test "$(grep -o '^{"step":[0-9]*,"tokens":[0-9]*,"loss"' sparse/log.jsonl |
        tr -cd '0-9,\n' | cut -d, -f1 | tr '\n' ' ')" = "4 6 "
}

test_help() {
    run --help
    ends 0
    quiet
    for option in data router top-k resume out sample profile; do
        check "--help without --$option" grep -qE -- "^  --$option " out
    done
}

# shellcheck disable=SC2086
test_zero_steps() {
    run $SIZES --steps 0 --out run
    ends 0
    quiet
    check "no evaluation" grep -q '^{"step":0,.*"val_loss"' run/log.jsonl
    check "numbers that are none" eval '! grep -iE "nan|inf\b" out'
    run --resume run --steps 6 --schedule constant --warmup 1
    ends 0
    log_is_sound run
    tiny whole
    same_state run whole
}

test_same_command_same_bits() {
    tiny once --router topk --experts 8
    tiny again --router topk --experts 8
    OMP_NUM_THREADS=2 tiny threads --router topk --experts 8
    same_state once again
    same_state once threads
    check "the log differs" cmp <(figures once) <(figures again)
    check "the log differs with two threads" cmp <(figures once) <(figures threads)
    tiny seed --seed 2
    check "another seed, same weights" eval '! cmp -s once/checkpoint/model.safetensors seed/checkpoint/model.safetensors'
    cp -r once before
    tiny once --router topk --experts 8
    same_state once before
    check "the log of a run started over" cmp <(figures once) <(figures before)
}

test_samples_and_profile() {
    tiny run --sample 40 --profile
    local domains
    domains=$(sed -n '1s/.*"domains":\[\([^]]*\)\].*/\1/p' run/log.jsonl | tr -d '"' | tr ',' ' ')
    check "fewer than five domains" test "$(echo "$domains" | wc -w)" -ge 5
    for domain in $domains; do
        check "no sample of $domain printed" grep -aq -- "^--- $domain ---" out
        check "no sample of $domain in the log" grep -q "\"event\":\"sample\",\"domain\":\"$domain\"" run/log.jsonl
    done
    for stage in attention route permute dispatch experts combine head optimizer; do
        check "no stage $stage" grep -aqE "^$stage +[0-9.]+ +[0-9.]+ %" out
    done
    log_is_sound run
    report_is_complete run
    tiny prompt --sample 12 --temperature 0 --prompt 'say "</script>" and a prompt far longer than the sequence'
    check "more than one sample" test "$(grep -c '"event":"sample"' prompt/log.jsonl)" = 1
    check "the prompt is not printed" grep -aqF 'say "</script>" and a prompt' out
    log_is_sound prompt
    report_is_complete prompt
}

test_terminal() {
    if ! command -v script >/dev/null; then
        skip "the progress bar: no script(1)"
        return
    fi
    script -qec "'$TRAIN' $TINY --steps 6 --out run" /dev/null </dev/null >out 2>err
    status=$?
    ends 0
    check "no progress bar" grep -aqE $'\r\[#+\.*\] [0-9]+/6 ' out
    check "no time left" grep -aqE '[0-9]:[0-9]{2} left' out
    script -qec "'$TRAIN' --resume run --steps 8" /dev/null </dev/null >out 2>err
    check "numbers that are none" eval '! grep -aiE "\bnan" out'
}

# Without a standard output, what is printed must not end up in the first file that is opened.
# shellcheck disable=SC2086
test_closed_output() {
    "$TRAIN" $TINY --steps 6 --out run >&-
    log_is_sound run
}

test_config_survives_a_resume() {
    tiny run --lr 1.2345678901234567e-3 --router top1 --capacity-factor 1.1 --sample 3
    cp run/config.json before.json
    run --resume run
    ends 0
    check "config.json has changed" diff <(grep -v '"resume"' before.json) <(grep -v '"resume"' run/config.json)
    run --resume run --out other
    ends 0
    check "config.json has changed" diff <(grep -vE '"(resume|out)"' before.json) <(grep -vE '"(resume|out)"' other/config.json)
    log_is_sound other
}

# ---- data: which token is read when shows in where a token beyond the vocabulary is met

# steps_before_bad DATA: how many steps a run over DATA logs before it ends at a bad token.
# shellcheck disable=SC2086
steps_before_bad() {
    rm -rf run
    run $TINY --steps 9 --shuffle 0 --vocab 128 --data "$1" --out run
    ends 1
    one_line
    grep -c '^{"step":[0-9]*,"tokens":[0-9]*,"loss"' run/log.jsonl
}

# shellcheck disable=SC2046,SC2086
test_text_file_and_its_last_tenth() {
    { bytes 900 377; bytes 100 141; } >train_bad.txt
    { bytes 900 141; bytes 100 377; } >val_bad.txt
    run $TINY --steps 6 --vocab 128 --data val_bad.txt --out run
    ends 1
    says 'token 900 is 255'
    run $TINY --steps 6 --vocab 128 --data train_bad.txt --shuffle 0 --out run2
    ends 1
    says 'token 0 is 255'
    check "the last tenth is not evaluated" grep -q '^{"step":0,.*"val_loss"' run2/log.jsonl
    tiny run3 --data val_bad.txt
}

# Sequence j of step s starts at token (s*B + j)*T: here a step takes 32 tokens and, as a target, one more.
# shellcheck disable=SC2046
test_unshuffled_order() {
    bytes 400 141 >good.txt
    for at in 95 96 97 128; do
        { bytes $at 141; bytes 1 377; bytes $((399 - at)) 141; } >bad.txt
        check "token $at" test "$(steps_before_bad bad.txt)" = $(((at - 1) / 32))
    done
    mkdir shards
    shard shards/train_0.bin $(seq 1 50)
    shard shards/train_1.bin $(seq 1 50) 200 $(seq 1 50)
    shard shards/val.bin $(seq 1 50)
    for data in shards 'shards/*.bin'; do
        check "token 100 of $data" test "$(steps_before_bad "$data")" = 3
    done
}

# ---- stopping and going on

test_resume_extends() {
    tiny whole --steps 9
    tiny parts --steps 4
    run --resume parts --steps 9
    ends 0
    same_state whole parts
    log_is_sound parts
    report_is_complete parts
    check "the log differs" cmp <(figures whole | grep '"loss":' | grep -v val_) \
        <(figures parts | grep '"loss":' | grep -v val_)
    # The checkpoint is older than the log's end: what follows it is written once.
    tiny later --steps 9 --save-every 4
    cp -r later earlier && rm -r earlier/checkpoint && cp -r whole/checkpoint earlier
    run --resume earlier --steps 12
    log_is_sound earlier
}

# stopped_by SIGNAL: saved, said, gone on with by the very command that was printed.
# shellcheck disable=SC2086
stopped_by() {
    rm -rf run
    "$TRAIN" $TINY --steps 20000 --schedule=constant --log-every=500 --out run >out 2>err
}

# shellcheck disable=SC2086
test_signals_save_and_resume() {
    set -- ${TINY/--log-every 1/--log-every 500} --eval-every=0
    set -- ${*/--eval-every 3/}
    for signal in INT TERM; do
        rm -rf run whole
        "$TRAIN" ${TINY/--eval-every 3 --log-every 1/--eval-every 0 --log-every 500} --steps 100000 --out run >out 2>err &
        local pid=$!
        wait_for run/report.html
        sleep 0.2
        kill -$signal $pid
        wait $pid
        status=$?
        ends 75
        quiet
        local step command
        step=$(sed -n 's/.*stopped by a signal at step \([0-9]*\); saved.*/\1/p' out)
        check "the step is not told" test "${step:-0}" -gt 0
        check "the state is of another step" grep -q "\"step\":$step," run/checkpoint/state.json
        report_is_complete run
        command=$(sed -n 's/.*Go on with: //p' out)
        check "the command that is printed does not go on" eval "$command --steps $((step + 500))"
        run ${TINY/--eval-every 3 --log-every 1/--eval-every 0 --log-every 500} --steps $((step + 500)) --out whole
        same_state run whole
    done
}

# The first signal waits for the step to end, the second does not.
# shellcheck disable=SC2086
test_second_signal_ends_at_once() {
    "$TRAIN" ${TINY/--batch 2/--batch 8192} --steps 100000 --out run >out 2>err &
    local pid=$!
    wait_for run/log.jsonl
    kill -TERM $pid
    sleep 0.05
    local begin=$EPOCHREALTIME
    kill -TERM $pid
    wait $pid
    status=$?
    local micros=$((${EPOCHREALTIME/./} - ${begin/./}))
    ends 143
    check "took $micros microseconds to end" test $micros -lt 500000
    [ ! -e run/checkpoint ] || fail "saved after the second signal"
}

# shellcheck disable=SC2086
test_kill_is_always_resumable() {
    tiny whole --steps 150
    local delay pid tries=0
    "$TRAIN" $TINY --steps 150 --save-every 1 --out run >/dev/null 2>err &
    pid=$!
    wait_for run/checkpoint/manifest.json
    RANDOM=${SEED:-$$}
    while kill -9 $pid 2>/dev/null && tries=$((tries + 1)) && [ $tries -le 8 ]; do
        wait $pid 2>/dev/null
        "$TRAIN" --resume run >out 2>err &
        pid=$!
        delay=$(printf '0.%03d' $((RANDOM % 200)))
        sleep "$delay"
    done
    wait $pid 2>/dev/null
    check "no kill met a running program" test $tries -ge 2
    run --resume run
    ends 0
    same_state run whole
    log_is_sound run
    check "left over" test -z "$(ls -d run/checkpoint.* 2>/dev/null)"
}

# ---- a loss that is no number

# Decay by lr * weight_decay = 10^4 a step makes the weights explode; the last ones that gave a finite gradient stay.
test_non_finite_steps() {
    local explode="$TINY --steps 400 --lr 100 --weight-decay 100 --max-skips 3"
    # shellcheck disable=SC2086
    run $explode --out run
    ends 1
    one_line
    says '^moelab: 3 steps in a row .*not finite'
    check "no three skips in the log" test "$(grep -c '"event":"skip"' run/log.jsonl)" = 3
    check "skips are not printed" grep -q 'step skipped (3 in a row)' out
    log_is_sound run
    # shellcheck disable=SC2086
    run ${explode/--log-every 1/--log-every 100} --out sparse
    ends 1
    says '^moelab: 3 steps in a row'
    same_state run sparse
    if command -v python3 >/dev/null; then
        check "weights are not finite" python3 - <<'PYTHON'
import array, json, math
data = open("run/checkpoint/model.safetensors", "rb").read()
header = 8 + int.from_bytes(data[:8], "little")
values = array.array("f", data[header:])
assert json.loads(data[8:header]) and all(map(math.isfinite, values))
PYTHON
    else
        skip "whether the weights are finite: no python3"
    fi
}

# ---- a full disk

# shellcheck disable=SC2086
test_full_disk() {
    if [ "$TEST_CLI_NAMESPACE" != mount ] || ! { mkdir disk && mount -t tmpfs -o size=8m tmpfs disk 2>/dev/null; }; then
        skip "a full disk: no right to mount one"
        return
    fi
    local options="${TINY/--dim 16/--dim 64}"
    options=${options/--eval-every 3 --log-every 1/--eval-every 0 --log-every 10}
    "$TRAIN" $options --steps 3000 --save-every 500 --out disk/run >out 2>err &
    local pid=$!
    wait_for disk/run/checkpoint/manifest.json
    kill -STOP $pid
    while [ -e disk/run/checkpoint.tmp ]; do # not in the middle of a save
        kill -CONT $pid
        sleep 0.02
        kill -STOP $pid
    done
    cat /dev/zero >disk/filler 2>/dev/null
    cp -r disk/run at_full
    kill -CONT $pid
    wait $pid
    status=$?
    ends 1
    says '^moelab: step 3000 not saved: .*room'
    check "the log is not heard of once" test "$(grep -c 'cannot write to .*log.jsonl' err)" = 1
    check "no line per failure:$(cat err)" eval '! grep -vq "^moelab: " err'
    check "the checkpoint has changed" diff -r at_full/checkpoint disk/run/checkpoint
    # Resuming on the full disk changes nothing either.
    run --resume disk/run
    ends 1
    one_line
    says 'space'
    check "the checkpoint has changed" diff -r at_full/checkpoint disk/run/checkpoint
    rm disk/filler
    log_is_sound disk/run 10
    run --resume disk/run
    ends 0
    quiet
    run $options --steps 3000 --out whole
    same_state disk/run whole
}

# A limit on the size of a file is a full disk, not a signal that ends the program.
# shellcheck disable=SC2086
test_file_size_limit() {
    tiny whole --steps 9
    tiny run --steps 3
    cp -r run before
    (ulimit -f 100 && exec "$TRAIN" --resume run --steps 9 >out 2>err)
    status=$?
    ends 1
    says '^moelab: .*not saved'
    check "the checkpoint has changed" diff -r before/checkpoint run/checkpoint
    run --resume run --steps 9
    ends 0
    same_state run whole
}

# ---- all of them, in the order of this file

all_passed=0
all_failed=0
exec 3>&1
for name in $(sed -n 's/^test_\([a-z_]*\)() {$/\1/p' "$0"); do
    wanted=$([ $# = 0 ] || echo no)
    for word; do
        [[ $name != *$word* ]] || wanted=
    done
    [ -z "$wanted" ] || continue
    mkdir "$ROOT/$name"
    begin=$EPOCHREALTIME
    if (
        cd "$ROOT/$name" || exit 1
        failed=0
        "test_$name"
        exit $failed
    ); then
        all_passed=$((all_passed + 1))
        word=ok
    else
        all_failed=$((all_failed + 1))
        word=FAIL
    fi
    printf '%-5s %s, %d ms\n' $word "$name" $(((${EPOCHREALTIME/./} - ${begin/./}) / 1000))
done
echo "$all_passed passed, $all_failed failed"
[ $all_failed = 0 ]
