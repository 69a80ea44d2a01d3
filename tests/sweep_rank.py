"""Tests of experiments/sweeping/rank.py on made-up results: the table's figures, and what it refuses to rank.

    tests/sweep_rank.py EXPERIMENTS        the folder; silent and status 0 when all is right
"""
import contextlib
import copy
import io
import json
import os
import sys
import tempfile

sys.path[:0] = [sys.argv[1] + "/sweeping", sys.argv[1]]
import rank as ranking  # noqa: E402

SCRATCH = tempfile.TemporaryDirectory()
CPU = "A CPU (2 threads, AVX2)"
LOSSES = {"topk": (1.0, 1.2, 1.1), "hash": (1.1, 1.31, 1.2), "dense": (1.3, 1.1, 1.12)}


def run(arm, seed, loss, rate=0.004, **fields):
    config = {"data": "builtin", "seq": 64, "batch": 4, "eval_batches": 8, "steps": 10}
    record = {"kind": "run", "sweep": "s", "size": "small", "budget": "tokens", "arm": arm, "rate": rate, "seed": seed,
              "val_loss": loss, "config": config, "commit": "abc", "device": CPU, "learned": arm == "topk",
              "leaky": False, "tokens": 2560, "steps": 10, "params_total": 2000000, "params_active": 1000000,
              "flops_per_token": 3e6, "load_cv": 0.25, "drop": 0.0,
              "router_gradient": {"main": [0.1, 0.2] if arm == "topk" else [0, 0], "balance": [0, 0]}}
    record.update(fields)
    return record


def timing(arm, ms, **fields):
    return dict({"kind": "timing", "sweep": "s", "size": "small", "budget": "tokens", "arm": arm, "ms": ms,
                 "weights": "trained",
                 "tokens_per_step": 256, "tok_s": 256 / ms * 1e3, "flops_per_token": 3e6, "peak_flops": 1e12,
                 "peak_from": "a table", "device": CPU, "others_busy": 0.0}, **fields)


def whole():
    records = [{"kind": "recipe", "sweep": "s", "question": "Which?", "expect": "topk", "baseline": "topk",
                "seeds": [1, 2, 3], "arms": list(LOSSES)}, {"kind": "of tomorrow"}]
    records += [run(arm, seed, loss) for arm, losses in LOSSES.items() for seed, loss in enumerate(losses, 1)]
    return records + [timing(arm, 2.0) for arm in LOSSES]


def rank(records, *arguments):
    path = os.path.join(SCRATCH.name, "results.jsonl")
    with open(path, "w", encoding="utf-8") as file:
        file.writelines((r if isinstance(r, str) else json.dumps(r)) + "\n" for r in records)
    out, err = io.StringIO(), io.StringIO()
    with contextlib.redirect_stdout(out), contextlib.redirect_stderr(err):
        status = ranking.main([path, *arguments])
    return status, out.getvalue(), err.getvalue()


def rows(table):
    """The cells of the first table by arm."""
    found = {}
    for line in table.split("Mean validation loss at every rate")[0].splitlines():
        cells = [cell.strip() for cell in line.strip("|").split("|")]
        if line.startswith("| ") and cells[0] != "arm":
            found[cells[0]] = cells
    return found


def refused(records, sentence, arm="hash", ranked=False):
    """The sentence is under the table, --strict ends with status 1, and the arm has no row (or, ranked, has one)."""
    status, out, err = rank(records, "--strict")
    assert status == 1 and not err, (status, err, out)
    assert any(line.startswith("- ") and sentence in line for line in out.splitlines()), (sentence, out)
    assert (arm in rows(out)) == ranked, out
    assert rank(records)[0] == 0


def changed(arm, **fields):
    records = whole()
    for record in records:
        if record.get("arm") == arm and record["kind"] == "run":
            record.update(copy.deepcopy(fields))
    return records


