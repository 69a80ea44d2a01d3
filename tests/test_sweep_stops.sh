#!/usr/bin/env bash
# Tests of experiments/sweep where it or its runs end early: a sweep that was killed at any moment and run again leaves
# the same lines, what is saved stays, what diverges or fails is told.
#
#     tests/test_sweep_stops.sh [NAME...]        from the repository's root; NAME: only the tests whose names contain it
#
# Called by run_tests.sh. Read next: experiments/sweep, test_sweep.sh.
# shellcheck source=tests/sweep_checks.sh
. "$(dirname "$0")/sweep_checks.sh"

# ---- interrupted

# interrupt SIGNAL CONDITION...: starts the sweep, sends the signal as soon as CONDITION holds.
interrupt() {
    python3 "$EXPERIMENTS/sweep" demo.sweep --out folder --jobs 2 --no-timing --program "$TRAIN" >out 2>&1 &
    pid=$!
    for _ in {1..1000}; do
        ! "${@:2}" 2>/dev/null || break
        sleep 0.01
    done
    kill "-$1" "$pid"
    wait "$pid" 2>/dev/null
    status=$?
}

a_checkpoint_is_there() {
    compgen -G 'folder/runs/tiny/*/0.004-[12]/checkpoint/manifest.json' >/dev/null
}

so_many_lines() {
    [ "$(wc -l <folder/results.jsonl)" -ge "$1" ]
}

# Runs of hours end with their sweep, within a second.
test_runs_end_with_their_sweep() {
    local process left
    [ -e /proc/self/exe ] || return
    LONG=${LONG//$'\n'/ }
    recipe "${LONG/--steps 240/--steps 1000000}"
    interrupt KILL a_checkpoint_is_there
    check "no run had begun" test -e folder/runs
    for _ in {1..100}; do
        left=
        for process in /proc/[0-9]*; do
            [ "$(readlink "$process/exe")" != "$TRAIN" ] || [ "$(readlink "$process/cwd")" != "$PWD" ] || left=$process
        done 2>/dev/null
        [ -n "$left" ] || return
        sleep 0.01
    done
    fail "a run of a killed sweep goes on: $left"
}

test_killed_and_run_again() {
    recipe "${LONG//$'\n'/ }" "rates 4e-3 8e-3" "seeds 1 2" "arm topk --router topk" "arm noisy --router noisy" \
        "arm tuned --init-from {base}" "before base --router sigmoid --steps 40 --lr 1e-3"
    sweep demo.sweep --out folder --jobs 2 --no-timing
    succeeds
    has '[len(of(k)) for k in ("recipe", "before", "run")] == [1, 2, 9] and all(r["before"] == {"base": 40}
        for r in of("run") if r["arm"] == "tuned")'
    mv folder whole
    for _ in {1..5}; do # where all runs are done before the signal, once more
        rm -rf folder
        interrupt TERM so_many_lines 3
        [ "$status" = 0 ] || break
    done
    ends 75
    check "did not say how to go on" grep -q 'the same command goes on from here' out
    interrupt KILL test -s folder/lock
    interrupt KILL a_checkpoint_is_there
    interrupt KILL so_many_lines 5
    cut=$(tail -n 1 folder/results.jsonl | wc -c)
    truncate -s "-$((cut / 2))" folder/results.jsonl
    interrupt KILL so_many_lines 6
    truncate -s -1 folder/results.jsonl
    interrupt KILL so_many_lines 8
    sweep demo.sweep --out folder --jobs 2 --no-timing
    succeeds
    records same whole/results.jsonl folder/results.jsonl
    check "half a line was not told" grep -q 'ended in half a line' folder/sweep.log
    check "no run went on from its checkpoint" grep -q 'resumed tiny' folder/sweep.log
    # A line that is lost is made from the run's directory, one of another configuration is made again.
    sed -i '$d' folder/results.jsonl
    sweep demo.sweep --out folder --jobs 2 --no-timing
    records same whole/results.jsonl folder/results.jsonl
    sed -i '/"noisy".*"seed":2/s/"expert_dim":8/"expert_dim":9/' folder/results.jsonl
    sweep demo.sweep --out folder --jobs 2 --no-timing
    succeeds
    check "was not told" grep -q '1 lines are of another configuration' out
    has 'len(of("run")) == 10 and records[-1]["config"]["expert_dim"] == 8'
}

test_a_damaged_checkpoint_is_started_over() {
    recipe "${LONG//$'\n'/ }" "seeds 1"
    sweep demo.sweep --out folder --jobs 2 --no-timing
    mv folder whole
    for _ in {1..5}; do # where both runs are done before the signal, once more
        rm -rf folder
        interrupt KILL a_checkpoint_is_there
        so_many_lines 2 || break
    done
    for file in folder/runs/tiny/*/0.004-1/checkpoint/model.safetensors; do
        truncate -s 100 "$file"
    done
    sweep demo.sweep --out folder --jobs 2 --no-timing
    succeeds
    check "was not told" grep -q 'did not go on from its checkpoint' out
    records same whole/results.jsonl folder/results.jsonl
}

# A run that cannot go on for now (no memory, a full disk, a signal) keeps what it has, and goes on later.
test_what_is_saved_stays() {
    cat >moody <<MOODY
#!/bin/bash
[[ -e calm || " \$* " != *" --resume "* ]] || { echo "moelab: no memory left [x.c:1, rank 0 on y]" >&2; exit 1; }
exec "$TRAIN" "\$@"
MOODY
    chmod +x moody
    recipe "${LONG//$'\n'/ }" "seeds 1"
    for _ in {1..5}; do # where both runs are done before the signal, once more
        rm -rf folder
        interrupt KILL a_checkpoint_is_there
        so_many_lines 2 || break
    done
    run=$(echo folder/runs/tiny/*/0.004-1/checkpoint/manifest.json)
    run=${run%%/checkpoint*}
    TRAIN=./moody sweep demo.sweep --out folder --no-timing
    ends 1
    check "was not told" grep -q 'FAILED .*, exit status 1: no memory left' out
    check "a checkpoint is lost" test -e "$run/checkpoint/manifest.json"
    mv "$run/checkpoint" "$run/checkpoint.old" # as a save leaves it that is interrupted at its end
    touch calm
    TRAIN=./moody sweep demo.sweep --out folder --no-timing
    succeeds
    arm=$(basename "$(dirname "$run")")
    check "began again" test "$(grep -c "started tiny $arm" folder/sweep.log) $(grep -c "resumed tiny $arm" \
        folder/sweep.log)" = "1 2"
}

