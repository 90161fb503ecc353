"""Continuous batching on the CPU engine: each answer has a slot with its own KV cache, and joins between tokens.

What a row of the batch computes must not depend on the other rows: its logits are bit for bit those it gets alone
(tests/engines/test_slots.py). So the batch always has as many rows as there are slots, taken or not, for the kernels
of other widths sum in another order; each row attends over its own keys, in a product of its own length; and a prompt
is computed by itself.
"""

from __future__ import annotations

import functools
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from common.engine import Array
from engines.cpu.decode import Attention, Linear, few_rows, hidden_states
from engines.cpu.engine import TorchCPU

# Shapes: R rows (the slots where tokens are decoded, 1 for a prompt), n tokens of a prompt, C tokens that a slot may
# come to hold, Q query heads, K key/value heads, D width of a head, V rows of the vocabulary.


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
        attention = functools.partial(attend_prompt, cache)
        logits: Array = self._forward(np.array([prompt]), positions, attention, nn.Module.__call__)[0]
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
        logits = self._forward(ids, positions, functools.partial(attend_tokens, caches), few_rows)
        return dict(zip(tokens, logits, strict=False))  # rows beyond these are nobody's

    def free(self, slot: int) -> None:
        """Free a slot and its cache."""
        self.caches.pop(slot, None)

    @torch.inference_mode()
    def _forward(self, ids: Array, positions: Array, attention: Attention, linear: Linear) -> Array:
        """Return logits [R, V] after the last of `ids` [R, n]."""
        model = self.backend.model
        self.backend.eval_mode()
        with self.backend.autocast():
            x = hidden_states(model, torch.from_numpy(ids), torch.from_numpy(positions), attention, linear, last=True)
            logits = linear(model.lm_head, x[:, -1])
        array: Array = logits.float().numpy()
        return array


def attend_prompt(cache: KVCache, layer: int, q: Tensor, k: Tensor, v: Tensor, scaling: float) -> Tensor:
    """Return what q [1, Q, n or 1, D] attends to of a prompt's k and v [1, K, n, D], which its cache keeps."""
    keys, values = cache.of_layer(layer, k[0])
    keys[:, : k.shape[2]], values[:, : k.shape[2]] = k[0], v[0]
    # In the last layer q is of the last token alone, which sees all keys.
    return F.scaled_dot_product_attention(q, k, v, is_causal=q.shape[2] > 1, scale=scaling, enable_gqa=True)


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
