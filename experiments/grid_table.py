#!/usr/bin/env python3
"""What grids of microbenchmarks say, in a few short tables.

    experiments/grid_table.py FILE...       lines of build/bench_layer --grid (grids.sh keeps them); "-": standard input

Reads lines with "kind": "microbench" (experiments/bench_grid_line.h says what they hold) and skips all others. Of lines
for the same point, load and device the last one counts. The tables, anew for each device; a load that takes the
router's place stands in its column, and "shared" where all experts share weights:

    layouts     the whole forward: padded / compact, a ratio above 1 says that compact is faster. Per router, shape size
                and capacity factor: the median ratio over the points, and at how many of them compact is faster,
                slower, or not resolved: the 95 % interval of the ratio, from those of both times, holds 1
    stages      share of each stage in the forward, median over the points; "around" is all but the experts
    soft        the write-back of soft routing (its combine) against the combine of topk, compact, at the same point
    bandwidth   pack grid: GB/s of dispatch + combine, strict and legacy (bench_layer.c), median and range
    loads       forward against that of equal loads, where there are lines with --load uniform
"""
import json
import math
import sys
from collections import OrderedDict


def read(paths):
    """The microbench lines of the files, the last of each point; the skipped ones apart."""
    rows, skipped = OrderedDict(), []
    for path in paths:
        with (sys.stdin if path == "-" else open(path, encoding="utf-8")) as file:
            for number, text in enumerate(file, 1):
                if not text.strip():
                    continue
                try:
                    row = json.loads(text)
                except ValueError:
                    sys.exit(f"grid_table.py: {path}, line {number} is not JSON: remove it")
                if not isinstance(row, dict) or row.get("kind") != "microbench" or row.get("dry_run"):
                    continue
                if "skipped" in row:
                    skipped.append(row)
                elif "times_ms" in row:
                    rows[key(row)] = row
    return list(rows.values()), skipped


SHAPE = ("device", "grid", "scale", "tokens", "dim", "expert_dim", "experts")


def shape(row):
    return tuple(row.get(name) for name in SHAPE)


def key(row):
    return shape(row) + tuple(row.get(name) for name in
                              ("top_k", "router", "layout", "capacity_factor", "load", "shared_weights"))


def conditions(row):
    """What points have to share, beside router and layout, to be compared."""
    return shape(row) + (row.get("load"), row.get("shared_weights"))


def chooser(row):
    """Who chose the experts, the router or the load that took its place; and whether all experts share weights."""
    name = row["router"] if row.get("load") in (None, "router") else row["load"]
    return name + (" shared" if row.get("shared_weights") else "")


def median(values):
    ordered = sorted(values)
    middle = len(ordered) // 2
    return ordered[middle] if len(ordered) % 2 else (ordered[middle - 1] + ordered[middle]) / 2


def ratio(above, below):
    """Ratio of two means and the half width of its interval (None where a time was taken once)."""
    value = above["mean"] / below["mean"]
    if above.get("half_width") is None or below.get("half_width") is None:
        return value, None
    return value, value * math.hypot(above["half_width"] / above["mean"], below["half_width"] / below["mean"])


def verdict(value, half):
    if half is None:
        return "not resolved"
    return "faster" if value - half > 1 else "slower" if value + half < 1 else "not resolved"


def grouped(rows, names):
    groups = OrderedDict()
    for row in rows:
        values = (chooser(row) if name == "chooser" else row.get(name) for name in names)
        groups.setdefault(tuple(values), []).append(row)
    return groups


def layouts(rows):
    compact = {conditions(r) + (r["router"], r["top_k"]): r for r in rows if r["layout"] == "compact"}
    print("layouts: forward, other / compact (compact is faster where it is above 1)")
    print("%-7s %-9s %7s %-12s %7s  %6s %6s %12s %9s %6s" % ("grid", "router", "tokens", "layout", "ratio", "faster",
                                                            "slower", "not resolved", "padding", "drop"))
    others = [r for r in rows if r["layout"] in ("padded", "block")]
    won = {}
    for (grid, router, tokens, layout, factor), group in grouped(
            others, ("grid", "chooser", "tokens", "layout", "capacity_factor")).items():
        pairs = [(r, compact.get(conditions(r) + (r["router"], r["top_k"]))) for r in group]
        ratios = [ratio(r["times_ms"]["forward"], c["times_ms"]["forward"]) for r, c in pairs if c]
        if not ratios:
            continue
        words = [verdict(*pair) for pair in ratios]
        name = f"padded {factor:g}" if layout == "padded" else layout
        print("%-7s %-9s %7d %-12s %7.3f  %6d %6d %12d %8.1f%% %5.1f%%" % (
            grid, router, tokens, name, median([value for value, _ in ratios]), words.count("faster"),
            words.count("slower"), words.count("not resolved"), 100 * median([r["padding"] for r, _ in pairs]),
            100 * median([r["drop"] for r, _ in pairs])))
        if layout == "padded":
            won.setdefault((grid, tokens, name), []).extend(words)
    for name in sorted({name for _, _, name in won}):
        scales = [(grid, tokens) for grid, tokens, other in won if other == name]
        clear = [s for s in scales if won[s + (name,)].count("faster") > len(won[s + (name,)]) / 2]
        print(f"compact is faster than {name} at most points of {len(clear)} of {len(scales)} scales (grid, tokens)")


