#!/usr/bin/env bash
# Tests of experiments/bench_alltoall.c on CPU ranks: every way, wire type and kind of choices gives what each rank
# works out by itself, the check that says so notices mistakes, and the lines hold what they should.
#
#     tests/test_bench_alltoall.sh [NAME...]   from the repository's root; NAME: only the tests whose names contain it
#
# Called by run_tests.sh. Read next: rank_checks.sh, experiments/bench_alltoall.c.
# shellcheck source=tests/rank_checks.sh
. "$(dirname "$0")/rank_checks.sh"

PROGRAM=$PWD/build/bench_alltoall

# lines CONDITION COUNT: so many lines, and for each the condition, in Python, on `line`.
lines() {
    check "not $2 lines for which $1" python3 -c '
import json, sys
lines = [json.loads(line) for line in open("out")]
assert len(lines) == int(sys.argv[2]), "%d lines" % len(lines)
for line in lines:
    assert eval(sys.argv[1]), line' "$1" "$2"
}

test_every_way() {
    needs_mpi || return
    ranks 2 --shape 8,2,16,9 --full-tokens --repeats 3
    succeeds
    lines 'line["tokens"] == [9, 9] and line["ranks"] == 2 and line["repeats"] == 3 and line["seed"] == 1' 6
    lines '0 < line["us_p50"] <= line["us_p95"] and line["wall_us"] > 0 and line["commit"] and line["device"]' 6
    lines 'line["checked"] == (line["version"] != "empty") == (line["bytes"] > 0)' 6
    grep -v '"empty"' out >ways && mv ways out
    lines 'line["bytes"] == 9 * 2 * 16 * 4' 5
    lines '[line["messages"], line["backward_messages"]] == ([0, 0] if line["version"] == "p2p" else [4, 3])' 5
    lines 'abs(line["algbw"] - 2 * line["bytes"] / line["us_p50"] / 1e3) < 1e-3 and line["busbw"] <= line["algbw"]' 5
    lines 'line["plain_us_p50"] > 0 and line["backward_us_p50"] > 0 and line["exchanges"] == line["messages"]' 5
    check "what is sent" python3 - out <<'PYTHON'
import json
ways = [json.loads(line) for line in open("out")]
assert [way["version"] for way in ways] == ["flat", "bucketed", "dedup", "padded", "p2p"]
flat, bucketed, dedup, padded, p2p = ways
for kind in "sent_bytes", "backward_sent_bytes":
    assert flat[kind] == bucketed[kind]
    assert dedup[kind] < flat[kind] < padded[kind]
# counts of 8 experts; a note of 8 bytes with each row, which goes there and comes back
assert padded["sent_bytes"] == 32 + padded["room"] * (8 + 2 * 64)
# .. with p2p two notes for each of 9 places, and rows of 64 bytes as many as with dedup
assert (p2p["sent_bytes"] - 32 - 9 * 2 * 8) % 64 == 0 and 9 * 64 < p2p["sent_bytes"] < flat["sent_bytes"]
assert p2p["backward_sent_bytes"] == dedup["backward_sent_bytes"]
assert abs(padded["padded_ratio"] - 4 * padded["room"] / 36) < 1e-3
PYTHON
}

test_one_rank() {
    alone --shape 8,2,16,4 --repeats 2
    succeeds
    lines 'line["ranks"] == 1 and line.get("sent_bytes", 0) == 0 and line.get("padded_ratio", 1) == 1' 6
}

# Rows of odd lengths, one token a rank, all experts for each token, several ranks.
test_shapes() {
    needs_mpi || return
    ranks 2 t2 --shape 6,3,7,33 --shape 4,4,1,1 --repeats 1 --seed 5
    succeeds
    lines 'line["seed"] == 5' 18
    ranks 4 --shape 8,2,24,20 --repeats 1
    succeeds
    lines 'len(line["tokens"]) == 4 and all(1 <= tokens < 20 for tokens in line["tokens"])' 6
}

test_wire_types() {
    needs_mpi || return
    for wires in 'bf16 fp8' 'fp8 fp16' 'fp16 fp32'; do
        read -r there back <<<"$wires"
        ranks 2 --shape 8,2,48,9 --wire "$there" --wire-back "$back" --repeats 1
        succeeds
        lines 'line["version"] == "empty" or [line["wire"], line["wire_back"]] == "'"$wires"'".split()' 6
    done
    lines 'line["version"] == "empty" or line["bytes"] == max(line["tokens"]) * 2 * 48 * 2' 6
}

test_skew() {
    needs_mpi || return
    for skew in none zipf:1.5 one empty; do
        ranks 2 --shape 8,2,16,60 --full-tokens --exchange dedup --skew $skew --repeats 1
        succeeds
        lines 'line["skew"] == "'$skew'"' 2
        cat out >>all
    done
    mv all out
    check "how uneven the ranks are" python3 - <<'PYTHON'
import json
none, zipf, one, empty = (line["room"] for line in map(json.loads, open("out")) if line["version"] == "dedup")
assert 60 <= none < zipf < empty == 120 and none < one
PYTHON
}

test_sweeps() {
    needs_mpi || return
    ranks 2 --sweep k --shape 6,1,8,16 --exchange padded --full-tokens --repeats 1
    succeeds
    lines 'line["shape"] == "k=%d" % line["k"] and line["T"] == 16' 10
    ranks 2 --sweep batch --shape 6,1,8,16 --exchange padded --full-tokens --repeats 1
    lines 'line["shape"] == "batch=%d" % (line["T"] // 2)' 12
    ranks 2 --sweep experts --shape 6,2,8,16 --exchange padded --full-tokens --repeats 1
    lines 'line["shape"] == "experts=%d" % (line["E"] // 2) and line.get("padded_ratio", 1) >= 1' 12
}

# A row that is dropped on the way makes a sum that is wrong.
test_check_notices() {
    needs_mpi || return
    ranks 2 --shape 8,2,16,60 --full-tokens --exchange padded --room 3 --repeats 1
    [ "$status" != 0 ] || fail "passed with dropped rows"
    check "no word on the result: $(cat err)" grep -q '^moelab: wrong result: 8,2,16,60 sum of token' err
}

test_refusals() {
    local wrong=('b9' '--exchange fastest' '--skew zipf:' '--sweep heads' '--shape 4,5,8,2' '--repeats 0' '--wire'
                 '--skew empty' '--exchange padded+graph' '--room -1' '--wire fp9')
    for arguments in "${wrong[@]}"; do
        # shellcheck disable=SC2086  # words
        alone $arguments
        ends 1
        check "not one line of moelab: $(cat err)" test "$(grep -c '^moelab: ' err)" = 1
    done
    needs_mpi || return
    ranks 2 --shape 7,2,16,4
    check "7 experts on 2 ranks" grep -q '^moelab: 7,2,16,4: 7 experts cannot be shared out' err
}

run_tests "$@"
