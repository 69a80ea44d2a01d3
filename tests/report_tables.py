#!/usr/bin/env python3
"""Holds what a page of experiments/report works out from losses and times to the lines it is made from.

    tests/report_tables.py sweep PAGE RESULTS.jsonl   of one comparison: cost, stages, curves, rates, domains, dropping
    tests/report_tables.py machine PAGE LINES.jsonl   of microbenchmarks and scaling tests: rooflines and efficiency

A check that fails ends with status 1. The figures themselves are in report_checks.py, which test_report_page.sh calls
first.
"""
import collections
import math
import statistics
import sys

from report_checks import best_rates, cell, fail, figure, keyed, lines_of, parse, table, words

EXPERTS_AND_ROWS = ("route", "permute", "dispatch", "experts", "combine")
UNITS = {"k": 1e3, "M": 1e6, "G": 1e9, "T": 1e12}


def amount(text):
    """The number that "4.5k" stands for."""
    return float(text.rstrip("kMGT")) * UNITS.get(text[-1], 1)


def near(text, value, what):
    """To the three digits that are printed."""
    if abs(amount(text) - value) > 0.006 * abs(value):
        fail(what, "is", text, "on the page,", value, "in the lines")


def sweep(page, path):
    lines = list(lines_of(path))
    timings = collections.defaultdict(list)
    for line in lines:
        if line.get("kind") == "timing":
            timings[line["arm"]].append(line)
    runs = [line for line in lines if line.get("kind") == "run"]
    best = best_rates(runs, [line for line in lines if line.get("kind") == "failed"])
    speeds = {arm: statistics.fmean(line["tok_s"] for line in found) for arm, found in timings.items()}
    flops = {line["arm"]: line["flops_per_token"] for line in runs}
    costs(page, speeds, flops, timings)
    curves(page, best, speeds, flops)
    rates(page, best, runs)
    domains(page, best)
    for (arm,), row in keyed(figure(page, "dropping")[0], ["arm"]).items():
        for column, key, digits in (("choices dropped", "drop", 2), ("tokens without expert", "token_drop", 2),
                                    ("padding", "padding", 1)):
            cell(row, column, 100 * statistics.fmean(run[key] for run in best[arm][1].values()), digits, arm)
    for (arm,), row in keyed(figure(page, "figure_d_")[0], ["arm"]).items():
        for column, key, scale, digits in (("load CV", "load_cv", 1, 4), ("dropped", "drop", 100, 2),
                                           ("tokens without expert", "token_drop", 100, 2)):
            cell(row, column, scale * statistics.fmean(run[key] for run in best[arm][1].values()), digits, arm)


def costs(page, speeds, flops, timings):
    rows = keyed(figure(page, "moe_tax")[0], ["arm"])
    if len(rows) < 5:
        fail("the tax of", list(rows))
    for (arm,), row in rows.items():
        ratio, work = speeds["dense"] / speeds[arm], flops[arm] / flops["dense"]
        cell(row, "time ratio", ratio, 3, arm)
        cell(row, "FLOPs ratio", work, 3, arm)
        cell(row, "tax", ratio / work, 3, arm)
        near(row["FLOP/s"], speeds[arm] * flops[arm], f"FLOP/s of {arm}")
        cell(row, "of the peak", 100 * speeds[arm] * flops[arm] / (2 * 5e9 * 8 * 4), 1, arm)  # two threads of AVX2
    for (arm,), row in keyed(figure(page, "stage_times")[0], ["arm"]).items():
        stages = {stage: statistics.fmean(line["stages_ms"][stage] for line in timings[arm])
                  for stage in timings[arm][0]["stages_ms"]}
        for stage, ms in stages.items():
            cell(row, stage, ms, 3, arm)
        total = sum(stages.values())
        cell(row, "sum, ms", total, 3, arm)
        cell(row, "step, ms", statistics.fmean(line["ms"] for line in timings[arm]), 3, arm)
        cell(row, "MoE layer", 100 * sum(stages[s] for s in EXPERTS_AND_ROWS) / total, 1, arm)


