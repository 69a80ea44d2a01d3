#!/usr/bin/env bash
# Tests of experiments/sweep: what it runs and keeps, its budgets and places, what it refuses, and the table that
# `sweep rank` makes.
#
#     tests/test_sweep.sh [NAME...]        from the repository's root; NAME: only the tests whose names contain it
#
# Called by run_tests.sh. Read next: experiments/sweep, test_sweep_stops.sh, sweep_records.py, sweep_rank.py,
# sweep_statistics.py.
# shellcheck source=tests/sweep_checks.sh
. "$(dirname "$0")/sweep_checks.sh"

# ---- a whole sweep

test_a_sweep() {
    recipe "rates 4e-3 1e-3" "size tiny" "size wide --dim 24 --heads 3"
    sweep demo.sweep --out folder --jobs 2 --timing-steps 8
    succeeds
    records schema folder/results.jsonl
    has '[len(of(k)) for k in ("recipe", "run", "timing", "failed")] == [1, 16, 4, 0]'
    has '{(r["size"], r["arm"], r["seed"]) for r in of("run")} ==
        {(s, a, n) for s in ("tiny", "wide") for a in ("topk", "dense") for n in (1, 2, 3)}'
    has 'sorted(r["phase"] for r in of("run")) == ["rates"] * 8 + ["seeds"] * 8'
    # all seeds at the rate that was better with the first
    has 'all(r["rate"] == min((x["val_loss"], x["rate"]) for x in of("run") if x["phase"] == "rates" and
        (x["size"], x["arm"]) == (r["size"], r["arm"]))[1] for r in of("run") if r["seed"] > 1)'
    has 'all(r["config"]["dim"] == {"tiny": 16, "wide": 24}[r["size"]] for r in of("run"))'
    has 'all(r["steps"] == 8 and r["warmup_steps"] == 10 and r["config"]["steps"] == 6 + 18 for r in of("timing"))'
    has 'all(r["weights"] == "trained" and r["seed"] == 1 for r in of("timing"))'
    has 'all(r["config"]["resume"].endswith("runs/%(size)s/%(arm)s/%(rate)g-1" % r) for r in of("timing"))'
    check "checkpoints are left" test -z "$(find folder -name checkpoint)"
    has 'all(r["side_by_side"] == 2 and r["device"].endswith("(1 thread, AVX2)") == ("AVX2" in r["device"])
        for r in of("run"))'
    check "a checkpoint is left" test -z "$(find folder -name checkpoint)"
    check "files of a run" test "$(echo folder/runs/wide/dense/0.004-1/*)" = "$(echo \
        folder/runs/wide/dense/0.004-1/{config.json,log.jsonl,output.txt,report.html})"
    check "scratch is left" test ! -e folder/scratch
    check "the recipe is another" cmp demo.sweep folder/recipe
    # nothing is left to do
    cp folder/results.jsonl before.jsonl
    sweep demo.sweep --out folder
    succeeds
    check "lines were added" cmp before.jsonl folder/results.jsonl
    # arms, seeds and rates may be added
    sed -i 's/^seeds .*/seeds 1 2 3 4/; s/^rates .*/rates 4e-3 1e-3 2e-3/; $a arm hash --router hash' demo.sweep
    sweep demo.sweep --out folder --no-timing --size tiny --keep-runs
    succeeds
    has '{(r["arm"], r["seed"]) for r in of("run") if r["size"] == "tiny"} ==
        {(a, n) for a in ("topk", "dense", "hash") for n in (1, 2, 3, 4)}'
    has 'sum(r["rate"] == 0.002 and r["seed"] == 1 for r in of("run")) == 3 and len(of("recipe")) == 2'
    check "no checkpoint is kept" test -e folder/runs/tiny/hash/0.002-1/checkpoint/manifest.json
    python3 "$EXPERIMENTS/sweep" rank folder --strict >out 2>err
    status=$?
    succeeds
    check "three arms are ranked" test "$(sed -n '/tiny: equal tokens/,/Losses are/p' out | grep -c '^| [a-z]')" = 4
}

