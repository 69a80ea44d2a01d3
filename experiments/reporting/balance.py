"""Figure D: how even the load is and what overflows, beside quality and speed, arm by arm.

    balance_beside_quality(comparison) -> Figure or Missing

Four columns of one row an arm: load CV and dropped choices over the last quarter of training, the validation loss, and
tokens per second of timings alone on the device; on a phone they stand below each other.
"""
from . import plot
from .figure import PHONE, Figure, Missing, Panel
from .markup import MISSING, clipped, count, fixed, percent, percent_tick, plus_minus, short
from .quality import best_runs, commands_of, loss_label

ROW = 22
NAME_MOST = 17


def balance_beside_quality(comparison):
    name = "figure_d_" + comparison.slug
    arms = [arm for arm in comparison.arms if arm.best]
    routed = [arm for arm in arms if arm.mean("load_cv") is not None or arm.mean("drop") is not None]
    if not routed:
        return Missing(name, "Figure D: no run says how even its load was or what it dropped.")
    order = sorted(arms, key=lambda arm: (not arm.ranked, comparison.mean_loss(arm)))
    rows = [[arm.name, len(arm.best), fixed(arm.mean("load_cv"), 4), fixed(arm.mean("max_vio"), 3),
             percent(arm.mean("drop"), 2), percent(arm.mean("token_drop"), 2), percent(arm.mean("padding")),
             plus_minus(*comparison.loss_interval(arm), 4),
             plus_minus(*arm.speed(), 0) if arm.speed() else MISSING] for arm in order]
    columns = [column for column in columns_of(comparison) if any(column[1](arm) for arm in order)]
    untimed = [arm for arm in order if not arm.speed()]
    notes = []
    if len(untimed) == len(order):
        notes.append("No speed: there is no timing of these arms alone on their device (experiments/sweep makes them).")
    elif untimed:
        notes.append(f"Without a speed that may be shown: {', '.join(arm.name for arm in untimed)}.")
    if not any(arm.mean("drop") for arm in order):
        notes.append("No arm dropped a row.")
    uneven = max(routed, key=lambda arm: arm.mean("load_cv") or 0)
    ranked = [arm for arm in order if arm.ranked]
    title = f"D. The load of {uneven.name} is least even"
    if ranked:
        title += f", {ranked[0].name} has the lowest mean loss of {count(len(ranked), 'arm')}"
    how = ("One row an arm, the lowest mean loss on top. Load CV: spread of the choices over the experts, 0 is even. "
           "Dropped: choices that found no place at their expert. Both are means over the layers, the seeds and the "
           "last quarter of training. Loss: at the end, with 95\u202f% intervals over the seeds; its scale does not "
           "begin at 0. Even load is no aim in itself: it pays where rows are dropped or experts wait for the fullest.")
    if any(not arm.ranked for arm in order):
        how += " Red: not ranked (the router reads later tokens or does not learn, or a seed diverged)."
    return Figure(name, title, [Panel(lambda width: draw_columns(order, columns, width))], how,
                  ["arm", "seeds", "load CV", "max violation", "dropped", "tokens without expert", "padding",
                   "loss \u00b1 95 %", "tokens/s"], rows, notes=notes, commands=commands_of(order, best_runs))


def columns_of(comparison):
    """(heading, arm -> value or None, arm -> half of its interval or None, value -> words, from 0)"""
    def of_run(key):
        return lambda arm: arm.mean(key)

    def nothing(_):
        return None

    return (("load CV", of_run("load_cv"), nothing, lambda v: fixed(v, 2), short, True),
            ("dropped choices", of_run("drop"), nothing, percent, percent_tick, True),
            (loss_label(comparison, "loss"), comparison.mean_loss, lambda arm: comparison.loss_interval(arm)[1],
             lambda v: fixed(v, 3), None, False),
            ("tokens per second", lambda arm: arm.speed()[0] if arm.speed() else None,
             lambda arm: arm.speed()[1] if arm.speed() else None, short, short, True))


def draw_columns(order, columns, width):
    left = max(plot.text_width(clipped(arm.name, NAME_MOST)) for arm in order) + 12
    stacked = width <= PHONE
    high = ROW * len(order) + 46
    d = plot.Drawing(width, high * (len(columns) if stacked else 1),
                     "Load, dropped choices, loss and speed of each arm", left=left, right=10, top=22, bottom=24)
    across = d.right - left if stacked else (d.right - left) / len(columns)
    for i, column in enumerate(columns):
        draw_column(d, order, column, (left if stacked else left + across * i, high * i if stacked else 0),
                    across - (0 if stacked else 18), stacked or i == 0)
    return d


def draw_column(d, order, column, corner, across, named):
    heading, value, half, words, say, from_zero = column
    start, top = corner
    bottom = top + 22 + ROW * len(order)
    values = {arm: value(arm) for arm in order}
    halves = {arm: half(arm) or 0 for arm in order}
    ends = [v + s * halves[arm] for arm, v in values.items() if v is not None for s in (-1, 1)]
    # Room behind the longest bar for its number.
    low, high = plot.spread(ends, False, from_zero, 0.06)
    low = 0 if from_zero else low
    room = plot.text_width(words(max(v for v in values.values() if v is not None))) + 12
    x = plot.Scale(low, high, start, start + across - room)
    d.add(plot.el("text", heading, x=start, y=top + 12, cls="heading"))
    ticks = x.ticks(max(3, int((across - room) / 52)))
    say = say or plot.even(ticks)
    for t in ticks:
        d.add(plot.el("line", x1=x(t), x2=x(t), y1=top + 20, y2=bottom, cls="grid"),
              plot.el("text", say(t), x=x(t), y=bottom + 14, text_anchor="middle"))
    d.add(plot.el("line", x1=start, x2=start, y1=top + 20, y2=bottom, cls="axis"))
    for i, arm in enumerate(order):
        y, v = top + 22 + ROW * i + ROW / 2, values[arm]
        if named:
            d.add(plot.el("text", clipped(arm.name, NAME_MOST), plot.tooltip(arm.name), x=start - 8, y=y + 4,
                          text_anchor="end", cls="label" if arm.ranked else "bad"))
        if v is None:
            d.add(plot.el("text", MISSING, x=start + 6, y=y + 4, cls="quiet"))
            continue
        reach = halves[arm]
        said = f"{arm.name}: {heading} {words(v)}" + (f" \u00b1 {words(reach)}" if reach else "")
        if from_zero:
            d.add(plot.el("rect", plot.tooltip(said), x=start, y=y - 7, width=max(0.5, x(v) - start), height=14,
                          cls="f1" if arm.ranked else "fred"))
        else:
            d.mark(x(v), y, 0, None if arm.ranked else "red", title=said, size=4)
        if reach:
            d.whisker(x(max(low, v - reach)), y, x(v + reach), y, "0" if arm.ranked else "red")
        d.add(plot.el("text", words(v), x=x(v + reach) + 7, y=y + 4, cls="quiet"))
