from __future__ import annotations

import numpy as np
import pytest

from common.data.order import permutation, random_words, rows_of_step, steps_for

MASK = (1 << 64) - 1


def philox(counter: int, key: tuple[int, int]) -> list[int]:
    """Philox4x64-10 as its authors define it: ten rounds over four words, the key bumped between them."""
    words, (k0, k1) = [counter, 0, 0, 0], key
    for _ in range(10):
        low, high = words[0] * 0xD2E7470EE14C6C93, words[2] * 0xCA5A826395121157
        words = [(high >> 64) ^ words[1] ^ k0, high & MASK, (low >> 64) ^ words[3] ^ k1, low & MASK]
        k0, k1 = (k0 + 0x9E3779B97F4A7C15) & MASK, (k1 + 0xBB67AE8584CAA73B) & MASK
    return words


def test_words_are_those_of_the_algorithm():
    expected = [word for counter in (1, 2) for word in philox(counter, (7, 3))]
    assert random_words(8, 7, 3).tolist() == expected


def test_golden_order():
    assert permutation(8, 0, 0).tolist() == [0, 2, 1, 5, 4, 3, 6, 7]
    assert permutation(8, 0, 1).tolist() == [5, 3, 7, 2, 4, 1, 0, 6]
    assert rows_of_step(3, 42, 4, 10).tolist() == [2, 8, 4, 9]


def test_every_epoch_sees_every_row_once_and_batches_cross_the_seam():
    rows, batch, epochs = 10, 4, 6
    seen = np.concatenate([rows_of_step(step, 1, batch, rows) for step in range(1, rows * epochs // batch + 1)])
    for epoch in seen.reshape(epochs, rows):
        assert sorted(epoch) == list(range(rows))
    assert not np.array_equal(seen[:rows], seen[rows : 2 * rows])


def test_a_batch_larger_than_the_data_spans_epochs():
    assert np.bincount(rows_of_step(1, 0, 25, 10)).tolist().count(2) == 5


def test_order_hangs_on_the_seed_and_nothing_else():
    first = rows_of_step(5, 0, 8, 100)
    rows_of_step(9, 3, 8, 50)
    assert np.array_equal(first, rows_of_step(5, 0, 8, 100))
    assert not np.array_equal(first, rows_of_step(5, 1, 8, 100))


@pytest.mark.parametrize(("step", "batch", "rows"), [(0, 1, 1), (1, 0, 1), (1, 1, 0)])
def test_counts_start_at_one(step, batch, rows):
    with pytest.raises(ValueError, match="at least 1"):
        rows_of_step(step, 0, batch, rows)


@pytest.mark.parametrize(
    ("epochs", "rows", "batch", "steps"),
    [
        (1, 100, 10, 10),
        (1, 101, 10, 11),
        (0.1, 300, 30, 1),
        (3, 10, 3, 10),
        (1.1, 100, 10, 11),
        (0.01, 10, 32, 1),
    ],
)
def test_steps_cover_the_epochs(epochs, rows, batch, steps):
    assert steps_for(epochs, rows, batch) == steps
