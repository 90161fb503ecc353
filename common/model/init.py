"""Initial values made on the host: the same bits for every engine and every library version.

The raw bits come from Philox, a counter-based generator with a published definition (Salmon et al., 2011), keyed by
(seed, tensor name); numpy's `Generator` streams are not promised across versions, its raw bits are.
"""

from __future__ import annotations

import hashlib
import math
from collections.abc import Mapping
from typing import Any

import numpy as np

from common.model import llama

FORMAT = 1  # of the rules below; another one makes another training
EMBEDDING_STD = 0.02  # GPT-2's, and that of tt-train's embeddings; another one makes another training
Array = np.ndarray[Any, Any]


def initial(rule: str, seed: int, name: str, shape: tuple[int, ...], layers: int) -> Array:
    """Return float32 values of a Llama's tensor `name` before training, by `rule`.

    ttml: linear layers uniform in +-1/sqrt(fan_in), embeddings N(0, 0.02^2), as tt-train's modules have them.
    gpt2: all N(0, 0.02^2), and the two layers that write into the residual stream 1/sqrt(2 x layers) of that (Radford
    et al., 2019, section 2.3). Norm gains are 1 in both.
    """
    if len(shape) == 1:
        return np.ones(shape, np.float32)
    if name == llama.EMBEDDING:
        return normal(seed, name, shape, EMBEDDING_STD)
    if rule == "ttml":
        return uniform(seed, name, shape, shape[1] ** -0.5)
    into_residual = name.endswith(("o_proj.weight", "down_proj.weight"))
    return normal(seed, name, shape, EMBEDDING_STD / math.sqrt(2 * layers) if into_residual else EMBEDDING_STD)


def logit_variance(rule: str, architecture: Mapping[str, Any]) -> float:
    """Return the variance of an untrained model's logits over the vocabulary: its hidden state has a mean square of 1.

    hidden_size x the variance of the head's weights: a uniform in +-1/sqrt(fan_in) has 1 / (3 fan_in).
    """
    if rule == "ttml" and not architecture["tie_word_embeddings"]:
        return 1 / 3
    return float(architecture["hidden_size"]) * EMBEDDING_STD**2


def uniform(seed: int, name: str, shape: tuple[int, ...], bound: float) -> Array:
    """Return float32 values in [-bound, bound) for the tensor `name`."""
    return ((2.0 * _unit(seed, name, math.prod(shape)) - 1.0) * bound).astype(np.float32).reshape(shape)


def normal(seed: int, name: str, shape: tuple[int, ...], std: float) -> Array:
    """Return float32 values of N(0, std^2) for the tensor `name`, by the Box-Muller transform."""
    count = math.prod(shape)
    unit = _unit(seed, name, 2 * count)  # two for each normal value: Box-Muller's second one, the sine's, is not used
    radius = np.sqrt(-2.0 * np.log1p(-unit[:count]))  # 1 - u is in (0, 1]: the logarithm is finite
    return (std * radius * np.cos(2.0 * math.pi * unit[count:])).astype(np.float32).reshape(shape)


def _unit(seed: int, name: str, count: int) -> Array:
    """Return `count` float64 values in [0, 1) from the top 53 bits of Philox output."""
    # A key of 128 bits by the tensor's name: values do not depend on which tensors are made before it, or at all.
    key = int.from_bytes(hashlib.sha256(f"{seed}/{name}".encode()).digest()[:16], "little")
    return (np.random.Philox(key=key).random_raw(count) >> np.uint64(11)) * 2.0**-53  # a float64 holds 53
