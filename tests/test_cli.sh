#!/usr/bin/env bash
# Tests of the whole program, ./train, as a user meets it: what it refuses and how, what a run leaves behind, and that
# a run which is stopped, killed or resumed, or meets a full disk, ends in the same bits or in one clear line.
#
#     tests/test_cli.sh [NAME...]        from the repository's root; NAME: only the tests whose names contain it
#
# Every test is a function test_NAME, run in a subshell and a directory of its own; it passes when no check in it
# failed. TRAIN names another program than ./train. Called by run_tests.sh. Read next: train.c.
# shellcheck disable=SC2015,SC2046  # A && B || C is meant so: B ends the same way in both; numbers of seq are split
set -u

# A full disk is a small tmpfs in a mount namespace of our own, which ends with this script.
if [ -z "${TEST_CLI_NAMESPACE:-}" ]; then
    export TEST_CLI_NAMESPACE=none
    for flags in --mount "--map-root-user --mount"; do
        # shellcheck disable=SC2086  # two flags
        if unshare $flags true 2>/dev/null; then
            TEST_CLI_NAMESPACE=mount exec unshare $flags "$BASH" "$0" "$@"
        fi
    done
fi

TRAIN=$(realpath "${TRAIN:-./train}")
ROOT=$(mktemp -d "${TMPDIR:-/tmp}/test_cli.XXXXXX")
trap 'umount "$ROOT"/*/disk 2>/dev/null; rm -rf "$ROOT"' EXIT
chmod 755 "$ROOT"
# One thread: with more, the threads of tiny kernels mostly wait for each other. A test that needs two says so.
export OMP_NUM_THREADS=1 OMP_WAIT_POLICY=passive LC_ALL=C

# Options of a run that does not give them.
DEFAULTS=(steps 6 layers 1 dim 16 heads 2 seq 16 expert-dim 8 batch 2 warmup 1 schedule constant
          eval-batches 1 eval-every 3 log-every 1 out run)
QUICK=(--eval-every 0 --log-every 500)

# ---- running the program

