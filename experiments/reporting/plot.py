"""Drawing in SVG: colours, scales, axes, marks, labels that keep out of each other's way.

    d = Drawing(width, height, "what a screen reader says")
    x, y = d.scale_x([1, 2, 3]), d.scale_y([0.5, 4], log=True)
    d.axes(x, y, "tokens per second", "loss, nats")
    d.mark(x(2), y(1), style=3, title="said on hover")
    d.svg()

Colours are names in LIGHT and DARK; drawings use them through the classes in CSS, so that a page can switch between
them, and a file of its own gets the light ones written out (file_css). Whatever a colour tells, a shape or a dash
tells too; the colours are told apart by eyes that see no red or no green.
"""
import math
import re

from .markup import Markup, el, fixed, short

LIGHT = {
    "page": "#f7f7f4", "panel": "#ffffff", "ink": "#1c2126", "soft": "#56606a", "rule": "#dfe2e4", "grid": "#eceeef",
    "faint": "#a9b1b8", "red": "#b3261e", "green": "#08805f", "alarm": "#fdecea", "orange": "#c2540a",
    "s0": "#1c2126", "s1": "#1b6ca8", "s2": "#c2540a", "s3": "#08805f", "s4": "#7b3f98", "s5": "#a67c00",
    "s6": "#1590a3", "s7": "#a8456e", "fair": "#f3f2ee", "over": "#b04a06", "under": "#1a5a98", "on-strong": "#ffffff"}
DARK = {
    "page": "#121518", "panel": "#1a1e22", "ink": "#e6e9ec", "soft": "#a0abb5", "rule": "#333a41", "grid": "#272d33",
    "faint": "#68727c", "red": "#ff8f85", "green": "#45c7a0", "alarm": "#3a1f1e", "orange": "#f29a52",
    "s0": "#e6e9ec", "s1": "#6db6f0", "s2": "#f29a52", "s3": "#45c7a0", "s4": "#c99ae6", "s5": "#e6c24a",
    "s6": "#5fd2e0", "s7": "#f28cb3", "fair": "#262b30", "over": "#f59a4c", "under": "#5dabee", "on-strong": "#10151a"}
STYLES = 8
DASHES = [None, None, "7 3", "2 3", "9 3 2 3", "12 4", "4 3", "8 3 2 3 2 3"]
SHADES = 5  # of a heat map, on either side of the fair share

# The stages of a training step in the order they run; those of the MoE layer have colours, the others greys.
MOE_STAGES = ["route", "router", "permute", "dispatch", "exchange", "experts", "combine"]


def mixed(a, b, share):
    """Colour between a and b, `share` of it a."""
    parts = [(int(a[i:i + 2], 16), int(b[i:i + 2], 16)) for i in (1, 3, 5)]
    return "#" + "".join(f"{round(p * share + q * (1 - share)):02x}" for p, q in parts)


for theme in (LIGHT, DARK):
    for i in range(1, SHADES + 1):
        theme[f"over{i}"] = mixed(theme["over"], theme["fair"], i / SHADES)
        theme[f"under{i}"] = mixed(theme["under"], theme["fair"], i / SHADES)
    for i, share in enumerate((0.75, 0.6, 0.45, 0.32, 0.2, 0.1)):
        theme[f"grey{i}"] = mixed(theme["soft"], theme["panel"], share)

