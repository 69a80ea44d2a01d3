# shellcheck shell=bash disable=SC2034  # for who sources this
# What the tests of experiments/sweep share: recipes, calls, and checks of the lines that come out. Sourced by
# test_sweep.sh and test_sweep_stops.sh; the rest is in cli_checks.sh.
# shellcheck source=tests/cli_checks.sh
TESTS=$(realpath tests) EXPERIMENTS=$(realpath experiments)
. "$(dirname "$0")/cli_checks.sh"
command -v python3 >/dev/null || {
    echo "skip  there is no python3"
    echo "0 passed, 0 failed"
    exit 0
}
export PYTHONDONTWRITEBYTECODE=1

# sweep ARGUMENT...: output is in the files `out` and `err`, the exit status in $status.
sweep() {
    timeout 60 python3 "$EXPERIMENTS/sweep" "$@" --program "$TRAIN" >out 2>err
    status=$?
}

# records COMMAND ARGUMENT...
records() {
    check "lines of results: $*" python3 "$TESTS/sweep_records.py" "$@"
}

# has EXPRESSION: it is true of the lines of folder/results.jsonl.
has() {
    [ "$(python3 "$TESTS/sweep_records.py" get folder/results.jsonl "$1" 2>&1)" = True ] || fail "not so: $1"
}

# sweep_refused TEXT: ended with status 1 and one line on stderr that holds TEXT.
sweep_refused() {
    ends 1
    check "stderr is not one line of sweep: $(head -n 3 err)" test "$(grep -c '^sweep: ' err) $(wc -l <err)" = "1 1"
    check "stderr does not say '$1': $(head -n 1 err)" grep -qF -- "$1" err
}

# recipe LINE...: the file demo.sweep: two arms, with the lines given, each of which replaces one of its keyword.
recipe() {
    {
        printf '%s\n' "$@"
        for line in "question Which one?" "expect a below b" "baseline topk" "seeds 1 2 3" "rates 4e-3" \
            "options --layers 1 --dim 16 --heads 2 --seq 16 --expert-dim 8 --batch 2 --steps 6 --eval-batches 1 \
--eval-every 3 --log-every 2 --save-every 2" "size tiny"; do
            printf '%s\n' "$@" | grep -q "^${line%% *} " || echo "$line"
        done
        printf '%s\n' "$@" | grep -q '^arm ' || printf '%s\n' "arm topk --router topk" "arm dense --router dense"
    } >demo.sweep
}

# A run that takes long enough to be caught at work.
LONG='options --layers 1 --dim 16 --heads 2 --seq 16 --expert-dim 8 --batch 2 --steps 240 --eval-batches 1
--eval-every 40 --log-every 10 --save-every 20'
