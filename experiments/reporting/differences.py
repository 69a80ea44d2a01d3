"""Figures about single comparisons of losses: each arm against the baseline, and each arm over the learning rate."""
import statistics

from . import plot
from .arms import FEWEST_SEEDS, finite_loss
from .figure import PHONE, Figure, Missing, Panel
from .lines import number
from .markup import MISSING, clipped, count, fixed, listing, plus_minus, short, signed
from .quality import best_runs, commands_of, loss_label

LINE = 26   # height of an arm in the forest plot


# ---- 10. paired differences


def forest(comparison):
    name = comparison.slug + "_against_the_baseline"
    base = comparison.baseline
    if base is None or not base.best:
        return Missing(name, "Paired differences: the baseline has no run with a final loss.")
    differences = {arm: comparison.difference(arm) for arm in comparison.arms if arm.best and arm is not base}
    differences = {arm: d for arm, d in differences.items() if d is not None}
    if not differences:
        return Missing(name, f"Paired differences: no other arm shares a seed with the baseline {base.name}.")
    order = sorted(differences, key=lambda arm: (not arm.ranked, differences[arm].mean))
    ranked = [arm for arm in order if arm.ranked]
    resolved = sum(differences[arm].resolved for arm in ranked)
    unsure = sum(differences[arm].t is not None and not differences[arm].resolved for arm in ranked)
    few = sum(differences[arm].t is None for arm in ranked)
    words = [f"{resolved} of {count(len(ranked), 'arm')} differ from {base.name}"]
    words += [f"{unsure} not resolved"] * (unsure > 0) + [f"{few} with too few seeds"] * (few > 0)
    spread = comparison.losses(base)
    notes = []
    if len(spread) > 1:
        notes.append(f"The baseline's own losses over its seeds span {fixed(max(spread) - min(spread), 4)} "
                     f"(standard deviation {fixed(statistics.stdev(spread), 4)}): differences are taken within a seed, "
                     "so most of that is not in them.")
    else:
        notes.append("The baseline has one seed: how far seeds differ is not known.")
    apart = [arm.name for arm in order if not arm.ranked]
    if apart:
        notes.append(f"Not ranked, in red below the line: {listing(apart)}.")
    rows = []
    for arm in order:
        d = differences[arm]
        rows.append([arm.name, d.n, signed(d.mean, 4), "\u00b1 " + fixed(d.t[1] - d.mean, 4) if d.t else MISSING,
                     f"{signed(d.bootstrap[0], 4)} to {signed(d.bootstrap[1], 4)}" if d.t else MISSING, verdict_of(d),
                     ", ".join(signed(v, 4) for v in d.values)])
    how = (f"Each arm's loss minus that of {base.name}, over seeds that share data and initial weights: left of the "
           "zero line is better than the baseline. Dot: the mean. Bar: the wider of two 95\u202f% intervals, Student's "
           "t and the bootstrap; where it holds zero the difference is not resolved. Hollow small dots are single "
           f"seeds. With fewer than {FEWEST_SEEDS} seeds there is no interval. No correction is made for the number of "
           "arms: of twenty arms that do not differ, one is expected to look as if it did.")
    panel = Panel(lambda width: draw_forest(comparison, order, differences, width))
    return Figure(name, ", ".join(words), [panel], how,
                  ["arm", "seeds", "difference", "Student's t", "bootstrap", "said in words", "seed by seed"], rows,
                  notes=notes, commands=commands_of([base] + order, best_runs))


def verdict_of(d):
    if d.t is None:
        return f"{count(d.n, 'seed')}, no interval"
    return "not resolved" if not d.resolved else "lower loss" if d.mean < 0 else "higher loss"