# Of a run that others start from its own options are held to, so that what lies there is not taken for another.
test_another_start() {
    recipe "seeds 1" "baseline tuned" "arm tuned --init-from {base}" "before base --router topk --steps 4 --lr 1e-3"
    sweep demo.sweep --out folder --no-timing
    succeeds
    rm folder/results.jsonl
    sleep 1 # logs tell the second
    sed -i 's/^before .*/before base --router topk --steps 4 --lr 1e-3 --z-coef 0.5/' demo.sweep
    sweep demo.sweep --out folder --no-timing
    succeeds
    has '[r["config"]["z_coef"] for r in of("before")] == [0.5]'
    check "an arm kept what began with the old one" test "$(grep -c 'started tiny tuned' folder/sweep.log)" = 2
}

test_one_sweep_in_a_folder() {
    recipe "${LONG//$'\n'/ }"
    python3 "$EXPERIMENTS/sweep" demo.sweep --out folder --program "$TRAIN" --no-timing >first 2>&1 &
    pid=$!
    for _ in {1..500}; do [ -s folder/lock ] && break; sleep 0.01; done
    sweep demo.sweep --out folder
    sweep_refused "--out folder: process $pid is at work there"
    kill "$pid"
    finish
    ends 75
    # what the one at work has under its hands is not another's to tidy
    mkdir -p held/scratch
    exec 9>held/lock
    flock 9
    echo $$ >held/lock
    sweep demo.sweep --out held
    exec 9>&-
    sweep_refused "--out held: process $$ is at work there"
    check "scratch of the one at work is gone" test -d held/scratch
}

# Lines that are told, and those of sweep.log, are no reason to end a sweep.
test_no_room_for_words() {
    [ -e /dev/full ] || return
    recipe "seeds 1"
    mkdir folder
    ln -s /dev/full folder/sweep.log
    timeout 60 python3 "$EXPERIMENTS/sweep" demo.sweep --out folder --no-timing --program "$TRAIN" >/dev/full 2>err
    status=$?
    check "says: $(head -n 1 err)" test ! -s err
    has 'len(of("run")) == 2'
}

# ---- runs that fail

test_divergence() {
    recipe "rates 4e-3 90" "options --layers 2 --dim 16 --heads 2 --seq 32 --expert-dim 16 --batch 2 --steps 60 \
--eval-batches 1 --eval-every 0 --max-skips 3 --clip 0" "arm topk --router topk" "arm hash --router hash"
    sweep demo.sweep --out folder --no-timing
    succeeds
    records schema folder/results.jsonl
    has 'sorted(r["rate"] for r in of("failed")) == [90, 90] and all(r["rate"] == 0.004 for r in of("run"))'
    has 'all("not finite" in r["why"] for r in of("failed")) and len(of("run")) == 6'
    cp folder/results.jsonl before.jsonl
    sweep demo.sweep --out folder --no-timing
    check "diverged runs were made again" cmp before.jsonl folder/results.jsonl
    python3 "$EXPERIMENTS/sweep" rank folder >table
    check "the table hides what diverged" grep -q 'diverged (1)' table
    # an arm that diverges at all of its rates
    recipe "rates 80 90" "$(grep '^options' demo.sweep)" "arm topk --router topk"
    sweep demo.sweep --out lost --no-timing
    succeeds
    check "was not told" grep -q 'tiny topk: diverged at every rate' out
    python3 "$EXPERIMENTS/sweep" rank lost --strict >table
    check "is ranked" test "$?" = 1
    check "no sentence" grep -q '^- Not ranked: topk diverged at every rate' table
}

# A program that fails now and then: such a run is named, the others go on, and the next call makes it.
test_a_run_that_fails() {
    cat >moody <<MOODY
#!/bin/bash
case " \$* " in
*" --seed 2 "*"folder/runs"*) [ -e calm ] || { echo "moelab: no memory left [x.c:1, rank 0 on y]" >&2; exit 1; } ;;
esac
exec "$TRAIN" "\$@"
MOODY
    chmod +x moody
    recipe
    TRAIN=./moody sweep demo.sweep --out folder --no-timing
    ends 1
    check "was not told" grep -q 'FAILED tiny topk rate 0.004 seed 2, exit status 1: no memory left (folder/runs' out
    has 'sorted((r["arm"], r["seed"]) for r in of("run")) == [(a, n) for a in ("dense", "topk") for n in (1, 3)]'
    touch calm
    TRAIN=./moody sweep demo.sweep --out folder --no-timing
    succeeds
    has 'len(of("run")) == 6 and not of("failed")'
}

run_tests "$@"