STAGES = ("route", "permute", "dispatch", "experts", "combine")


def stages(rows):
    print("\nstages: share of the forward, median over the points")
    print("%-7s %-9s %-8s %7s" % ("grid", "router", "layout", "points") + "".join("%10s" % s for s in STAGES) +
          "%10s%16s" % ("around", "sum / forward"))
    for (grid, router, layout), group in grouped(rows, ("grid", "chooser", "layout")).items():
        shares = [median([r["stages"][s]["share"] for r in group]) for s in STAGES]
        around = median([1 - r["stages"]["experts"]["share"] for r in group])
        print("%-7s %-9s %-8s %7d" % (grid, router, layout, len(group)) +
              "".join("%9.1f%%" % (100 * s) for s in shares) +
              "%9.1f%%%16.3f" % (100 * around, median([r["stage_sum_over_forward"] for r in group])))


def soft(rows):
    sparse = {conditions(r): r for r in rows if r["router"] == "topk" and r["layout"] == "compact"}
    pairs = [(r, sparse[conditions(r)]) for r in rows if r["router"].startswith("soft") and conditions(r) in sparse]
    if not pairs:
        return
    print("\nsoft: its write-back (combine) and that of topk, ms; shares of the forward")
    print("%7s %6s %8s %10s %10s %8s %8s %8s" % ("tokens", "dim", "experts", "soft", "topk", "ratio", "soft", "topk"))
    for r, t in pairs:
        a, b = r["stages"]["combine"], t["stages"]["combine"]
        print("%7d %6d %8d %10.4f %10.4f %8s %7.1f%% %7.1f%%" % (
            r["tokens"], r["dim"], r["experts"], a["ms"], b["ms"], "%.1fx" % (a["ms"] / b["ms"]) if b["ms"] else "-",
            100 * a["share"], 100 * b["share"]))


def bandwidth(rows):
    packs = [r for r in rows if r["grid"] == "pack" and r.get("bw")]
    if not packs:
        return
    print("\nbandwidth of dispatch + combine, GB/s: median (lowest .. highest) over tokens and experts")
    print("%6s %3s %-8s %7s %32s %32s" % ("dim", "K", "layout", "points", "strict", "legacy"))
    for (dim, top_k, layout), group in grouped(packs, ("dim", "top_k", "layout")).items():
        cells = []
        for name in ("strict_gb_s", "legacy_gb_s"):
            values = [r["bw"][name] for r in group]
            cells.append("%.4g (%.4g .. %.4g)" % (median(values), min(values), max(values)))
        print("%6d %3d %-8s %7d %32s %32s" % (dim, top_k, layout, len(group), *cells))


def loads(rows):
    def same(row):
        return shape(row) + (row["layout"], row["capacity_factor"], row["top_k"], row["shared_weights"])
    even = {same(r): r for r in rows if r["load"] == "uniform"}
    pairs = [(r, even[same(r)]) for r in rows if r["load"].startswith("zipf:") and same(r) in even]
    if not pairs:
        return
    print("\nloads: forward against that of equal loads, median over the points")
    print("%-7s %-10s %-8s %7s %8s %8s %8s" % ("grid", "load", "layout", "points", "ratio", "cv", "drop"))
    for (grid, load, layout), group in grouped([r for r, _ in pairs], ("grid", "load", "layout")).items():
        values = [ratio(r["times_ms"]["forward"], even[same(r)]["times_ms"]["forward"])[0] for r in group]
        print("%-7s %-10s %-8s %7d %8.3f %8.2f %7.1f%%" % (
            grid, load, layout, len(group), median(values), median([r["load_cv"] for r in group]),
            100 * median([r["drop"] for r in group])))


def main():
    if len(sys.argv) < 2:
        sys.exit("usage: grid_table.py FILE...   (- for standard input)")
    try:
        rows, skipped = read(sys.argv[1:])
    except OSError as error:
        sys.exit(f"grid_table.py: {error}")
    if not rows and not skipped:
        sys.exit("grid_table.py: no line of a microbenchmark: run build/bench_layer --grid pack --scale small >> FILE")
    for i, device in enumerate(sorted({str(r.get("device")) for r in rows})):
        own = [r for r in rows if str(r.get("device")) == device]
        for commit in sorted({str(r.get("commit")) for r in own}):
            print("\n" * (i > 0) + f"{device}, commit {commit}")
        if any(r["grid"] != "pack" for r in own):
            layouts([r for r in own if r["grid"] != "pack"])
        stages(own)
        soft(own)
        bandwidth(own)
        loads(own)
    for row in skipped:
        print("left out: %s, %s tokens, dim %s, experts %s, K %s, %s: %s" % tuple(
            row.get(name) for name in ("grid", "tokens", "dim", "experts", "top_k", "layout", "skipped")))


if __name__ == "__main__":
    main()
