"""Figures A, B and C: what one MoE layer does with its time, from lines of microbenchmarks.

    layer_figures(lines) -> [Figure or Missing], for each device

    figure A   milliseconds of gate and top-k, and of the plan, over tokens: a line for each (E, K)
    figure B   bandwidth of pack and combine over tokens x width: a line for each (E, width), panels by K
    figure C   the stages of a layer, in milliseconds and as shares, by router and layout, at each number of tokens

experiments/bench_grid_line.h says what a line holds. A line that lacks what a figure needs is not in it. Of a point
that was measured more than once the later line counts.
"""
import peaks

from . import plot, speed
from .figure import PHONE, Figure, Missing, Panel
from .lines import mapping, number
from .markup import MISSING, count, details, el, fixed, listing, percent, short

POINT = ("grid", "scale", "tokens", "dim", "expert_dim", "experts", "top_k", "router", "layout", "capacity_factor",
         "load", "shared_weights", "dtype")
DASHES = (None, "7 3", "2 3", "9 3 2 3")
LABELS_MOST = 10     # at the ends of a panel's lines
HALF = 420           # width of panels that stand two beside each other
COURSE = "course"    # the grid whose shape figure C shows first


def layer_figures(lines):
    lines = [line for line in lines if not line.get("dry_run") and not line.get("skipped") and sized(line)]
    figures = []
    for i, device in enumerate(sorted({str(line.get("device")) for line in lines})):
        own = list({tuple(str(line.get(key)) for key in POINT): line
                    for line in lines if str(line.get("device")) == device}.values())
        end = f"_{i + 1}" if i else ""
        figures += [figure(own, letter + end, device) for letter, figure in
                    (("figure_a", gate_and_plan), ("figure_b", bandwidth), ("figure_c", stages_of_layer))]
    return figures


def sized(line):
    return all((number(line.get(key)) or 0) > 0 for key in ("tokens", "dim", "experts", "top_k"))


def commands_of(lines):
    """The first command of each grid."""
    found = {}
    for line in lines:
        if line.get("command"):
            found.setdefault(str(line["command"]), str(line.get("grid") or "points"))
    return [(grid, command) for command, grid in list(found.items())[:12]]


def layout_of(line):
    factor = number(line.get("capacity_factor"))
    return str(line.get("layout") or "runs") + (f" {factor:g}" if factor else "")


def stage_of(line, stage):
    return mapping(mapping(line.get("stages")).get(stage))


def times_of(line, stage):
    return mapping(mapping(line.get("times_ms")).get(stage))


def stage_ms(line, stage):
    """The median of a stage; None where it was not timed."""
    found = [number(stage_of(line, stage).get("ms")), number(times_of(line, stage).get("p50"))]
    return next((ms for ms in found if ms is not None and ms > 0), None)


def in_order(values):
    return {value: i for i, value in enumerate(sorted(set(values)))}


# ---- lines over tokens, told apart by two numbers


def key_of(colours, say_colour, dashes, say_dash):
    return [(plot.mark_swatch(i % plot.STYLES), say_colour(value)) for value, i in colours.items()] + \
        [(plot.dash_swatch(DASHES[i % len(DASHES)]), say_dash(value)) for value, i in dashes.items()]


def draw_lines(curves, words, x_label, y_label, xs, ys, width, roof=None):
    """curves: {(colour, dash): [(x, y, words)]}; words(colour, dash): the label; xs, ys: what the scales must hold,
    the same for all panels of a figure. roof: None, or (y, words) of a horizontal line, on a linear scale from 0."""
    labels = len(curves) <= LABELS_MOST and width > PHONE
    room = max(plot.text_width(words(*key)) for key in curves) + 14 if labels else 14
    d = plot.Drawing(width, 240, f"{y_label} over {x_label}", right=room, left=44)
    x = d.scale_x(xs, log=True)
    y = d.scale_y(list(ys) + ([1.1 * roof[0]] if roof else []), log=not roof, zero=bool(roof))
    ticks = sorted(set(xs))
    d.axes(x, y, x_label, y_label, ticks_x=ticks if len(ticks) < 6 else None)
    if roof and roof[1]:
        d.rule(y(roof[0]), roof[1])
    ends = []
    for (colour, dash), points in curves.items():
        tone = str(colour % plot.STYLES)
        if len(points) > 1:
            d.add(plot.el("path", d=plot.path([(x(a), y(b)) for a, b, _ in points]), cls="curve l" + tone,
                          stroke_dasharray=DASHES[dash % len(DASHES)]))
        for a, b, said in points:
            d.mark(x(a), y(b), colour % plot.STYLES, title=said, size=3.6)
        ends.append((y(points[-1][1]), words(colour, dash), "t" + tone))
    if labels:
        d.end_labels(ends)
    return d


