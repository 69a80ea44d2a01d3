"""Figures about the loss: against speed, over the training, over the learning rate, against the baseline."""
import statistics

from . import plot
from .figure import PHONE, Figure, Missing, Panel
from .lines import number, rows
from .markup import MISSING, clipped, count, fixed, listing, percent, plus_minus, short, signed

BESIDE = 250   # width of the panel for what may not be ranked


def loss_label(comparison, kind="validation loss"):
    return f"{kind}, {comparison.unit}"


def commands_of(arms, lines):
    """(arm, command) of one line of each arm."""
    return [(arm.name, next((line.get("command") for line in lines(arm) if line.get("command")), None))
            for arm in arms]


def best_runs(arm):
    return list(arm.best.values())


def against_words(comparison, arm):
    d = comparison.difference(arm)
    if arm is comparison.baseline:
        return "baseline"
    if d is None:
        return MISSING
    if d.t is None:
        return f"{signed(d.mean, 4)} ({count(d.n, 'seed')}: no interval)"
    return f"{signed(d.mean, 4)} \u00b1 {fixed(d.t[1] - d.mean, 4)}" + ("" if d.resolved else " (not resolved)")


def rank_row(comparison, arm, front):
    mean, half = comparison.loss_interval(arm)
    speed = arm.speed()
    marks = [words for words, holds in (
        ("on the front", arm in front), ("reads later tokens", arm.leaky), ("diverged with a seed", arm.lost),
        ("sees the rest of the batch", arm.sees_batch), ("router without gradient", arm.unlearned),
        ("implausible speed", arm.implausible)) if holds]
    return [arm.name, short(arm.rate), len(arm.best), plus_minus(mean, half, 4), against_words(comparison, arm),
            fixed(comparison.above_floor(arm), 4),
            plus_minus(speed[0], speed[1], 0) if speed else MISSING,
            short(number(arm.first("params_total"))), short(number(arm.first("params_active"))),
            short(number(arm.first("flops_per_token"))), fixed(arm.mean("load_cv"), 2), percent(arm.mean("drop")),
            ", ".join(marks)]


RANK_HEAD = ["arm", "learning rate", "seeds", "loss \u00b1 95 %", "against the baseline", "above the floor", "tokens/s",
             "parameters", "active", "FLOPs/token", "load CV", "dropped", "marks"]


# ---- 1. quality against speed


def quality_against_speed(comparison):
    name = comparison.slug + "_quality_against_speed"
    with_loss = [arm for arm in comparison.arms if arm.best]
    if not with_loss:
        return Missing(name, "Quality against speed: no run has a final validation loss.")
    placed = [arm for arm in with_loss if arm.ranked and arm.speed()]
    apart = [arm for arm in with_loss if not arm.ranked and arm.speed()]
    front = comparison.front()
    order = sorted(with_loss, key=lambda arm: (not arm.ranked, comparison.mean_loss(arm)))
    table = [rank_row(comparison, arm, front) for arm in order]
    commands = commands_of(order, best_runs)
    unplaced = [arm for arm in order if not arm.speed()]
    notes = []
    if unplaced:
        notes.append("Without a speed that may be shown (no timing of the arm alone on its device" +
                     (", or an implausible one" if any(arm.implausible for arm in unplaced) else "") + "): " +
                     "; ".join(f"{arm.name} {plus_minus(*comparison.loss_interval(arm), 4)}" for arm in unplaced) + ".")
    if not placed and not apart:
        return Figure(name, f"The losses of {count(len(with_loss), 'arm')}, without speeds", [],
                      "Quality against speed needs timing lines, made with nothing else on the device: there are none.",
                      RANK_HEAD, table, notes=notes, commands=commands)
    panels = []
    if placed:
        panels.append(Panel(lambda width: draw_speed(comparison, placed, front, width),
                            620 if apart else 900, "Arms that may be ranked" if apart else None))
    if apart:
        panels.append(Panel(lambda width: draw_speed(comparison, apart, [], width, "red"), BESIDE if placed else 620,
                            "Not ranked: they read later tokens, a seed diverged, or their router does not learn"))
    if front and len(placed) > 1:
        fastest, best = front[-1].name, front[0].name
        few = sum(not arm.enough_seeds for arm in placed)
        title = f"{len(front)} of {count(len(placed), 'arm')} on the front: " + (
            f"{best} has the lowest mean loss and is the fastest" if best == fastest else
            f"{best} has the lowest mean loss, {fastest} is the fastest") + (
            f", {few} with too few seeds left aside" if few else "")
    else:
        title = "Loss and speed" + (", but no arm has the three seeds that a front needs" if not front else "")
    how = ("Lower is better, right is faster. Each point is an arm at its best learning rate, its mean over the seeds; "
           "vertical bars are 95\u202f% intervals (Student's t) over the seeds" +
           (", horizontal ones over the timings. " if any(len(arm.speeds()) > 1 for arm in placed) else
            "; each arm was timed once, so there is no interval across. ") +
           "The line joins the points that no other point beats in both; the others are grey, those of fewer than "
           "three seeds pale and never on it. Intervals are per arm, "
           "without a correction for the number of arms; near the line, order is not certain.")
    return Figure(name, title, panels, how, RANK_HEAD, table, notes=notes, commands=commands)