def test_figures():
    status, out, err = rank(whole(), "--strict")
    assert status == 0 and not err, (out, err)
    table = rows(out)
    assert list(table) == ["topk", "dense", "hash"], "in the order of their losses"
    assert table["topk"][3] == "1.100 ± 0.248" and table["topk"][7] == "baseline", table["topk"]
    # 0.1, 0.11, 0.1: mean 0.1033; Student's half width 4.3027 x 0.0057735 / sqrt(3) = 0.01434
    assert table["hash"][4:8] == ["+0.103", "+0.100 to +0.110", "+0.089 to +0.118", "worse"], table["hash"]
    # 0.3, -0.1, 0.02
    assert table["dense"][4:8] == ["+0.073", "-0.100 to +0.300", "-0.437 to +0.583", "not resolved"], table["dense"]
    assert table["hash"][8:] == ["2.00", "1.00", "3.00", "10", "2", "128000", "0.25", "0.000"], table["hash"]
    assert "topk spreads by 0.100 (standard deviation), 0.200" in out
    assert "- Validation losses are means over 2048 tokens." in out, out
    loads = [dict(r, load_cv=(0.1, 0.2, 0.6)[r["seed"] - 1]) if r["kind"] == "run" else r for r in whole()]
    assert rows(rank(loads)[1])["hash"][14] == "0.30", "loads are means over seeds"
    assert "Question: Which?" in out and "Expected: topk" in out
    by_other = rows(rank(whole(), "--baseline", "hash")[1])
    assert by_other["topk"][4] == "-0.103" and by_other["topk"][7] == "better"


def test_rates():
    records = whole() + [run("hash", 1, 0.9, 0.002), run("hash", 1, 1.5, 0.008)]
    records += [dict(run("dense", 1, None, 0.016), kind="failed", why="boom"), run("dense", 1, 1.31, 0.002)]
    _, out, _ = rank(records)
    assert "| hash | **0.900** (1) | 1.203 (3) | 1.500 (1) | – |" in out, out
    assert "| dense | 1.310 (1) | **1.173** (3) | – | diverged (1) |" in out, out
    refused(records, "Not ranked: hash has 1 seed at rate 0.002: below 3")
    records += [run("hash", seed, 0.9, 0.002) for seed in (2, 3)]
    status, out, _ = rank(records, "--strict")
    assert status == 0 and rows(out)["hash"][1] == "0.002"
    assert "Best at the lowest rate that was tried, so a better one may lie beyond: hash." in out


def test_refusals():
    refused(changed("hash", learned=True), "Not ranked: hash, seed 1: the router of layer 0, 1 got no gradient")
    refused(changed("hash", learned=True, router_gradient={"main": [0.1, 0]}), "the router of layer 1 got no gradient")
    refused(changed("hash", leaky=True), "hash reads later tokens", ranked=True)
    _, out, _ = rank(changed("hash", leaky=True))
    alone = out.split("Runs that read later tokens, with no language-model loss:")
    assert "hash" not in rows(alone[0]) and rows(alone[1])["hash"][4] == "–", out
    refused([r for r in whole() if (r.get("arm"), r.get("seed")) != ("hash", 2)], "Not ranked: hash has 2 seeds")
    refused(changed("hash", tokens=5120), "Not ranked: hash drew 5120 tokens and topk 2560")
    assert rank([dict(r, budget="flops") for r in changed("hash", tokens=5120)], "--strict")[0] == 0
    config = dict(run("hash", 1, 1)["config"], data="other")
    refused(changed("hash", config=config), "Not ranked: hash has another --data than topk")
    config = dict(run("hash", 1, 1)["config"], eval_batches=4)
    refused(changed("hash", config=config), "Not ranked: hash is validated with another --eval-batches than topk")
    fast = [dict(r, ms=1e-6, tok_s=256e9) if r.get("arm") == "hash" and r["kind"] == "timing" else r for r in whole()]
    refused(fast, "The speed of hash is not printed: 7.68e+05 TFLOP/s is above the 1 of the device (a table).",
            ranked=True)
    assert rows(rank(fast)[1])["hash"][12:14] == ["–", "–"]
    diverged = [dict(r, kind="failed", why="not finite", val_loss=None)
                if (r.get("arm"), r.get("seed")) == ("hash", 3) else r for r in whole()]
    refused(diverged, "Not ranked: hash diverged at every rate that was tried, so that none has a finite mean: at "
            "0.004 with seed 3.")
    # by the seed that both rates have its own is 0.002; the one that diverged there later keeps it from a rank
    later = [dict(r, rate=0.002) if r.get("arm") == "hash" and r["kind"] == "run" else r for r in diverged]
    later = [dict(r, rate=0.002) if r["kind"] == "failed" else r for r in later] + [run("hash", 1, 1.5)]
    refused(later, "Not ranked: hash diverged at its rate 0.002 with seed 3 (not finite)")
    refused(changed("topk", router_gradient={"main": [0, 0]}), "The baseline topk has no rank", arm="topk")


