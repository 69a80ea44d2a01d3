#!/usr/bin/env python3
"""From the logs of router_table.sh to a table.

    router_table.py line LOG.jsonl KEY=VALUE ...   one JSON line about a finished run, for router_table.sh
    router_table.py done OUT.jsonl                 objective, size, timing, arm, rate, seed of runs that have a line
    router_table.py rate OUT.jsonl lm|mlm wide|narrow ARM     the learning rate at which the arm did best so far
    router_table.py table OUT.jsonl                the tables, in Markdown

Differences are taken against topk, seed by seed (same data order, same initial values of all tensors of the same name),
each arm at its own best learning rate; the interval is Student's t at 95 % over the seeds. Runs at other rates, made
with fewer seeds to find the best, are in the second table. Standard library only.
"""
import collections
import json
import math
import statistics
import sys

T95 = {1: 12.706, 2: 4.303, 3: 3.182, 4: 2.776, 5: 2.571, 6: 2.447, 7: 2.365, 8: 2.306, 9: 2.262}
BASELINE = "topk"


def mean_of(steps, key):
    values = [s[key] for s in steps if isinstance(s.get(key), (int, float))]
    return statistics.fmean(values) if values else None


def line(path, pairs):
    header, steps, evaluation = None, [], None
    for text in open(path, encoding="utf-8"):
        entry = json.loads(text)
        if "config" in entry:
            header = entry
        elif "loss" in entry:
            steps.append(entry)
        elif "val_loss" in entry:
            evaluation = entry
    late = steps[len(steps) * 3 // 4:]
    record = dict(pair.split("=", 1) for pair in pairs)
    for key in ("rate", "work"):
        record[key] = float(record[key])
    for key in ("seed", "timing", "side_by_side"):
        record[key] = int(record[key])
    record.update(
        router=header["config"]["router"], leaky=header["leaky"], sees_batch=header["sees_batch"],
        device=header["device"], commit=header["git_sha"] + ("-dirty" if header["git_dirty"] else ""),
        params_total=header["params_total"], params_active=header["params_active"],
        flops_per_token=header["flops_per_token"], steps=steps[-1]["step"], tokens=steps[-1]["tokens"],
        val_loss=evaluation["val_loss"], val_floor=evaluation["val_floor"],
        domains={name: d["loss"] for name, d in evaluation["val_domains"].items()},
        floors={name: d["floor"] for name, d in evaluation["val_domains"].items()},
        mi=statistics.fmean(evaluation["mi"]) if evaluation["mi"] else None,
        ms=statistics.median(s["ms"] for s in late), ts=header["ts"])
    for key in ("load_cv", "max_vio", "entropy", "mean_entropy", "drop", "token_drop", "dead", "near_dead", "margin",
                "router_main_norm", "router_balance_norm"):
        record[key] = mean_of(late, key)
    print(json.dumps(record))


def load(path):
    return [json.loads(text) for text in open(path, encoding="utf-8")]


def interval(values):
    """Mean and half width of its 95 % interval; None for the width of a single value."""
    if len(values) < 2:
        return values[0], None
    return statistics.fmean(values), T95[len(values) - 1] * statistics.stdev(values) / math.sqrt(len(values))


def plus_minus(values, digits=3):
    mean, half = interval(values)
    return f"{mean:.{digits}f}" + (f" ± {half:.{digits}f}" if half is not None else "")


def signed(values):
    mean, half = interval(values)
    resolved = half is not None and abs(mean) > half
    return f"{mean:+.3f}" + (f" ± {half:.3f}" if half is not None else "") + ("" if resolved else " (not resolved)")


def best_rate(runs):
    """Runs of the learning rate with the lowest mean loss among those that all seeds finished."""
    rates = collections.defaultdict(list)
    for run in runs:
        rates[run["rate"]].append(run)
    most = max(len(r) for r in rates.values())
    whole = [r for r in rates.values() if len(r) == most]
    return min(whole, key=lambda r: statistics.fmean(run["val_loss"] for run in r))


def print_arms(title, arms, base, domains, ms):
    print(f"\n### {title}\n")
    print("| arm | rate | loss | against topk | " + " | ".join(domains) +
          " | CV | MaxVio | MI | dead | M active | MFLOP/token | ms/step | |")
    print("|" + "---|" * (12 + len(domains)))
    for arm, r in arms:
        losses = [run["val_loss"] for run in r]
        paired = [run["val_loss"] - base[run["seed"]] for run in r if run["seed"] in base]
        against = signed(paired) if arm != BASELINE and paired else "–"
        cells = [arm, f"{r[0]['rate']:g}", plus_minus(losses), against]
        for name in domains:
            value = statistics.fmean(run["domains"][name] for run in r)
            domain_floor = r[0]["floors"][name]
            cells.append(f"x{value / domain_floor:.2f}" if domain_floor else f"{value:.3f}")
        for key, digits in (("load_cv", 2), ("max_vio", 2), ("mi", 2), ("dead", 1)):
            values = [run[key] for run in r if run[key] is not None]
            cells.append(f"{statistics.fmean(values):.{digits}f}" if values else "–")
        cells += [f"{r[0]['params_active'] / 1e6:.2f}", f"{r[0]['flops_per_token'] / 1e6:.2f}",
                  f"{ms[arm]:.0f}" if arm in ms else "–",
                  "LEAKY" if r[0]["leaky"] else "batch" if r[0]["sees_batch"] else ""]
        print("| " + " | ".join(cells) + " |")


def table(path):
    runs = load(path)
    for kind in (("lm", "wide"), ("lm", "narrow"), ("mlm", "wide"), ("mlm", "narrow")):
        arms, ms = collections.OrderedDict(), {}
        for run in runs:
            if (run["objective"], run["size"]) == kind and run["timing"]:
                ms[run["arm"]] = run["ms"]
            elif (run["objective"], run["size"]) == kind:
                arms.setdefault(run["arm"], []).append(run)
        if not arms:
            continue
        best = {arm: sorted(best_rate(r), key=lambda run: run["seed"]) for arm, r in arms.items()}
        base = {run["seed"]: run["val_loss"] for run in best.get(BASELINE, [])}
        domains = list(next(iter(best.values()))[0]["domains"])
        floor = next(iter(best.values()))[0]["val_floor"]
        title = f"{kind[0]}, {kind[1]}: validation loss in nats" + (f", floor {floor:.3f}" if floor else "")
        ranked = sorted(best.items(), key=lambda item: statistics.fmean(run["val_loss"] for run in item[1]))
        honest = [item for item in ranked if not item[1][0]["leaky"]]
        leaky = [item for item in ranked if item[1][0]["leaky"]]
        print_arms(title, honest, base, domains, ms)
        if leaky:
            print_arms(f"{kind[0]}, {kind[1]}: runs that read later tokens, no language-model loss", leaky, base,
                       domains, ms)
        rates = sorted({run["rate"] for r in arms.values() for run in r})
        if len(rates) > 1:
            print("\nMean loss at every learning rate:\n\n| arm | " + " | ".join(f"{x:g}" for x in rates) + " |")
            print("|" + "---|" * (len(rates) + 1))
            for arm, r in arms.items():
                means = [[run["val_loss"] for run in r if run["rate"] == x] for x in rates]
                print(f"| {arm} | " + " | ".join(f"{statistics.fmean(m):.3f}" if m else "–" for m in means) + " |")


def main():
    if len(sys.argv) >= 3 and sys.argv[1] == "line":
        line(sys.argv[2], sys.argv[3:])
    elif len(sys.argv) == 3 and sys.argv[1] == "done":
        for r in load(sys.argv[2]):
            print(r["objective"], r["size"], r["timing"], r["arm"], f"{r['rate']:g}", r["seed"])
    elif len(sys.argv) == 6 and sys.argv[1] == "rate":
        runs = load(sys.argv[2])
        ours = [r for r in runs if [r["objective"], r["size"], r["arm"]] == sys.argv[3:] and not r["timing"]]
        print(f"{best_rate(ours)[0]['rate']:g}" if ours else "")
    elif len(sys.argv) == 3 and sys.argv[1] == "table":
        table(sys.argv[2])
    else:
        sys.exit(__doc__)


if __name__ == "__main__":
    main()