def draw_speed(comparison, arms, front, width, colour=None):
    phone = width <= PHONE
    above = comparison.floor is not None and not phone and width > 400
    d = plot.Drawing(width, 300 if phone or width < 400 else 380,
                     "Validation loss over tokens per second: " + listing((arm.name for arm in arms), 30),
                     right=56 if above else 14)
    losses, speeds = {}, {}
    for arm in arms:
        mean, half = comparison.loss_interval(arm)
        losses[arm] = (mean, half or 0)
        speeds[arm] = (arm.speed()[0], arm.speed()[1] or 0)
    floor = [comparison.floor] if comparison.floor and near_floor(comparison.floor, losses.values()) else []
    ends = [m + sign * h for m, h in speeds.values() for sign in (-1, 1)]
    log = min(ends) > 0 and max(ends) / min(ends) > 3
    x = d.scale_x([max(end, 0) for end in ends], log=log, pad=0.1)
    y = d.scale_y([m + sign * h for m, h in losses.values() for sign in (-1, 1)] + floor)
    d.axes(x, y, "tokens per second" + (" (log scale)" if log else "") + " \u2192", loss_label(comparison),
           say_y="even")
    if above:
        ticks = plot.linear_ticks(y.low - comparison.floor, y.high - comparison.floor, 8)
        for t in ticks:
            d.add(plot.el("text", plot.even(ticks, signed)(t), x=d.right + 8, y=y(t + comparison.floor) + 4))
        d.add(plot.el("text", "above the floor", x=d.width, y=11, text_anchor="end"))
    if floor:
        d.rule(y(floor[0]), f"floor {fixed(floor[0])}")
    if len(front) > 1:
        points = []
        for arm in front:
            at = (x(speeds[arm][0]), y(losses[arm][0]))
            if points:
                points.append((points[-1][0], at[1]) if at[1] < points[-1][1] else (points[-1][0], at[1]))
            points.append(at)
        d.add(plot.el("path", plot.tooltip("the front"), d=plot.path(points), cls="front"))
    labels = []
    for arm in sorted(arms, key=lambda arm: arm in front):
        at, (mean, half), (speed, across) = (x(speeds[arm][0]), y(losses[arm][0])), losses[arm], speeds[arm]
        tone = colour or (plot.tone(arm.style or 0) if arm in front else "grey")
        if half:
            d.whisker(at[0], y(mean - half), at[0], y(mean + half), tone)
        if across:
            d.whisker(x(max(speed - across, x.low)), at[1], x(speed + across), at[1], tone)
        say = f"{arm.name}: {plus_minus(mean, half or None)} {comparison.unit}, {short(speed)} tokens/s"
        d.mark(*at, arm.style, tone, say, pale=not arm.enough_seeds)
        labels.append((*at, clipped(arm.name, 18 if phone or colour else 24),
                       "bad" if colour else "label" if arm in front else "quiet"))
    for arm in arms:
        at = x(speeds[arm][0])
        d.block(at - 2, y(sum(losses[arm])), at + 2, y(losses[arm][0] - losses[arm][1]))
    d.labels(labels[::-1])
    return d


def near_floor(floor, losses):
    """Whether a scale with the floor leaves the points most of the room."""
    low, high = min(m - h for m, h in losses), max(m + h for m, h in losses)
    return low - floor < 0.4 * (high - floor)


# ---- 2. loss over the training


def mean_curves(comparison, arm, key, x_of):
    """[(x, mean, low, high)] over the seeds at the arm's best rate, at the steps that all of them have."""
    curves = []
    for run in arm.best.values():
        points = {}
        for p in rows(run.get(key), 3):
            if number(p[2]) is not None:
                points[p[0]] = (x_of(run, p), p[2] * comparison.scale(run))
        curves.append(points)
    shared = sorted(set.intersection(*map(set, curves))) if curves else []
    result = []
    for step in shared:
        at = [c[step] for c in curves]
        if None not in (x for x, _ in at):
            values = [v for _, v in at]
            result.append((statistics.fmean(x for x, _ in at), statistics.fmean(values), min(values), max(values)))
    return result


def curve_kind(comparison, arms):
    """Validation where it was measured often enough to be a curve, else the training loss."""
    lengths = [len(rows(run.get("val"), 3)) for arm in arms for run in arm.best.values()]
    return ("val", "validation loss") if lengths and min(lengths) >= 5 else ("train", "training loss")


