"""Several answers at once on the CPU engine: each has a place with its own keys and values, and joins between tokens.

All places are decoded as one batch that always has as many rows as there are places, taken or not. Every product then
has one shape, and each row attends over its own keys alone, in a product of its own length: what a row computes cannot
depend on who sits beside it, and its logits are bit for bit those it gets alone (tests/engines/test_places.py). A
padded batch, or one as wide as it has answers, would take other kernels and sums whenever somebody comes or goes.
"""

from __future__ import annotations

import functools
from collections.abc import Callable, Collection, Mapping, Sequence
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor
from transformers import AttentionInterface, AttentionMaskInterface

from common.engine import Array
from engines.cpu.engine import TorchCPU

# Shapes: P places, n tokens of a prompt, C tokens that a place holds at most, Q query heads, K key/value heads, D width
# of a head, V rows of the vocabulary.

NAME = "places"  # what `set_attn_implementation` is told
Attention = Callable[[int, Tensor, Tensor, Tensor, float], Tensor]  # layer, q, k, v, scaling


class Places:
    """Room for `count` answers of at most `context` tokens each, prompts included, with the weights of `backend`."""

    def __init__(self, backend: TorchCPU, count: int, context: int) -> None:
        self.backend, self.count, self.context = backend, count, context
        self.keys: list[Tensor] = []  # by layer [P, K, C, D]; memory is taken when a token is written, not before
        self.values: list[Tensor] = []
        self.lengths = [0] * count  # tokens that each place holds; 0: nobody is there

    def join(self, place: int, prompt: Sequence[int]) -> Array:
        """Put `prompt` into a free place, computed alone; return the logits [V] after its last token."""
        assert self.lengths[place] == 0, "somebody is there"
        assert 0 < len(prompt) <= self.context
        positions = np.arange(len(prompt))[None]
        logits: Array = self._forward(np.array([prompt]), positions, functools.partial(self._attend_prompt, place))[0]
        self.lengths[place] = len(prompt)
        return logits

    def step(self, tokens: Mapping[int, int]) -> Array:
        """Append a token to each place in `tokens`; return logits [P, V], of which the other places' mean nothing."""
        ids, positions = np.zeros((self.count, 1), np.int64), np.zeros((self.count, 1), np.int64)
        for place, token in tokens.items():
            assert 0 < self.lengths[place] < self.context
            ids[place, 0], positions[place, 0] = token, self.lengths[place]
            self.lengths[place] += 1
        return self._forward(ids, positions, functools.partial(self._attend_tokens, tokens.keys()))

    def leave(self, place: int) -> None:
        """Free a place."""
        self.lengths[place] = 0

    @torch.no_grad()
    def _forward(self, ids: Array, positions: Array, attention: Attention) -> Array:
        """Return logits [rows, V] after the last of `ids` [rows, n]."""
        model = self.backend.model
        model.eval()
        model.set_attn_implementation(NAME)
        with self.backend.autocast():
            hidden = model.model(
                input_ids=torch.from_numpy(ids.astype(np.int64)),
                position_ids=torch.from_numpy(positions.astype(np.int64)),
                use_cache=False,
                attention=attention,
            ).last_hidden_state  # [rows, n, H]
            logits = model.lm_head(hidden[:, -1])
        array: Array = logits.float().numpy()
        return array

    def _attend_prompt(self, place: int, layer: int, q: Tensor, k: Tensor, v: Tensor, scaling: float) -> Tensor:
        """Return [1, Q, n, D] for a prompt's q [1, Q, n, D], k and v [1, K, n, D], and keep k and v at its place."""
        keys, values = self._room(layer, k)
        keys[place, :, : k.shape[2]], values[place, :, : k.shape[2]] = k[0], v[0]
        return F.scaled_dot_product_attention(q, k, v, is_causal=True, scale=scaling, enable_gqa=True)

    def _attend_tokens(
        self, taken: Collection[int], layer: int, q: Tensor, k: Tensor, v: Tensor, scaling: float
    ) -> Tensor:
        """Return [P, Q, 1, D] for a token a place, q [P, Q, 1, D], k and v [P, K, 1, D]; 0 where none is `taken`."""
        keys, values = self._room(layer, k)
        out = torch.zeros_like(q)
        for place in taken:
            end = self.lengths[place]
            keys[place, :, end - 1], values[place, :, end - 1] = k[place, :, 0], v[place, :, 0]
            # Queries that share a key below each other: [K, Q/K, D] @ [K, D, end] -> [K, Q/K, end], no key repeated.
            shared = q[place].view(k.shape[1], -1, q.shape[3])
            scores = (shared @ keys[place, :, :end].transpose(1, 2)).float() * scaling
            out[place] = (torch.softmax(scores, -1).to(q.dtype) @ values[place, :, :end]).view_as(q[place])
        return out

    def _room(self, layer: int, like: Tensor) -> tuple[Tensor, Tensor]:
        """Return keys and values [P, K, C, D] of a layer, made at its first use for numbers like those of `like`."""
        if layer == len(self.keys):
            shape = (self.count, like.shape[1], self.context, like.shape[3])
            self.keys.append(like.new_empty(shape))
            self.values.append(like.new_empty(shape))
        return self.keys[layer], self.values[layer]


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
    """Return ([rows, n, Q, D], None) for query [rows, Q, n, D], key and value [rows, K, n, D], as transformers asks."""
    dtype = torch.bfloat16 if torch.is_autocast_enabled("cpu") else query.dtype
    out = attention(module.layer_idx, query.to(dtype), key.to(dtype), value.to(dtype), scaling)
    return out.transpose(1, 2), None


AttentionInterface.register(NAME, attend)
AttentionMaskInterface.register(NAME, lambda *_, **__: None)
