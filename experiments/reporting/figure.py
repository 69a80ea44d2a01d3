"""A figure: a title that says what is seen, one or more panels, how to read it, its table, its commands.

A panel is a function draw(width) -> Drawing. It is drawn twice, for a desk and for a phone, and the page shows the one
that fits: text keeps its size. A key is a list of (swatch, words), swatches being plot.mark_swatch and the like. A file
of its own (file_svg) has the title, the key and all panels side by side.
"""
from . import plot
from .markup import Markup, details, el, table

PAGE = 900    # the width that wide drawings are made for
PHONE = 335


class Panel:
    def __init__(self, draw, width=PAGE, title=None):
        self.draw, self.width, self.title = draw, width, title

    def html(self):
        wide = self.draw(self.width).svg()
        drawings = [el("div", wide, cls="desk"), el("div", self.draw(PHONE).svg(), cls="phone")] \
            if abs(self.width - PHONE) > 40 else [wide]
        return el("div", el("h4", self.title) if self.title else None, drawings, style=f"--w: {self.width}")


class Figure:
    def __init__(self, name, title, panels, how, head=None, rows=None, key=None, notes=(), commands=(), more=None):
        self.name, self.title, self.panels, self.how = name, title, panels, how
        self.head, self.rows, self.key, self.notes, self.commands, self.more = head, rows, key, notes, commands, more

    def html(self):
        commands = [(what, command) for what, command in self.commands if command]
        return el(
            "figure", el("h3", self.title), plot.key_of(self.key) if self.key else None,
            el("div", [panel.html() for panel in self.panels], cls="panels"),
            [el("p", note, cls="note") for note in self.notes],
            el("figcaption", el("b", "How to read this. "), self.how),
            details("Table", table(self.head, self.rows)) if self.rows else None, self.more,
            details("Commands that made the data",
                    el("pre", "\n".join(f"{what}: {command}" for what, command in commands))) if commands else None,
            id=self.name)

    def file_svg(self):
        """(text, width, height) of an SVG file."""
        gap, top = 18, 34
        drawings = [(panel, panel.draw(panel.width)) for panel in self.panels]
        rows, row = [], []
        for item in drawings:
            if row and sum(d.width + gap for _, d in row + [item]) > max(PAGE + 2 * gap, item[1].width) + gap:
                rows.append(row)
                row = []
            row.append(item)
        rows.append(row)
        key, top = self.file_key(top, max(sum(d.width + gap for _, d in row) for row in rows))
        parts, y, width = [key], top, 0
        for row in rows:
            x, heading = 12, 18 if any(panel.title for panel, _ in row) else 0
            for panel, d in row:
                if panel.title:
                    parts.append(el("text", panel.title, x=x, y=y + 12, cls="heading"))
                parts.append(el("svg", d.parts, x=x, y=y + heading, width=d.width, height=d.height,
                                viewBox=f"0 0 {d.width} {d.height}"))
                x += d.width + gap
            width = max(width, x)
            y += heading + max(d.height for _, d in row) + gap
        text_most = max(20, int(width / 8.6))
        title = self.title if len(self.title) <= text_most else self.title[:text_most - 1] + "\u2026"
        body = el("svg", el("title", self.title), el("style", Markup(plot.file_css())),
                  el("rect", width="100%", height="100%", cls="paper"),
                  el("text", title, x=12, y=22, cls="title"), parts,
                  xmlns="http://www.w3.org/2000/svg", width=width, height=y, viewBox=f"0 0 {width} {y}")
        return '<?xml version="1.0" encoding="UTF-8"?>\n' + body + "\n", width, y

    def file_key(self, top, width):
        """(the key from `top` down, where the drawings begin)"""
        parts, x, y = [], 12, top
        for swatch, words in self.key or []:
            across = 34 + plot.text_width(words) + 14
            if x > 12 and x + across > width:
                x, y = 12, y + 18
            parts.append(el("g", swatch, el("text", words, x=32, y=10), transform=f"translate({x:.0f} {y})"))
            x += across
        return parts, y + 26 if parts else top


class Missing:
    """What stands where a figure has no data: a sentence."""

    def __init__(self, name, sentence):
        self.name, self.sentence = name, sentence

    def html(self):
        return el("p", self.sentence, cls="soft", id=self.name)