def test_notes():
    def note(records, sentence):
        status, out, _ = rank(records, "--strict")
        assert status == 0 and any(line.startswith("- " + sentence) for line in out.splitlines()), (sentence, out)

    note(changed("hash", commit="abc-dirty"), "Made by a program that no commit describes: abc-dirty.")
    assert "hash†" in rows(rank(changed("hash", commit="abc-dirty"))[1])
    note(changed("hash", commit="def"), "Mixed commits: abc (6 runs), def (3 runs).")
    note(changed("hash", device="GPU"), "Mixed devices: A CPU (2 threads, AVX2) (6 runs), GPU (3 runs).")
    note(changed("hash", sees_batch=True), "Looking at other sequences of a batch")
    note(changed("hash", before={"base": 9}), "Started from the weights of base, whose 9 steps are in no column: hash.")
    note([dict(r, seeds=[1, 2, 3, 4]) if r["kind"] == "recipe" else r for r in whole()],
         "topk has no run of seed 4 at its rate.")
    note(whole()[:1] + [r for r in whole() if r.get("arm") != "dense"], "No run yet of dense.")
    # p = 0.014 each: resolved one by one, not all five at once
    many = [run(arm, seed, LOSSES["topk"][seed - 1] + (0.1, 0.12, 0.15)[seed - 1])
            for arm in "abcde" for seed in (1, 2, 3)]
    note([r for r in whole()[:8] if r.get("arm") != "hash"] + many,
         "Of 5 comparisons at once, these do not hold at 5 % (Holm): a, b, c, d, e.")
    # as many tokens as the others, half of them in the run that it started from
    half = dict(before={"base": 5}, before_tokens=1280, tokens=1280)
    note(changed("hash", **half), "Started from the weights of base, whose 5 steps are in no column: hash.")
    note(changed("hash", **dict(half, before_tokens=None)), "Started from the weights of base, whose 5 steps")
    refused(changed("hash", **dict(half, before_tokens=640)), "Not ranked: hash drew 1280 tokens and topk 2560")
    note([r for r in whole() if r.get("arm") != "topk"], "The recipe's baseline topk has no run: differences are to "
         "hash.")
    moved = [dict(r, device="GPU") if r["kind"] == "timing" and r["arm"] == "hash" else r for r in whole()]
    note(moved, "Mixed devices of speeds: A CPU (2 threads, AVX2) (2 timings), GPU (1 timings).")
    busy = [dict(r, others_busy=1.5) if r["kind"] == "timing" else r for r in whole()]
    note(busy, "Speed was measured while other processes kept cores busy (how many): topk (1.5)")


def test_bad_input():
    for records, arguments, sentence in ((whole()[:3] + ["{half"], [], "results.jsonl:4: not JSON"),
                                         (["[1]"], [], "results.jsonl:1: not a JSON object"),
                                         ([run("a", 1, "1.5")], [], 'results.jsonl:1: "val_loss" is "1.5": mend'),
                                         ([run("a", None, 1.5)], [], 'results.jsonl:1: a "run" line without "seed"'),
                                         ([run("a", 1, 1.5, config=[])], [], 'results.jsonl:1: "config" is []'),
                                         ([dict(timing("a", 1), ms="1")], [], 'results.jsonl:1: "ms" is "1"'),
                                         ([], [], "no finished run there"),
                                         (whole(), ["--baseline", "tip"], "--baseline tip has no run in s, small")):
        status, out, err = rank(records, *arguments)
        assert status == 1 and not out and err.startswith("rank: ") and err.count("\n") == 1 and sentence in err, err
    older = [{name: value for name, value in r.items() if name not in
              ("router_gradient", "learned", "load_cv", "drop", "params_total", "commit", "device")} for r in whole()]
    assert rank(older, "--strict")[0] == 0, "lines with less in them are read"
    bare = [dict(r, config=None) if r["kind"] == "run" else r for r in whole()] + [dict(timing("hash", 1), tok_s=None,
                                                                                       tokens_per_step=None)]
    assert rows(rank(bare)[1])["hash"][12:14] == ["1", "–"]


for name, test in list(globals().items()):
    if name.startswith("test_"):
        test()
