"""Which rows a step trains on: a pure function of (step, seed, batch size, number of rows).

The order comes from the raw bits of Philox4x64-10 (Salmon et al., "Parallel random numbers: as easy as 1, 2,
3", SC 2011), keyed by (seed, epoch). numpy promises the raw bits of a bit generator across versions, and does
not promise the streams of `numpy.random.Generator`; so nothing here goes through a `Generator`.
"""

from __future__ import annotations

import math
from fractions import Fraction
from functools import lru_cache

import numpy as np
import numpy.typing as npt

RowIndices = npt.NDArray[np.int64]

_WORD = (1 << 64) - 1  # a part of Philox's key is 64 bits wide


def random_words(count: int, *key: int) -> npt.NDArray[np.uint64]:
    """Return `count` raw 64-bit words of the Philox stream of `key` (one or two integers, taken modulo 2**64)."""
    words = np.array([part & _WORD for part in (*key, 0)[:2]], dtype=np.uint64)
    return np.asarray(np.random.Philox(key=words).random_raw(count), dtype=np.uint64)


@lru_cache(maxsize=4)  # a batch lies in one epoch, or across the seam of two; every step asks for it again
def permutation(rows: int, seed: int, epoch: int) -> RowIndices:
    """Return the order of `rows` rows in `epoch` (from 0): int64 [rows], read-only: it is cached."""
    # A stable sort, as two rows may draw equal words: another kind of sort would put them in an order of its own.
    order = np.argsort(random_words(rows, seed, epoch), kind="stable").astype(np.int64)
    order.setflags(write=False)
    return order


def rows_of_step(step: int, seed: int, batch_size: int, rows: int) -> RowIndices:
    """Return the rows of optimizer step `step` (from 1): int64 [batch_size], each in [0, rows).

    Epoch permutations are concatenated and cut into batches, so a batch may cross the seam of two epochs and
    every row is seen once an epoch. Raises ValueError when a count is not positive.
    """
    if step < 1 or batch_size < 1 or rows < 1:
        raise ValueError(f"step {step}, batch size {batch_size} and rows {rows} must all be at least 1")
    first = (step - 1) * batch_size
    chosen = np.empty(batch_size, dtype=np.int64)
    done = 0
    while done < batch_size:
        epoch, at = divmod(first + done, rows)
        take = min(rows - at, batch_size - done)
        chosen[done : done + take] = permutation(rows, seed, epoch)[at : at + take]
        done += take
    return chosen


def steps_for(epochs: float, rows: int, batch_size: int) -> int:
    """Return the optimizer steps that cover `epochs` passes over `rows` rows: ceil(epochs x rows / batch size).

    Computed on the decimal that was written (0.1 means one tenth), so that no rounding error adds a step.
    """
    # In floats 1.1 x 100 is 110.00000000000001, and its ceiling a step more.
    return math.ceil(Fraction(repr(epochs)) * rows / batch_size)
