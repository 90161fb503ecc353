"""A run's loss in the terminal: the training loss and the held-out loss over the steps, in braille dots."""

from __future__ import annotations

from typing import Any

from tools.report import facts
from tools.report.curves import Curve, curve, running_mean, thinned
from tools.runs.folder import RunFolder

HEIGHT = 14  # lines: with legend and frame a terminal of 24 shows it whole
FRAME = 16  # columns beside the plot


def loss_lines(run: RunFolder, width: int, colour: bool) -> list[str]:
    """Return the plot, `width` columns wide, and below it what it shows; one line where there is nothing to draw."""
    import plotille

    training, held_out = curve(run.steps, "loss"), curve(run.scores, "eval_loss")
    # As facts.panels.
    window = max(1, len(training) // 20)
    mean, points = running_mean(training, window), held_out.known
    if not len(mean) and not len(points):
        return ["no loss to draw", *facts.not_drawn({"loss": training})]
    figure = plotille.Figure()
    figure.width, figure.height = max(20, width - FRAME), HEIGHT
    figure.color_mode, figure.with_colors, figure.origin = "names", colour, False
    set_limits(figure, mean, points)
    figure.x_label, figure.y_label = "step", "loss"
    figure.x_ticks_fkt = lambda value, _: f"{value:.0f}"
    figure.y_ticks_fkt = lambda value, _: f"{value:10.4g}"
    if len(mean):
        # A braille character is two dots wide.
        line = thinned(mean, 2 * figure.width)
        figure.plot(line.steps.tolist(), line.values.tolist(), lc="cyan")
    if len(points):
        figure.plot(points.steps.tolist(), points.values.tolist(), lc="yellow")
        figure.scatter(points.steps.tolist(), points.values.tolist(), lc="yellow", marker="o")
    names = [f"training loss{f', mean of {window} steps' if window > 1 else ''} (cyan)"] if len(mean) else []
    names += ["o held-out loss (yellow)"] if len(points) else []
    return [*figure.show().splitlines(), f"nats per token by step: {'; '.join(names)}", *notes(training, held_out)]


def set_limits(figure: Any, *curves: Curve) -> None:
    """Set the axes around the points; around a single value, one to each side."""
    steps = [float(step) for part in curves for step in part.steps]
    values = [float(value) for part in curves for value in part.values]
    for axis, found in (("x", steps), ("y", values)):
        low, high = min(found), max(found)
        # plotille raises for an axis without an extent, which a single value has.
        margin = 1.0 if low == high else (high - low) * (0.05 if axis == "y" else 0)
        getattr(figure, f"set_{axis}_limits")(low - margin, high + margin)


def notes(training: Curve, held_out: Curve) -> list[str]:
    return [
        note.replace(" (crosses at the top)", "") for note in facts.not_drawn({"loss": training, "eval_loss": held_out})
    ]
