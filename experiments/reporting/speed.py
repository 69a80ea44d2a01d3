"""Figures about the time of a step: its stages, and what a mixture costs beside a dense model of equal work."""
import statistics

import peaks

from . import plot
from .figure import PHONE, Figure, Missing, Panel
from .lines import mapping, number
from .markup import MISSING, clipped, count, fixed, listing, percent, percent_tick, short
from .quality import commands_of

BAR = 19
# In the order in which a step runs them. Stages of the MoE layer have colours, the others greys.
ORDER = ["embed", "norm", "attention", "route", "router", "permute", "dispatch", "exchange", "experts", "combine",
         "head", "optimizer", "other"]
COLOURS = {"route": "f4", "router": "f4", "permute": "f7", "dispatch": "f6", "exchange": "f5", "experts": "f1",
           "combine": "f3", "attention": "grey0", "head": "grey2", "optimizer": "grey4", "norm": "grey1",
           "embed": "grey3", "other": "grey5"}
CLOSE = 0.05   # FLOPs of a control that differ by less count as equal


def timing_lines(arm):
    return arm.timings


# ---- 3. stages


def stage_times(comparison):
    name = comparison.slug + "_stage_times"
    stages = {}
    for arm in comparison.arms:
        found = [{stage: number(ms) for stage, ms in mapping(line.get("stages_ms")).items() if (number(ms) or 0) >= 0}
                 for line in arm.timings]
        found = [times for times in found if times and sum(filter(None, times.values())) > 0]
        if found:
            stages[arm] = {stage: statistics.fmean(times.get(stage) or 0 for times in found)
                           for stage in dict.fromkeys(stage for times in found for stage in times)}
    if not stages:
        return Missing(name, "Stage times: no timing line has stages_ms (they come from --profile).")
    order = sorted(stages, key=lambda arm: sum(stages[arm].values()))
    names = [s for s in ORDER if any(stages[arm].get(s) for arm in order)]
    names += sorted({s for arm in order for s, ms in stages[arm].items() if ms} - set(names))
    sums = {arm: sum(stages[arm].values()) for arm in order}
    key = [(plot.box_swatch(colour_of(stage)), stage) for stage in names]
    rows = [[arm.name] + [fixed(stages[arm].get(stage, 0.0), 3) for stage in names] +
            [fixed(sums[arm], 3), fixed(statistics.fmean(arm.times()), 3) if arm.times() else MISSING,
             percent(moe_share(stages[arm]))] for arm in order]
    widest = max(order, key=lambda arm: max(stages[arm].get(s, 0) for s in names) / sums[arm])
    stage = max(stages[widest], key=stages[widest].get)
    how = ("One bar an arm, the milliseconds of one step by stage, from a profiled run of its own: waiting after each "
           "stage makes the sum a little longer than the step without it, which the table names beside it. Stages of "
           "the MoE layer have colours; what every transformer has is grey.")
    return Figure(name, f"Where a step's time goes: {stage} is the largest single share, "
                  f"{percent(stages[widest][stage] / sums[widest], 0)} in {widest.name}",
                  [Panel(lambda width: draw_stages([(arm.name, stages[arm]) for arm in order], names, width,
                                                    "milliseconds of a step"))], how,
                  ["arm"] + names + ["sum, ms", "step, ms", "MoE layer"], rows, key=key,
                  commands=commands_of(order, timing_lines))


def colour_of(stage):
    return COLOURS.get(stage, "grey4")


def moe_share(stages):
    return sum(ms for stage, ms in stages.items() if stage in plot.MOE_STAGES) / sum(stages.values())


def draw_stages(bars, names, width, label, share=False):
    """bars: [(words, {stage: ms})]. share: every bar as long as the drawing is wide."""
    left = max(plot.text_width(clipped(words, 18)) for words, _ in bars) + 12
    d = plot.Drawing(width, 16 + (BAR + 6) * len(bars) + 42, label, left=left, top=10, right=52, bottom=42)
    sums = [sum(stages.values()) for _, stages in bars]
    x = plot.Scale(0, 1 if share else max(sums) * 1.001, d.left, d.right)
    ticks_below(d, x, "share of the stages" if share else label, percent_tick if share else short)
    for i, ((words, stages), total) in enumerate(zip(bars, sums)):
        y, at = d.top + (BAR + 6) * i, 0.0
        d.add(plot.el("text", clipped(words, 18), plot.tooltip(words), x=left - 8, y=y + 14, text_anchor="end",
                      cls="label"))
        for stage in names:
            ms = stages.get(stage, 0)
            if ms > 0:
                length = ms / total if share else ms
                said, across = percent(length, 0) if share else short(ms), x(at + length) - x(at)
                d.add(plot.el("rect", plot.tooltip(f"{words}, {stage}: {fixed(ms, 3)} ms, {percent(ms / total)}"),
                              x=x(at), y=y, width=across, height=BAR, cls=colour_of(stage) + " edge"))
                if across > plot.text_width(said) + 6 and stage in plot.MOE_STAGES:
                    d.add(plot.el("text", said, x=x(at + length / 2), y=y + 14, text_anchor="middle",
                                  cls="small strong"))
                at += length
        if not share:
            d.add(plot.el("text", short(total), x=x(at) + 6, y=y + 14))
    return d


