#!/usr/bin/env bash
# Tests of the grids of experiments/bench_layer.c: how many points there are, what their lines hold, and that the
# numbers of a line agree with each other; and of grids.sh and grid_table.py, which keep and tabulate them.
#
#     tests/test_bench_layer.sh [NAME...]    from the repository's root; NAME: only the tests whose names contain it
#
# Called by run_tests.sh. Read next: cli_checks.sh, experiments/bench_grid_line.h.
# shellcheck source=tests/cli_checks.sh
. "$(dirname "$0")/cli_checks.sh"

PROGRAM=$PWD/build/bench_layer
EXPERIMENTS=$PWD/experiments

# grid OPTION...: its lines in `out`.
grid() {
    timeout 60 "$PROGRAM" "$@" >out 2>err
    status=$?
}

# lines COUNT: so many lines; the program on standard input, in Python, says what holds for `line`.
lines() {
    check "$1 lines: $(wc -l <out) lines, $(head -c 300 err)" python3 -c '
import json, sys
lines = [json.loads(text) for text in open("out")]
assert len(lines) == int(sys.argv[1]), len(lines)
body = compile(sys.stdin.read(), "lines", "exec")
for line in lines:
    try:
        exec(body, {"line": line, "lines": lines})
    except Exception as error:
        sys.exit("%s: %r" % (error, line))' "$1"
}