def curves(page, best, speeds, flops):
    for (arm,), row in keyed(figure(page, "loss_over_training")[0], ["arm"]).items():
        ends = [run["val"][-1] for run in best[arm][1].values()]
        near(row["tokens"], ends[0][1], f"tokens of {arm}")
        near(row["FLOPs"], ends[0][1] * flops[arm], f"FLOPs of {arm}")
        if row["seconds"] != "\u2013":
            near(row["seconds"], ends[0][1] / speeds[arm], f"seconds of {arm}")
        for column, value in (("last mean", statistics.fmean), ("lowest seed", min), ("highest seed", max)):
            cell(row, column, value([point[2] for point in ends]), 4, arm)


def rates(page, best, runs):
    said = words(figure(page, "learning_rates")[0].find("h3"))
    ranked = {arm for arm in best if arm not in ("expert-choice", "broken")}
    tried = collections.defaultdict(set)
    for run in runs:
        tried[run["arm"]].add(run["rate"])
    edge = sorted(arm for arm in ranked if best[arm][0] in (min(tried[arm]), max(tried[arm])))
    if bool(edge) == ("Every arm's best" in said):
        fail("best at an end of the grid are", edge, "but the page says", said)
    said = words(figure(page, "against_the_baseline")[0].find("h3"))
    rows = [row for row in table(figure(page, "against_the_baseline")[0]) if row["arm"] in ranked]
    differ = sum(row["said in words"] in ("lower loss", "higher loss") for row in rows)
    if not said.startswith(f"{differ} of {len(rows)} arms differ from topk"):
        fail(differ, "of", len(rows), "arms differ, but the page says", said)


def domains(page, best):
    """Mutual information, of domains that are equally frequent: H(expert) - mean of H(expert | domain)."""
    def entropy(shares):
        return -sum(p * math.log(p) for p in shares if p > 0)

    for row in table(figure(page, "domains_and_experts")[0]):
        run = best[row["arm"]][1][int(row["seed"])]
        for layer, said in zip(run["domain_expert"], row["mutual information of each layer, nats"].split(", ")):
            both = entropy([statistics.fmean(column) for column in zip(*layer)])
            expected = both - statistics.fmean(map(entropy, layer))
            if abs(float(said) - expected) > 0.00051:
                fail("mutual information of", row["arm"], "is", said, "but", expected, "by its shares")


def machine(page, path):
    lines = list(lines_of(path))
    gpu = any("H100" in str(line.get("device")) for line in lines)
    top, slope = (989.4e12, 3.35e12) if gpu else (2 * 5e9 * 8 * 4, math.inf)
    rows = table(figure(page, "roofline_1")[0])
    for row in rows:
        intensity, rate = amount(row["FLOPs/byte"]), amount(row["FLOP/s"])
        share = float(row["of the roof"].rstrip("%"))
        if abs(share - 100 * rate / min(top, intensity * slope)) > 0.015 * share + 0.1:
            fail("share of the roof", row)
    points = sum(1 + len(line["stages"]) for line in lines if line.get("kind") == "microbench" and line.get("stages"))
    if not 0 < len(rows) <= points:
        fail(len(rows), "points under the roof")
    firsts = {}
    for row in table(figure(page, "scaling_1")[0]) if not gpu else []:
        ranks, rate = firsts.setdefault(row["series"], (int(row["ranks"]), float(row["tokens/s"])))
        gained = float(row["tokens/s"]) / rate
        cell(row, "times its first", gained, 2, row["series"])
        if abs(float(row["efficiency"].rstrip("%")) - 100 * gained * ranks / int(row["ranks"])) > 0.06:
            fail("efficiency", row)


if __name__ == "__main__":
    if len(sys.argv) != 4 or sys.argv[1] not in ("sweep", "machine"):
        sys.exit(__doc__)
    {"sweep": sweep, "machine": machine}[sys.argv[1]](parse(sys.argv[2]), sys.argv[3])
