#!/usr/bin/env bash
# Tests of experiments/scaling_compare.sh, with programs that stand in for both sides: no GPU and no PyTorch is needed.
#
#     tests/test_scaling_compare.sh [NAME...]   from the repository's root; NAME: only the tests whose names contain it
#
# Called by run_tests.sh. Read next: cli_checks.sh, experiments/scaling_compare.sh.
# shellcheck source=tests/cli_checks.sh
. "$(dirname "$0")/cli_checks.sh"

EXPERIMENTS=$(realpath experiments)

# Ours make 1000 tokens/s on one rank and 900 on each of several, less 10 for each rank that shares the experts, half of
# that where they share the batch; "none_of_ours" fails. The peer makes 500 and 400 of those, and half in strong; its
# first way is slower by 100. It ends at "ends". mpirun starts one process, which finds the number of ranks in RANKS;
# `calls` has what either side was asked for. NO_GPU=1: PyTorch finds none.
sides() {
    mkdir bin
    cat >bin/bench_train_cuda <<'PROGRAM'
#!/bin/bash
echo "ours $RANKS $*" >>calls
[ "$2" != none_of_ours ] || exit 1
speed=$((RANKS == 1 ? 1000 : RANKS * 900 - 10 * $6)) mode=weak stages='"head":3'
if [ "$7" = --strong ]; then mode=strong speed=$((speed / 2)); fi
if [ "$RANKS" != 1 ]; then stages+=",\"exchange\":$6.5"; fi
echo "starting"
echo "{\"model\":\"$2\",\"impl\":\"moelab\",\"ranks\":$RANKS,\"ep\":$6,\"mode\":\"$mode\",\"tok_s\":$speed,"\
    "\"commit\":\"abc\",\"stages_ms\":{$stages}}"
PROGRAM
    cat >bin/python <<'PROGRAM'
#!/bin/bash
case $1 in
    -c) case $2 in *torch*) exit "${NO_GPU:-0}" ;; esac ;;
    *torch_gpu.py)
        echo "peer $RANKS ${*:2}" >>calls
        for name in "${@:3}"; do
            case $name in --*) exit ;; ends) exit 9 ;; esac
            for mode in weak strong; do
                [ $mode$RANKS != strong1 ] || continue
                for way in slow fast; do
                    speed=$((RANKS == 1 ? 500 : RANKS * 400))
                    [ $mode = weak ] || speed=$((speed / 2))
                    [ $way = fast ] || speed=$((speed - 100))
                    echo "{\"model\": \"$name\", \"impl\": \"torch\", \"way\": \"$way\", \"tok_s\": $speed," \
                        "\"ranks\": $RANKS, \"mode\": \"$mode\"}"
                done
            done
        done ;;
esac
exec python3 "$@"
PROGRAM
    cat >bin/mpirun <<'PROGRAM'
