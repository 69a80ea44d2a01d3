#!/usr/bin/env bash
# Tests of experiments/alltoall/table.py, with lines written by hand, and of run.sh, with programs that stand in for the
# levels: no GPU is needed.
#
#     tests/test_alltoall_ladder.sh [NAME...]   from the repository's root; NAME: only the tests whose names contain it
#
# Called by run_tests.sh. Read next: cli_checks.sh, experiments/alltoall/README.md.
# shellcheck source=tests/cli_checks.sh
. "$(dirname "$0")/cli_checks.sh"

LADDER=$(realpath experiments/alltoall)

# line LEVEL SHAPE RANKS US BYTES [DEVICE]: as a level prints it, of commit abc.
line() {
    echo "{\"ladder\":\"alltoall\",\"level\":\"$1\",\"shape\":\"$2\",\"ranks\":$3,\"us\":$4,\"bytes\":$5,"\
        "\"exchanges\":6,\"host_waits\":3,\"launches\":15,\"device\":\"${6:-GPU}\",\"commit\":\"abc\"}"
}

# tables ARGUMENT...: table.py, what it prints in `out`.
tables() {
    timeout 20 python3 "$LADDER/table.py" "$@" >out 2>err
    status=$?
}

# prints: all of `out` but empty lines is what stdin has.
prints() {
    cat >wanted
    grep . out >found
    check "the tables" diff wanted found
}

# says TEXT: ended with status 1 and this one line on stderr.
says() {
    ends 1
    echo "table.py: $1" >wanted
    check "stderr" diff wanted err
}

# Levels by their numbers, shapes in the README's order; of two lines that are alike the last one.
test_table() {
    {
        line "1 sorted" t1 2 300 4096000
        line "1 sorted" b2 2 20.04 1234567
        line "0 host loops" b2 2 1000 1234567
        line "1 sorted" b2 2 10.26 1234567
        echo 'mpirun noticed something'
        echo '{"impl":"moelab","version":"flat","shape":"b1","ranks":2}'
        echo '7'
        line "1 sorted" b2 1 9 0
        line "1 sorted" b2 2 10 0 | head -c 40
    } >lines
    tables lines
    succeeds
    prints <<'TABLES'
1 x GPU, commit abc: microseconds from x to y, median of the slowest rank
| level | b2 |
|---|---:|
| 1 sorted | 9.0 |
2 x GPU, commit abc: microseconds from x to y, median of the slowest rank
| level | b2 | t1 |
|---|---:|---:|
| 0 host loops | 1000.0 | - |
| 1 sorted | 10.3 | 300.0 |
2 x GPU, commit abc: what one exchange of b2 does; bytes to others, of the rank that sends most
| level | bytes | exchanges | waits of the host | launches |
|---|---:|---:|---:|---:|
| 0 host loops | 1,234,567 | 6 | 3 | 15 |
| 1 sorted | 1,234,567 | 6 | 3 | 15 |
TABLES
}

test_counts_of_another_shape() {
    { line "1 sorted" b1 2 1 2; line "1 sorted" b2 2 3 4; } >lines
    tables lines --counts b2
    succeeds
    check "not b2's" grep -q '^| 1 sorted | 4 | 6 | 3 | 15 |$' out
    tables lines --counts b3
    says "lines: no line of shape b3 on 2 x GPU"
}

# What one kind of GPU reached stands beside nothing of another's.
test_devices_apart() {
    { line "1 sorted" b1 2 1 2 Old; line "1 sorted" b1 2 3 4 New; } >lines
    tables lines
    succeeds
    check "not two tables of times and two of counts" test "$(grep -c '^2 x ' out)" = 4
    check "not the old one's time" grep -q '^| 1 sorted | 1.0 |$' out
    check "not the new one's time" grep -q '^| 1 sorted | 3.0 |$' out
}

test_nothing_to_print() {
    tables none
    says "none: No such file or directory"
    echo '{"impl":"moelab"}' >lines
    tables lines
    says "lines: no line of the ladder"
}

# A copy of the tree without git, with levels 1, which prints what it was asked for, and 2, which fails; two GPUs.
# shellcheck disable=SC2016  # what is in quotes is for the programs to expand
make_tree() {
    mkdir -p tree/experiments/alltoall tree/experiments/results tree/build/alltoall bin
    cp "$LADDER"/{run.sh,table.py} tree/experiments/alltoall
    touch tree/experiments/alltoall/level_{1_sorted,2_wrong}.cu
    {
        echo '#!/bin/bash'
        declare -f line
        echo 'for shape; do line "1 sorted" "$shape" "$RANKS" 5 6; done'
    } >tree/build/alltoall/level_1_sorted
    printf '#!/bin/sh\nexit 1\n' >tree/build/alltoall/level_2_wrong
    printf '#!/bin/sh\n[ "$1" = -n ] || exit 9\nexport RANKS="$2"\nshift 2\nexec "$@"\n' >bin/mpirun
    printf '#!/bin/sh\necho "GPU 0: one"\necho "GPU 1: another"\n' >bin/nvidia-smi
    chmod +x bin/* tree/build/alltoall/*
}

# runs ARGUMENT...: run.sh of the tree.
runs() {
    PATH=$PWD/bin:$PATH timeout 60 tree/experiments/alltoall/run.sh "$@" >out 2>err
    status=$?
}

test_run() {
    make_tree
    runs "1 2 4" 1 "b1 t2"
    ends 0
    check "4 ranks on 2 GPUs: $(cat err)" grep -q '^left out: 4 ranks, there are 2 GPUs$' err
    check "not the tables" grep -q '^| level | b1 | t2 |$' out
    check "not the counts" grep -q '^2 x GPU, commit abc: what one exchange of b1 does' out
    check "the lines that are kept" python3 - tree/experiments/results/alltoall_ladder.jsonl <<'PYTHON'
import json, sys
lines = [json.loads(line) for line in open(sys.argv[1])]
assert [(line["ranks"], line["shape"]) for line in lines] == [(1, "b1"), (1, "t2"), (2, "b1"), (2, "t2")]
assert all(line["command"] == 'experiments/alltoall/run.sh "1 2 4" "1" "b1 t2"' and line["date"] for line in lines)
PYTHON
    runs 1 1 b1
    ends 0
    check "earlier lines are gone" test "$(wc -l <tree/experiments/results/alltoall_ladder.jsonl)" = 5
    check "lines of earlier runs are in the table" lacks 't2' out
}

test_run_with_a_wrong_level() {
    make_tree
    runs 2 "1 2" b1
    ends 1
    check "which one: $(cat err)" grep -q '^failed, or a result is wrong: level 2 on 2 ranks$' err
    check "the others' table" grep -q '^| 1 sorted | 5.0 |$' out
    runs 2 2 b1
    ends 1
    check "nothing: $(cat err)" grep -q '^no results; failed: level 2 on 2 ranks$' err
}

run_tests "$@"