CSS = """
svg text { font: 11.5px system-ui, -apple-system, "Segoe UI", Roboto, "Noto Sans", "DejaVu Sans", sans-serif;
  fill: var(--soft); font-variant-numeric: tabular-nums; }
svg text.label { fill: var(--ink); paint-order: stroke; stroke: var(--panel); stroke-width: 3px; }
svg text.quiet { fill: var(--soft); paint-order: stroke; stroke: var(--panel); stroke-width: 3px; }
svg text.bad { fill: var(--red); } svg text.small { font-size: 10.5px; } svg text.strong { fill: var(--on-strong); }
svg text.label-plain { fill: var(--ink); }
svg text.heading { font-size: 13px; font-weight: 600; fill: var(--ink); }
svg text.title { font-size: 15px; font-weight: 600; fill: var(--ink); }
.grid { stroke: var(--grid); } .axis { stroke: var(--soft); } .lead { stroke: var(--faint); stroke-width: 0.8; }
.zero { stroke: var(--ink); stroke-width: 1.2; } .floor { stroke: var(--green); stroke-width: 1.5; }
text.floor-label { fill: var(--green); stroke: var(--panel); stroke-width: 3px; paint-order: stroke; }
.pale { opacity: 0.5; }
.front { fill: none; stroke: var(--ink); stroke-width: 1.4; opacity: 0.55; }
.curve { fill: none; stroke-width: 2; stroke-linejoin: round; } .band { opacity: 0.13; stroke: none; }
.whisker { stroke-width: 1.3; fill: none; } .halo { stroke: var(--panel); stroke-width: 1.2; }
.roof { fill: none; stroke: var(--ink); stroke-width: 1.5; } .edge { stroke: var(--panel); stroke-width: 1; }
.lgrey { stroke: var(--faint); stroke-width: 1.1; opacity: 0.75; } .fgrey { fill: var(--faint); }
.lred { stroke: var(--red); } .fred { fill: var(--red); } .paper { fill: var(--panel); } .fair { fill: var(--fair); }
""" + "\n".join(
    [f".l{i} {{ stroke: var(--s{i}); }} .f{i} {{ fill: var(--s{i}); }} svg text.t{i} {{ fill: var(--s{i}); }}"
     for i in range(STYLES)] +
    [f".over{i} {{ fill: var(--over{i}); }} .under{i} {{ fill: var(--under{i}); }}" for i in range(1, SHADES + 1)] +
    [f".grey{i} {{ fill: var(--grey{i}); }}" for i in range(6)]) + "\n"


def variables(theme):
    return " ".join(f"--{name}: {colour};" for name, colour in theme.items())


def file_css():
    """CSS without variables: programs that draw SVG outside a browser know none."""
    return re.sub(r"var\(--([a-z0-9-]+)\)", lambda match: LIGHT[match[1]], CSS)


# ---- scales


class Scale:
    """From values to pixels."""

    def __init__(self, low, high, start, end, log=False):
        self.low, self.high, self.start, self.end, self.log = low, high, start, end, log
        f = math.log10 if log else float
        self.span = (f(high) - f(low)) or 1.0

    def __call__(self, value):
        f = math.log10 if self.log else float
        return self.start + (f(value) - f(self.low)) / self.span * (self.end - self.start)

    def ticks(self, most):
        return log_ticks(self.low, self.high, most) if self.log else linear_ticks(self.low, self.high, most)


def linear_ticks(low, high, most):
    raw = (high - low) / max(1, most)
    if not raw > 0:
        return [low]
    power = 10.0 ** math.floor(math.log10(raw))
    step = next(m * power for m in (1, 2, 2.5, 5, 10) if m * power >= raw * 0.999)
    first = math.ceil(low / step - 1e-9)
    return [round(i * step, 12) for i in range(first, first + 200) if i * step <= high + step * 1e-9]


def log_ticks(low, high, most):
    if high / low < 4:
        return [t for t in linear_ticks(low, high, most) if t > 0]
    exponents = range(math.floor(math.log10(low)), math.ceil(math.log10(high)) + 1)
    for digits in ((1, 2, 5), (1, 3), (1,)):
        found = [d * 10.0 ** e for e in exponents for d in digits if low * 0.999 <= d * 10.0 ** e <= high * 1.001]
        if len(found) <= most + 2 or digits == (1,):
            return found[::max(1, math.ceil(len(found) / (most + 2)))]
    return []