# ---- A. the router's own time


def gate_and_plan(lines, name, device):
    chosen = [line for line in lines if line.get("layout") != "slots" and stage_ms(line, "route")]
    if not chosen:
        return Missing(name, f"Figure A, {device}: no line has the time of a stage \"route\" (build/bench_layer).")
    groups = {}
    for line in chosen:
        router = "topk" if line.get("router") == "top1" else str(line.get("router") or "")
        key = (str(line.get("grid") or "points"), line["dim"], router, str(line.get("load") or "router"))
        groups.setdefault(key, {}).setdefault(layout_of(line), []).append(line)
    # The plan's work is the layout's: one for all lines of a panel, "compact" where there is one.
    groups = {key + (layout,): layouts[layout] for key, layouts in sorted(groups.items())
              for layout in ["compact" if "compact" in layouts else next(iter(layouts))]}
    shown = [line for found in groups.values() for line in found]
    experts, top_k = in_order(line["experts"] for line in shown), in_order(line["top_k"] for line in shown)
    tokens = [line["tokens"] for line in shown]
    values = {stage: [ms for line in shown for ms in [stage_ms(line, stage)] if ms] for stage in ("route", "permute")}
    panels, rows = [], []
    for key, found in groups.items():
        for stage, said in (("route", "gate and top-k"), ("permute", "plan")):
            curves = {}
            for line in sorted(found, key=lambda line: line["tokens"]):
                ms = stage_ms(line, stage)
                if ms:
                    words = f"E {line['experts']}, K {line['top_k']}, {line['tokens']} tokens: {short(ms)} ms"
                    curves.setdefault((experts[line["experts"]], top_k[line["top_k"]]), []).append(
                        (line["tokens"], ms, words))
            if curves:
                panels.append(Panel(lambda width, c=dict(sorted(curves.items())): draw_lines(
                    c, pair_words(experts, "E", top_k, "K"), "tokens (log scale)", "milliseconds (log scale)", tokens,
                    values["route"] + values["permute"], width), HALF, f"{panel_words(groups, key)}: {said}"))
        for line in sorted(found, key=lambda line: (line["experts"], line["top_k"], line["tokens"])):
            forward = number(line.get("ms"))
            around = [stage_ms(line, stage) for stage in ("route", "permute")]
            rows.append([key[0], line["dim"], line["experts"], line["top_k"], line["tokens"],
                         str(line.get("router") or MISSING), layout_of(line)] +
                        [cell for stage in ("route", "permute") for cell in
                         (fixed(stage_ms(line, stage), 4), fixed(number(times_of(line, stage).get("p95")), 4))] +
                        [percent(sum(around) / forward) if None not in around and forward else MISSING])
    ranges = {stage: f"{short(min(v))} to {short(max(v))} ms" for stage, v in values.items() if v}
    title = f"A. Gate and top-k take {ranges['route']}" + (
        f", the plan {ranges['permute']}" if values["permute"] else "")
    layouts = listing(sorted({key[-1] for key in groups}))
    how = (f"{device}: medians of the stage \"route\" (scores of the experts and the choice of K) and of the stage "
           f"\"permute\" (where each row goes), layout {layouts}; all panels have the same scales. E experts, K "
           "choices a token; colours and marks tell E, dashes K. A line that is flat is bound by what a launch "
           "takes, not by the tokens. The plan of a whole layer also counts the load, that of the pack grid does not. "
           "Soft routing has no top-k and is left out.")
    return Figure(name, title, panels, how,
                  ["grid", "width", "E", "K", "tokens", "router", "layout", "route, ms (P50)", "P95", "plan, ms (P50)",
                   "P95", "both, of the forward"], rows,
                  key=key_of(experts, lambda e: f"E {e}", top_k, lambda k: f"K {k}"), commands=commands_of(shown))


def pair_words(colours, colour_name, dashes, dash_name):
    first, second = list(colours), list(dashes)
    return lambda i, j: f"{colour_name} {first[i]}, {dash_name} {second[j]}"


