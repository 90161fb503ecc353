"""Several answers at once on the CPU engine: each has a place with its own keys and values, and joins between tokens.

What a row of the batch computes must not depend on who sits beside it: its logits are bit for bit those it gets alone
(tests/engines/test_places.py). So the batch always has as many rows as there are places, taken or not, for the kernels
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

# Shapes: P places, R rows (P where tokens are decoded, 1 for a prompt), n tokens of a prompt, C tokens that a place may
# come to hold, Q query heads, K key/value heads, D width of a head, V rows of the vocabulary.

NAME = "places"  # what `set_attn_implementation` is told
Attention = Callable[[int, Tensor, Tensor, Tensor, float], Tensor]  # layer, q, k, v, scaling


@dataclass
class Place:
    """An answer's keys and values by layer, each [K, C, D], and the tokens it holds so far."""

    tokens: int  # C
    length: int = 0
    cache: list[tuple[Tensor, Tensor]] = field(default_factory=list)

    def room(self, layer: int, like: Tensor) -> tuple[Tensor, Tensor]:
        """Return keys and values of a layer, made at its first use for numbers like those of `like` [K, n, D]."""
        if layer == len(self.cache):
            shape = (like.shape[0], self.tokens, like.shape[2])
            self.cache.append((like.new_empty(shape), like.new_empty(shape)))
        return self.cache[layer]


class Places:
    """Room for `count` answers of at most `context` tokens each, prompts included, with the weights of `backend`."""

    def __init__(self, backend: TorchCPU, count: int, context: int) -> None:
        self.backend, self.count, self.context = backend, count, context
        self.taken: dict[int, Place] = {}

    def join(self, place: int, prompt: Sequence[int], tokens: int) -> Array:
        """Put `prompt` into a free place, for `tokens` together with its answer; return the logits [V] after it."""
        assert place not in self.taken, "somebody is there"
        assert 0 < len(prompt) <= tokens <= self.context
        seat = self.taken[place] = Place(tokens)
        positions = np.arange(len(prompt))[None]
        logits: Array = self._forward(np.array([prompt]), positions, functools.partial(attend_prompt, seat))[0]
        seat.length = len(prompt)
        return logits

    def step(self, tokens: Mapping[int, int]) -> dict[int, Array]:
        """Append a token to each place in `tokens`; return the logits [V] after it, by place."""
        seats = [self.taken[place] for place in tokens]
        ids, positions = np.zeros((self.count, 1), np.int64), np.zeros((self.count, 1), np.int64)
        for row, (seat, token) in enumerate(zip(seats, tokens.values(), strict=True)):
            assert seat.length < seat.tokens
            ids[row, 0], positions[row, 0] = token, seat.length
            seat.length += 1
        with FewRows():
            logits = self._forward(ids, positions, functools.partial(attend_tokens, seats))
        return dict(zip(tokens, logits, strict=False))  # rows beyond these are nobody's

    def leave(self, place: int) -> None:
        """Free a place, and what it held."""
        self.taken.pop(place, None)

    @torch.no_grad()
    def _forward(self, ids: Array, positions: Array, attention: Attention) -> Array:
        """Return logits [R, V] after the last of `ids` [R, n]."""
        model = self.backend.model
        model.eval()
        model.set_attn_implementation(NAME)
        with self.backend.autocast():
            hidden = model.model(
                input_ids=torch.from_numpy(ids.astype(np.int64)),
                position_ids=torch.from_numpy(positions.astype(np.int64)),
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


def attend_prompt(seat: Place, layer: int, q: Tensor, k: Tensor, v: Tensor, scaling: float) -> Tensor:
    """Return [1, Q, n, D] for a prompt's q [1, Q, n, D], k and v [1, K, n, D], and keep k and v in its place."""
    keys, values = seat.room(layer, k[0])
    keys[:, : k.shape[2]], values[:, : k.shape[2]] = k[0], v[0]
    return F.scaled_dot_product_attention(q, k, v, is_causal=True, scale=scaling, enable_gqa=True)


def attend_tokens(seats: Sequence[Place], layer: int, q: Tensor, k: Tensor, v: Tensor, scaling: float) -> Tensor:
    """Return [R, Q, 1, D] for a token a row, q [R, Q, 1, D], k and v [R, K, 1, D]; 0 in rows that are nobody's."""
    out = torch.zeros_like(q)
    for row, seat in enumerate(seats):
        keys, values = seat.room(layer, k[row])
        end = seat.length
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