def even(ticks, say=fixed):
    """A function that says any of the ticks, with the fewest decimals that give none of them rounded."""
    digits = next((digits for digits in range(6) if all(abs(round(t, digits) - t) < 1e-9 for t in ticks)), 6)
    return lambda t: say(t, digits)


def text_width(text, size=11.5):
    return 0.56 * size * len(text)


# ---- one drawing


class Drawing:
    def __init__(self, width, height, label, left=50, right=14, top=24, bottom=40):
        self.width, self.height, self.label = width, height, label
        self.left, self.right, self.top, self.bottom = left, width - right, top, height - bottom
        self.parts = []
        self.taken = []   # (box (x0, y0, x1, y1) that labels should not cover, how much that matters)

    def add(self, *parts):
        self.parts += parts

    def block(self, x0, y0, x1, y1, weight=40):
        self.taken.append(((x0, y0, x1, y1), weight))

    def scale_x(self, values, log=False, zero=False, pad=0.06):
        return Scale(*spread(values, log, zero, pad), self.left, self.right, log)

    def scale_y(self, values, log=False, zero=False, pad=0.07):
        return Scale(*spread(values, log, zero, pad), self.bottom, self.top, log)

    def axes(self, x, y, x_label, y_label, say_x=short, say_y=short, ticks_x=None):
        """say_x and say_y: from a tick's value to its words; say_y "even": all with the decimals that they need."""
        ticks_y = self.ticks_y(y)
        say_y = even(ticks_y) if say_y == "even" else say_y
        for t in ticks_y:
            self.add(el("line", x1=self.left, x2=self.right, y1=y(t), y2=y(t), cls="grid"),
                     el("text", say_y(t), x=self.left - 6, y=y(t) + 4, text_anchor="end"))
        self.add(el("line", x1=self.left, x2=self.right, y1=self.bottom, y2=self.bottom, cls="axis"))
        for t in ticks_x or x.ticks(max(2, int((self.right - self.left) / 58))):
            anchor = "end" if x(t) > self.right - 12 else "middle"
            self.add(el("line", x1=x(t), x2=x(t), y1=self.bottom, y2=self.bottom + 4, cls="axis"),
                     el("text", say_x(t), x=x(t), y=self.bottom + 17, text_anchor=anchor))
        self.add(el("text", x_label, x=self.right, y=self.height - 4, text_anchor="end"),
                 el("text", y_label, x=0, y=11))

    def ticks_y(self, y):
        return y.ticks(max(2, int((self.bottom - self.top) / 34)))

    def rule(self, y, text, cls="floor"):
        """A dashed horizontal line with its label above it."""
        self.add(el("line", x1=self.left, x2=self.right, y1=y, y2=y, cls=cls, stroke_dasharray="6 4"),
                 el("text", text, x=self.left + 6, y=y - 5, cls="floor-label"))
        self.block(self.left + 4, y - 16, self.left + 8 + text_width(text), y + 2)

    def curve(self, points, style, title=None, clip=None):
        """points in pixels; a single one becomes a dot. style: of an arm, None is grey, "red" is red."""
        if len(points) == 1:
            self.add(el("circle", tooltip(title), cx=points[0][0], cy=points[0][1], r=2.5, cls="f" + tone(style)))
        elif points:
            self.add(el("path", tooltip(title), d=path(points), cls="curve l" + tone(style),
                        stroke_dasharray=dash(style), clip_path=clip))

    def mark(self, x, y, style, colour=None, title=None, size=5.5, pale=False):
        """The mark of a style: circle, square, triangle, ..., in its colour or that of another style."""
        self.add(el("path", tooltip(title), d=mark_path(style if isinstance(style, int) else 0, x, y, size),
                    cls="f" + (colour or tone(style)) + " halo" + (" pale" if pale else "")))
        self.block(x - size, y - size, x + size, y + size, weight=150)

    def whisker(self, x0, y0, x1, y1, colour):
        """An interval from one end to the other, with short bars across the ends."""
        cls = "l" + colour
        across = (0, 3) if y0 == y1 else (3, 0)
        ends = "".join(f"M{x - across[0]:.1f} {y - across[1]:.1f}L{x + across[0]:.1f} {y + across[1]:.1f}"
                       for x, y in ((x0, y0), (x1, y1)))
        self.add(el("path", d=f"M{x0:.1f} {y0:.1f}L{x1:.1f} {y1:.1f}{ends}", cls="whisker " + cls))

    def labels(self, items):
        """items: (x, y, text, class). Each goes to the free place that is nearest to its point."""
        for x, y, text, cls in items:
            width = text_width(text)
            best = None
            for distance in (9, 14, 24, 36, 52, 70):
                for k, (dx, dy) in enumerate(((1, 0), (-1, 0), (0.7, -0.9), (0.7, 0.9), (-0.7, -0.9), (-0.7, 0.9),
                                              (0, -1.2), (0, 1.2))):
                    cx, cy = x + dx * distance, y + dy * distance
                    x0 = cx if dx > 0 else cx - width if dx < 0 else cx - width / 2
                    box = (x0, cy - 7, x0 + width, cy + 6)
                    cost = distance + k + sum(weight * overlap(box, other) for other, weight in self.taken)
                    cost += 1e4 * (box[0] < 2 or box[2] > self.width - 1 or box[1] < 14 or box[3] > self.bottom - 1)
                    cost += 30 * (box[0] < self.left)
                    if best is None or cost < best[0]:
                        best = (cost, box, distance)
            _, box, distance = best
            self.block(*box, weight=400)
            if distance > 14:
                end = (min(max(x, box[0]), box[2]), box[1] + 6 if box[1] > y else box[3] - 5 if box[3] < y else
                       (box[1] + box[3]) / 2)
                self.add(el("line", x1=x, y1=y, x2=end[0], y2=end[1], cls="lead"))
            self.add(el("text", text, x=box[0], y=box[3] - 2, cls=cls))

    def end_labels(self, items):
        """items: (y, text, class) of curves that end at the right; the labels stand behind them, pushed apart."""
        places = pushed_apart([y for y, _, _ in items], 13, self.top + 2, self.bottom - 3)
        for (y, text, cls), place in zip(items, places):
            if abs(place - y) > 3:
                self.add(el("path", d=f"M{self.right + 1} {y:.1f}L{self.right + 7} {place:.1f}",
                            cls="lead", fill="none"))
            self.add(el("text", text, x=self.right + 9, y=place + 4, cls=cls))

    def svg(self):
        return el("svg", self.parts, viewBox=f"0 0 {self.width} {self.height}", role="img", aria_label=self.label,
                  xmlns="http://www.w3.org/2000/svg", data_w=self.width, data_h=self.height)