# with_defaults OPTION...: fills in `arguments`.
with_defaults() {
    arguments=("$@")
    for ((i = 0; i < ${#DEFAULTS[@]}; i += 2)); do
        [[ " $* " == *" --${DEFAULTS[i]} "* ]] || arguments+=("--${DEFAULTS[i]}" "${DEFAULTS[i + 1]}")
    done
}

# Output is in the files `out` and `err`, the exit status in $status.
run() {
    with_defaults "$@"
    "$TRAIN" "${arguments[@]}" >out 2>err
    status=$?
}

# The same in the background: $pid.
start() {
    with_defaults "$@"
    "$TRAIN" "${arguments[@]}" >out 2>err &
    pid=$!
}

finish() {
    wait "$pid" 2>/dev/null
    status=$?
}

# resume DIR OPTION...
resume() {
    "$TRAIN" --resume "$@" >out 2>err
    status=$?
}

# ---- checks

fail() {
    echo "  $*"
    failed=1
}

skip() {
    echo "  skip  $*"
}

# check WHAT COMMAND...: COMMAND must succeed.
check() {
    local what=$1
    shift
    "$@" >check.out 2>&1 || { fail "$what"; head -n 5 check.out; }
}

# lacks PATTERN FILE
lacks() {
    ! grep -aE -- "$1" "$2"
}

# ends STATUS: how the last run ended.
ends() {
    [ "$status" = "$1" ] || { fail "exit status $status, expected $1"; head -n 3 err; }
}

quiet() {
    [ ! -s err ] || { fail "stderr is not empty:"; head -n 3 err; }
}

succeeds() {
    ends 0
    quiet
}

# refused PATTERN: the last run ended with status 1 and one line that matches.
refused() {
    ends 1
    [ "$(wc -l <err)" = 1 ] && grep -q '^moelab: ' err || { fail "stderr is not one line of moelab:"; head -n 4 err; }
    grep -qE -- "$1" err || { fail "stderr does not say '$1':"; head -n 3 err; }
}

# refuses PATTERN OPTION...: refused, and before anything was made.
refuses() {
    rm -rf run
    run "${@:2}"
    refused "$1"
    [ ! -e run ] || fail "left $(echo run/*) behind: ${*:2}"
}

# refuses_resume PATTERN DIR: refused, and DIR stays as it was.
refuses_resume() {
    rm -rf before
    [ ! -e "$2" ] || cp -r "$2" before
    resume "$2"
    refused "$1"
    [ ! -e before ] && [ ! -e "$2" ] || check "$2 has changed" diff -r "$2" before
}

# All of a checkpoint but the time and the configuration: of state.json the numbers before "train_seconds".
same_state() {
    for file in model.safetensors optimizer.safetensors; do
        check "$1 and $2 differ in $file" cmp "$1/checkpoint/$file" "$2/checkpoint/$file"
    done
    for run in "$1" "$2"; do
        sed -n '1s/,"train_seconds".*//p' "$run/checkpoint/state.json" >"state_$run"
    done
    check "$1 and $2 differ in state.json" cmp "state_$1" "state_$2"
}

# The lines of steps and evaluations, or with a pattern those that match, must be the same but for the clock's share.
same_figures() {
    for run in "$1" "$2"; do
        grep '^{"step"' "$run/log.jsonl" | grep "${3:-}" | sed 's/"ms":[^,]*,"tok_s":[^,]*,//' >"figures_$run"
    done
    check "the logs of $1 and $2 differ" diff "figures_$1" "figures_$2"
}

# is_sound DIR [LOG_EVERY]: the log's lines are what model/log.h says, none is missing or twice, and all are in the
# report.
is_sound() {
    if ! command -v python3 >/dev/null; then
        skip "the lines of $1/log.jsonl are not read: no python3"
        return
    fi
    check "log and report of $1" python3 - "$1" "${2:-1}" <<'PYTHON'
import json, re, sys
run, every = sys.argv[1], int(sys.argv[2])
def strict(text):
    raise ValueError(text + " is not JSON")
def read(text):
    return json.loads(text, parse_constant=strict)
text = open(run + "/log.jsonl", encoding="utf-8").read()
assert text.endswith("\n"), "the last line is not whole"
header, *lines = map(read, text.splitlines())
header_keys = """ts program git_sha git_dirty config device precision versions params_total params_active
    flops_per_token domains moe_layers leaky""".split()
step_keys = """step tokens loss aux z lr grad_norm router_grad_norm router_main_norm ms tok_s mfu drop load_cv load_kl
    max_vio entropy mean_entropy dead leaky skipped counts layer_entropy""".split()
val_keys = "step tokens val_loss val_bpb val_floor val_domains domain_expert mi".split()
events = {"resume", "skip", "sample", "memory", "checkpoint", "alarm", "end"}
assert list(header) == header_keys, f"header {list(header)}"
config, layers = header["config"], len(header["moe_layers"])
steps, vals = [], []
for line in lines:
    if list(line) == step_keys:
        steps.append(line["step"])
        assert line["tokens"] == line["step"] * config["batch"] * config["seq"]
        assert [sum(c) for c in line["counts"]] == [config["batch"] * config["seq"] * config["top_k"]] * layers
        assert len(line["layer_entropy"]) == layers
    elif list(line) == val_keys:
        vals.append(line["step"])
        assert list(line["val_domains"]) == header["domains"]
        assert len(line["mi"]) == len(line["domain_expert"]) == layers
    else:
        assert line["event"] in events, f"line {line}"
assert steps == list(range(every, max(steps, default=0) + 1, every)), f"logged steps {steps}"
assert vals == sorted(set(vals)), f"evaluated steps {vals}"
page = open(run + "/report.html", encoding="utf-8").read()
data = [read(part) for part in re.findall(r'<script[^>]*type="application/json"[^>]*>(.*?)</script', page, re.S)]
last = next((i for i, line in enumerate(lines) if line.get("event") == "end"), None)
assert last is None or [header] + lines in data, "the report does not hold the log's lines"
PYTHON
}

# wait_for FILE: until it is there, at most 20 s.
wait_for() {
    for _ in {1..2000}; do
        [ ! -e "$1" ] || return 0
        sleep 0.01
    done
    fail "$1 never came"
}

# ---- data

# bytes COUNT OCTAL: a text of one byte value.
bytes() {
    head -c "$1" /dev/zero | tr '\0' "\\$2"
}

# little BYTES VALUE: a little-endian number.
little() {
    local left=$1 value=$2 text=
    for (( ; left > 0; left--, value >>= 8)); do
        text+=$(printf '\\x%02x' $((value & 255)))
    done
    printf '%b' "$text"
}

# shard FILE TOKEN...: a token shard as llm.c writes it.
shard() {
    {
        little 4 20240520
        little 4 1
        little 4 $(($# - 1))
        head -c 1012 /dev/zero
        for token in "${@:2}"; do
            little 2 "$token"
        done
    } >"$1"
}

# ---- refusals

test_refuses_bad_data() {
    : >empty.txt
    printf x >one.txt
    bytes 4000 141 >letters.txt
    mkdir no_shards truncated magic
    shard truncated/a_train.bin 1 2 3 4
    truncate -s -1 truncated/a_train.bin
    bytes 1400 141 >magic/a_train.bin
    refuses 'cannot open missing.txt' --data missing.txt
    refuses 'empty.txt is empty' --data empty.txt
    refuses 'one.txt has 1 tokens .*--seq' --data one.txt
    refuses 'letters.txt has 3600 tokens .*lower --seq or give more' --data letters.txt --seq 4096
    refuses 'no_shards has no \*\.bin' --data no_shards
    refuses 'a_train.bin .*truncated' --data truncated
    refuses 'starts with .*20240520' --data magic
    refuses 'matches no file' --data 'none_*.bin'
    refuses '/dev/null is not a regular file' --data /dev/null
    refuses 'cannot open missing.txt' --data letters.txt --val missing.txt
}

test_refuses_a_token_beyond_the_vocabulary() {
    mkdir shards
    shard shards/a_train.bin $(seq 40) 300 $(seq 40)
    shard shards/b_val.bin $(seq 40)
    run --data shards
    refused 'a_train.bin: token 40 is 300, .*--vocab'
    [ ! -e run/checkpoint ] || fail "left a checkpoint behind"
    check "the log tells of an end" lacks '"event":"end"' run/log.jsonl
    run --data shards --vocab 301 --out wide
    succeeds
}

test_refuses_bad_options() {
    refuses '--top-k 9 is above --experts 8' --top-k 9
    refuses '--dim 16 is not divisible by --heads 3' --heads 3
    refuses 'odd size' --heads 16
    refuses 'not divisible by --kv-heads' --heads 4 --kv-heads 3
    refuses 'unknown --router tpk: the nearest is topk' --router tpk
    refuses 'unknown option --expert-din: the nearest is --expert-dim' --expert-din 4
    refuses 'unknown option --step: the nearest is --steps' --step 6
    refuses 'top1 with --renorm 1: .*no gradient' --router top1 --renorm 1
    for value in fast nan inf 0x10 ' 1' ''; do
        refuses "--lr takes a number, not '$value'" --lr "$value"
    done
    refuses '--lr 1e30 is out of range' --lr 1e30
    refuses '--seed takes a whole number' --seed 1.5
    refuses '--steps takes a whole number' --steps 6x
    refuses '--steps -1 is out of range' --steps -1
    refuses '--steps 99999999999999999999 is out of range' --steps 99999999999999999999
    refuses '--seed needs a value' --seed
    refuses '--top-k is given twice' --top-k 2 --top-k 2
    refuses "unexpected 'fast'" fast
    refuses '--schedule has no value .cosin.*nearest: cosine' --schedule cosin
    refuses '--warmup 7 is longer than --steps 6' --warmup 7
    refuses '--batch 2 is not divisible by --grad-accum 3' --grad-accum 3
    refuses '--drop .*--capacity-factor' --drop slot
    refuses '--vocab 100 is too small' --vocab 100
}

# What a user typed may hold a line's end; the message is one line all the same.
test_message_is_one_line() {
    refuses 'the nearest is topk' --router $'to\npk'
}

# A prompt is bytes; a smaller vocabulary has no embedding for some of them.
test_refuses_a_prompt_beyond_the_vocabulary() {
    refuses '--prompt' --vocab 128 --sample 4 --prompt $'\xc3\xa9'
}

test_refuses_absurd_sizes() {
    refuses 'out of memory: the run needs' --layers 1024 --dim 65536 --heads 4096 --experts 4096 --expert-dim 65536
    refuses '2\^31' --batch 1048576 --seq 4096
    refuses 'out of memory' --batch 1048576 --experts 256
    OMP_NUM_THREADS=2 refuses '--seq 65536 is out of range' --seq 65536 --batch 1 --steps 0
    refuses 'raise --heads' --dim 1032 --heads 1 --steps 0
    rm -rf run
    if [ "$(bash -c 'ulimit -v 200000; "$0" --help | wc -l' "$TRAIN" 2>/dev/null)" -gt 10 ]; then
        bash -c 'ulimit -v 200000; exec "$0" --dim 512 --out run' "$TRAIN" >out 2>err
        status=$?
        refused 'out of memory: the run needs'
        [ ! -e run ] || fail "left $(echo run/*) behind"
    else
        skip "too little memory: the program does not start under a limit (a sanitizer)"
    fi
}

# ---- directories that are refused

test_out_that_cannot_be_used() {
    run
    succeeds
    cp -r run before
    run --experts 4 --lr 1e-2
    refused '--out run holds a run with another --experts, --lr'
    check "the run that was there has changed" diff -r run before
    touch file
    for out in file file/below /proc/below; do
        run --out $out
        refused "--out $out"
    done
    mkdir foreign
    bytes 20 141 >foreign/config.json
    run --out foreign
    refused 'not a run.s configuration'

    local as_user=()
    [ "$(id -u)" != 0 ] || as_user=(setpriv --reuid=65534 --clear-groups)
    mkdir -m 555 locked
    chown -f 65534 locked
    if ! "${as_user[@]}" test -x "$TRAIN" 2>/dev/null || "${as_user[@]}" touch locked/x 2>/dev/null; then
        skip "a directory without the right to write: everything may be written here"
        return
    fi
    with_defaults --out locked
    "${as_user[@]}" "$TRAIN" "${arguments[@]}" >out 2>err
    status=$?
    refused 'cannot write into --out locked'
}

test_resume_of_what_is_no_checkpoint() {
    run --out good
    run --out smaller --experts 4
    for name in none truncated unfinished altered foreign garbled; do
        cp -r good $name
    done
    refuses_resume 'cannot read missing/config.json' missing
    rm -r none/checkpoint
    refuses_resume 'no checkpoint in none' none
    truncate -s -1 truncated/checkpoint/optimizer.safetensors
    refuses_resume 'truncated' truncated
    rm unfinished/checkpoint/manifest.json
    refuses_resume 'manifest' unfinished
    printf '\377' | dd of=altered/checkpoint/model.safetensors bs=1 seek=20000 conv=notrunc 2>/dev/null
    refuses_resume 'altered' altered
    rm -r foreign/checkpoint
    cp -r smaller/checkpoint foreign
    refuses_resume 'another model' foreign
    printf '{"layers":' >garbled/config.json
    refuses_resume 'garbled/config.json is not a run.s configuration' garbled
    resume good --experts 4
    refused '--experts 4 differs'
}

# A run of three steps cannot go on from step six: it would call the weights of step six those of step three.
test_resume_beyond_the_last_step() {
    run
    resume run --steps 3
    refused '--steps 3'
}

# ---- what a run leaves behind and prints

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
    for option in data router top-k resume out sample profile; do
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
    if ! command -v script >/dev/null; then
        skip "the progress bar: no script(1)"
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

# Sequence j of step s starts at token (s*B + j)*T: here a step takes 32 tokens and, as a target, one more.
test_unshuffled_order() {
    for at in 95 96 97 128; do
        { bytes $at 141; bytes 1 377; bytes $((399 - at)) 141; } >bad.txt
        steps_until_bad bad.txt
        check "token $at ended the run after $steps steps" test "$steps" = $(((at - 1) / 32))
    done
    mkdir shards
    shard shards/train_0.bin $(seq 50)
    shard shards/train_1.bin $(seq 50) 200 $(seq 50)
    shard shards/val.bin $(seq 50)
    for data in shards 'shards/*.bin'; do
        steps_until_bad "$data"
        check "token 100 of $data ended the run after $steps steps" test "$steps" = 3
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
    refused '^moelab: 3 steps in a row'
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

# ---- all of them, in the order of this file

if [ ! -x "$TRAIN" ]; then
    echo "there is no ./train here: run make first"
    echo "0 passed, 1 failed"
    exit 1
fi
all_passed=0
all_failed=0
mapfile -t names < <(sed -n 's/^test_\([a-z_]*\)() {$/\1/p' "$0")
for name in "${names[@]}"; do
    wanted=$#
    for word; do
        [[ $name != *$word* ]] || wanted=0
    done
    [ "$wanted" = 0 ] || continue
    mkdir "$ROOT/$name"
    begin=${EPOCHREALTIME/./}
    if (cd "$ROOT/$name" && failed=0 && { "test_$name"; exit "$failed"; }); then
        all_passed=$((all_passed + 1))
        word=ok
    else
        all_failed=$((all_failed + 1))
        word=FAIL
    fi
    printf '%-5s %s, %d ms\n' $word "$name" $(((${EPOCHREALTIME/./} - begin) / 1000))
done
echo "$all_passed passed, $all_failed failed"
[ $all_failed = 0 ]
