"""Held-out loss with its standard error over rows."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np

from common.data.tokens import TokenSplit
from common.engine import Backend

Array = np.ndarray[Any, Any]
EVAL_ROWS = 8  # rows at a time


@dataclass(frozen=True)
class HeldOut:
    """Per held-out row, in the data set's order: the sum of nll in nats and the supervised tokens, float64 [R]."""

    nll: Array
    tokens: Array

    @property
    def loss(self) -> float:
        """Nats per supervised token, over all rows together."""
        return float(self.nll.sum() / self.tokens.sum())

    @property
    def standard_error(self) -> float:
        """Of `loss`, over rows."""
        return ratio_standard_error(self.nll, self.tokens)

    def bits_per_byte(self, sizes: Sequence[float]) -> tuple[float, float]:
        """Bits per UTF-8 byte of the text, which `sizes` [R] counts by row, and its standard error over rows.

        Unlike nats per token it can be compared between tokenizers.
        """
        weights, bits = np.asarray(sizes, np.float64), self.nll / math.log(2)
        return float(bits.sum() / weights.sum()), ratio_standard_error(bits, weights)

    def improvement_over(self, other: HeldOut) -> tuple[float, float]:
        """How much lower this loss is than `other`'s on the same rows, and its standard error, paired by row."""
        if not np.array_equal(self.tokens, other.tokens):
            raise ValueError("the two evaluations are not of the same rows")
        saved = other.nll - self.nll
        return float(saved.sum() / self.tokens.sum()), ratio_standard_error(saved, self.tokens)


def held_out(backend: Backend, split: TokenSplit) -> HeldOut:
    """Evaluate every row of `split`, exactly; zero-mask rows that fill the last batch are left out."""
    nll: list[Array] = []
    tokens: list[Array] = []
    for batch in split.batches(EVAL_ROWS):
        sums, counts = backend.eval_nll(batch)
        real = batch.rows >= 0
        nll.append(sums[real])
        tokens.append(counts[real])
    return HeldOut(np.concatenate(nll), np.concatenate(tokens))


def from_rows(nll: Sequence[float], tokens: Sequence[float]) -> HeldOut:
    return HeldOut(np.asarray(nll, np.float64), np.asarray(tokens, np.float64))


def ratio_standard_error(values: Array, weights: Array) -> float:
    """Standard error of sum(values) / sum(weights) when rows are drawn independently.

    The linearised ratio estimator (Cochran, Sampling Techniques, 1977, section 2.11); nan with fewer than two rows.
    """
    rows = len(values)
    if rows < 2:
        return math.nan
    residual = values - values.sum() / weights.sum() * weights
    return float(math.sqrt(rows / (rows - 1) * (residual**2).sum()) / weights.sum())
