"""Figures about generation: new tokens and the prompt, over the number of sequences side by side.

    generation_figures(lines) -> [Figure or Missing], for each device

experiments/bench_generate.c says what a line of kind "inference" holds. A series is a model with its options; lines
without a batch, or with no time at all, are left out.
"""
from . import plot
from .figure import PHONE, Figure, Missing, Panel
from .lines import mapping, number
from .markup import MISSING, clipped, fixed, plus_minus, short

HALF = 420
TOLD = ("router", "experts", "top_k", "prompt", "new", "dtype", "at_once", "temperature", "weights", "layers", "dim")


def generation_figures(lines):
    figures = []
    for i, device in enumerate(sorted({str(line.get("device")) for line in lines}), 1):
        figures.append(generation([line for line in lines if str(line.get("device")) == device], f"inference_{i}",
                                  device))
    return figures


def time_of(line, key, which):
    return number(mapping(line.get(key)).get(which))


def positive(value):
    return value if value and value > 0 else None


def model_of(line):
    return str(line.get("model") or line.get("checkpoint") or "model")


def series_of(lines):
    """{name: {batch: line}}; the name is the model's and what tells series of it apart."""
    names = {}
    for line in lines:
        own = [other for other in lines if model_of(other) == model_of(line)]
        told = [f"{key} {line.get(key)}" for key in TOLD if len({str(other.get(key)) for other in own}) > 1]
        names.setdefault(", ".join([model_of(line)] + told), {})[line["batch"]] = line
    return {name: dict(sorted(points.items())) for name, points in names.items()}


def generation(lines, name, device):
    lines = [line for line in lines if positive(number(line.get("batch"))) and
             any(time_of(line, key, "p50") for key in ("token_ms", "first_ms"))]
    if not lines:
        return Missing(name, f"Generation on {device}: no line has a batch and the times of a prompt or of tokens.")
    series = series_of(lines)
    batches = sorted({line["batch"] for line in lines})
    panels = []
    for title, axis, value, high in (
            ("New tokens, all sequences together", "tokens per second", lambda line: line.get("tok_s"), None),
            ("New tokens, time of one round: P50, bars to P95", "milliseconds",
             lambda line: time_of(line, "token_ms", "p50"), lambda line: time_of(line, "token_ms", "p95")),
            ("Prompt, all sequences together", "tokens per second", lambda line: line.get("prompt_tok_s"), None),
            ("Prompt, time to the first token: P50, bars to P95", "milliseconds",
             lambda line: time_of(line, "first_ms", "p50"), lambda line: time_of(line, "first_ms", "p95"))):
        points = {key: [(batch, v, high and positive(high(line))) for batch, line in found.items()
                        for v in [positive(number(value(line)))] if v] for key, found in series.items()}
        if any(points.values()):
            panels.append(Panel(lambda width, p=points, a=axis: draw_batches(p, a, batches, width), HALF, title))
    rows = [[key, batch, number(line.get("prompt")) or MISSING, number(line.get("new")) or MISSING,
             fixed(number(line.get("tok_s")), 1)] +
            [fixed(time_of(line, "token_ms", which), 3) for which in ("p50", "p95")] +
            [interval(line, "token_ms"), fixed(number(line.get("prompt_tok_s")), 0)] +
            [fixed(time_of(line, "first_ms", which), 3) for which in ("p50", "p95")] +
            [fixed(number(line.get("draw_ms")), 3), fixed(number(line.get("peak_mib")), 0)]
            for key, found in series.items() for batch, line in found.items()]
    fastest = max(((key, batch, line) for key, found in series.items() for batch, line in found.items()),
                  key=lambda item: number(item[2].get("tok_s")) or 0)
    rate = positive(number(fastest[2].get("tok_s")))
    title = "Generation" + (f": {fastest[0]} makes {short(rate)} new tokens/s with {fastest[1]} sequences side by side"
                            if rate else " over the number of sequences side by side")
    how = (f"{device}. Above: new tokens, one for each sequence in a round: forward, copy of the logits, draw. Below: "
           "the prompt, until every sequence has its first token. Throughput is over all sequences; a round's time is "
           "what a reader of one sequence waits for each token. A flat time means that more sequences are free: the "
           "weights are read once for all of them.")
    return Figure(name, title, panels, how,
                  ["model", "batch", "prompt", "new", "new tokens/s", "token, ms (P50)", "P95", "mean \u00b1 95 %",
                   "prompt tokens/s", "first token, ms (P50)", "P95", "draw, ms", "peak, MiB"], rows,
                  commands=[(model_of(line), line.get("command")) for line in lines][:12])


def interval(line, key):
    mean = time_of(line, key, "mean")
    return MISSING if mean is None else plus_minus(mean, time_of(line, key, "half_width"), 3)


def draw_batches(series, axis, batches, width):
    """series: {name: [(batch, value, end of its bar or None)]}"""
    most = 20 if width > PHONE else 10
    room = max(plot.text_width(clipped(name, most)) for name in series) + 14
    d = plot.Drawing(width, 240, f"{axis} over sequences side by side", right=room, left=44)
    values = [v for points in series.values() for _, a, b in points for v in (a, b) if v]
    log = max(values) > 8 * min(values)
    x, y = d.scale_x(batches, log=True), d.scale_y(values, log=log, zero=not log)
    d.axes(x, y, "sequences side by side (log scale)", axis + (" (log scale)" if log else ""),
           ticks_x=batches if len(batches) < 9 else None)
    ends = []
    for i, (name, points) in enumerate(series.items()):
        style = i if i < plot.STYLES else None
        if not points:
            continue
        d.curve([(x(a), y(b)) for a, b, _ in points], style, name)
        for a, b, high in points:
            if high and high > b:
                d.whisker(x(a), y(b), x(a), y(high), plot.tone(style))
            d.mark(x(a), y(b), style, size=4,
                   title=f"{name}, {a} sequences: {short(b)}" + (f", P95 {short(high)}" if high else ""))
        ends.append((y(points[-1][1]), clipped(name, most), "quiet" if style is None else f"t{style}"))
    d.end_labels(ends)
    return d
