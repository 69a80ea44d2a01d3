"""Figures about where tokens go: load over time, which domains go to which experts, what dropping rows costs."""
import math
import statistics

from . import plot
from .figure import PHONE, Figure, Missing, Panel
from .lines import mapping, number
from .markup import MISSING, Markup, clipped, count, details, el, fixed, listing, percent, percent_tick, \
    plus_minus, short
from .quality import best_runs, commands_of, loss_label, near_floor

MEASURES = (   # index in a point of "loads", key of its late mean, title, axis
    (1, "load_cv", "Spread over the experts", "coefficient of variation"),
    (2, "max_vio", "The fullest expert", "largest load / mean \u2212 1"),
    (3, "entropy", "How decided the router is", "entropy of a token's scores, nats"),
    (4, "drop", "Dropped rows", "share of the choices"))
MAPS_SHOWN = 6       # heat maps beside each other; the others are folded away
CELLS_MOST = 30000   # of all heat maps of a comparison


# ---- 4. load over time


def load_over_training(comparison):
    name = comparison.slug + "_load"
    arms = [arm for arm in comparison.arms if arm.best and not arm.dense]
    panels, rows, shown = [], {}, []
    for index, key, title, axis in MEASURES:
        curves = {arm: points for arm in arms for points in [load_curve(arm, index)] if points}
        late = {arm: arm.mean(key) for arm in arms}
        if any(v for v in late.values() if v) or any(p[1] for points in curves.values() for p in points):
            for arm, v in late.items():
                rows.setdefault(arm, {})[key] = v
            shown.append((key, title))
            if curves:
                panels.append(Panel(lambda width, c=curves, a=axis, k=key: draw_load(c, a, k, width), 420, title))
    if not shown:
        return Missing(name, "Load over time: no run has a router whose load was logged.")
    if not panels:
        return Missing(name, "Load over time: the lines hold late means alone (in the table of quality against speed), "
                             "no curves.")
    cv = {arm: arm.mean("load_cv") for arm in arms if arm.mean("load_cv") is not None}
    title = "Load over the training"
    if len(cv) > 1:
        even, uneven = min(cv, key=cv.get), max(cv, key=cv.get)
        title += f": {even.name} ends most even, {uneven.name} least"
    notes = [] if any(key == "drop" for key, _ in shown) else ["No arm dropped a row."]
    experts = {arm.config("experts") for arm in arms} - {None}
    how = ("Means over the layers and seeds. 0 is an even load in the first two panels. Entropy is that of a token's "
           "scores over the experts: near 0 the router is sure, " +
           (f"ln {experts.pop()} would be no preference at all. " if len(experts) == 1 else
            "the logarithm of the number of experts would be no preference at all. ") +
           "Even load and good loss are two things: a router that throws dice is even.")
    head = ["arm"] + [f"{title.lower()}, last quarter" for _, title in shown]
    return Figure(name, title, panels, how, head,
                  [[arm.name] + [fixed(values.get(key), 4) for key, _ in shown] for arm, values in rows.items()],
                  notes=notes, commands=commands_of(rows, best_runs))


def load_curve(arm, index):
    """[(tokens, mean over the seeds)]"""
    at = {}
    for run in arm.best.values():
        steps, tokens = number(run.get("steps")), number(run.get("tokens"))
        per_step = tokens / steps if steps and tokens else 1
        for p in run.get("loads") if isinstance(run.get("loads"), list) else []:
            if isinstance(p, list) and len(p) > index and number(p[0]) is not None and number(p[index]) is not None:
                at.setdefault(p[0] * per_step, []).append(p[index])
    return [(tokens, statistics.fmean(values)) for tokens, values in sorted(at.items())]


def draw_load(curves, axis, key, width):
    named = [arm for arm in curves if arm.style is not None]
    room = max([plot.text_width(clipped(arm.name, 14)) for arm in named] + [20]) + 12
    d = plot.Drawing(width, 230, axis, right=room, left=44)
    x = d.scale_x([0] + [points[-1][0] for points in curves.values()], pad=0)
    y = d.scale_y([p[1] for points in curves.values() for p in points], zero=True)
    d.axes(x, y, "tokens", axis, say_y=percent_tick if key == "drop" else short)
    ends = []
    for arm in sorted(curves, key=lambda arm: -1 if arm.style is None else 10 - arm.style):
        points = curves[arm]
        d.curve([(x(a), y(b)) for a, b in points], "red" if arm.leaky else arm.style,
                f"{arm.name}: {short(points[-1][1])} at the end")
        if arm.style is not None:
            ends.append((y(points[-1][1]), clipped(arm.name, 14), "bad" if arm.leaky else f"t{arm.style}"))
    d.end_labels(ends)
    return d


# ---- 5. domains and experts