def panel_words(groups, key):
    grid, dim, router, load, layout = key
    words = [f"{grid} grid, width {dim}", router, f"load {load}", layout]
    varies = [len({other[i] for other in groups}) > 1 for i in (2, 3, 4)]
    return ", ".join(words[:1] + [word for word, needed in zip(words[1:], varies) if needed])


# ---- B. bandwidth of the moves


def moves_of(line):
    """(ms, strict, legacy, moved) in ms and bytes/s of pack and combine, None where the line does not say."""
    bw = mapping(line.get("bw"))
    ms, bytes_ = number(bw.get("ms")), number(bw.get("moved_bytes"))
    rates = [number(bw.get(key)) for key in ("strict_gb_s", "legacy_gb_s", "moved_gb_s")]
    if rates[2] is None and bytes_ and ms and ms > 0:
        rates[2] = bytes_ / ms / 1e6
    return ms, *[rate * 1e9 if rate and rate > 0 else None for rate in rates]


def in_bandwidth_figure(line):
    """Whether figure B shows the line, so that no other figure needs to."""
    return sized(line) and moves_of(line)[1] is not None


def bandwidth(lines, name, device):
    found = [line for line in lines if in_bandwidth_figure(line)]
    if not found:
        return Missing(name, f"Figure B, {device}: no line has the bandwidth of dispatch and combine (\"bw\"; the pack "
                             "grid of build/bench_layer).")
    peak = peaks.bandwidth_of(device, found)
    experts, widths = in_order(line["experts"] for line in found), in_order(line["dim"] for line in found)
    groups, rows = {}, []
    found.sort(key=lambda line: (line["top_k"], layout_of(line), str(line.get("router")), line["experts"], line["dim"],
                                 line["tokens"]))
    for line in found:
        ms, strict, legacy, moved = moves_of(line)
        size = line["tokens"] * line["dim"]
        words = f"E {line['experts']}, K {line['top_k']}, {line['tokens']} tokens of {line['dim']}: {short(strict)}B/s"
        key = (line["top_k"], layout_of(line), str(line.get("router") or ""), str(line.get("grid") or ""),
               str(line.get("load") or ""))
        groups.setdefault(key, {}).setdefault((experts[line["experts"]], widths[line["dim"]]), []).append(
            (size, strict, words))
        rows.append([line["top_k"], line["experts"], line["dim"], line["tokens"], layout_of(line), fixed(ms, 4)] +
                    [fixed(rate / 1e9 if rate else None, 1) for rate in (strict, legacy, moved)] +
                    [percent(strict / peak) if peak else MISSING])
    sizes = [size for curves in groups.values() for points in curves.values() for size, _, _ in points]
    rates = [rate for curves in groups.values() for points in curves.values() for _, rate, _ in points]
    panels = []
    for key, curves in groups.items():
        panels.append(Panel(lambda width, c=curves: draw_lines(
            c, pair_words(experts, "E", widths, "width"), "tokens \u00d7 width (log scale)", "bytes per second, strict",
            sizes, rates, width, (peak, "the memory's bandwidth") if peak else (max(rates), None)), HALF,
            ", ".join([f"K = {key[0]}"] + [key[i] for i in range(1, 5)
                                           if key[i] and len({other[i] for other in groups}) > 1])))
    best = max(found, key=lambda line: moves_of(line)[1])
    title = f"B. Pack and combine move {short(min(rates))}B/s to {short(max(rates))}B/s" + \
        (f", at best {percent(max(rates) / peak, 0)} of the memory's bandwidth" if peak else "") + \
        f" (E {best['experts']}, K {best['top_k']})"
    how = (f"{device}: dispatch and combine queued together. Drawn is the strict convention, (2 + 2K) \u00b7 tokens "
           "\u00b7 width \u00b7 bytes of a number over the time: every row is read once and written K times, then read "
           "K times and written once. The legacy one counts the K copies alone, 2K / (2 + 2K) of it; \"moved\" counts "
           "the arrays as the kernels read and write them. All panels have the same scales; colours and marks tell E, "
           "dashes the width. What fits the caches can be above the memory's bandwidth.")
    return Figure(name, title, panels, how,
                  ["K", "E", "width", "tokens", "layout", "ms", "strict, GB/s", "legacy, GB/s", "moved, GB/s",
                   "strict, of the peak"], rows,
                  key=key_of(experts, lambda e: f"E {e}", widths, lambda w: f"width {w}"), commands=commands_of(found))