def loss_over_training(comparison):
    name = comparison.slug + "_loss_over_training"
    arms = [arm for arm in comparison.arms if arm.best]
    key, words = curve_kind(comparison, arms)
    axes = [("tokens", lambda arm: lambda run, p: p[1])]
    axes.append(("seconds of training steps", seconds_of))
    axes.append(("FLOPs", lambda arm: lambda run, p: number(run.get("flops_per_token")) and
                 p[1] * run["flops_per_token"]))
    panels, table = [], []
    for label, x_of in axes:
        curves = {}
        for arm in arms:
            of_arm = x_of(arm)
            points = mean_curves(comparison, arm, key, of_arm) if of_arm else []
            if points:
                curves[arm] = points
        if curves:
            panels.append(Panel(lambda width, c=curves, t=label: draw_curves(comparison, c, t, words, width),
                                PHONE if len(axes) > 1 else 900, f"Against {label.split(' of ')[0]}"))
        if label == "tokens":
            if not curves:
                return Missing(name, "Loss over the training: no run has more than its final loss.")
            drawn = curves
    for arm, points in sorted(drawn.items(), key=lambda item: item[1][-1][1]):
        flops, speed = number(arm.first("flops_per_token")), arm.speed()
        tokens = points[-1][0]
        table.append([arm.name, len(arm.best), short(tokens), short(tokens / speed[0]) if speed else MISSING,
                      short(tokens * flops) if flops else MISSING, *[fixed(v, 4) for v in points[-1][1:]]])
    untimed = [arm.name for arm in drawn if not arm.speed()]
    notes = [f"No speed, so not in the panel against seconds: {listing(untimed)}."] if untimed else []
    leaky = [arm.name for arm in drawn if arm.leaky]
    if leaky:
        notes.append(f"In red: {listing(leaky)}, which read later tokens; their loss is no language model's.")
    sure = [arm for arm in drawn if arm.ranked and arm.enough_seeds]
    best = min(sure, key=lambda arm: drawn[arm][-1][1], default=None)
    title = f"{words.capitalize()} over the training" + (
        f": {best.name} ends lowest, at {fixed(drawn[best][-1][1])}" if best and len(drawn) > 1 else "")
    how = ("One curve an arm, the mean over its seeds; the band spans the lowest and the highest seed. The same curves "
           "three times: at equal tokens, equal time (each arm's own time of a step, alone on its device) and equal "
           "arithmetic. Arms that lead in one panel need not lead in the next. The start is cut off.")
    return Figure(name, title, panels, how,
                  ["arm", "seeds", "tokens", "seconds", "FLOPs", "last mean", "lowest seed", "highest seed"], table,
                  notes=notes, commands=commands_of(drawn, best_runs))


def seconds_of(arm):
    speed = arm.speed()
    return (lambda run, p: p[1] / speed[0]) if speed else None


def draw_curves(comparison, curves, x_label, words, width):
    named = [arm for arm in curves if arm.style is not None]
    room = max([plot.text_width(clipped(arm.name, 15)) for arm in named] + [20]) + 12
    d = plot.Drawing(width, 290, f"{words} against {x_label}", right=room, left=44)
    late = [p for points in curves.values() for p in points[len(points) // 4:]]
    floor = [comparison.floor] if comparison.floor else []
    x = d.scale_x([0] + [points[-1][0] for points in curves.values()], pad=0)
    y = d.scale_y([v for p in late for v in p[2:]] + floor, pad=0.03)
    d.axes(x, y, x_label, f"{words}, {comparison.unit.split(' per ')[0]}", say_y="even")
    if floor:
        d.rule(y(floor[0]), f"floor {fixed(floor[0])}")
    ends = []
    for arm in sorted(curves, key=lambda arm: -1 if arm.style is None else 10 - arm.style):
        points = cut_above(curves[arm], y.high)
        style = "red" if arm.leaky else arm.style
        if arm.style is not None and len(points) > 1 and len(arm.best) > 1:
            d.add(plot.el("path", cls=f"band f{plot.tone(style)}",
                          d=plot.band_path([(x(p[0]), y(p[2])) for p in points],
                                           [(x(p[0]), y(min(p[3], y.high))) for p in points])))
        d.curve([(x(p[0]), y(p[1])) for p in points], style,
                f"{arm.name}: {fixed(points[-1][1])} after {short(points[-1][0])} {x_label.split(' ')[0]}")
        if arm.style is not None:
            ends.append((y(points[-1][1]), clipped(arm.name, 15), f"t{arm.style}" if not arm.leaky else "bad"))
            if x(points[-1][0]) < d.right - 3:
                d.add(plot.el("path", d=plot.path([(x(points[-1][0]), y(points[-1][1])),
                                                   (d.right, y(points[-1][1]))]), cls="lead", stroke_dasharray="1 3"))
    d.end_labels(ends)
    return d


def cut_above(points, high):
    """The points of a curve that comes from above: from its first crossing of `high`, interpolated."""
    for i, p in enumerate(points):
        if p[1] <= high:
            if i == 0:
                return points
            before = points[i - 1]
            share = (before[1] - high) / (before[1] - p[1])
            edge = tuple(a + share * (b - a) for a, b in zip(before, p))
            return [edge] + points[i:]
    return points[-1:]
