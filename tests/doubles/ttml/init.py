"""A double of `ttml.init`: initial values from a generator of its own.

Neither numpy's seed nor the context's reaches it: without `manual_seed` two builds differ.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence

import numpy as np
import ttnn

from .autograd import PreferredPrecision, Tensor

_rng = np.random.default_rng()


def manual_seed(seed: int) -> None:
    global _rng
    _rng = np.random.default_rng(seed)


def uniform(low: float, high: float) -> Callable[[Sequence[int]], Tensor]:
    return lambda shape: _on_device(_rng.uniform(low, high, shape))


def normal(mean: float, std: float) -> Callable[[Sequence[int]], Tensor]:
    return lambda shape: _on_device(_rng.normal(mean, std, shape))


def constant(value: float) -> Callable[[Sequence[int]], Tensor]:
    return lambda shape: _on_device(np.full(shape, value))


def zeros_(tensor: Tensor) -> Tensor:
    """Fill with zeros, through the FULL view: a bf16 parameter becomes FLOAT32."""
    tensor.set_value(constant(0.0)(tensor.shape()).get_value(PreferredPrecision.FULL))
    return tensor


def _on_device(values: np.ndarray[tuple[int, ...], np.dtype[np.float64]]) -> Tensor:
    return Tensor.from_numpy(values.astype(np.float32), ttnn.Layout.TILE, ttnn.DataType.BFLOAT16)
