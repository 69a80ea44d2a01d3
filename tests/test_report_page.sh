#!/usr/bin/env bash
# Tests of experiments/report: its page, its figures and its refusals, from lines made by tests/report_inputs.py and by
# hand. No run is made but for two small ones, where ./train is built.
#
#     tests/test_report_page.sh [NAME...]        from the repository's root; NAME: only the tests whose names contain it
#
# Called by run_tests.sh. What pages are held to is in tests/report_checks.py; the loop, in script_tests.sh.
set -u
REPO=$PWD
ROOT=$(mktemp -d "${TMPDIR:-/tmp}/test_report_page.XXXXXX")
trap 'rm -rf "$ROOT"' EXIT
# shellcheck source=tests/script_tests.sh
. "$(dirname "$0")/script_tests.sh"
export PYTHONPYCACHEPREFIX=$ROOT/compiled LC_ALL=C.UTF-8

# report ARGUMENT...: output is in the files `out` and `err`, the exit status in $status.
report() {
    timeout 30 "$REPO/experiments/report" "$@" >out 2>err
    status=$?
}

# page CHECK ARGUMENT...: what tests/report_checks.py says of the page.
page() {
    check "page: $*" python3 "$REPO/tests/report_checks.py" "$1" page.html "${@:2}"
}

# tables CHECK LINES: what the page works out from losses and times.
tables() {
    check "tables: $*" python3 "$REPO/tests/report_tables.py" "$1" page.html "$2"
}

# made: the report ended well.
made() {
    check "exit status $status: $(tail -n 1 err)" test "$status" = 0
}

# refused TEXT: ended with status 1, one line on stderr that holds TEXT, and no page.
refused() {
    check "exit status $status, expected 1" test "$status" = 1
    check "stderr is not one line: $(head -n 3 err)" test "$(wc -l <err)" = 1
    check "stderr does not say '$1': $(head -n 1 err)" grep -qF -- "$1" err
    check "there is a page" test ! -e page.html
}

lines_of() { python3 "$REPO/tests/report_inputs.py" "$@"; }

SWEEP=$ROOT/sweep
lines_of synthetic "$SWEEP" || exit 1

# ---- a sweep with something for every figure

test_every_figure() {
    report "$SWEEP" -o page.html --figures figures --title 'A <title> & more'
    made
    check "stderr is not empty" test ! -s err
    page figures "$SWEEP/results.jsonl"
    page numbers "$SWEEP/results.jsonl"
    page front 'sigmoid, topk, topk-cf1 and top1'
    tables sweep "$SWEEP/results.jsonl"
    tables machine "$SWEEP/results.jsonl"
    page text 'A <title> & more' "<&\">'" \
        'Does a learned router beat a hash of the token?' 'Expected topk below hash: seen' \
        'Expected sigmoid below topk: not resolved' 'The router of broken gets no gradient from the loss' \
        'expert-choice: the router reads later tokens' 'too-fast: more FLOP/s than the device can do' \
        'Fewer than 3 seeds, so no interval: one-seed (1).' \
        'top1 (rate 0.016, seed 1): 10 steps in a row were not finite' 'untimed'
    check "figures" python3 "$REPO/tests/report_checks.py" drawings figures 15
    cp page.html first
    report "$SWEEP" -o page.html --title 'A <title> & more'
    check "the same input gives another page" cmp first page.html
}

# Two of its arms have stages with the same sum but for the order in which they are added.
test_same_page() {
    for order in 1 2 3 4 5 6; do
        PYTHONHASHSEED=$order report "$REPO/experiments/results/r1_text.jsonl" -o page.html
        made
        [ -e first ] || cp page.html first
        check "the same input gives another page" cmp first page.html
    done
}

test_baseline() {
    report "$SWEEP" -o page.html --baseline hash
    made
    page text 'Against hash, seed by seed'
    rm page.html
    report "$SWEEP" -o page.html --baseline hush
    refused '--baseline hush: no such arm; there are'
}

test_old_table() {
    lines_of converted "$REPO/experiments/results/router_table.jsonl" >table.jsonl
    report table.jsonl -o page.html --figures figures
    made
    page numbers table.jsonl
    page text 'router_table, lm wide' 'f199ec5e3182' 'The lines come from 4 commits'
    check "figures" python3 "$REPO/tests/report_checks.py" drawings figures 16
}