test_a_dry_run() {
    recipe
    sweep demo.sweep --dry-run
    succeeds
    check "no sum" grep -qE '^6 runs, [0-9.]+[kMG]FLOP, about 0:00:0[0-9] with 1 at a time' out
    check "tokens of a run" grep -qE '^tiny +topk +3 +6 +192 ' out
    sweep demo.sweep --dry-run --out folder --seeds 1 --steps 5
    succeeds
    check "made more than a cache" test "$(echo folder/*)" = "folder/lock folder/probes.json folder/sweep.log"
    check "tokens of a short run" grep -qE '^tiny +topk +1 +5 +160 ' out
    # evaluations count, and text that is read before an arm begins is text that is read
    recipe "baseline topk" "arm topk --router topk" "arm long --router topk --eval-batches 1000000" \
        "before one --lr 1e-3 --steps 2" "before two --lr 1e-3 --steps 2 --init-from {one}" \
        "arm chain --steps 2 --init-from {two}"
    sweep demo.sweep --dry-run
    succeeds
    check "evaluations take no time: $(cat out)" awk '$2 == "long" && $NF != "0:00:00" { found = 1 }
        END { exit !found }' out
    sed -i 's/--steps 2 --init-from {two}/--steps 3 --init-from {two}/' demo.sweep
    sweep demo.sweep --dry-run
    sweep_refused "arm chain of size tiny draws 96 tokens and the baseline 192"
    # two seeds try both rates, the third runs at the best one
    recipe "rates 4e-3 1e-3" "rate-seeds 2"
    sweep demo.sweep --dry-run
    succeeds
    check "runs of two rates: $(cat out)" grep -qE '^tiny +topk +5 +6 +192 ' out
    recipe "options --layers 1 --dim 16 --heads 2 --seq 16 --expert-dim 8 --batch 2 --steps 60 --warmup 50"
    sweep demo.sweep --dry-run # a warm-up longer than what is timed
    succeeds
    for recipe in "$EXPERIMENTS"/recipes/*.sweep; do
        check "recipe $recipe" python3 -c "import sys; sys.path[:0] = ['$EXPERIMENTS/sweeping', '$EXPERIMENTS']
import sweep_recipe; sweep_recipe.read(sys.argv[1])" "$recipe"
    done
}

# ---- budgets and places

test_budgets() {
    recipe "budget flops" "arm topk --router topk" "arm one --router top1 --top-k 1 --expert-dim 32"
    sweep demo.sweep --out folder --no-timing --seeds 1
    succeeds
    has '(lambda t, o: abs(o["steps"] * o["flops_per_token"] / (t["steps"] * t["flops_per_token"]) - 1) < 0.5 / 5 and
        o["steps"] < t["steps"])(*sorted(of("run"), key=lambda r: r["arm"], reverse=True))'
    rm -r folder
    recipe "budget seconds" "arm topk --router topk" "arm wide --router topk --expert-dim 256"
    sweep demo.sweep --out folder --no-timing
    sweep_refused "budget seconds needs the time of a step of topk: leave --no-timing out"
    sweep demo.sweep --out folder --seeds 1 --timing-steps 20
    succeeds
    has '(lambda ms: {r["arm"]: r["steps"] for r in of("run")} ==
        {"topk": 6, "wide": max(1, round(6 * ms["topk"] / ms["wide"]))})({r["arm"]: r["ms"] for r in of("timing")})'
    recipe "arm topk --router topk" "arm long --router topk --steps 7"
    sweep demo.sweep --out other
    sweep_refused "demo.sweep:2: arm long of size tiny draws 224 tokens and the baseline 192"
}

# An arm is timed with the weights that training left, which are trained again where they are gone; `budget seconds`
# must time before.
test_timings_of_trained_weights() {
    recipe "rates 4e-3 1e-3"
    sweep demo.sweep --out folder --seeds 2,3 --no-timing
    succeeds
    sweep demo.sweep --out folder --seeds 2,3 --timing-steps 2
    succeeds
    has 'len(of("timing")) == 2 and all(r["weights"] == "trained" and r["seed"] == 2 for r in of("timing"))'
    has 'all(r["config"]["resume"] == "folder/scratch/tiny-alone/trained" for r in of("timing"))'
    sed -i 's/"weights":"trained",//' folder/results.jsonl
    sweep demo.sweep --out folder --seeds 2,3 --timing-only --timing-steps 2
    succeeds
    has 'len(of("timing")) == 4 and of("timing")[-1]["weights"] == "trained"'
    rm -r folder
    recipe "budget seconds"
    sweep demo.sweep --out folder --seeds 1 --timing-steps 2
    succeeds
    has 'len(of("timing")) == 2 and all(r["weights"] == "fresh" for r in of("timing"))'
}

# without OPTION RUNS: the sweep, once more when its lines lack the option, has so many lines of runs.
without() {
    rm -rf folder
    sweep demo.sweep --out folder --no-timing
    succeeds
    has "len(of('run')) == 2 and all('${1%%:*}' in r['config'] for r in of('run'))"
    sed -i "s/\"${1%%:*}\":${1#*:},//" folder/results.jsonl
    has "all('${1%%:*}' not in r['config'] for r in of('run'))"
    sweep demo.sweep --out folder --no-timing
    succeeds
    has "len(of('run')) == $2"
}

# A line of an older program lacks the options that came since; they are as their defaults, or the run is made again.
test_lines_of_an_older_program() {
    recipe "seeds 1"
    without 'lora:"none"' 2
    recipe "seeds 1" "options --layers 1 --dim 16 --heads 2 --seq 16 --expert-dim 8 --batch 2 --steps 6 --z-coef 0.5"
    without 'z_coef:0.5' 4
}

# Runs are told their GPU and their threads, no more at once than there are places, and timings are alone.
test_places() {
    cat >seen <<SEEN
#!/bin/bash
[[ " \$* " != *" --out folder/runs"* ]] || runs=1
[[ " \$* " != *"--log-every 1 "* ]] || timing=1
echo "begin \${runs:-0} \${timing:-0} \$CUDA_VISIBLE_DEVICES \$OMP_NUM_THREADS \$OMP_WAIT_POLICY" >>places
"$TRAIN" "\$@"
status=\$?
echo "end" >>places
exit \$status
SEEN
    chmod +x seen
    recipe "${LONG//$'\n'/ }"
    unset OMP_WAIT_POLICY
    TRAIN=./seen sweep demo.sweep --out folder --gpus 3,5 --per-gpu 2 --threads 2 --timing-steps 2
    succeeds
    has 'all(r["side_by_side"] == 2 for r in of("run"))'
    check "places" test "$(grep 'begin 1' places | sort | uniq -c | awk '{print $3, $4, $5, $6, $7}' | paste -sd,)" = \
        "1 0 3 2 passive,1 0 5 2 passive"
    check "timings are on one GPU" test "$(grep 'begin 0 1' places | cut -d' ' -f4 | sort -u)" = 3
    check "more runs at once than places, or only one" awk '/^begin 1/ { n++ } /^end/ && n > 0 { n-- }
        n > most { most = n } END { exit most < 2 || most > 4 }' places
    check "a timing has company" awk '/^begin/ { n++ } /^begin 0 1/ && n > 1 { exit 1 } /^end/ { n-- }' places
    sweep demo.sweep --out folder --gpus 3,3
    sweep_refused "a GPU stands twice: --per-gpu N runs N on each"
}

# ---- refusals

# misread TEXT LINE...: a recipe that reading alone refuses, kept as a case.
misread() {
    cases=$((cases + 1))
    recipe "${@:2}"
    mv demo.sweep "case_$cases"
    echo "$1" >"case_$cases.says"
}

test_bad_recipes() {
    cases=0
    misread "demo.sweep:1: unknown keyword 'arms': choose question" "arms a b"
    misread "demo.sweep:2: arm topk stands twice, first in line 1" "arm topk --router topk" "arm topk"
    misread "demo.sweep:1: baseline dance is not an arm: choose topk, dense" "baseline dance"
    misread "demo.sweep:1: 'x' is no seed" "seeds 1 x"
    misread "demo.sweep:1: '2' stands twice" "seeds 1 2 2"
    misread "demo.sweep:1: budget 'hours': choose tokens, flops, seconds" "budget hours"
    misread "demo.sweep:1: --seed is the sweep's own: use seeds" "options --seed 3"
    misread "demo.sweep:2: arm topk has no --steps" "options --dim 16" "arm topk"
    misread "demo.sweep:2: arm b starts from {base}: add a line 'before base ...'" "arm topk" "arm b --init-from {base}"
    misread "demo.sweep:2: size 'a/b': a name is letters" "arm topk" "size a/b"
    misread "demo.sweep:1: rates of 'big', which is not a size: choose tiny" "rates big 1e-3" "rates 1e-3"
    misread "demo.sweep:1: rate-seeds 4, but there are 3 seeds" "rate-seeds 4"
    misread "demo.sweep:2: arm topk: --eval-every often is no number" "options --steps 6 --eval-every often" "arm topk"
    misread "demo.sweep:2: arm topk: --steps  is no number" "options --dim 16 --steps" "arm topk"
    check "recipes" python3 - "$EXPERIMENTS" "$cases" <<'PYTHON'
import sys
sys.path[:0] = [sys.argv[1] + '/sweeping', sys.argv[1]]
import sweep_recipe
for case in range(1, int(sys.argv[2]) + 1):
    text, says = open(f"case_{case}").read(), open(f"case_{case}.says").read().strip()
    try:
        sweep_recipe.parse(text, "demo.sweep")
    except sweep_recipe.RecipeError as error:
        assert says in str(error), f"says '{error}', not '{says}'"
    else:
        raise AssertionError(f"is taken: {says}")
PYTHON
}

# refuses_sweep TEXT LINE...
refuses_sweep() {
    recipe "${@:2}"
    sweep demo.sweep --out folder --no-timing
    sweep_refused "$1"
    check "a run was made: $1" test ! -e folder/runs
}

test_refused_recipes() {
    refuses_sweep "demo.sweep:1: budget 'hours': choose" "budget hours"
    refuses_sweep "arm b of size tiny: $TRAIN says: unknown option --rooter" "arm topk" "arm b --rooter topk"
    refuses_sweep "arm b of size tiny: $TRAIN says: --router" "arm topk" "arm b --router expert-choice"
    grep -v '^expect' demo.sweep >none.sweep
    sweep none.sweep --out folder
    sweep_refused "none.sweep:1: no expect: add a line 'expect ...', the sign you expect"
    printf 'question a\nexpect b\n' >demo.sweep
    sweep demo.sweep --out folder
    sweep_refused "demo.sweep:1: no arms"
    sweep missing.sweep --out folder
    sweep_refused "missing.sweep: No such file"
}

test_bad_places() {
    recipe
    touch file
    sweep demo.sweep --out file/folder
    sweep_refused "--out file/folder: cannot write there"
    TRAIN=./nothing sweep demo.sweep --out folder
    sweep_refused "./nothing is not there, or is no program"
    sweep demo.sweep --out folder --arms topk,tip
    sweep_refused "--arms tip is not in the recipe: choose topk, dense"
    sweep demo.sweep --out folder --seeds 9
    sweep_refused "--seeds 9 is not in the recipe: choose 1, 2, 3"
    sweep demo.sweep --out folder --no-timing
    succeeds
    cp folder/results.jsonl before.jsonl
    sed -i 's/^expect .*/expect b below a/' demo.sweep
    sweep demo.sweep --out folder
    sweep_refused "--out folder: made by a recipe with another expect (folder/recipe)"
    mv folder/recipe elsewhere # it stands among the results as well
    sweep demo.sweep --out folder
    sweep_refused "--out folder: made by a recipe with another expect (folder/recipe)"
    mv elsewhere folder/recipe
    recipe "seeds 2 3"
    sweep demo.sweep --out folder
    sweep_refused "made by a recipe with another seeds"
    recipe
    sweep demo.sweep --out folder --steps 5
    sweep_refused "made by a recipe with another steps"
    cp demo.sweep other.sweep
    sweep other.sweep --out folder
    sweep_refused "--out folder: holds the sweep demo, this one is other"
    sed -i '2s/^{/[/' folder/results.jsonl
    sweep demo.sweep --out folder
    sweep_refused "folder/results.jsonl:2: not JSON: mend or remove the line"
    sed -i '2s/^\[/{/' folder/results.jsonl
    check "lines have changed" cmp before.jsonl folder/results.jsonl
}

# ---- statistics and the table

test_statistics() {
    check "intervals" python3 "$TESTS/sweep_statistics.py" "$EXPERIMENTS"
}

test_rank() {
    check "the table" python3 "$TESTS/sweep_rank.py" "$EXPERIMENTS"
}

run_tests "$@"