def maps_of(run):
    """[layer][domain][expert] shares, checked; [] where there are none."""
    layers = run.get("domain_expert")
    if not isinstance(layers, list):
        return []
    sound = [layer for layer in layers if isinstance(layer, list) and layer and all(
        isinstance(row, list) and row and all(number(v) is not None for v in row) for row in layer)]
    return sound if len(sound) == len(layers) else []


def domain_names(run):
    count_ = len(maps_of(run)[0])
    names = run.get("domains") if isinstance(run.get("domains"), list) else list(mapping(run.get("val_domains")))
    return [str(n) for n in names] if len(names) == count_ else [f"domain {i}" for i in range(count_)]


def mutual(layer):
    """Mutual information in nats of domain and expert, domains weighted alike."""
    experts = [statistics.fmean(column) for column in zip(*layer)]
    return statistics.fmean(sum(v * math.log(v / e) for v, e in zip(row, experts) if v > 0 and e > 0) for row in layer)


def information(run):
    """Of each layer: as the run measured it, else from the shares."""
    given = run.get("mi")
    layers = maps_of(run)
    if isinstance(given, list) and len(given) == len(layers) and all(number(v) is not None for v in given):
        return given
    return [mutual(layer) for layer in layers]


def domains_and_experts(comparison):
    name = comparison.slug + "_domains_and_experts"
    runs = {}
    for arm in comparison.arms:
        run = next((run for run in arm.best.values() if maps_of(run) and len(maps_of(run)[0][0]) > 1), None)
        if run is not None and not arm.dense:
            runs[arm] = run
    if not runs:
        return Missing(name, "Domains and experts: no line says which domain's tokens went to which expert.")
    order = sorted(runs, key=lambda arm: (not arm.ranked, -max(information(runs[arm]))))
    if comparison.baseline in order[MAPS_SHOWN:]:   # always among those that are shown
        order.remove(comparison.baseline)
        order.insert(MAPS_SHOWN - 1, comparison.baseline)
    best = {arm: max(range(len(information(runs[arm]))), key=information(runs[arm]).__getitem__) for arm in order}
    panels, folded, cells = [], [], 0
    for arm in order:
        maps, values = maps_of(runs[arm]), information(runs[arm])
        for layer in [best[arm]] + [i for i in range(len(maps)) if i != best[arm]]:
            cells += len(maps[layer]) * len(maps[layer][0])
            panel = Panel(lambda width, m=maps[layer], n=domain_names(runs[arm]): draw_map(m, n, width), PHONE,
                          f"{clipped(arm.name)}, {layer_name(runs[arm], layer)}: {fixed(values[layer], 2)} nats")
            if layer == best[arm] and len(panels) < MAPS_SHOWN:
                panels.append(panel)
            elif cells <= CELLS_MOST:
                folded.append(panel)
    most = order[0]
    rows = [[arm.name, runs[arm].get("seed"), layer_name(runs[arm], best[arm])] +
            [", ".join(fixed(v, 3) for v in information(runs[arm]))] for arm in order]
    left_out = " Some are left out: there are too many." if cells > CELLS_MOST else ""
    more = details(f"Other layers and arms ({len(folded)})", el("div", [p.html() for p in folded], cls="panels"),
                   el("p", left_out, cls="note") if left_out else None) if folded else None
    how = ("Rows are the domains of the validation text, which the model is never told; columns are experts, cells the "
           "share of the domain's choices in percent. Orange is more than the fair share of one expert, blue less: "
           "rows that look alike mean that experts do not tell domains apart. Nats: mutual information of domain and "
           "expert, 0 when they have nothing to do with each other. One seed an arm, the layer where it is largest; "
           "expert numbers mean nothing across arms.")
    title = f"Experts tell domains apart most in {most.name}: {fixed(max(information(runs[most])), 2)} nats"
    return Figure(name, title,
                  panels, how, ["arm", "seed", "layer shown", "mutual information of each layer, nats"], rows,
                  more=more, commands=commands_of(order, lambda arm: [runs[arm]]))


def layer_name(run, i):
    layers = run.get("moe_layers")
    return f"layer {layers[i]}" if isinstance(layers, list) and len(layers) == len(maps_of(run)) and \
        len(set(layers)) == len(layers) else f"router {i}"


def shade(share, fair):
    """Class of a cell: shades of orange up to four times the fair share, of blue down to none."""
    if share >= fair:
        level = math.log(share / fair) / math.log(min(4, max(1.5, 1 / fair)))
        side = "over"
    else:
        level, side = 1 - share / fair, "under"
    step = min(plot.SHADES, round(level * plot.SHADES))
    return f"{side}{step}" if step else "fair"


