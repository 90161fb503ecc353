"""Initial values made on the host: the same bits for every engine and every library version.

The raw bits come from Philox, a counter-based generator with a published definition (Salmon et al., 2011), keyed by
(seed, tensor name); numpy's `Generator` streams are not promised across versions, its raw bits are.
"""

from __future__ import annotations

import hashlib
import math
from typing import Any

import numpy as np

Array = np.ndarray[Any, Any]


def uniform(seed: int, name: str, shape: tuple[int, ...], bound: float) -> Array:
    """float32 values in [-bound, bound) for the tensor `name`."""
    return ((2.0 * _unit(seed, name, math.prod(shape)) - 1.0) * bound).astype(np.float32).reshape(shape)


def normal(seed: int, name: str, shape: tuple[int, ...], std: float) -> Array:
    """float32 values of N(0, std^2) for the tensor `name`, by the Box-Muller transform."""
    count = math.prod(shape)
    unit = _unit(seed, name, 2 * count)
    radius = np.sqrt(-2.0 * np.log1p(-unit[:count]))  # 1 - u is in (0, 1]: the logarithm is finite
    return (std * radius * np.cos(2.0 * math.pi * unit[count:])).astype(np.float32).reshape(shape)


def _unit(seed: int, name: str, count: int) -> Array:
    """`count` float64 values in [0, 1) from the top 53 bits of Philox output."""
    key = int.from_bytes(hashlib.sha256(f"{seed}/{name}".encode()).digest()[:16], "little")
    return (np.random.Philox(key=key).random_raw(count) >> np.uint64(11)) * 2.0**-53
