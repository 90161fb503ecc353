"""The next token of every row of a batch, over a cache of keys and values that has a place for each token.

What all prompts begin with is computed once, and rows that have ended leave the batch.

The model's layers are called here, not its `forward`: a token of one answer takes 0.037 s so and 0.048 s through it,
one of four answers each 0.041 and 0.054 s, a prompt of 100 tokens 0.201 and 0.210 s (SmolLM2-135M in fp32, torch 2.13,
two cores of an EPYC; best of 5 rounds in turns). slots.py decodes by them, too.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, cast

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from common.engine import Array
from engines.cpu.blocks import inverse_rms, rms_norm
from engines.cpu.llama import Llama
from engines.cpu.lora import Frozen, LoraLinear

# Shapes: B rows, n new tokens of a row, C tokens that the cache has room for, Q query heads, K key/value heads,
# D width of a head, H hidden_size.

ROOM = 128  # tokens by which the cache grows: an evaluation's prompts and answers fit into two or three times that
FEW = 8  # rows: see `product`
Attention = Callable[[int, Tensor, Tensor, Tensor, float], Tensor]  # layer's index, q, k, v, scaling
Linear = Callable[[nn.Module, Tensor], Tensor]  # how a layer is called


class Rows:
    """Rows that tokens are appended to: their keys and values by layer, each [B, K, C, D] in fp32.

    All rows get their next token at the same place of the cache, behind the longest prompt: what lies between a
    shorter prompt and its answer is attended to by nobody. `live` says at which place of the caller's batch each row
    stands: rows that have ended are not kept.
    """

    def __init__(self, linears: Linears, ids: Array, lengths: Array) -> None:
        """Begin with prompts: `ids` [B, n] filled on the right, `lengths` [B]."""
        self.linears, model = linears, linears.model
        self.layers = [(torch.empty(0), torch.empty(0))] * len(model.model.layers)
        self.lengths = torch.from_numpy(lengths.astype(np.int64))  # tokens so far, which say where a row's next stands
        self.live = torch.arange(len(ids))
        tokens = torch.from_numpy(ids.astype(np.int64))
        self.end = tokens.shape[1]  # of what the cache holds
        # Added to the scores of keys, [B, C]: those that only fill a prompt count for nothing.
        places = torch.arange(self.end)
        self.masked = torch.zeros(tokens.shape).masked_fill_(places >= self.lengths[:, None], float("-inf"))
        # What all prompts begin with, such as a template's system turn, but for each one's last token.
        same = (tokens == tokens[:1]).all(dim=0).long().cumprod(dim=0).sum()
        shared = min(int(same), int(self.lengths.min()) - 1) if len(ids) > 1 else 0
        future = torch.zeros(self.end, self.end).masked_fill_(places > places[:, None], float("-inf"))
        if shared:
            self._append(tokens[:1, :shared], places[None, :shared], future[:shared, :shared])
            self.layers = [(k.repeat(len(ids), 1, 1, 1), v.repeat(len(ids), 1, 1, 1)) for k, v in self.layers]
        hidden = self._append(tokens[:, shared:], places[shared:].expand(len(ids), -1), future[shared:])
        self.hidden = hidden[torch.arange(len(ids)), self.lengths - 1 - shared]  # [B, H], after each row's last token

    def append(self, tokens: Array, going: Array) -> None:
        """Append to each row that is going on (bool, by its place in the caller's batch) its token of `tokens`."""
        stays = torch.from_numpy(going)[self.live]
        if not bool(stays.all()):
            self.live, self.lengths, self.masked = self.live[stays], self.lengths[stays], self.masked[stays]
            self.layers = [(keys[stays], values[stays]) for keys, values in self.layers]
        ids = torch.from_numpy(tokens.astype(np.int64))[self.live]
        self.end += 1
        self.masked = torch.cat((self.masked, torch.zeros(len(ids), 1)), dim=1)
        self.hidden = self._append(ids[:, None], self.lengths[:, None], self.masked[:, None, None, None])[:, 0]
        self.lengths = self.lengths + 1

    def logits(self) -> Tensor:
        """Return the logits [B, V] after each row's last token, in fp32."""
        return self.linears(self.linears.model.lm_head, self.hidden)

    def _append(self, ids: Tensor, places: Tensor, masked: Tensor) -> Tensor:
        """Return hidden states [B, n, H] of `ids` [B, n], which the cache keeps as its last tokens so far.

        `places` [B, n] is where they stand in their rows; `masked`, which is added to the scores, is broadcast
        against [B, K, Q / K, n, C].
        """
        end, (count, new) = masked.shape[-1], ids.shape

        def attention(layer: int, q: Tensor, k: Tensor, v: Tensor, scaling: float) -> Tensor:
            # In fp32 also where the rest is bf16: for one query a row, products in bf16 take 2.4 times as long, and
            # torch's flash kernel 7 times (12 rows, 9 heads of 64, 100 tokens; torch 2.13, 2 cores of an EPYC).
            groups, width = k.shape[1], k.shape[3]
            keys, values = self.layers[layer]
            if keys.ndim < 4 or keys.shape[2] < end:
                keys, values = (longer(kept, like, end) for kept, like in ((keys, k), (values, v)))
                self.layers[layer] = keys, values
            keys[:, :, end - new : end], values[:, :, end - new : end] = k, v
            # Queries that share keys stand below each other: [B, K, Q/K x n, D] @ [B, K, D, C].
            scores = q.reshape(count, groups, -1, width) @ keys[:, :, :end].transpose(2, 3)
            weights = torch.softmax(scores.view(count, groups, -1, new, end).mul_(scaling).add_(masked), dim=-1)
            return (weights.view(scores.shape) @ values[:, :, :end]).view(q.shape)

        return hidden_states(self.linears.model, ids, places, attention, self.linears)


class Linears:
    """A model's linear layers as they are now: what each token needs of their tensors is made once.

    Weights are multiplied in the dtype `work`. What adapters add is computed in fp32, as all that lies between two
    layers: a block's eleven products with A and B take a core 0.09 ms in fp32 and 0.25 ms in bf16, and 0.31 ms more
    where A and B are rounded for each token (12 rows, rank 16, SmolLM2-135M, torch 2.13, an EPYC).
    """

    def __init__(self, model: Llama, work: torch.dtype, head: Tensor | None) -> None:
        """Take the layers of `model`; `head` is the output head's weight in `work`, where there is such a copy."""
        self.model, self.work = model, work
        self.input = self.narrowed = torch.empty(0)  # what was multiplied last: [..., I], and in the dtype `work`
        self.low: dict[Tensor, Tensor] = {}  # the same times A, by A, which projections share
        self.weights: dict[nn.Module, tuple[Tensor, Tensor | None]] = {}
        self.adapters: dict[nn.Module, tuple[Tensor, Tensor, float]] = {}
        wide: dict[Tensor, Tensor] = {}  # A^T in fp32, by A
        for layer in model.modules():
            if not isinstance(layer, nn.Linear | Frozen):
                continue
            kept = layer.weight16 if isinstance(layer, Frozen) else head if layer is model.lm_head else None
            weight = layer.weight.to(work) if kept is None or kept.dtype is not work else kept
            self.weights[layer] = weight, None if layer.bias is None else layer.bias.to(work)
            if isinstance(layer, LoraLinear) and layer.enabled:
                a = wide.setdefault(layer.lora_A, layer.lora_A.float().t())
                self.adapters[layer] = a, layer.lora_B.float().t(), layer.scale

    def __call__(self, layer: nn.Module, x: Tensor) -> Tensor:
        """Return layer(x) [..., O] in fp32 for x [..., I]."""
        if x is not self.input:  # q, k and v have the same one
            self.input, self.narrowed, self.low = x, x.flatten(0, -2).to(self.work), {}
        weight, bias = self.weights[layer]
        y = product(self.narrowed, weight, bias).float()
        if layer in self.adapters:
            a, b, scale = self.adapters[layer]
            if a not in self.low:
                self.low[a] = x.flatten(0, -2).float() @ a
            y.addmm_(self.low[a], b, alpha=scale)
        return y.view(*x.shape[:-1], -1)


def longer(kept: Tensor, new: Tensor, end: int) -> Tensor:
    """Return a cache [B, K, C, D] in fp32 that has room for `end` tokens and holds `kept`, the cache so far.

    `kept` is an empty tensor at first; `new` [B, K, n, D] says the other sizes.
    """
    room = torch.zeros(*new.shape[:2], -(-end // ROOM) * ROOM, new.shape[3])
    if kept.ndim == room.ndim:
        room[:, :, : kept.shape[2]] = kept
    return room


def hidden_states(
    model: Llama, ids: Tensor, places: Tensor, attention: Attention, linear: Linear, *, last: bool = False
) -> Tensor:
    """Return the hidden states [B, n, H] under the output head of `ids` [B, n], which stand at `places` [B, n].

    `attention` gets the queries [B, Q, n, D] and the new keys and values [B, K, n, D] of a layer, and keeps what it
    needs of them; `linear` calls a linear layer. With `last` only the hidden states of each row's last token are
    computed, [B, 1, H].
    """
    llama = model.model
    x = llama.embed_tokens(ids)
    cos, sin = (table[:, None] for table in llama.rotary_emb(x, places))  # [B, 1, n, D]
    sin = torch.cat((-sin[..., : sin.shape[-1] // 2], sin[..., sin.shape[-1] // 2 :]), dim=-1)  # as `rotated` adds it
    for block in llama.layers:
        project, mlp = block.self_attn, block.mlp
        normed = norm(block.input_layernorm, x)
        key, value = heads(linear(project.k_proj, normed), cos), heads(linear(project.v_proj, normed), cos)
        key = rotated(key, cos, sin)
        if last and block is llama.layers[-1]:  # what follows the last keys and values is asked of the last token only
            x, normed, cos, sin = x[:, -1:], normed[:, -1:], cos[:, :, -1:], sin[:, :, -1:]
        query = rotated(heads(linear(project.q_proj, normed), cos), cos, sin)
        qkv = query.to(value.dtype), key.to(value.dtype), value  # autocast leaves RoPE's outputs in fp32
        attended = attention(project.layer_idx, *qkv, project.scaling)  # [B, Q, n, D]
        x = x + linear(project.o_proj, attended.transpose(1, 2).flatten(2))
        normed = norm(block.post_attention_layernorm, x)
        gated = mlp.act_fn(linear(mlp.gate_proj, normed)).mul_(linear(mlp.up_proj, normed))
        x = x + linear(mlp.down_proj, gated)
    return cast(Tensor, llama.norm(x))


def norm(layer: Any, x: Tensor) -> Tensor:
    """Return layer(x) for an RMSNorm and x [B, n, H], in the dtype of the products, by half as many passes over x."""
    work = torch.bfloat16 if torch.is_autocast_enabled("cpu") else x.dtype
    return rms_norm(x, inverse_rms(x, layer.variance_epsilon), layer.weight, work)


def heads(x: Tensor, like: Tensor) -> Tensor:
    """Return x [B, n, heads D] as [B, heads, n, D], where `like` is [..., D]."""
    return x.view(*x.shape[:2], -1, like.shape[-1]).transpose(1, 2)


def rotated(x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
    """Return x [B, heads, n, D] with RoPE applied; cos and sin are [B, 1, n, D], the first half of sin negated."""
    return (x * cos).addcmul_(x.roll(x.shape[-1] // 2, -1), sin)


def few_rows(layer: Any, x: Tensor) -> Tensor:
    """Return layer(x) for a linear layer and a token a row, in fp32 by `product`."""
    if x.dtype is not torch.float32 or torch.is_autocast_enabled("cpu"):
        return cast(Tensor, layer(x))
    y = product(x.flatten(0, -2), layer.weight, layer.bias).view(*x.shape[:-1], -1)
    return layer.adapt(x, y) if isinstance(layer, LoraLinear) else y


def product(x: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
    """Return x [N, I] times weight [O, I] transposed, plus bias: of few rows in fp32 as (W x^T)^T.

    For that MKL takes another way: all matrices of 8 layers of SmolLM2-135M and its head with 4 rows took 0.034 s so
    and 0.049 s the other way, with one row 0.024 s (torch 2.13, 2 threads that sleep while they wait, on 2 busy cores
    of an EPYC; best of 6). With 12 rows it was slower, 0.062 s for 0.051 s, with 6 faster (30 layers, best of 4).
    """
    if x.dtype is not torch.float32 or len(x) > FEW:
        return F.linear(x, weight, bias)
    y = (weight @ x.t()).t().contiguous()
    return y if bias is None else y + bias
