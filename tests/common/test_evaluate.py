from __future__ import annotations

import math

import numpy as np
import pytest

from common.data import tokens
from common.data.tokens import Batch, Encoded
from common.train.evaluate import EVAL_ROWS, HeldOut, from_rows, held_out, ratio_standard_error


class LengthBackend:
    """nll of a row: its number of supervised tokens times its first id; fill rows give nonsense."""

    def eval_nll(self, batch: Batch):
        counts = batch.loss_mask.sum(axis=1, dtype=np.float64)
        return np.where(batch.rows < 0, 1e9, counts * batch.input_ids[:, 0]), counts + (batch.rows < 0)


def split_of(tmp_path, rows: int) -> tokens.TokenSplit:
    encoded = [Encoded(np.full(n + 2, n + 1, np.uint32), np.ones(n + 2, np.uint8)) for n in range(rows)]
    return tokens.write(tmp_path / "set", {"held_out": tokens.pack(encoded)}, source_key="k", info={}).held_out


@pytest.mark.parametrize("rows", [2, EVAL_ROWS, EVAL_ROWS + 3])
def test_every_row_counts_once_in_order_and_fill_rows_never(tmp_path, rows):
    found = held_out(LengthBackend(), split_of(tmp_path, rows))  # type: ignore[arg-type]
    assert found.tokens.tolist() == [n + 1 for n in range(rows)]
    assert found.nll.tolist() == [(n + 1) ** 2 for n in range(rows)]
    assert found.loss == sum((n + 1) ** 2 for n in range(rows)) / sum(n + 1 for n in range(rows))


def test_the_loss_is_per_token_and_not_per_row():
    assert from_rows([10.0, 1.0], [10, 1]).loss == 1.0
    assert from_rows([10.0, 3.0], [10, 1]).loss == 13 / 11


def test_standard_error_of_equal_rows_is_the_one_of_a_mean():
    values = np.array([1.0, 2.0, 4.0, 9.0])
    assert ratio_standard_error(values, np.ones(4)) == pytest.approx(values.std(ddof=1) / 2)


def test_standard_error_covers_the_truth_as_often_as_it_says():
    """Rows drawn from a known population: the true ratio lies within two errors in about 95 % of the samples."""
    rng, hits = np.random.default_rng(0), 0
    for _ in range(1000):
        counts = rng.integers(5, 100, 60).astype(float)
        nll = counts * 2.0 + counts * rng.normal(0, 0.3, 60)
        hits += abs(nll.sum() / counts.sum() - 2.0) < 2 * ratio_standard_error(nll, counts)
    assert 920 <= hits <= 980


def test_improvement_is_paired_by_row():
    counts, noise = np.full(50, 10.0), np.random.default_rng(0).normal(0, 5, 50)
    before, after = HeldOut(30 + noise, counts), HeldOut(29 + noise, counts)
    gain, error = after.improvement_over(before)
    assert gain == pytest.approx(0.1)
    assert error == pytest.approx(0, abs=1e-12)
    assert before.standard_error > 0.05, "unpaired, the gain would drown"
    assert before.improvement_over(after)[0] == pytest.approx(-0.1)


def test_other_rows_cannot_be_compared():
    with pytest.raises(ValueError, match="not of the same rows"):
        from_rows([1.0], [2]).improvement_over(from_rows([1.0], [3]))


def test_one_row_has_no_standard_error():
    assert math.isnan(from_rows([1.0], [2]).standard_error)
