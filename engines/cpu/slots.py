"""Continuous batching on the CPU engine: each answer has a slot with its own KV cache, and joins between tokens.

What a row of the batch computes must not depend on the other rows: its logits are bit for bit those it gets alone
(tests/engines/test_slots.py). So the batch always has as many rows as there are slots, taken or not, for the kernels
of other widths sum in another order; each row attends over its own keys, in a product of its own length; and a prompt
is computed by itself.
"""

from __future__ import annotations

import functools
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor
from torch.overrides import TorchFunctionMode
from transformers import AttentionInterface, AttentionMaskInterface

from common.engine import Array
from engines.cpu.engine import TorchCPU

# Shapes: R rows (the slots where tokens are decoded, 1 for a prompt), n tokens of a prompt, C tokens that a slot may
# come to hold, Q query heads, K key/value heads, D width of a head, V rows of the vocabulary.

NAME = "slots"  # what `set_attn_implementation` is told
Attention = Callable[[int, Tensor, Tensor, Tensor, float], Tensor]  # layer, q, k, v, scaling


@dataclass
class KVCache:
    """An answer's keys and values by layer, each [K, C, D], of which the first `length` tokens are filled."""

    capacity: int  # C
    length: int = 0
    layers: list[tuple[Tensor, Tensor]] = field(default_factory=list)

    def of_layer(self, layer: int, like: Tensor) -> tuple[Tensor, Tensor]:
        """Return keys and values of a layer, allocated at its first use with the dtype of `like` [K, n, D]."""
        if layer == len(self.layers):
            shape = (like.shape[0], self.capacity, like.shape[2])
            self.layers.append((like.new_empty(shape), like.new_empty(shape)))
        return self.layers[layer]


class Slots:
    """Room for `count` answers of at most `context` tokens each, prompts included, with the weights of `backend`."""

    def __init__(self, backend: TorchCPU, count: int, context: int) -> None:
        self.backend, self.count, self.context = backend, count, context
        self.caches: dict[int, KVCache] = {}  # of the slots that are taken

    def prefill(self, slot: int, prompt: Sequence[int], tokens: int) -> Array:
        """Put `prompt` into a free slot, for `tokens` together with its answer; return the logits [V] after it."""
        assert slot not in self.caches, "the slot is taken"
        assert 0 < len(prompt) <= tokens <= self.context
        cache = self.caches[slot] = KVCache(tokens)
        positions = np.arange(len(prompt))[None]
        logits: Array = self._forward(np.array([prompt]), positions, functools.partial(attend_prompt, cache))[0]
        cache.length = len(prompt)
        return logits

    def decode(self, tokens: Mapping[int, int]) -> dict[int, Array]:
        """Append a token to each slot in `tokens`; return the logits [V] after it, by slot."""
        caches = [self.caches[slot] for slot in tokens]
        ids, positions = np.zeros((self.count, 1), np.int64), np.zeros((self.count, 1), np.int64)
        for row, (cache, token) in enumerate(zip(caches, tokens.values(), strict=True)):
            assert cache.length < cache.capacity
            ids[row, 0], positions[row, 0] = token, cache.length
            cache.length += 1
        with FewRows():
            logits = self._forward(ids, positions, functools.partial(attend_tokens, caches))
        return dict(zip(tokens, logits, strict=False))  # rows beyond these are nobody's

    def free(self, slot: int) -> None:
        """Free a slot and its cache."""
        self.caches.pop(slot, None)

    @torch.no_grad()
    def _forward(self, ids: Array, positions: Array, attention: Attention) -> Array:
        """Return logits [R, V] after the last of `ids` [R, n]."""
        model = self.backend.model
        if model.training:  # asked first: eval() goes through every module, 0.9 ms of a token's 64 (SmolLM2-135M)
            model.eval()
        model.set_attn_implementation(NAME)
        with self.backend.autocast():
            hidden = model.model(
                input_ids=torch.from_numpy(ids),
                position_ids=torch.from_numpy(positions),
                use_cache=False,
                attention=attention,
            ).last_hidden_state  # [R, n, H]
            logits = model.lm_head(hidden[:, -1])
        array: Array = logits.float().numpy()
        return array


class FewRows(TorchFunctionMode):
    """Computes x W^T of few rows as (W x^T)^T in fp32: the same products, for which MKL takes another way.

    All matrices of 8 layers of SmolLM2-135M and its head with 4 rows took 0.034 s so and 0.049 s the other way, with
    one row 0.024 s (torch 2.13, 2 threads that sleep while they wait, on 2 busy cores of an EPYC; best of 6).
    """

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if func is F.linear and args[1].dtype is torch.float32 and not torch.is_autocast_enabled("cpu"):
            x, weight, *bias = args
            y = (weight @ x.flatten(0, -2).t()).t().contiguous().view(*x.shape[:-1], -1)
            return y + bias[0] if bias and bias[0] is not None else y
        return func(*args, **(kwargs or {}))


def attend_prompt(cache: KVCache, layer: int, q: Tensor, k: Tensor, v: Tensor, scaling: float) -> Tensor:
    """Return [1, Q, n, D] for a prompt's q [1, Q, n, D], k and v [1, K, n, D], and keep k and v in its cache."""
    keys, values = cache.of_layer(layer, k[0])
    keys[:, : k.shape[2]], values[:, : k.shape[2]] = k[0], v[0]
    return F.scaled_dot_product_attention(q, k, v, is_causal=True, scale=scaling, enable_gqa=True)


def attend_tokens(caches: Sequence[KVCache], layer: int, q: Tensor, k: Tensor, v: Tensor, scaling: float) -> Tensor:
    """Return [R, Q, 1, D] for a token a row, q [R, Q, 1, D], k and v [R, K, 1, D]; 0 in rows that are nobody's."""
    out = torch.zeros_like(q)
    for row, cache in enumerate(caches):
        keys, values = cache.of_layer(layer, k[row])
        end = cache.length
        keys[:, end - 1], values[:, end - 1] = k[row, :, 0], v[row, :, 0]
        mine = q[row : row + 1], keys[None, :, :end], values[None, :, :end]
        out[row] = F.scaled_dot_product_attention(*mine, scale=scaling, enable_gqa=True)[0]
    return out


def attend(
    module: Any,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    _mask: Any,
    *,
    scaling: float,
    attention: Attention,
    **_: Any,
) -> tuple[Tensor, None]:
    """Return ([R, n, Q, D], None) for query [R, Q, n, D], key and value [R, K, n, D], as transformers asks for it."""
    dtype = torch.bfloat16 if torch.is_autocast_enabled("cpu") else query.dtype
    out = attention(module.layer_idx, query.to(dtype), key.to(dtype), value.to(dtype), scaling)
    return out.transpose(1, 2), None


AttentionInterface.register(NAME, attend)
AttentionMaskInterface.register(NAME, lambda *_, **__: None)