def draw_forest(comparison, order, differences, width):
    phone = width <= PHONE
    names = [clipped(arm.name, 14 if phone else 24) for arm in order]
    said = [verdict_of(differences[arm]) for arm in order]
    if not phone:
        said = [signed(differences[arm].mean, 4) + ", " + words for arm, words in zip(order, said)]
    left = max(map(plot.text_width, names)) + 14
    right = 16 if phone else max(map(plot.text_width, said)) + 18
    step = LINE + (12 if phone else 0)
    d = plot.Drawing(width, 24 + step * len(order) + 44, "Paired differences to " + comparison.baseline.name,
                     left=left, right=right, bottom=44)
    values = [0.0]
    for arm in order:
        difference = differences[arm]
        values += difference.values + (list(difference.ends) if difference.t is not None else [])
    shown = robust_ends(values, [differences[arm].mean for arm in order])
    x = d.scale_x([min(max(v, shown[0]), shown[1]) for v in values])
    ticks = x.ticks(max(2, int((d.right - d.left) / (55 if phone else 80))))
    for t in ticks:
        d.add(plot.el("line", x1=x(t), x2=x(t), y1=d.top - 6, y2=d.bottom, cls="grid"),
              plot.el("text", plot.even(ticks, signed)(t) if t else "0", x=x(t), y=d.bottom + 17, text_anchor="middle"))
    d.add(plot.el("line", x1=x(0), x2=x(0), y1=d.top - 6, y2=d.bottom, cls="zero"),
          plot.el("text", f"difference in {comparison.unit if not phone else comparison.unit.split(' per ')[0]}",
                  x=d.right, y=d.height - 6, text_anchor="end"),
          plot.el("text", "\u2190 lower loss", x=x(0) - 6, y=d.top - 10, text_anchor="end"),
          plot.el("text", "higher" + ("" if phone else f" than {clipped(comparison.baseline.name, 14)}") + " \u2192",
                  x=x(0) + 6, y=d.top - 10))
    for i, arm in enumerate(order):
        difference, y = differences[arm], d.top + step * (i + 0.5)
        colour = "red" if not arm.ranked else "grey" if not difference.resolved else "1" if difference.mean < 0 else "2"
        inside = [v for v in difference.values if x.low <= v <= x.high]
        for v in inside:
            d.add(plot.el("circle", plot.tooltip(signed(v, 4)), cx=x(v), cy=y, r=2.2, cls=f"whisker l{colour}"))
        if difference.t is not None:
            low, high = (min(max(v, x.low), x.high) for v in difference.ends)
            d.whisker(x(low), y, x(high), y, colour)
        if x.low <= difference.mean <= x.high:
            say = f"{arm.name}: {signed(difference.mean, 4)}" + (
                f", from {signed(difference.ends[0], 4)} to {signed(difference.ends[1], 4)}"
                if difference.t is not None else "") + f", {verdict_of(difference)}"
            d.mark(x(difference.mean), y, 0 if difference.resolved else 1, colour, say, 5)
        else:
            side = difference.mean > x.high
            d.add(plot.el("text", "beyond \u2192" if side else "\u2190 beyond", x=d.right if side else d.left, y=y + 4,
                          text_anchor="end" if side else "start", cls="bad"))
        d.add(plot.el("text", names[i], plot.tooltip(arm.name), x=left - 12, y=y + 4, text_anchor="end",
                      cls="bad" if not arm.ranked else "label"))
        if phone:
            d.add(plot.el("text", said[i], x=d.right, y=y + 18, text_anchor="end", cls="small"))
        else:
            d.add(plot.el("text", said[i], x=d.right + 14, y=y + 4))
        if i and not arm.ranked and order[i - 1].ranked:
            d.add(plot.el("line", x1=0, x2=width, y1=y - step / 2, y2=y - step / 2, cls="lead"))
    return d


