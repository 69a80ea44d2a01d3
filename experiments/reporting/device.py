"""Figures about the machine: throughput over the number of ranks, a roofline and bandwidths from microbenchmarks.

Both take what they find. A scaling line needs "ranks" and "tok_s". A microbenchmark's line needs a time ("ms"), and
"flops" with "bytes" or an arithmetic intensity for the roofline, "bytes" or a bandwidth for the other figure; its
"stages" are objects of the same kind.
"""
import math

import peaks

from . import plot
from .figure import PHONE, Figure, Missing, Panel
from .layer import in_bandwidth_figure
from .lines import mapping, number
from .markup import MISSING, clipped, count, fixed, listing, percent, short

SERIES_MOST = 8


def first_number(line, *keys):
    return next((number(line[key]) for key in keys if number(line.get(key)) is not None), None)


# ---- throughput over ranks


def scaling_figures(lines):
    groups = {}

    def device_of(line):   # what stands in brackets our programs alone say
        return str(line.get("device") or "").split(" (")[0]

    several = len(set(map(device_of, lines))) > 1

    def key_of(line):
        words = [str(line[k]) for k in ("model", "mode") if line.get(k)]
        return " ".join(words + [device_of(line)] * several)

    for line in lines:
        key = key_of(line)
        groups.setdefault(key or "model", {}).setdefault(series_name(line), {}).setdefault(line["ranks"], []).append(
            line["tok_s"])
    figures = []
    for i, (key, series) in enumerate(groups.items()):
        series = {name: sorted((r, sum(v) / len(v)) for r, v in points.items()) for name, points in series.items()}
        long = {name: points for name, points in series.items() if len(points) > 1}
        commands = [(series_name(line), line.get("command")) for line in lines if key_of(line) == key][:12]
        rows = [[name, r, fixed(v, 0), fixed(v / points[0][1], 2), percent(v / points[0][1] / (r / points[0][0]))]
                for name, points in series.items() for r, v in points]
        head = ["series", "ranks", "tokens/s", "times its first", "efficiency"]
        name = f"scaling_{i + 1}"
        how = ("Tokens per second over the number of ranks, both on logarithmic scales; the thin line from each first "
               "point is what it would be if every rank added as much as the first did. Efficiency is the share of it.")
        if not long:
            figures.append(Figure(name, f"{key}: one number of ranks alone", [], how, head, rows, commands=commands))
            continue
        best = max(long, key=lambda n: long[n][-1][1])
        ratio = long[best][-1][1] / long[best][0][1]
        more = long[best][-1][0] / long[best][0][0]
        title = f"{key}: {best} gets {fixed(ratio, 2)} times the tokens/s from {more:g} times the ranks"
        figures.append(Figure(name, title, [Panel(lambda width, s=long: draw_scaling(s, width), 620)], how, head, rows,
                              commands=commands))
    return figures


def series_name(line):
    words = [str(line.get("impl") or "")]
    if line.get("router") and line.get("router") != "topk":
        words.append(str(line["router"]))
    for key in ("ep", "exchange"):
        if line.get(key) not in (None, ""):
            words.append("ep = ranks" if key == "ep" and line["ep"] == line["ranks"] and line["ep"] > 1 else
                         f"{key} {line[key]}")
    return " ".join(filter(None, words)) or "runs"