# ---- C. the stages of a layer


def stages_of_layer(lines, name, device):
    whole = [line for line in lines if stage_ms(line, "experts")]
    if not whole:
        return Missing(name, f"Figure C, {device}: no line has the time of a layer's experts (the grids course and "
                             "large of build/bench_layer).")
    shapes, rows = {}, []
    stages = {id(line): {stage: ms for stage in mapping(line.get("stages"))
                         for ms in [stage_ms(line, stage)] if ms} for line in whole}
    names = [s for s in speed.ORDER if any(s in found for found in stages.values())]
    names += sorted({s for found in stages.values() for s in found} - set(names))
    for line in whole:
        shape = (str(line.get("grid") or "points"), line["dim"], number(line.get("expert_dim")), line["experts"])
        shapes.setdefault(shape, []).append(line)
        own = stages[id(line)]
        total = sum(own.values())
        rows.append([str(line.get("grid") or MISSING), line["tokens"], line["dim"], line["experts"], line["top_k"],
                     str(line.get("router") or MISSING), layout_of(line)] +
                    [f"{fixed(own[s], 4)} ({percent(own[s] / total)})" if s in own else MISSING for s in names] +
                    [fixed(total, 4), fixed(number(line.get("ms")), 4)])
    order = sorted(shapes, key=lambda shape: (shape[0] != COURSE, -len(shapes[shape]), -shape[1]))
    alike = [shape for shape in order if shape[:2] == order[0][:2] and len(shapes[shape]) == len(shapes[order[0]])]
    first = sorted(alike, key=lambda shape: shape[3])[len(alike) // 2]
    panels = []
    for tokens, bars in bars_of(shapes[first], stages).items():
        for share in (False, True):
            panels.append(Panel(lambda width, b=bars, s=share: speed.draw_stages(
                b, names, width, "milliseconds of a layer", s), HALF,
                f"{tokens} tokens: {'shares' if share else 'milliseconds'}"))
    folded = [Panel(lambda width, b=bars: speed.draw_stages(b, names, width, "milliseconds of a layer"), PHONE,
                    f"{shape_words(shape)}: {tokens} tokens")
              for shape in order if shape != first for tokens, bars in bars_of(shapes[shape], stages).items()]
    more = details(f"Other shapes ({len(folded)} panels)",
                   el("div", [panel.html() for panel in folded], cls="panels")) if folded else None
    around = [1 - own.get("experts", 0) / sum(own.values()) for own in stages.values()]
    how = (f"{device}: medians of the stages of one forward pass, timed call by call with a wait behind each stage, so "
           "that their sum is a little more than the recorded forward in the table's last column. Milliseconds, "
           f"and after them shares of the sum. Drawn is {shape_words(first)}; the table has every shape.")
    return Figure(name, f"C. All but the experts' products take {percent(min(around), 0)} to "
                  f"{percent(max(around), 0)} of a layer's stages, over {count(len(whole), 'point')}", panels, how,
                  ["grid", "tokens", "width", "E", "K", "router", "layout"] + [f"{s}, ms" for s in names] +
                  ["sum, ms", "forward, ms"], rows,
                  key=[(plot.box_swatch(speed.colour_of(s)), s) for s in names], more=more,
                  commands=commands_of(whole))


def shape_words(shape):
    grid, dim, expert_dim, experts = shape
    return f"{grid} grid, width {dim}" + (f", experts of {expert_dim}" if expert_dim else "") + f", E {experts}"


def bars_of(lines, stages):
    """{tokens: [(router and layout, {stage: ms})]}, with what else tells bars of one number of tokens apart."""
    found = {}
    for line in sorted(lines, key=lambda line: line["tokens"]):
        same = [other for other in lines if other["tokens"] == line["tokens"] and
                (other.get("router"), layout_of(other)) == (line.get("router"), layout_of(line))]
        words = [str(line.get("router") or "layer"), layout_of(line)]
        for key, say in (("top_k", "K {}"), ("load", "{}"), ("shared_weights", "shared {}"), ("dtype", "{}"),
                         ("scale", "{}")):
            if len({str(other.get(key)) for other in same}) > 1:
                words.append(say.format(line.get(key)))
        found.setdefault(line["tokens"], []).append((" ".join(words), stages[id(line)]))
    return found
