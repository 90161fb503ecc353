"""Curves out of metrics.jsonl, made small enough to draw without losing a spike or a hole."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np

from tools.runs.folder import Record

Array = np.ndarray[Any, Any]
DRAWABLE = 1e100  # beyond it axes overflow; a value that large is told in words, as NaN is


@dataclass(frozen=True)
class Curve:
    """Values by step, float64 [n] each, in the order of the steps; NaN where a record holds no drawable number."""

    steps: Array
    values: Array

    def __len__(self) -> int:
        return len(self.steps)

    @property
    def known(self) -> Curve:
        """Return only the points that can be drawn."""
        at = ~np.isnan(self.values)
        return Curve(self.steps[at], self.values[at])

    @property
    def unknown(self) -> list[int]:
        """Return the steps whose value is NaN, infinite, or no number."""
        return [int(step) for step in self.steps[np.isnan(self.values)]]


def curve(records: Sequence[Record], key: str) -> Curve:
    """Return what `key` was by step, over the records that have it."""
    having = [record for record in records if key in record]
    steps = np.array([record["step"] for record in having], np.float64)
    return Curve(steps, np.array([drawable(record[key]) for record in having], np.float64))


def drawable(value: Any) -> float:
    if isinstance(value, bool) or not isinstance(value, int | float) or not abs(value) < DRAWABLE:
        return float("nan")
    return float(value)


def rate(records: Sequence[Record]) -> Curve:
    """Return tokens per second by step."""
    tokens, seconds = curve(records, "tokens"), curve(records, "seconds")
    if len(tokens) != len(seconds):
        return Curve(np.zeros(0), np.zeros(0))
    with np.errstate(divide="ignore", invalid="ignore"):
        values = tokens.values / seconds.values
    return Curve(tokens.steps, np.where(np.isfinite(values), values, np.nan))


def running_mean(points: Curve, window: int) -> Curve:
    """Return the mean of the last `window` known values at each of their steps (of fewer at the beginning)."""
    known = points.known
    sums = np.concatenate([[0.0], np.cumsum(known.values)])
    ends = np.arange(1, len(known) + 1)
    starts = np.maximum(ends - window, 0)
    return Curve(known.steps, (sums[ends] - sums[starts]) / (ends - starts))


def thinned(points: Curve, columns: int) -> Curve:
    """Return at most three points for each of `columns` equal stretches of steps: lowest, highest, and a hole."""
    if len(points) <= 2 * columns:
        return points
    first, last = points.steps[0], points.steps[-1]
    column = ((points.steps - first) / max(last - first, 1) * columns).astype(np.int64)
    kept: set[int] = set()
    for part in np.split(np.arange(len(points)), np.flatnonzero(np.diff(column)) + 1):
        values = points.values[part]
        if np.isnan(values).all():
            kept.add(int(part[0]))
            continue
        kept |= {int(part[np.nanargmin(values)]), int(part[np.nanargmax(values)])}
        kept |= {int(at) for at in part[np.isnan(values)][:1]}
    order = sorted(kept)
    return Curve(points.steps[order], points.values[order])