def draw_map(layer, names, width):
    experts = len(layer[0])
    left = max(plot.text_width(clipped(name, 12), 11) for name in names) + 10
    d = plot.Drawing(width, 22 * len(layer) + 34, "Share of each domain's choices by expert", left=left, right=2, top=4,
                     bottom=30)
    across = (d.right - d.left) / experts
    plain = {}
    for i, row in enumerate(layer):
        y = d.top + 22 * i
        d.add(el("text", clipped(names[i], 12), x=left - 6, y=y + 15, text_anchor="end"))
        for j, share in enumerate(row):
            x, cls = d.left + across * j, shade(share, 1 / experts)
            if across >= 24:
                level = int(cls[-1]) if cls[-1].isdigit() else 0
                d.add(el("rect", plot.tooltip(f"{names[i]}, expert {j}: {percent(share)}"), x=x, y=y, width=across,
                         height=22, cls=cls + " edge"),
                      el("text", f"{100 * share:.0f}", x=x + across / 2, y=y + 15, text_anchor="middle",
                         cls="small strong" if level > 3 else "small label-plain"))
            else:
                plain.setdefault(cls, []).append(f"M{x:.1f} {y}h{across:.2f}v21h{-across:.2f}z")
    for cls, cells in plain.items():
        d.add(el("path", d=Markup("".join(cells)), cls=cls))
    step = max(1, math.ceil(experts / max(1, int((d.right - d.left) / 26))))
    for j in range(0, experts, step):
        d.add(el("text", j, x=d.left + across * (j + 0.5), y=d.bottom + 14, text_anchor="middle", cls="small"))
    d.add(el("text", "expert", x=d.right, y=d.height - 3, text_anchor="end", cls="small"))
    return d


# ---- 6. what dropping costs


def drop_against_quality(comparison):
    name = comparison.slug + "_dropping"
    capped = [arm for arm in comparison.arms if arm.best and not arm.leaky and arm.mean("drop") is not None and
              (arm.mean("drop") > 0 or (number(arm.config("capacity_factor")) or 0) > 0)]
    if not any(arm.mean("drop") > 0 for arm in capped):
        return Missing(name, "Dropping: no arm dropped a row in the last quarter of its steps." if
                       any(arm.mean("drop") is not None for arm in comparison.arms) else
                       "Dropping: no line says how many rows were dropped.")
    base = comparison.baseline
    arms = capped + [base] * (base is not None and bool(base.best) and base not in capped)
    order = sorted(arms, key=lambda arm: arm.mean("drop") or 0)
    rows = [[arm.name, short(number(arm.config("capacity_factor"))), percent(arm.mean("drop") or 0, 2),
             percent(arm.mean("token_drop"), 2), percent(arm.mean("padding"), 1),
             plus_minus(*comparison.loss_interval(arm), 4)] for arm in order]
    worst = order[-1]
    how = ("Each point is an arm: the share of its choices that found no place at their expert, over the last quarter "
           "of training, and its validation loss, with 95\u202f% intervals over the seeds. The baseline is shown for "
           "reference. "
           "Evaluation drops nothing unless the run says --eval-drop 1.")
    return Figure(name, f"{count(len([a for a in capped if a.mean('drop') > 0]), 'arm')} dropped rows, at most "
                  f"{percent(worst.mean('drop'))} in {worst.name}",
                  [Panel(lambda width: draw_drop(comparison, order, width), 620)], how,
                  ["arm", "capacity factor", "choices dropped", "tokens without expert", "padding", "loss \u00b1 95 %"],
                  rows, commands=commands_of(order, best_runs))


def draw_drop(comparison, arms, width):
    d = plot.Drawing(width, 300, "Validation loss over the share of dropped choices")
    losses = {arm: comparison.loss_interval(arm) for arm in arms}
    losses = {arm: (mean, half or 0) for arm, (mean, half) in losses.items()}
    floor = [comparison.floor] if comparison.floor and near_floor(comparison.floor, losses.values()) else []
    x = d.scale_x([0] + [arm.mean("drop") or 0 for arm in arms], pad=0.12)
    y = d.scale_y([m + s * h for m, h in losses.values() for s in (-1, 1)] + floor)
    d.axes(x, y, "share of the choices dropped", loss_label(comparison), say_x=percent_tick,
           say_y="even")
    if floor:
        d.rule(y(floor[0]), f"floor {fixed(floor[0])}")
    labels = []
    for arm in arms:
        (mean, half), at = losses[arm], x(arm.mean("drop") or 0)
        if half:
            d.whisker(at, y(mean - half), at, y(mean + half), plot.tone(arm.style))
        say = f"{arm.name}: {percent(arm.mean('drop') or 0)} dropped, loss {fixed(mean)}"
        d.mark(at, y(mean), arm.style, title=say)
        labels.append((at, y(mean), clipped(arm.name, 18), "label"))
    d.labels(labels)
    return d