# The points of the full grids, without a device.
test_points() {
    for counts in course:162 large:36 pack:54; do
        grid --grid ${counts%:*} --dry-run 1
        succeeds
        lines ${counts#*:} <<'PYTHON'
assert line["dry_run"] and line["kind"] == "microbench" and line["scale"] == "full" and line["device"] is None
assert (line["seed"], line["warm_up"], line["iterations"]) == (17, 10, 100) and line["commit"] and line["ts"]
names = ("tokens", "dim", "experts", "top_k", "router", "layout", "capacity_factor")
assert len({tuple(each[name] for name in names) for each in lines}) == len(lines)
def values(name):
    return sorted({each[name] for each in lines})
wanted = {
    "course": ([4096, 16384, 65536], [1024, 2048], [4, 8, 16], [1, 2], ["soft", "top1", "topk"], [0, 1, 1.25]),
    "large": ([8192, 16384, 32768], [4096], [64, 128, 256], [2], ["topk"], [0, 1, 1.25]),
    "pack": ([8192, 16384, 32768], [2048, 4096], [32, 64, 128], [1, 2, 4], ["topk"], [0]),
}[line["grid"]]
assert tuple(map(values, ("tokens", "dim", "experts", "top_k", "router", "capacity_factor"))) == wanted
assert line["batch"] * line["seq"] == line["tokens"]
PYTHON
    done
    grid --grid pack --dry-run 1 --layout compact,padded,block --load zipf:1.5
    succeeds
    lines 216 <<<'assert line["load"] == "zipf:1.5" and (line["layout"] == "padded") == (line["capacity_factor"] > 0)'
}

# What holds for every measured line: times, shares, counts.
common() {
    cat <<'PYTHON'
from math import isclose
stages = line["stages"]
assert isclose(sum(stage["share"] for stage in stages.values()), 1, abs_tol=1e-5)
assert isclose(sum(stage["ms"] for stage in stages.values()), line["stage_sum"], rel_tol=1e-4)
assert isclose(line["stage_sum"] / line["ms"], line["stage_sum_over_forward"], rel_tol=1e-2)
for name, times in line["times_ms"].items():
    if name != "unit" and (name != "experts" or stages["experts"]["flops"]):
        assert 0 <= times["p50"] <= times["p95"] and times["avg"] > 0 and times["std"] >= 0, name
        assert times["count"] >= 3 * line["repeats"] and times["half_width"] >= 0 and times["mean"] > 0, name
assert line["ms"] == line["times_ms"]["forward"]["p50"]
assert isclose(line["flops"], sum(stage["flops"] for stage in stages.values()), rel_tol=1e-6)
assert isclose(line["bytes"], sum(stage["bytes"] for stage in stages.values()), rel_tol=1e-6)
assert isclose(line["ai"], line["flops"] / line["bytes"], rel_tol=1e-4)
assert isclose(line["waste"], line["rows_computed"] / line["rows"], rel_tol=1e-4)
assert isclose(line["padding"], 1 - line["rows"] / line["rows_computed"], abs_tol=1e-4)
assert line["memory_mib"]["all"] >= line["memory_mib"]["activations"] > 0 and line["device"] and line["versions"]
PYTHON
}

# Bandwidth: both conventions, whose constants at one known point are written out.
test_pack() {
    grid --grid pack --scale small --seconds 0.002 --iterations 4 --repeats-of-all 2
    succeeds
    { common; cat <<'PYTHON'; } | lines 54
def bandwidth(factor, N, C, K, number, ms):
    return factor(K) * C * number * N / ms / 1e6
def legacy(K):
    return 2 * K
def strict(K):
    return 2 + 2 * K
assert round(bandwidth(legacy, 16384, 4096, 2, 2, 3.37), 1) == 159.3
assert int(10 * bandwidth(strict, 16384, 4096, 2, 2, 3.37)) == 2389
bw, point = line["bw"], (line["tokens"], line["dim"], line["top_k"], 4)
assert isclose(bw["legacy_gb_s"], bandwidth(legacy, *point, bw["ms"]), rel_tol=1e-3)
assert isclose(bw["strict_gb_s"], bandwidth(strict, *point, bw["ms"]), rel_tol=1e-3)
N, C, K = point[:3]
assert bw["moved_bytes"] == 3 * N * K * C * 4 + N * C * 4 + N * K * 4 + N * K * 8  # rows in and out twice, y, indices
assert bw["ms"] == line["times_ms"]["moves"]["p50"] and line["gemm"] is None and line["rows"] == N * K
PYTHON
}

test_layers() {
    grid --grid course --scale small --router topk,soft --seconds 0.002 --iterations 3 --repeats-of-all 2 \
        --points 1-15
    succeeds
    { common; cat <<'PYTHON'; } | lines 15
N, C, H, K = line["tokens"], line["dim"], line["expert_dim"], line["top_k"]
soft = line["router"] == "soft"
assert soft == (line["layout"] == "slots") == (line["bw"] is None) and H == 4 * C and line["act"] == "gelu"
assert stages["experts"]["flops"] == 4 * line["rows"] * C * H
assert isclose(line["gemm"]["tflops"], stages["experts"]["flops"] / line["gemm"]["ms"] / 1e9, rel_tol=1e-3)
assert line["memory_mib"]["weights"] > 0 and line["memory_mib"]["gradients"] > 0
if line["layout"] == "compact":
    assert line["rows"] == line["rows_computed"] == N * K and line["drop"] == 0
if line["layout"] == "padded":
    E = line["experts"]
    assert line["rows_computed"] == E * min(N, -(-int(4 * line["capacity_factor"] * K * N) // (4 * E)))
    assert isclose(line["drop"], 1 - line["rows"] / (N * K), abs_tol=1e-4)
if line["layout"] == "block":
    assert line["rows"] == N * K and line["rows_computed"] % 64 == 0
PYTHON
}

# Loads: equal ones have no spread, Zipf's grow with the exponent; the label of shared weights; what does not fit.
test_choices() {
    for load in uniform zipf:0.5 zipf:2; do
        grid --grid large --scale small --layout compact --load $load --seconds 0.002 --iterations 3 \
            --shared-weights 1 --points 1-2
        succeeds
        lines 2 <<<'assert line["router"] == "forced" and line["shared_weights"] is True and line["bw"]'
        cat out >>all
    done
    mv all out
    lines 6 <<'PYTHON'
spread = [each["load_cv"] for each in lines if each["point"] == line["point"]]
assert spread[0] == 0 < spread[1] < spread[2] and len(spread) == 3, spread
PYTHON
    grid --grid large --scale small --memory 0.008 --layout padded --capacity-factor 1 --seconds 0.002 \
        --iterations 3 --points 1-3
    succeeds
    lines 3 <<'PYTHON'
assert ("skipped" in line) == (line["experts"] == 64) != ("ms" in line)
assert line.get("skipped", "needs 0.01 GiB") == "needs 0.01 GiB"
PYTHON
}

test_refusals() {
    local wrong=('--grid what' '--grid pack --scale tiny' '--grid pack --router top1' '--load zipf:x --grid pack'
                 '--layout wide --grid course' '--router nobody --grid course' '--repeats-of-all 0 --grid pack'
                 '--iterations 1.5 --grid pack' '--shared-weights 1 --grid pack' '--points 9-3 --grid pack'
                 '--points 4x --grid pack' '--points 55 --grid pack --dry-run 1'
                 '--load uniform --router topk --grid course' '--seconds' '--grids pack')
    for arguments in "${wrong[@]}"; do
        # shellcheck disable=SC2086  # words
        grid $arguments
        refused "${arguments%% *}"
        check "$arguments: printed something" test ! -s out
    done
}

# grids.sh keeps the lines with command and time, and prints a table; the single configurations are as they were.
test_script() {
    timeout 60 "$EXPERIMENTS/grids.sh" -g large -o '--scale small --seconds 0.002 --iterations 3 --points 1-12' \
        "$PROGRAM" kept \
        >table 2>err
    check "exit status: $(cat err)" test $? = 0
    cp kept out
    lines 12 <<<'assert line["command"].endswith("--points 1-12") and line["time"] and line["commit"] != "unknown"'
    check "no table: $(cat table err)" grep -qE '^large +topk +256 padded 1 ' table
    timeout 60 "$EXPERIMENTS/grids.sh" -g wide,large -o '--scale small --seconds 0.002 --iterations 3 --points 1' \
        "$PROGRAM" kept >table 2>err
    check "a grid that failed ends well" test $? = 1
    check "no table of the other: $(cat table err)" grep -qE '^large +topk +compact ' table
    timeout 20 "$EXPERIMENTS/grids.sh" nowhere kept >out 2>err
    check "a program that is not there" grep -q '^grids.sh: nowhere is not there: make nowhere$' err
    grid --tokens 64 --dim 16 --expert-dim 16 --repeats 2
    succeeds
    lines 1 <<<'assert line["layer"] == "own" and line["ms"] > 0 and line["rows"] == 128 and line["forward_stages_ms"]'
    grid --dispatch 64,16,8,2 --repeats 2
    succeeds
    lines 1 <<<'assert line["dispatch"] == "64,16,8,2" and line["gb_s"] >= line["gb_s_legacy"] and line["plan_ms"] > 0'
}

# The table from lines of known numbers: a ratio whose interval leaves 1 is resolved, one that holds 1 is not.
test_table() {
    python3 - >lines.jsonl <<'PYTHON'
import json
def point(layout, factor, experts, mean, half, **more):
    share = {"share": 0.2, "ms": mean / 5}
    return {"kind": "microbench", "grid": "course", "scale": "full", "tokens": 4096, "dim": 8, "expert_dim": 8,
            "experts": experts, "top_k": 2, "router": "topk", "layout": layout, "capacity_factor": factor,
            "load": "router", "shared_weights": False, "padding": 0.25, "drop": 0.5, "device": "D", "commit": "C",
            "stages": {name: share for name in ("route", "permute", "dispatch", "experts", "combine")},
            "stage_sum_over_forward": 1.01, "bw": None,
            "times_ms": {"forward": {"mean": mean, "half_width": half}}, **more}
rows = [point("compact", 0, 4, 9, 0.1), point("compact", 0, 4, 2, 0.01), point("compact", 0, 8, 2, 0.01),
        point("compact", 0, 16, 2, 0.01), point("padded", 1.25, 4, 3, 0.01), point("padded", 1.25, 8, 2.02, 0.1),
        point("padded", 1.25, 16, 1, 0.01), {"kind": "run"}, {"kind": "microbench", "dry_run": True},
        point("padded", 1, 16, 1, 0.01, skipped="needs 99 GiB")]
# the same points with another load, on another device, or with weights that are shared are points of their own
rows += [dict(r, load="zipf:2", times_ms={"forward": {"mean": 5, "half_width": None}}) for r in rows[1:3]]
rows += [dict(r, shared_weights=True, times_ms={"forward": {"mean": 50, "half_width": 1}}) for r in rows[:1]]
rows += [dict(r, device="E", times_ms={"forward": {"mean": 4, "half_width": 0.1}}) for r in rows[1:5:3]]
rows[2]["stages"] = dict(rows[2]["stages"], combine={"ms": 0.5, "share": 0.25})
rows.append(point("slots", 0, 8, 9, 0.1, router="soft"))
rows[-1]["stages"] = dict(rows[-1]["stages"], combine={"ms": 2, "share": 0.5})
rows += [point("compact", 0, 32, mean, 0.1, load=load, router="forced", load_cv=0.75) for load, mean in
         (("uniform", 2), ("zipf:1", 3))]
rows.append(point("compact", 0, 64, 9, 0.1, grid="pack", bw={"strict_gb_s": 6, "legacy_gb_s": 4}))
print("\n".join(map(json.dumps, rows)))
PYTHON
    timeout 20 "$EXPERIMENTS/grid_table.py" lines.jsonl >out 2>err
    status=$?
    succeeds
    check "layouts: $(cat out)" grep -qE '^course +topk +4096 padded 1.25 +1.010 +1 +1 +1 +25.0% +50.0%$' out
    check "scales: $(cat out)" grep -q 'faster than padded 1.25 at most points of 0 of 1 scales' out
    check "stages: $(cat out)" grep -qE '^course +topk +compact +3 .* 80.0% +1.010$' out
    check "stages of another load: $(cat out)" grep -qE '^course +zipf:2 +compact +2 ' out
    check "loads: $(cat out)" grep -qE '^course +zipf:1 +compact +1 +1.500 +0.75 +50.0%$' out
    check "bandwidths: $(cat out)" grep -qE '^ +8 +2 +compact +1 +6 \(6 .. 6\) +4 \(4 .. 4\)$' out
    check "soft's write-back: $(cat out)" grep -qE '^ +4096 +8 +8 +2.0000 +0.5000 +4.0x +50.0% +25.0%$' out
    check "layouts on another device: $(cat out)" grep -qE '^course +topk +4096 padded 1.25 +1.000 +0 +0 +1 ' out
    check "what was left out: $(cat out)" grep -q 'left out: course, .*, padded: needs 99 GiB' out
    echo '{' >>lines.jsonl
    timeout 20 "$EXPERIMENTS/grid_table.py" lines.jsonl >out 2>err
    check "not JSON: $(cat err)" grep -q '^grid_table.py: lines.jsonl, line 20 is not JSON' err
}

run_tests "$@"