def tone(style):
    """Suffix of the classes l (line), f (filled) and t (text)."""
    return "grey" if style is None else str(style)


def dash(style):
    return DASHES[style] if isinstance(style, int) else None


def tooltip(text):
    return el("title", text) if text else None


def path(points):
    return Markup("M" + "L".join(f"{x:.1f} {y:.1f}" for x, y in points))


def band_path(lower, upper):
    return Markup(path(lower) + "L" + path(upper[::-1])[1:] + "Z")


POLYGONS = {1: 4, 2: 3, 3: 4, 4: 3, 5: 5, 6: 6}


def mark_path(style, x, y, r):
    """0 circle, 1 square, 2 triangle up, 3 diamond, 4 triangle down, 5 pentagon, 6 hexagon, 7 cross."""
    if style == 0:
        return Markup(f"M{x - r:.1f} {y:.1f}a{r} {r} 0 1 0 {2 * r} 0a{r} {r} 0 1 0 {-2 * r} 0Z")
    if style == 7:
        a, b = r * 0.4, r
        return Markup(f"M{x - a:.1f} {y - b:.1f}h{2 * a:.1f}v{b - a:.1f}h{b - a:.1f}v{2 * a:.1f}h{a - b:.1f}"
                      f"v{b - a:.1f}h{-2 * a:.1f}v{a - b:.1f}h{a - b:.1f}v{-2 * a:.1f}h{b - a:.1f}Z")
    sides = POLYGONS[style]
    turn = {1: math.pi / 4, 4: math.pi / 2}.get(style, -math.pi / 2)
    reach = r * {3: 1.35, 4: 1.15, 6: 1.05}.get(sides, 1.1) if style != 1 else r * 1.25
    return Markup(path([(x + reach * math.cos(turn + 2 * math.pi * i / sides),
                         y + reach * math.sin(turn + 2 * math.pi * i / sides)) for i in range(sides)]) + "Z")