def draw_scaling(series, width):
    room = max(plot.text_width(clipped(name, 22)) for name in series) + 14 if width > PHONE else 16
    d = plot.Drawing(width, 320, "Tokens per second over ranks", right=room)
    ranks = sorted({r for points in series.values() for r, _ in points})
    values = [v for points in series.values() for _, v in points]
    values += [points[0][1] * points[-1][0] / points[0][0] for points in series.values()]
    x, y = d.scale_x(ranks, log=True), d.scale_y(values, log=True)
    d.axes(x, y, "ranks (log scale)", "tokens per second (log scale)", ticks_x=ranks)
    ends = []
    for i, (name, points) in enumerate(series.items()):
        style = i if i < SERIES_MOST else None
        ideal = [points[0], (points[-1][0], points[0][1] * points[-1][0] / points[0][0])]
        d.add(plot.el("path", d=plot.path([(x(a), y(b)) for a, b in ideal]), cls="lead", fill="none"))
        d.curve([(x(a), y(b)) for a, b in points], style, name)
        for r, v in points:
            d.mark(x(r), y(v), style, title=f"{name}, {r} ranks: {short(v)} tokens/s", size=4)
        ends.append((x(points[-1][0]), y(points[-1][1]), clipped(name, 22),
                     "quiet" if style is None else f"t{style}"))
    if width > PHONE:
        d.end_labels([(y_, text, cls) for _, y_, text, cls in ends])
    else:
        d.labels(ends)
    return d


# ---- microbenchmarks


def intensity_of(part):
    own, flops, bytes_ = first_number(part, "ai", "intensity", "arithmetic_intensity"), number(part.get("flops")), \
        number(part.get("bytes"))
    return own if own else flops / bytes_ if flops and bytes_ else None


def time_of(part):
    ms = part.get("ms")
    if isinstance(ms, dict):
        ms = first_number(ms, "p50", "median", "avg")
    return number(ms) or first_number(part, "p50_ms", "p50", "avg_ms")


def roofline_points(lines):
    """{series: [(FLOPs a byte, FLOP/s, words)]}"""
    series = {}
    for line in lines:
        words = bench_words(line)
        for name, part in [("whole layer", line)] + [(n, mapping(p)) for n, p in mapping(line.get("stages")).items()]:
            ms, at, flops = time_of(part), intensity_of(part), number(part.get("flops"))
            rate = flops / (ms / 1000) if flops and ms and ms > 0 else first_number(part, "flop_s")
            if at and rate and at > 0 and rate > 0:
                series.setdefault(name, []).append((at, rate, words))
    return series


def bench_words(line):
    keys = ("grid", "router", "layout", "tokens", "experts", "top_k", "dim", "expert_dim")
    return ", ".join(f"{key} {line[key]}" for key in keys if line.get(key) is not None)


def bandwidth_points(lines):
    """{series: [(bytes, bytes/s, words)]} of the moves that figure B cannot show"""
    series = {}
    for line in lines:
        if in_bandwidth_figure(line):
            continue
        words, bw = bench_words(line), mapping(line.get("bw"))
        moved, ms = first_number(bw, "moved_bytes", "bytes"), number(bw.get("ms"))
        if moved and ms:
            name = "dispatch + combine" + (f", {line['layout']}" if line.get("layout") else "")
            series.setdefault(name, []).append((moved, moved / (ms / 1000), words))
        elif not bw and not number(line.get("flops")):
            size, ms = number(line.get("bytes")), time_of(line)
            rate = first_number(line, "gb_s", "bw_gb_s")
            rate = rate * 1e9 if rate else size / (ms / 1000) if size and ms else None
            if size and rate:
                series.setdefault(str(line.get("op") or line.get("grid") or "moves"), []).append((size, rate, words))
    return series


def bench_figures(lines):
    lines = [line for line in lines if not line.get("dry_run")]
    figures = []
    for i, device in enumerate(sorted({str(line.get("device")) for line in lines}), 1):
        own = [line for line in lines if str(line.get("device")) == device]
        skipped = sum(bool(line.get("skipped")) for line in own)
        notes = [f"{count(skipped, 'point')} did not fit the memory."] if skipped else []
        seen = []
        commands = []
        for line in own:
            if line.get("command") and line["command"] not in seen and len(seen) < 12:
                seen.append(line["command"])
                commands.append((str(line.get("grid") or "points"), line["command"]))
        roof, bandwidth = roofline_points(own), bandwidth_points(own)
        top, slope = peaks.flops_of(device, own), peaks.bandwidth_of(device, own)
        if roof:
            figures.append(roofline(f"roofline_{i}", device, roof, top, slope, notes, commands))
        if bandwidth:
            figures.append(bandwidths(f"bandwidth_{i}", device, bandwidth, slope, notes, commands))
        if not roof and not bandwidth:
            figures.append(Missing(f"microbenchmarks_{i}",
                                   f"Microbenchmarks on {device}: no line has a time with FLOPs and bytes."))
    return figures


