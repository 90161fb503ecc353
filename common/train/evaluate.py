"""Held-out loss with its standard error over rows: which rows, what they cost, and how that is written down."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np

from common.config.schema import Evaluation
from common.data.build import UNKNOWN_ALLOWED
from common.data.tokens import TokenDataset, TokenSplit, spread
from common.engine import Backend

# Shapes: R evaluated rows, B rows of a batch.

Array = np.ndarray[Any, Any]
EVAL_ROWS = 8  # rows at a time; one shape in a run, as every other one is compiled anew


@dataclass(frozen=True)
class HeldOut:
    """Per held-out row, in the data set's order: the sum of nll in nats and the supervised tokens, float64 [R]."""

    nll: Array
    tokens: Array

    @property
    def loss(self) -> float:
        """Return nats per supervised token, over all rows together."""
        return float(self.nll.sum() / self.tokens.sum())

    @property
    def standard_error(self) -> float:
        """Return the standard error of `loss` over rows; nan with fewer than two."""
        return ratio_standard_error(self.nll, self.tokens)

    def bits_per_byte(self, sizes: Sequence[float]) -> tuple[float, float]:
        """Return bits per UTF-8 byte of the text, which `sizes` [R] counts by row, and the standard error over rows.

        Unlike nats per token it can be compared between tokenizers.
        """
        weights, bits = np.asarray(sizes, np.float64), self.nll / math.log(2)  # [R] each; nats to bits
        return float(bits.sum() / weights.sum()), ratio_standard_error(bits, weights)

    def improvement_over(self, other: HeldOut) -> tuple[float, float]:
        """Return how much lower this loss is than `other`'s on the same rows, and the standard error, paired by row."""
        if not np.array_equal(self.tokens, other.tokens):
            raise ValueError("the two evaluations are not of the same rows")
        saved = other.nll - self.nll  # [R]; what makes a row easy or hard for both falls out of the error
        return float(saved.sum() / self.tokens.sum()), ratio_standard_error(saved, self.tokens)


def evaluated_rows(dataset: TokenDataset, evaluation: Evaluation) -> TokenSplit:
    """Return the held-out rows that a run evaluates: at most eval_config.max_rows, evenly spread."""
    return dataset.held_out.spread(evaluation.max_rows)


@dataclass(frozen=True)
class EvaluatedText:
    """The text of the evaluated rows: UTF-8 bytes by row [R], and the bits per byte of a unigram model of it.

    The unigram model knows the frequencies of the training tokens and nothing else.
    """

    sizes: Sequence[float]
    unigram_bits: float


def evaluated_text(dataset: TokenDataset, evaluation: Evaluation) -> EvaluatedText | None:
    """Return the text of a corpus's evaluated rows; None for other data, or where much of the text is unknown."""
    info = dataset.info
    if "held_out_bytes" not in info or info["unknown"] > UNKNOWN_ALLOWED:
        return None
    rows = spread(len(dataset.held_out), evaluation.max_rows)
    sizes, nll = ([info[name][row] for row in rows] for name in ("held_out_bytes", "unigram_nll"))
    return EvaluatedText(sizes, math.fsum(nll) / math.log(2) / sum(sizes))


def held_out(backend: Backend, split: TokenSplit) -> HeldOut:
    """Return the evaluation of every row of `split`; rows of zero mask, which fill the last batch, are left out."""
    nll: list[Array] = []
    tokens: list[Array] = []
    for batch in split.batches(EVAL_ROWS):
        sums, counts = backend.eval_nll(batch)  # [B] each
        real = batch.rows >= 0
        nll.append(sums[real])
        tokens.append(counts[real])
    return HeldOut(np.concatenate(nll), np.concatenate(tokens))  # [R] each


def scores(step: int, rows: HeldOut, text: EvaluatedText | None) -> dict[str, Any]:
    """Return the record of an evaluation for metrics.jsonl. An error over one row is None: NaN is no JSON."""
    several = len(rows.nll) > 1
    record = {"step": step, "eval_loss": rows.loss, "eval_loss_se": rows.standard_error if several else None}
    record["eval_tokens"] = int(rows.tokens.sum())
    if text:
        bits, error = rows.bits_per_byte(text.sizes)
        record |= {"bits_per_byte": bits, "bits_per_byte_se": error if several else None}
    return record


def describe(step: int, rows: HeldOut, untrained: HeldOut | None, text: EvaluatedText | None) -> str:
    """Return an evaluation as a line for the screen; `untrained` is that of step 0 on the same rows."""
    line = f"held-out loss after step {step}: {rows.loss:.4f} ± {rows.standard_error:.4f}"
    if untrained:
        gain, error = rows.improvement_over(untrained)
        line += f"; {gain:+.4f} ± {error:.4f} better than the untrained model, paired by row"
    if text:
        line += f"; {rows.bits_per_byte(text.sizes)[0]:.4f} bits per byte (unigram {text.unigram_bits:.4f})"
    return line


def from_rows(nll: Sequence[float], tokens: Sequence[float]) -> HeldOut:
    """Return the evaluation that a record of evaluations.jsonl holds, by its `nll` and `tokens`."""
    return HeldOut(np.asarray(nll, np.float64), np.asarray(tokens, np.float64))


def ratio_standard_error(values: Array, weights: Array) -> float:
    """Return the standard error of sum(values) / sum(weights) when rows are drawn independently.

    The linearized ratio estimator (Cochran, Sampling Techniques, 1977, section 2.11); nan with fewer than two rows.
    """
    rows = len(values)
    if rows < 2:
        return math.nan
    residual = values - values.sum() / weights.sum() * weights  # [R]
    return float(math.sqrt(rows / (rows - 1) * (residual**2).sum()) / weights.sum())