# ---- figures of the machine, and figure D

# A third of the lines that an H100 made, of every grid.
test_layer() {
    grep '"experts": \(4\|32\|64\),' "$REPO/experiments/results/grids.jsonl" >grids.jsonl
    report grids.jsonl -o page.html --figures figures
    made
    page layer grids.jsonl
    tables machine grids.jsonl
    for name in figure_a figure_b figure_c roofline_1; do
        check "no $name.svg" grep -q '</svg>' "figures/$name.svg"
    done
}

# Tokens/s of two devices are not one measurement taken twice.
test_scaling_on_two_devices() {
    for ranks in 1 2; do
        echo '{"model":"m","mode":"weak","ranks":'$ranks',"tok_s":'${ranks}00',"device":"A"}'
        echo '{"model":"m","mode":"weak","ranks":'$ranks',"tok_s":'${ranks}000',"device":"B"}'
    done >scaling.jsonl
    report scaling.jsonl -o page.html
    made
    page text 'm weak A: runs gets 2.00 times' 'm weak B: runs gets 2.00 times'
}

test_balance() {
    check "make figure-d" make -C "$REPO" --no-print-directory figure-d FIGURES_OUT="$PWD/drawn" \
        FIGURES_RUNS=experiments/results/r2_balance.jsonl
    mv drawn/figure_d.html page.html
    page balance "$REPO/experiments/results/r2_balance.jsonl"
    check "another figure is there" test "$(grep -o '<figure ' page.html | wc -l)" = 1
    check "no drawing" grep -q '</svg>' drawn/figure_d_1_r2_balance_gpu.svg
}

test_generation() {
    cat >generation.jsonl <<'LINES'
{"kind":"inference","model":"d12","batch":1,"prompt":64,"token_ms":{"p50":2.5,"p95":3.5},"first_ms":{"p50":7},
  "tok_s":390.5,"prompt_tok_s":9142,"device":"H100","command":"build/bench_generate_cuda"}
{"kind":"inference","model":"d12","batch":8,"prompt":64,"token_ms":{"p50":3.125,"p95":3},"first_ms":{"p50":21.5},
  "tok_s":2551.2,"prompt_tok_s":23814,"device":"H100"}
{"kind":"inference","model":"tiny","batch":8,"token_ms":{"p50":0.75},"device":"H100"}
LINES
    sed -i -z 's/\n  //g' generation.jsonl
    report generation.jsonl -o page.html
    made
    page generation generation.jsonl
    page text 'd12 makes 2.55' 'new tokens/s with 8 sequences side by side' '3 measurements of generation'
    rm page.html
    report generation.jsonl -o page.html --only figure_z
    refused '--only figure_z: no such figure; there are inference_1'
}

# ---- inputs that are not whole

test_nothing() {
    mkdir empty
    report empty -o page.html
    refused 'no results in empty'
    report none -o page.html
    refused 'none: No such file or directory'
    : >empty/results.jsonl
    report empty -o page.html
    refused 'no results in empty'
}

test_damaged_lines() {
    {
        head -n 4 "$SWEEP/results.jsonl"
        printf '%s\n' '{"kind":"run","arm":' '[1]' '{"kind":"party","arm":"x"}' '{"kind":"run"}'
        printf '\xff\xfe{"step":6}\n'
        tail -n +5 "$SWEEP/results.jsonl"
    } >damaged.jsonl
    report damaged.jsonl -o page.html
    made
    check "the lines are not named" grep -qF 'damaged.jsonl:5: not a JSON object, left out' err
    page text 'damaged.jsonl:6: not a JSON object' 'damaged.jsonl:8: a "run" line without "arm"' \
        'damaged.jsonl: 1 line of kind "party", not shown'
    page numbers "$SWEEP/results.jsonl"
}

