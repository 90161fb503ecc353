"""Plots as inline SVG: drawn by matplotlib, coloured by the page's style sheet, with text that stays text.

matplotlib knows no style sheet, so every colour is drawn as a stand-in that is replaced by a CSS variable afterwards.
No text of a user goes into a plot: titles and names stand in the page around it, where they are escaped.
"""

from __future__ import annotations

import io
import re
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any

import matplotlib
import numpy as np
from markupsafe import Markup, escape
from matplotlib.figure import Figure
from matplotlib.ticker import MaxNLocator

from tools.report.curves import Array, Curve, thinned

SERIES = 8  # colours that the style sheet has for lines
THEME = {f"#0c0a{number:02x}": f"var(--series-{number})" for number in range(SERIES)}
INK, FAINT, GRID, WARNING = "#0c0b01", "#0c0b02", "#0c0b03", "#0c0b04"
THEME |= {INK: "var(--ink-soft)", FAINT: "var(--faint)", GRID: "var(--grid)", WARNING: "var(--warning)"}
DIGIT = 6.6  # how wide a digit is at most in the font size below, whatever the font: 0.6 of it
SETTINGS: Any = {
    "svg.fonttype": "none",
    "text.parse_math": False,
    "font.family": "sans-serif",
    "font.size": 11,
    "axes.edgecolor": GRID,
    "axes.labelcolor": INK,
    "axes.spines.top": False,
    "axes.spines.right": False,
    "axes.grid": True,
    "axes.grid.axis": "y",
    "axes.axisbelow": True,
    "grid.color": GRID,
    "text.color": INK,
    "xtick.color": INK,
    "ytick.color": INK,
    "xtick.major.size": 0,
    "ytick.major.size": 0,
}


@dataclass(frozen=True)
class PlotLine:
    """One curve: `colour` is a number of the style sheet's, None a faint line behind the others."""

    curve: Curve
    colour: int | None = None
    label: str = ""
    band: Array | None = None  # half its height around each point, float64 [n]
    dots: bool = False


@dataclass(frozen=True)
class Panel:
    """One plot of the page: its title, what the axis counts, its lines from back to front."""

    title: str
    lines: Sequence[PlotLine]
    unit: str = ""
    notes: Sequence[str] = field(default=())
    columns: int | None = None  # how finely a line is drawn; None: a point or two for each pixel
    skip: float = 0.0  # share of the steps, from the first, that may leave the plot at its top

    @property
    def keyed(self) -> list[PlotLine]:
        """Return the lines that have a name, for the key beside the plot."""
        return [line for line in self.lines if line.label]

    @property
    def drawn(self) -> bool:
        return any(len(line.curve.known) for line in self.lines)

    def summary(self) -> str:
        """Return the plot in words, for those who do not see it."""
        parts = []
        for line in self.lines:
            known = line.curve.known
            if len(known) and (line.label or len(self.lines) == 1):
                first, last = (f"{known.values[at]:.4g} at step {known.steps[at]:.0f}" for at in (0, -1))
                parts.append(f"{line.label}{': ' if line.label else ''}{first}, {last}")
        return f"{self.title}: " + "; ".join(parts)


def svg(panel: Panel, width: int, height: int, name: str) -> Markup:
    """Return the panel as an <svg> of these units, CSS pixels at full size; `name` is unique in the page."""
    # The ids in an SVG come of this salt: unique in a page of several plots, and the same when a page is written again.
    with matplotlib.rc_context({**SETTINGS, "svg.hashsalt": name}):
        # matplotlib counts in inches: at 72 dpi, and 72 units an inch in SVG, one unit is one CSS pixel.
        figure = Figure(figsize=(width / 72, height / 72), dpi=72)
        axes = figure.add_subplot()
        axes.set_xlabel("step")
        axes.xaxis.set_major_locator(MaxNLocator("auto", integer=True, min_n_ticks=1))
        axes.margins(x=0.02)
        for line in panel.lines:
            draw(axes, line, panel.columns or width)
        if panel.skip:
            zoom(axes, panel)
        make_room(figure, axes, width, height)
        buffer = io.StringIO()
        figure.savefig(buffer, format="svg", transparent=True, metadata={"Date": None, "Creator": None})
    return inlined(buffer.getvalue(), width, height, panel.summary())


