"""How the figures of the notebooks look: import it before the first figure.

    from plots import *          # plt, COLORS, figure, label_ends, heat, note

Figures are PNG, which every viewer and converter shows, of some 30 kB. Colours can be told apart
by colour-blind readers (Okabe and Ito's set). A curve is named at its end where there is room, rather than in a box.
"""
import matplotlib
import matplotlib.pyplot as plt
import numpy as np

__all__ = ["plt", "np", "COLORS", "GREY", "figure", "label_ends", "heat", "note"]

COLORS = ["#0072B2", "#D55E00", "#009E73", "#CC79A7", "#E69F00", "#56B4E9", "#5A5A5A", "#8C6D1F"]
GREY = "#767676"

matplotlib.rcParams.update({
    "axes.prop_cycle": matplotlib.cycler(color=COLORS), "axes.spines.top": False, "axes.spines.right": False,
    "axes.edgecolor": "#999999", "axes.labelcolor": "#333333", "axes.titlesize": 10, "axes.titlelocation": "left",
    "axes.titlepad": 8, "axes.labelsize": 9, "xtick.color": "#555555", "ytick.color": "#555555", "xtick.labelsize": 8,
    "ytick.labelsize": 8, "axes.grid": True, "grid.color": "#e6e6e6", "grid.linewidth": 0.6, "axes.axisbelow": True,
    "lines.linewidth": 1.6, "legend.frameon": False, "legend.fontsize": 8, "figure.dpi": 90, "font.size": 9,
    "figure.facecolor": "white",
})


def figure(columns=1, width=4.2, height=2.8, rows=1, **options):
    """A figure of columns x rows axes, each width x height inches; returns the axes alone or as an array."""
    _, axes = plt.subplots(rows, columns, figsize=(width * columns, height * rows), constrained_layout=True, **options)
    return axes


def label_ends(axes, labels, room=0.28):
    """Writes each curve's label at its right end in its colour, moved apart where two would touch."""
    lines = axes.get_lines()[:len(labels)]
    low, high = axes.get_ylim()
    left, right = axes.get_xlim()
    log = axes.get_yscale() == "log"
    place = (lambda v: np.log(v)) if log else (lambda v: v)
    gap = (place(high) - place(low)) * 0.075
    ends = []
    for line, label in zip(lines, labels):
        y = np.asarray(line.get_ydata(), dtype=float)
        y = y[np.isfinite(y)]
        ends.append([place(np.clip(y[-1], low, high)), line, label])
    ends.sort(key=lambda end: end[0])
    for i in range(1, len(ends)):
        ends[i][0] = max(ends[i][0], ends[i - 1][0] + gap)
    over = ends[-1][0] - place(high)
    if over > 0:  # too many at the top: all of them move down
        for end in ends:
            end[0] -= over
    axes.set_xlim(left, right + (right - left) * room)
    for y, line, label in ends:
        axes.text(right + (right - left) * 0.01, np.exp(y) if log else y, label, color=line.get_color(), fontsize=8,
                  va="center")


def heat(axes, values, rows, columns, title="", fmt="{:.2f}", limit=None, cmap="Blues"):
    """A table of numbers as colours, with the numbers in it."""
    values = np.asarray(values, dtype=float)
    limit = limit or np.nanmax(np.abs(values)) or 1.0
    axes.imshow(values, cmap=cmap, vmin=-limit if cmap != "Blues" else 0, vmax=limit, aspect="auto")
    axes.set_xticks(range(len(columns)))
    axes.set_xticklabels(columns)
    axes.set_yticks(range(len(rows)))
    axes.set_yticklabels(rows)
    axes.grid(False)
    axes.tick_params(length=0)
    for spine in axes.spines.values():
        spine.set_visible(False)
    axes.set_title(title)
    for i in range(values.shape[0]):
        for j in range(values.shape[1]):
            if np.isfinite(values[i, j]):
                dark = abs(values[i, j]) > 0.6 * limit
                axes.text(j, i, fmt.format(values[i, j]), ha="center", va="center", fontsize=7.5,
                          color="white" if dark else "#333333")


def note(axes, text):
    """A line under a figure: where its numbers come from."""
    axes.figure.text(0.0, -0.02, text, fontsize=7, color=GREY, va="top")