# Losses and other numbers that are none, of the wrong kind or absent.
test_strange_values() {
    cat >strange.jsonl <<'LINES'
{"kind":"run","arm":"nan","seed":1,"rate":0.1,"val_loss":NaN,"train":[[0,0,NaN],[10,10,1e999]],"loads":[[0,null]]}
{"kind":"run","arm":"cut","seed":1,"rate":0.1,"val_loss":null,"val":[[0,0,5.5]],"steps":10,"tokens":0}
{"kind":"run","arm":"bare","val_loss":2}
{"kind":"run","arm":"odd","seed":[1],"rate":"fast","val_loss":1.5,"config":7,"val":{"a":1},"train":[1,[2],"x"],
  "loads":3,"domain_expert":[[["a"]]],"mi":"x","val_floor":"low","device":5,"versions":[1],"router_gradient":3}
{"kind":"run","arm":"fine","seed":1,"rate":0.1,"val_loss":1.25,"domain_expert":[[[0,1],[1,0]]],"train":[[1,8,2]]}
{"kind":"timing","arm":"fine","ms":0,"stages_ms":{"experts":0}}
{"kind":"timing","arm":"odd","ms":-1,"tokens_per_step":5,"stages_ms":[1]}
{"kind":"timing","arm":"only timed","ms":2,"tok_s":500}
{"kind":"failed","arm":"nan","rate":0.2,"seed":1}
{"kind":["run"],"arm":"listed"}
{"kind":"microbench"}
{"kind":"microbench","tokens":0,"dim":4,"experts":2,"top_k":1,"stages":{"route":{"ms":1}}}
{"kind":"microbench","tokens":8,"dim":4,"experts":2,"top_k":1,"grid":[1],"expert_dim":[2],"load":3,"stages":
  {"route":{"ms":1},"permute":{"ms":"x"},"experts":{"ms":2},"combine":7},"times_ms":[],"bw":{"strict_gb_s":5}}
{"kind":"microbench","tokens":8,"dim":4,"experts":2,"top_k":1,"stages":3,"bw":"fast"}
{"kind":"inference"}
{"kind":"inference","batch":0,"token_ms":{"p50":1}}
{"kind":"inference","batch":2,"token_ms":{"p50":-1},"first_ms":7,"tok_s":"x"}
{"kind":"inference","batch":2,"model":["m"],"token_ms":{"p50":3},"command":"build/bench_generate"}
{"kind":"microbench","ms":{"p50":1},"flops":100,"bytes":0,"bw":{"ms":0,"moved_bytes":5},"stages":{"x":1}}
{"ranks":2,"tok_s":5}
LINES
    sed -i -z 's/\n  //g' strange.jsonl
    report strange.jsonl -o page.html --figures figures
    made
    page text 'Without a finite final validation loss, left out: nan (rate 0.1, seed 1) and cut (rate 0.1, seed 1).' \
        'Timed, but without a run: only timed.' 'nan (rate 0.2, seed 1)'
    check "a page holds NaN" bash -c '! grep -qiE "\b(nan|inf)[,\" ]*(px|[0-9])" page.html'
}

# The rate with the lowest mean over the shared seeds is the arm's, and one at which such a seed failed is not. A seed
# that failed there later does not change the rate: the arm has no rank then, here as in the table of `sweep rank`.
test_rate_that_failed() {
    python3 - >rates.jsonl <<'PYTHON'
import json
def line(arm, rate, seed, loss):
    kind = {"kind": "run", "val_loss": loss} if loss else {"kind": "failed", "why": "not finite"}
    print(json.dumps(dict(sweep="s", size="a", arm=arm, rate=rate, seed=seed, budget="tokens", **kind)))
for arm in ("early", "late", "topk"):
    for rate, seed, loss in ((0.1, 1, 1.0), (0.1, 2, 1.2), (0.1, 3, 1.1), (0.3, 1, 1.4)):
        line(arm, rate, seed, loss)
    line(arm, 0.2, 1, None if arm == "early" else 0.5)
for seed, loss in ((2, None), (3, 0.7), (4, 0.6)):
    line("late", 0.2, seed, loss)
for seed, loss in ((2, 0.7), (3, 0.6)):
    line("topk", 0.2, seed, loss)
for seed, loss in ((1, 0.4), (2, None), (3, 0.4)):
    line("every", 0.1, seed, loss)
PYTHON
    report rates.jsonl -o page.html
    made
    for rate in early=0.1 late=0.2 topk=0.2; do
        page numbers rates.jsonl $rate
    done
    page text "Diverged at the arm's own rate: late (rate 0.2, seed 2)" \
        "every (rate 0.1, seed 2)" 'Against topk, seed by seed: higher loss: early.' \
        'The best learning rate is inside the grid for 2 of 3 arms'
    "$REPO/experiments/sweep" rank rates.jsonl >table
    check "rank says otherwise" grep -q 'Not ranked: late diverged at its rate 0.2 with seed 2' table
}

