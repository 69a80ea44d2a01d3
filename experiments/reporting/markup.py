"""HTML and SVG as text, made so that it is well-formed: what is not Markup is escaped.

    el("p", "a < b ", el("b", name), cls="soft")     <p class="soft">a &lt; b <b>...</b></p>

A keyword's `cls` is the attribute class, its underscores are hyphens; None leaves an attribute or a child out. Numbers
as text, for tables and axes, are at the end: real minus signs, thin spaces before units.
"""
import html
import math
import re

# What XML 1.0 cannot hold, however it is escaped.
ILLEGAL = re.compile("[^\t\n\r\x20-\ud7ff\ue000-\ufffd\U00010000-\U0010ffff]")
EMPTY = {"meta", "br", "hr", "col", "line", "circle", "rect", "path"}  # written <x/>, all others <x></x>
MISSING = "\u2013"


class Markup(str):
    """Text that is HTML or SVG already."""


def escape(value):
    return value if isinstance(value, Markup) else Markup(html.escape(ILLEGAL.sub("\ufffd", str(value))))


def join(children):
    """Children, lists of children within them, None left out."""
    parts = []
    for child in children:
        if isinstance(child, (list, tuple)):
            parts.append(join(child))
        elif child is not None:
            parts.append(escape(child))
    return Markup("".join(parts))


def attribute(value):
    if isinstance(value, float):
        return f"{value:.1f}".rstrip("0").rstrip(".") if math.isfinite(value) else "0"
    return escape(value)


def el(tag, *children, **attributes):
    words = "".join(f' {"class" if key == "cls" else key.rstrip("_").replace("_", "-")}="{attribute(value)}"'
                    for key, value in attributes.items() if value is not None)
    if tag in EMPTY and not children:
        return Markup(f"<{tag}{words}/>")
    return Markup(f"<{tag}{words}>{join(children)}</{tag}>")


def table(head, rows, cls=None):
    """head: texts, rows: lists of texts or Markup. It scrolls sideways where it is too wide for the page."""
    return el("div", el("table", el("thead", el("tr", [el("th", cell, scope="col") for cell in head])),
                        el("tbody", [el("tr", [el("td", cell) for cell in row]) for row in rows]), cls=cls),
              cls="wide-table", tabindex="0", role="region", aria_label="table")


def details(summary, *content, **attributes):
    return el("details", el("summary", summary), *content, **attributes)


# ---- numbers


def fixed(x, digits=3):
    return MISSING if x is None else f"{x:.{digits}f}".replace("-", "\u2212")


def signed(x, digits=3):
    if x is None:
        return MISSING
    text = f"{x:+.{digits}f}"
    return text[1:] if float(text) == 0 else text.replace("-", "\u2212")


def plus_minus(mean, half, digits=3):
    return fixed(mean, digits) + (f" \u00b1 {fixed(half, digits)}" if half is not None else "")


def short(x):
    """Three digits: 0.0123, 4.5 k, 1.2e−5."""
    if x is None:
        return MISSING
    size = abs(x)
    if size and size < 1e-3:
        text = f"{x:.1e}".replace("e-0", "e-").replace(".0e", "e")
    else:
        unit = next(((u, n) for u, n in ((1e15, "P"), (1e12, "T"), (1e9, "G"), (1e6, "M"), (1e3, "k"))
                     if size >= u * 0.9995), (1, ""))
        text = f"{x / unit[0]:.3g}" + ("\u202f" + unit[1] if unit[1] else "")
    return text.replace("-", "\u2212")


def percent(x, digits=1):
    return MISSING if x is None else fixed(100 * x, digits) + "\u202f%"


def percent_tick(x):
    """Three digits, for an axis."""
    return f"{100 * x:.3g}\u202f%"


def count(n, noun, plural=None):
    """1 arm, 2 arms."""
    return f"{n} {noun if n == 1 else plural or noun + 's'}"


def listing(words, most=8):
    """a, b and c; what is beyond `most` is counted."""
    words = list(words)
    if len(words) > most:
        words = words[:most - 1] + [f"{len(words) - most + 1} more"]
    return " and ".join(part for part in (", ".join(words[:-1]), "".join(words[-1:])) if part)


def clipped(name, most=24):
    return name if len(name) <= most else name[:most - 1] + "\u2026"