def zoom(axes: Any, panel: Panel) -> None:
    """Set the y axis by what follows the first steps (the share panel.skip), whose fall would flatten the rest."""
    last = max(line.curve.steps[-1] for line in panel.lines if len(line.curve))
    later = []
    for line in panel.lines:
        at = line.curve.steps >= panel.skip * last
        band = 0.0 if line.band is None else np.nan_to_num(line.band[at])
        later += [line.curve.values[at] - band, line.curve.values[at] + band]
    values = np.concatenate(later)
    values = values[~np.isnan(values)]
    if len(values) and values.max() > values.min():
        margin = 0.05 * (values.max() - values.min())
        axes.set_ylim(values.min() - margin, values.max() + margin)


def make_room(figure: Figure, axes: Any, width: int, height: int) -> None:
    """Set margins for the labels, in a fraction of the time that matplotlib's own layouts take to draw all twice."""
    labels = axes.yaxis.get_major_formatter().format_ticks(axes.get_yticks())
    # Pixels: 34 below hold the steps and their name, 18 and 14 what a label at the end of an axis sticks out.
    left = 8 + DIGIT * max(map(len, labels))
    figure.subplots_adjust(left / width, 34 / height, 1 - 14 / width, 1 - 18 / height)


def draw(axes: Any, line: PlotLine, columns: int) -> None:
    colour = FAINT if line.colour is None else f"#0c0a{line.colour % SERIES:02x}"
    known = line.curve.known
    if line.band is not None:
        band = np.nan_to_num(line.band[~np.isnan(line.curve.values)])
        axes.fill_between(known.steps, known.values - band, known.values + band, color=colour, alpha=0.18, linewidth=0)
    points = thinned(line.curve, columns)
    marker = "o" if line.dots or len(known) == 1 else ""
    style = "-" if line.colour is None or line.colour < SERIES else "--"
    width = 0.8 if line.colour is None else 1.6
    axes.plot(points.steps, points.values, style, color=colour, linewidth=width, marker=marker, markersize=3.5)
    if line.curve.unknown:  # at the top edge, where no value stands
        unknown = thinned(Curve(np.array(line.curve.unknown, np.float64), np.zeros(len(line.curve.unknown))), columns)
        top = np.ones(len(unknown))
        edge = axes.get_xaxis_transform()
        axes.plot(unknown.steps, top, "x", color=WARNING, markersize=6, clip_on=False, transform=edge)


def inlined(text: str, width: int, height: int, label: str) -> Markup:
    """Return matplotlib's file as an element of a page: sized and colored by the style sheet, without a head."""
    body = text[text.index("<svg") :]
    body = re.sub(r"<metadata>.*?</metadata>|<style.*?</style>", "", body, flags=re.DOTALL)
    body = re.sub(r' id="(?:figure|axes|patch|line2d|text|xtick|ytick|matplotlib\.axis|[A-Z]\w*)_\d+"', "", body)
    body = re.sub(r"font-family: [^;]*; ", "", body)
    body = re.sub("<[^>]*>", lambda tag: re.sub(r"(\d\.\d\d)\d+", r"\1", tag[0]), body)  # hundredths of a pixel
    body = re.sub("#0c0[ab][0-9a-f]{2}", lambda found: THEME[found[0]], body)
    head = f'<svg viewBox="0 0 {width} {height}" role="img" aria-label="{escape(label)}" style="--width: {width}px">'
    return Markup(re.sub(r"<svg[^>]*>", lambda _: head, body, count=1))