# Where texts are cut otherwise losses are in bits per byte, in curves as well.
test_other_tokenizers() {
    for tokenizer in byte vocabulary; do
        echo '{"kind":"run","arm":"'$tokenizer'","rate":0.1,"seed":1,"val_loss":3,"val_bpb":1.5,
            "tokens":'${#tokenizer}',"val":[[0,0,9],[1,8,8],[2,16,6],[3,24,4],[4,32,3]],
            "config":{"tokenizer":"'$tokenizer'"}}' | tr -d '\n'
        echo
    done >tokenizers.jsonl
    report tokenizers.jsonl -o page.html
    made
    page text 'bits per byte' 'The arms have different tokenizers' \
        'The arms were not trained on equally many tokens (4 to 10).'
    check "a curve is not in them" test "$(sed 's/<td>/\n/g' page.html | grep -c '^1.5000<')" -ge 8
    check "nats are left" bash -c '! grep -qF ">3.0000<" page.html'
}

# What an arm that was timed anew took before, or on another device, is not mixed into its speed.
test_timed_anew() {
    for entry in '"device":"A","ms":1' '"device":"B","ms":2' '"device":"B","ms":4'; do
        for router in topk hash; do
            echo '{"kind":"timing","arm":"x","tokens_per_step":8,"config":{"router":"'$router'"},'"$entry}"
        done
    done >timings.jsonl
    echo '{"kind":"run","arm":"x","rate":0.1,"seed":1,"val_loss":2}' >>timings.jsonl
    report timings.jsonl -o page.html
    made
    check "is not 8 tokens in 2 and in 4 ms" grep -qF '>3000 ±' page.html
}

test_logs() {
    if [ ! -x "$REPO/train" ]; then
        fail "./train is not built"
        return
    fi
    for router in topk hash; do
        "$REPO/train" --layers 2 --dim 16 --heads 2 --experts 4 --expert-dim 16 --seq 32 --batch 2 --steps 12 \
            --log-every 1 --eval-every 3 --eval-batches 1 --router $router --out runs/$router >train.out 2>&1
    done
    report runs -o page.html --figures figures
    made
    page text '2 layers of 16' 'Speeds are those that the runs themselves logged' 'Fewer than 3 seeds'
    page logs runs/topk/log.jsonl runs/hash/log.jsonl
    head -n 6 runs/topk/log.jsonl >begin.jsonl
    mkdir -p half/topk
    mv begin.jsonl half/topk/log.jsonl
    report half/topk -o page.html
    made
    page text 'Without a finite final validation loss, left out: topk'
    # one that diverged is no run that is still to come
    sed 's/"seed":1337/"seed":1/' runs/topk/log.jsonl >half/topk/log.jsonl
    mkdir half/lost
    sed '/^{"step":12,/d' runs/topk/log.jsonl >half/lost/log.jsonl
    echo '{"event":"skip","step":11,"in_a_row":1000000}' >>half/lost/log.jsonl
    report half -o page.html
    made
    page text "Diverged at the arm's own rate: topk (rate 0.003, seed 1337)"
    rm -r half/lost
    # a run that was stopped has an end as well, and its last evaluation is not its final one
    sed 's/"event":"end","step":12,/"event":"end","step":11,/; /^{"step":12,/d' runs/topk/log.jsonl >half/topk/log.jsonl
    report half/topk -o page.html
    made
    page text 'Without a finite final validation loss, left out: topk'
}

test_no_converter() {
    mkdir bin
    timeout 30 env PATH="$PWD/bin" "$(python3 -c 'import sys; print(sys.executable)')" "$REPO/experiments/report" \
        "$SWEEP" -o page.html --png >out 2>err
    status=$?
    made
    check "it does not say why there is no PNG" grep -q '^no PNG: neither rsvg-convert nor chromium is here' out
    check "no drawings" test -s page_figures/roofline_1.svg
}

test_unwritable() {
    report "$SWEEP" -o none/page.html
    refused 'none/page.html'
}

each_test "$@"