def ticks_below(d, x, label, say=short):
    for t in x.ticks(max(2, int((d.right - d.left) / 80))):
        d.add(plot.el("line", x1=x(t), x2=x(t), y1=d.top - 4, y2=d.bottom, cls="grid"),
              plot.el("text", say(t), x=x(t), y=d.bottom + 15, text_anchor="middle"))
    d.add(plot.el("text", label, x=d.right, y=d.height - 6, text_anchor="end"))


# ---- 7. the tax of a mixture


def control_of(arm, dense):
    """The dense arm whose FLOPs per token are nearest."""
    flops = number(arm.first("flops_per_token"))
    if not flops or not dense:
        return None
    return min(dense, key=lambda other: abs(number(other.first("flops_per_token")) - flops))


def moe_tax(comparison):
    name = comparison.slug + "_moe_tax"
    arms = [arm for arm in comparison.arms if arm.times() and not arm.implausible]
    dense = [arm for arm in arms if arm.dense and number(arm.first("flops_per_token"))]
    if not dense:
        return Missing(name, "MoE tax: no dense control was timed, so there is nothing to hold the mixtures against.")
    rows, taxes = [], {}
    for arm in arms:
        control = control_of(arm, dense)
        if control is None:
            continue
        ms, base = statistics.fmean(arm.times()), statistics.fmean(control.times())
        work = number(arm.first("flops_per_token")) / number(control.first("flops_per_token"))
        per_token = (1 / arm.speed()[0]) / (1 / control.speed()[0]) if arm.speed() and control.speed() else ms / base
        taxes[arm] = (ms, control, per_token, work)
    if len(taxes) < 2:
        return Missing(name, "MoE tax: only the dense control was timed.")
    order = sorted(taxes, key=lambda arm: (taxes[arm][2] / taxes[arm][3]))
    device = next((arm.timing_device() for arm in order if arm.timing_device()), None)
    most = peaks.flops_of(device, [line for arm in order for line in arm.timings])
    for arm in order:
        ms, control, ratio, work = taxes[arm]
        rate = arm.flop_rate()
        rows.append([arm.name, fixed(ms, 3), control.name if control is not arm else "(itself)", fixed(ratio, 3),
                     fixed(work, 3), fixed(ratio / work, 3), short(rate),
                     percent(rate / most) if rate and most else MISSING])
    mixtures = [arm for arm in order if not arm.dense]
    equal = [taxes[arm][2] for arm in mixtures if abs(taxes[arm][3] - 1) < CLOSE]
    title = f"At equal active FLOPs a mixture's step takes {fixed(min(equal), 2)} to {fixed(max(equal), 2)} times " \
        "that of a dense model" if len(equal) > 1 else "What a mixture's step costs beside a dense one"
    unequal = [arm.name for arm in mixtures if abs(taxes[arm][3] - 1) >= CLOSE]
    notes = [f"No dense control of equal active FLOPs: {listing(unequal, 16)}. The tick on the bar is the time that "
             "their FLOPs alone would explain."] if unequal else []
    how = ("Bars: the time of a token relative to the dense control whose active FLOPs are nearest; at 1 routing, "
           "moving rows and smaller products would be free. The tick marks the ratio of the FLOPs. Right: FLOP/s, "
           "counted from the model's arithmetic, not from what the device executed" +
           (f"; the share in the table is of {short(most)}FLOP/s, an upper limit for {device}." if most else "."))
    peak = max((arm.flop_rate() or 0) for arm in order)
    panels = [Panel(lambda width: draw_bars(order, lambda arm: taxes[arm][2], lambda arm: taxes[arm][3],
                                            "time of a token, relative to the dense control", width), 450)]
    if peak:
        panels.append(Panel(lambda width: draw_bars(order, lambda arm: arm.flop_rate() or 0, None, "FLOP/s", width),
                            450))
    return Figure(name, title, panels, how,
                  ["arm", "step, ms", "dense control", "time ratio", "FLOPs ratio", "tax", "FLOP/s", "of the peak"],
                  rows, notes=notes, commands=commands_of(order, timing_lines))


def draw_bars(order, value, tick, label, width):
    left = max(plot.text_width(clipped(arm.name, 16)) for arm in order) + 12
    d = plot.Drawing(width, 16 + (BAR + 4) * len(order) + 42, label, left=left, top=10, right=52, bottom=42)
    x = plot.Scale(0, max([value(arm) for arm in order] + [tick(arm) for arm in order if tick]) * 1.02, d.left, d.right)
    ticks_below(d, x, label)
    if tick:
        d.add(plot.el("line", x1=x(1), x2=x(1), y1=d.top - 4, y2=d.bottom, cls="zero"))
    for i, arm in enumerate(order):
        y, v = d.top + (BAR + 4) * i, value(arm)
        d.add(plot.el("text", clipped(arm.name, 16), plot.tooltip(arm.name), x=left - 8, y=y + 14, text_anchor="end",
                      cls="label"),
              plot.el("rect", plot.tooltip(f"{arm.name}: {short(v)}"), x=d.left, y=y + 1, width=max(0.5, x(v) - d.left),
                      height=BAR - 2, cls="grey2" if arm.dense else "f1"),
              plot.el("text", fixed(v, 2) if tick else short(v), x=x(v) + 6, y=y + 14, cls="quiet"))
        if tick and abs(tick(arm) - 1) >= CLOSE:
            d.add(plot.el("line", plot.tooltip(f"ratio of FLOPs: {fixed(tick(arm), 2)}"), x1=x(tick(arm)),
                          x2=x(tick(arm)), y1=y - 1, y2=y + BAR + 1, cls="curve l2"))
    return d
