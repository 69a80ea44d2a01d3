# shellcheck shell=bash disable=SC2015  # A && B || C is meant so: B ends the same way in both
# What the tests of the whole program, ./train, share: running it, checks of how it ended and what it left, data to
# train on. A script sources this, defines functions test_NAME (script_tests.sh) and ends with
#
#     run_tests "$@"
#
# TRAIN names another program than ./train; AHEAD=1 says that it runs ahead of its device, so that the figures of a step
# are read when the next is under way. Sourced by test_cli_*.sh and others.
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
AHEAD=${AHEAD:-0}
ROOT=$(mktemp -d "${TMPDIR:-/tmp}/test_cli.XXXXXX")
# shellcheck source=tests/script_tests.sh
. "$(dirname "$0")/script_tests.sh"
trap 'umount "$ROOT"/*/disk 2>/dev/null; rm -rf "$ROOT"' EXIT
chmod 755 "$ROOT"
# One thread: with more, the threads of tiny kernels mostly wait for each other. A test that needs two says so.
export OMP_NUM_THREADS=1 OMP_WAIT_POLICY=passive LC_ALL=C

# Options of a run that does not give them.
DEFAULTS=(steps 6 layers 1 dim 16 heads 2 seq 16 expert-dim 8 batch 2 warmup 1 schedule constant
          eval-batches 1 eval-every 3 log-every 1 out run)

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

skip() {
    echo "  skip  $*"
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
        grep '^{"step"' "$run/log.jsonl" | grep "${3:-}" |
            sed 's/"ms":[^,]*,"tok_s":[^,]*,"mfu":[^,]*,//' >"figures_$run"
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
    params_trainable flops_per_token domains moe_layers learned leaky sees_batch""".split()
step_keys = """step tokens loss aux z lr grad_norm router_grad_norm router_main_norm router_balance_norm ms tok_s mfu
    drop token_drop padding load_cv load_kl max_vio entropy mean_entropy margin dead near_dead leaky skipped counts
    layer_entropy layer_main_norm layer_balance_norm layer_margin""".split()
val_keys = "step tokens val_loss val_bpb val_floor val_domains domain_expert mi churn".split()
events = {"resume", "skip", "sample", "memory", "checkpoint", "alarm", "router_gradient", "choices", "syncs", "end"}
assert list(header) == header_keys, f"header {list(header)}"
config, layers = header["config"], len(header["moe_layers"])
if config["perft"] == "r":
    at = step_keys.index("counts")
    step_keys[at:at] = ["perft_aux", "perft_entropy", "perft_main_norm", "perft_balance_norm"]
router, E, tokens = config["router"], config["experts"], config["batch"] * config["seq"]
def entries_are_right(count):  # of one router in one step
    if router == "threshold":  # as many as pass
        return all(0 <= n <= tokens for n in count)
    if router.startswith("soft") and config["slots"] > 0:
        return count == [config["slots"] * (config["seq"] if router == "soft-batch" else config["batch"])] * E
    if router == "expert-choice":
        slice_tokens = tokens // config["grad_accum"]
        return count == [-(-slice_tokens * config["top_k"] // E) * config["grad_accum"]] * E
    return len(count) == E and sum(count) == tokens * config["top_k"]
steps, vals = [], []
for line in lines:
    if list(line) == step_keys:
        steps.append(line["step"])
        assert line["tokens"] == line["step"] * tokens
        assert line["leaky"] == header["leaky"]
        assert len(line["counts"]) == layers and all(map(entries_are_right, line["counts"])), f"line {line}"
        assert all(len(line[key]) == layers for key in step_keys if key.startswith("layer_"))
    elif list(line) == val_keys:
        vals.append(line["step"])
        assert list(line["val_domains"]) == header["domains"]
        assert len(line["mi"]) == len(line["churn"]) == len(line["domain_expert"]) == layers
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

# Losses and norms of every line are numbers, and there are some.
is_finite() {
    check "$1/log.jsonl has no losses" grep -q '^{"step".*"loss"' "$1/log.jsonl"
    grep '^{"step"' "$1/log.jsonl" | sed 's/,"val_domains".*//' >losses # a domain may be without tokens
    check "a loss of $1 is not a number" lacks '"[a-z_]*(loss|aux|z|norm)":null' losses
}

# resumes DIR WHOLE OPTION...: DIR, stopped before, ends like WHOLE when resumed. What the evaluation before chose is
# not part of a checkpoint, so the first churn is missing.
resumes() {
    resume "$1" "${@:3}"
    succeeds
    same_state "$1" "$2"
    same_figures "$1" "$2" '"aux"'
    for run in "$1" "$2"; do
        sed -n '/"val_loss"/s/,"churn".*//p' "$run/log.jsonl" >"evaluations_$run"
    done
    check "evaluations of $1 and $2 differ" cmp "evaluations_$1" "evaluations_$2"
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

# ---- running the tests

# run_tests [NAME...]: the tests, where there is a program.
run_tests() {
    if [ ! -x "$TRAIN" ]; then
        echo "there is no $TRAIN: run make first"
        echo "0 passed, 1 failed"
        exit 1
    fi
    each_test "$@"
}