def roofline(name, device, series, top, slope, notes, commands):
    rows = [[s, short(a), short(r), percent(r / min(top, a * slope)) if top and slope else
             percent(r / top) if top else MISSING, words] for s, points in series.items() for a, r, words in points]
    fastest = max(((s, p) for s, points in series.items() for p in points), key=lambda item: item[1][1])
    title = f"Roofline: {fastest[0]} reaches {short(fastest[1][1])}FLOP/s" + \
        (f", {percent(fastest[1][1] / top, 0)} of the most that the device can do" if top else "")
    roofs = f"the flat roof is {short(top)}FLOP/s" if top else "the device's most FLOP/s is not known"
    roofs += f", the slanted one {short(slope)}B/s times the intensity" if slope else \
        ", its memory's bandwidth is not known, so there is no slanted roof"
    how = (f"{device}: {roofs}. Each point is a microbenchmark: right means more arithmetic for each byte that goes to "
           "or from memory, up is faster. A point under the slanted roof waits for memory, one under the flat roof for "
           "the arithmetic; the distance to the roof is what could be gained.")
    return Figure(name, title, [Panel(lambda width: draw_cloud(
        series, "FLOPs for each byte (log scale)", "FLOP/s (log scale)", width, top, slope))], how,
        ["what", "FLOPs/byte", "FLOP/s", "of the roof", "point"], rows, key=key_of_series(series), notes=notes,
        commands=commands)


def bandwidths(name, device, series, slope, notes, commands):
    rows = [[s, short(a), short(r), percent(r / slope) if slope else MISSING, words]
            for s, points in series.items() for a, r, words in points]
    fastest = max(((s, p) for s, points in series.items() for p in points), key=lambda item: item[1][1])
    title = f"Moving rows: {fastest[0]} reaches {short(fastest[1][1])}B/s"
    how = (f"{device}: bytes moved in one call and how many a second. Small moves are bound by the time it takes to "
           "start them, large ones by the memory" + (f", {short(slope)}B/s at most." if slope else "."))
    return Figure(name, title, [Panel(lambda width: draw_cloud(
        series, "bytes moved (log scale)", "bytes per second (log scale)", width, slope, None), 620)], how,
        ["what", "bytes", "bytes/s", "of the peak", "point"], rows, key=key_of_series(series), notes=notes,
        commands=commands)


def key_of_series(series):
    names = list(series)
    return [(plot.mark_swatch(i if i < SERIES_MOST else None), name) for i, name in enumerate(names)]


def draw_cloud(series, x_label, y_label, width, top, slope):
    d = plot.Drawing(width, 380 if width > PHONE else 300, f"{y_label} over {x_label}")
    points = [p for found in series.values() for p in found]
    x = d.scale_x([p[0] for p in points], log=True)
    y = d.scale_y([p[1] for p in points] + ([top] if top else []), log=True)
    d.axes(x, y, x_label, y_label)
    if top and slope:
        corner = min(max(top / slope, x.low), x.high)
        start = max(x.low, y.low / slope)
        at = [start, corner, x.high]
        d.add(plot.el("path", d=plot.path([(x(a), y(min(top, a * slope))) for a in at]), cls="roof"))
    elif top:
        d.add(plot.el("path", d=plot.path([(d.left, y(top)), (d.right, y(top))]), cls="roof"))
    for i, (name, found) in enumerate(series.items()):
        for a, b, words in found:
            d.mark(x(a), y(b), i if i < SERIES_MOST else None, size=3.6,
                   title=f"{name}: {short(b)} at {short(a)}; {words}")
    return d