def robust_ends(values, means):
    """An axis that a single huge interval does not squeeze: four times what the means and zero span."""
    low, high = min(means + [0.0]), max(means + [0.0])
    ordered = sorted(abs(m) for m in means)
    room = 4 * max(ordered[len(ordered) // 2], (high - low) / 4, 1e-9)
    return max(min(values), min(low, -room)), min(max(values), max(high, room))


# ---- 9. learning rates


def loss_over_rate(comparison):
    name = comparison.slug + "_learning_rates"
    arms = {}
    for arm in comparison.arms:
        rates = {}
        for run in arm.runs:
            rate, loss = number(run.get("rate")), finite_loss(run, comparison.loss)
            if rate and rate > 0 and loss is not None:
                rates.setdefault(rate, []).append(loss)
        if len(rates) > 1:
            arms[arm] = dict(sorted(rates.items()))
    if not arms:
        return Missing(name, "Learning rates: no arm was run at more than one, so an arm's loss may owe as much to the "
                             "rate it happened to get as to the arm.")
    tried = {arm: {number(line.get("rate")) for line in arm.runs + arm.failed} - {None} for arm in arms}
    edge = [arm.name for arm in arms if arm.ranked and arm.rate in (min(tried[arm]), max(tried[arm]))]
    title = f"The best learning rate is inside the grid for {len(arms) - len(edge)} of {count(len(arms), 'arm')}" \
        if edge else "Every arm's best learning rate is inside the grid"
    notes = [f"Best at an end of the grid, so a rate beyond it may be better still: {listing(edge, 30)}."] * bool(edge)
    failed = [f"{arm.name} at {short(number(line.get('rate')))}" for arm in comparison.arms for line in arm.failed]
    if failed:
        notes.append(f"Failed, which counts as infinitely bad: {listing(failed)}.")
    rates = sorted({rate for found in arms.values() for rate in found})
    rows = [[arm.name] + [f"{plus_minus(statistics.fmean(found[r]), None, 4)} ({len(found[r])})" if r in found else
                          MISSING for r in rates] + [short(arm.rate)] for arm, found in arms.items()]
    how = ("One line an arm through its mean at each rate, dots are single runs, the ring is the rate it stands at in "
           "all other figures. A comparison of arms at one common rate would be one of a vertical line here.")
    return Figure(name, title, [Panel(lambda width: draw_rates(comparison, arms, width), 620)], how,
                  ["arm"] + [short(r) + " (runs)" for r in rates] + ["best"], rows, notes=notes,
                  commands=commands_of(arms, lambda arm: arm.runs))


def draw_rates(comparison, arms, width):
    named = [arm for arm in arms if arm.style is not None]
    room = max([plot.text_width(clipped(arm.name, 15)) for arm in named] + [20]) + 14
    d = plot.Drawing(width, 320, "Loss over the learning rate", right=room)
    means = {arm: [(rate, statistics.fmean(v)) for rate, v in rates.items()] for arm, rates in arms.items()}
    every = sorted(loss for arm in arms for _, loss in means[arm])
    most = every[len(every) * 9 // 10] + 2 * (every[len(every) * 9 // 10] - every[0]) + 1e-6
    x = d.scale_x([rate for rates in arms.values() for rate in rates], log=True, pad=0.08)
    y = d.scale_y([v for rates in arms.values() for values in rates.values() for v in values if v <= most])
    rates = sorted({rate for found in arms.values() for rate in found})
    d.axes(x, y, "peak learning rate (log scale)", loss_label(comparison), say_y="even",
           ticks_x=rates if len(rates) <= 8 else None)
    ends = []
    for arm in sorted(arms, key=lambda arm: -1 if arm.style is None else 10 - arm.style):
        style = "red" if arm.leaky else arm.style
        points = [(x(rate), y(loss)) for rate, loss in means[arm] if loss <= y.high]
        if not points:
            continue
        d.curve(points, style, arm.name)
        for rate, values in arms[arm].items():
            for value in values:
                if value <= y.high and arm.style is not None:
                    d.add(plot.el("circle", plot.tooltip(f"{arm.name}, rate {short(rate)}: {fixed(value, 4)}"),
                                  cx=x(rate), cy=y(value), r=2.2, cls="f" + plot.tone(style)))
        at = dict(means[arm]).get(arm.rate)
        if at is not None and at <= y.high and arm.style is not None:
            d.add(plot.el("circle", cx=x(arm.rate), cy=y(at), r=6, cls="whisker l" + plot.tone(style), fill="none"))
        if arm.style is not None:
            ends.append((points[-1][1], clipped(arm.name, 15), "bad" if arm.leaky else f"t{arm.style}"))
    d.end_labels(ends)
    return d