def overlap(a, b):
    """Share of box a that b covers."""
    width, height = min(a[2], b[2]) - max(a[0], b[0]), min(a[3], b[3]) - max(a[1], b[1])
    return max(0, width) * max(0, height) / ((a[2] - a[0]) * (a[3] - a[1])) if width > 0 and height > 0 else 0


def pushed_apart(wanted, gap, low, high):
    """Places near the wanted ones, in their order, at least `gap` apart where there is room."""
    order = sorted(range(len(wanted)), key=lambda i: wanted[i])
    gap = min(gap, (high - low) / max(1, len(wanted) - 1)) if len(wanted) > 1 else gap
    clusters = []   # [places wanted, first index in order]
    for k, i in enumerate(order):
        clusters.append([[wanted[i]], k])
        while True:
            middle = sum(clusters[-1][0]) / len(clusters[-1][0])
            size = gap * (len(clusters[-1][0]) - 1)
            start = min(max(middle - size / 2, low), high - size)
            if len(clusters) > 1 and start < clusters[-2][2] + gap * len(clusters[-2][0]) - 1e-9:
                last = clusters.pop()
                clusters[-1][0] += last[0]
            else:
                clusters[-1][2:] = [start]
                break
    places = [0.0] * len(wanted)
    for values, first, start in clusters:
        for j in range(len(values)):
            places[order[first + j]] = start + gap * j
    return places


def spread(values, log, zero, pad):
    """Ends of a scale for the values, with some air."""
    values = [v for v in values if v is not None and math.isfinite(v) and (not log or v > 0)]
    if not values:
        return (1.0, 10.0) if log else (0.0, 1.0)
    low, high = min(values), max(values)
    if log:
        air = max((high / low) ** pad, 1.06)
        return low / air, high * air
    air = ((high - low) or abs(high) or 1.0) * pad
    below = min(0.0, low) if zero else low - air
    return (max(0.0, below) if low >= 0 else below), high + air


# ---- keys


def key_of(items):
    """A legend: [(swatch, words)]."""
    return el("div", [el("span", swatch, " ", words) for swatch, words in items], cls="key")


def line_swatch(style):
    return el("svg", el("line", x1=1, x2=25, y1=6, y2=6, cls="curve l" + tone(style), stroke_dasharray=dash(style)),
              viewBox="0 0 26 12", width=26, height=12, cls="swatch", aria_hidden="true")


def dash_swatch(dashes):
    return el("svg", el("line", x1=1, x2=25, y1=6, y2=6, cls="axis", stroke_width=2, stroke_dasharray=dashes),
              viewBox="0 0 26 12", width=26, height=12, cls="swatch", aria_hidden="true")


def mark_swatch(style):
    return el("svg", el("path", d=mark_path(style or 0, 12, 6, 4.2), cls="f" + tone(style)), viewBox="5 0 14 12",
              width=14, height=12, cls="swatch box", aria_hidden="true")


def box_swatch(cls):
    return el("svg", el("rect", x=1, y=1, width=12, height=10, cls=cls), viewBox="0 0 14 12", width=14, height=12,
              cls="swatch box", aria_hidden="true")