#!/bin/sh
[ "$1" = -n ] || exit 1
export RANKS="$2"
shift 2
exec "$@"
PROGRAM
    chmod +x bin/*
}

# compares ARGUMENT...: scaling_compare.sh with the stand-ins, its table in `out`.
compares() {
    MPIRUN=bin/mpirun timeout 60 "$EXPERIMENTS/scaling_compare.sh" -p bin/python "$@" bin lines >out 2>err
    status=$?
    ends 0
}

# table: its lines but for the first, blanks as one, are those on stdin.
table() {
    cat >wanted
    sed 1d out | tr -s ' ' >found
    check "the table" diff wanted found
}

test_all_numbers_of_ranks() {
    sides
    compares -m m,n -n '1 2 4' -r 7 -w W -k K -b 9
    table <<'ROWS'
m 1 1 weak 1000 100.0 % 500 100.0 % 2.00x fast
m 2 1 weak 1790 89.5 % 1.50 800 80.0 % 2.24x fast
m 2 2 weak 1780 89.0 % 2.50 800 80.0 % 2.23x fast
m 2 2 strong 890 44.5 % 2.50 400 40.0 % 2.23x fast
m 4 1 weak 3590 89.8 % 1.50 1600 80.0 % 2.24x fast
m 4 2 weak 3580 89.5 % 2.50 1600 80.0 % 2.24x fast
m 4 4 weak 3560 89.0 % 4.50 1600 80.0 % 2.23x fast
m 4 4 strong 1780 44.5 % 4.50 800 40.0 % 2.23x fast
n 1 1 weak 1000 100.0 % 500 100.0 % 2.00x fast
n 2 1 weak 1790 89.5 % 1.50 800 80.0 % 2.24x fast
n 2 2 weak 1780 89.0 % 2.50 800 80.0 % 2.23x fast
n 2 2 strong 890 44.5 % 2.50 400 40.0 % 2.23x fast
n 4 1 weak 3590 89.8 % 1.50 1600 80.0 % 2.24x fast
n 4 2 weak 3580 89.5 % 2.50 1600 80.0 % 2.24x fast
n 4 4 weak 3560 89.0 % 4.50 1600 80.0 % 2.23x fast
n 4 4 strong 1780 44.5 % 4.50 800 40.0 % 2.23x fast
ROWS
    for model in m n; do
        for asked in '1 1' '2 1' '2 2' '2 2 --strong 1' '4 1' '4 2' '4 4' '4 4 --strong 1'; do
            echo "ours ${asked%% *} --model $model --steps 7 --ep ${asked#* }"
        done
    done >wanted
    for n in 1 2 4; do
        echo "peer $n train m n --ways W --weights K --modes weak,strong --buckets 9 --repeats 7"
    done >>wanted
    check "what both were asked for" diff wanted calls
    check "lines say what they are of" python3 - lines <<'PYTHON'
import json, sys
rows = [json.loads(line) for line in open(sys.argv[1])]
assert len(rows) == 16 + 2 * (2 + 4 + 4) and all(row["commit"] == "abc" and row["time"] for row in rows)
assert rows[1]["command"] == "bin/mpirun -n 2 bin/bench_train_cuda --model m --steps 7 --ep 1"
assert "bin/mpirun -n 4 bin/python" in rows[-1]["command"]
PYTHON
}

# Three ranks have no --ep 2; without one rank there is no efficiency.
test_three_ranks_alone() {
    sides
    compares -m m -n 3
    table <<'ROWS'
m 3 1 weak 2690 1.50 1200 2.24x fast
m 3 3 weak 2670 3.50 1200 2.23x fast
m 3 3 strong 1335 3.50 600 2.23x fast
ROWS
}

test_failures_leave_the_others() {
    sides
    compares -m a,ends,b,none_of_ours -n '1 2'
    table <<'ROWS'
a 1 1 weak 1000 100.0 % 500 100.0 % 2.00x fast
a 2 1 weak 1790 89.5 % 1.50 800 80.0 % 2.24x fast
a 2 2 weak 1780 89.0 % 2.50 800 80.0 % 2.23x fast
a 2 2 strong 890 44.5 % 2.50 400 40.0 % 2.23x fast
ends 1 1 weak 1000 100.0 % missing
ends 2 1 weak 1790 89.5 % 1.50 missing
ends 2 2 weak 1780 89.0 % 2.50 missing
ends 2 2 strong 890 44.5 % 2.50 missing
b 1 1 weak 1000 100.0 % 500 100.0 % 2.00x fast
b 2 1 weak 1790 89.5 % 1.50 800 80.0 % 2.24x fast
b 2 2 weak 1780 89.0 % 2.50 800 80.0 % 2.23x fast
b 2 2 strong 890 44.5 % 2.50 400 40.0 % 2.23x fast
none_of_ours 1 1 weak missing 500 100.0 % fast
none_of_ours 2 1 weak missing 800 80.0 % fast
none_of_ours 2 2 weak missing 800 80.0 % fast
none_of_ours 2 2 strong missing 400 40.0 % fast
ROWS
    check "a failure is not told" grep -q 'failed: bin/mpirun -n 2 bin/bench_train_cuda --model none_of_ours' err
    grep -o '^peer [0-9] train [a-z_ ]*' calls >asked
    printf 'peer %s train %s \n' 1 'a ends b none_of_ours' 1 'b none_of_ours' 2 'a ends b none_of_ours' \
        2 'b none_of_ours' >wanted
    check "what the peer was asked for" diff wanted asked
}

test_without_peer() {
    sides
    NO_GPU=1 compares -m m -n '1 2'
    table <<'ROWS'
m 1 1 weak 1000 100.0 % missing
m 2 1 weak 1790 89.5 % 1.50 missing
m 2 2 weak 1780 89.0 % 2.50 missing
m 2 2 strong 890 44.5 % 2.50 missing
ROWS
    check "no word on the peer" grep -q 'ours alone' err
    check "the peer was started" lacks '^peer' calls
}

test_time_limit() {
    sides
    compares -s 0 -m m -n '1 2'
    table <<'ROWS'
m 1 1 weak missing missing
m 2 1 weak missing missing
m 2 2 weak missing missing
m 2 2 strong missing missing
ROWS
    check "something was begun" test ! -e calls
    check "no word on what was not begun: $(cat err)" \
        grep -q '0 s are over: not begun: ours, m, 2 ranks, ep 2 --strong 1' err
    check "nor on the peer" grep -q '0 s are over: not begun: PyTorch, m, 2 ranks' err
    compares -s 1000 -m m -n 1
    check "the limit is not handed on: $(cat calls)" grep -qE '^peer 1 .* --seconds (1000|9[0-9]{2})$' calls
}

# refused_call PATTERN ARGUMENT...: nothing is begun.
refused_call() {
    MPIRUN=bin/mpirun PATH=$PWD/bin:$PATH timeout 20 "$EXPERIMENTS/scaling_compare.sh" "${@:2}" >out 2>err
    status=$?
    ends 1
    check "stderr does not say '$1': $(cat err)" grep -q -- "$1" err
    check "something was begun" test ! -e calls
}

test_refusals() {
    sides
    printf '#!/bin/sh\nexit 1\n' >bin/nvidia-smi
    chmod +x bin/nvidia-smi
    refused_call 'whole seconds' -s soon bin lines
    refused_call 'give numbers of ranks' -n '1 two' bin lines
    refused_call 'no GPU is here' bin lines
    refused_call '^usage: experiments/scaling_compare.sh \[-m MODELS\]' bin
    check "the usage's second line" grep -q 'DIR OUT$' err
}

run_tests "$@"
