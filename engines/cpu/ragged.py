"""Attention over rows of different lengths laid end to end, so that layers compute next to no padding.

The model sees one sequence [1, S] of every row's tokens up to its last supervised one, rounded up a little (ROW_TO);
only attention has to know where a row ends. Row by row and written out, it needs neither a mask tensor over the batch
nor repeated keys and values.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor
from transformers import AttentionInterface, AttentionMaskInterface

from common.data.tokens import Batch

# Shapes: B rows, T positions of a padded row, S tokens of all rows laid end to end, n tokens of one row, Q query heads,
# K key/value heads, D width of a head.

NAME = "ragged"  # what `set_attn_implementation` is told
# Tokens: every new length makes oneDNN compile and keep its kernels again, so rows and batches have few lengths. The
# price is less than 8 computed tokens more in a row, and less than 64 in a batch.
ROW_TO, FILL_TO = 8, 64
# Tokens: below it torch's flash kernel for CPUs is slower than three products. Best of 14 passes, forward and backward,
# of 9 heads of 64 on 2 cores of an EPYC: flash took 3.4 times (bf16) and 1.2 times (fp32) as long with rows of 128,
# 1.8 and 1.0 times with rows of 256, 1.0 and 0.6 times with rows of 384.
WRITTEN_OUT_UP_TO = 256
Bounds = Sequence[tuple[int, int]]


class RaggedAttention(torch.autograd.Function):
    """Causal attention within each row: q [Q, S, D], k and v [K, S, D], rows `bounds`; returns [S, Q, D].

    Scores are products of `dtype`, the softmax is float32, as in transformers' eager attention under autocast.
    """

    @staticmethod
    def forward(
        ctx: Any, q: Tensor, k: Tensor, v: Tensor, bounds: Bounds, scaling: float, dtype: torch.dtype
    ) -> Tensor:
        ctx.given, ctx.bounds, ctx.scaling = (q.dtype, k.dtype, v.dtype), bounds, scaling
        q, k, v = q.to(dtype), k.to(dtype), v.to(dtype)
        (heads, tokens, width), groups = q.shape, k.shape[0]
        out = q.new_zeros(tokens, heads, width)  # filling tokens belong to no row
        weights = []
        for start, end in bounds:
            n = end - start
            # Queries that share keys stand below each other, so that one product serves all Q/K of them:
            # [K, Q/K x n, D] @ [K, D, n] -> [K, Q/K x n, n]
            scores = (grouped(q, start, end, groups) @ k[:, start:end].transpose(1, 2)).float().mul_(scaling)
            future = torch.ones(n, n, dtype=torch.bool).triu_(1)
            scores.view(groups, -1, n, n).masked_fill_(future, float("-inf"))
            weight = torch.softmax(scores, -1).to(dtype)  # kept for the backward pass: Q x n x n of each row
            out[start:end] = (weight @ v[:, start:end]).view(heads, n, width).transpose(0, 1)  # [n, Q, D]
            weights.append(weight)
        ctx.save_for_backward(q, k, v, *weights)
        return out

    @staticmethod
    def backward(ctx: Any, *gradients: Tensor) -> tuple[Tensor | None, ...]:
        q, k, v, *weights = ctx.saved_tensors
        heads, _, width = q.shape
        upstream = gradients[0].to(q.dtype).transpose(0, 1)  # [S, Q, D] -> [Q, S, D]
        dq, dk, dv = torch.zeros_like(q), torch.zeros_like(k), torch.zeros_like(v)
        for (start, end), weight in zip(ctx.bounds, weights, strict=True):
            queries, up = (grouped(t, start, end, len(k)) for t in (q, upstream))  # [K, Q/K x n, D]
            keys, values = k[:, start:end], v[:, start:end]
            dv[:, start:end] = weight.transpose(1, 2) @ up  # [K, n, D]: the product sums over the heads that share it
            slope = (up @ values.transpose(1, 2)).float()  # dP, [K, Q/K x n, n]
            wide = weight.float()
            # Through the softmax: dS = P * (dP - rowsum(dP * P)), in float32 as the forward pass.
            # Masked places have P = 0, and so no slope.
            slope = slope.sub_((slope * wide).sum(-1, keepdim=True)).mul_(wide).mul_(ctx.scaling).to(q.dtype)
            dq[:, start:end] = (slope @ keys).view(heads, end - start, width)
            dk[:, start:end] = slope.transpose(1, 2) @ queries
        return (*(t.to(dtype) for t, dtype in zip((dq, dk, dv), ctx.given, strict=True)), None, None, None)


def grouped(x: Tensor, start: int, end: int, groups: int) -> Tensor:
    """Return tokens start..end of x [Q, S, D] as [K, Q/K x n, D]: heads that share keys side by side."""
    return x[:, start:end].reshape(groups, -1, x.shape[-1])


def attend(
    _module: Any, query: Tensor, key: Tensor, value: Tensor, _mask: Any, *, scaling: float, bounds: Bounds, **_: Any
) -> tuple[Tensor, None]:
    """Return ([1, S, Q, D], None) for query [1, Q, S, D], key and value [1, K, S, D], as transformers asks for it."""
    if max(end - start for start, end in bounds) <= WRITTEN_OUT_UP_TO:
        dtype = torch.bfloat16 if torch.is_autocast_enabled("cpu") else query.dtype
        return RaggedAttention.apply(query[0], key[0], value[0], bounds, scaling, dtype)[None], None  # type: ignore[no-untyped-call]
    rows = []
    for start, end in bounds:
        q, k, v = (tensor[:, :, start:end] for tensor in (query, key, value))
        rows.append(F.scaled_dot_product_attention(q, k, v, is_causal=True, scale=scaling, enable_gqa=True))
    fill = query.shape[2] - bounds[-1][1]  # tokens of no row
    return F.pad(torch.cat(rows, dim=2), (0, 0, 0, fill)).transpose(1, 2), None


def lay_out(batch: Batch) -> tuple[Tensor, Tensor, Tensor, Tensor, list[tuple[int, int]]]:
    """Return ids and positions int64 [1, S], labels int64 [S], supervised bool [S], and each row's (start, end).

    A row ends with its last supervised token, rounded up to ROW_TO: attention is causal, so nothing right of it has an
    effect.
    """
    width = batch.loss_mask.shape[1]
    lengths = np.minimum(width, (batch.lengths() + ROW_TO - 1) // ROW_TO * ROW_TO)
    inside = np.arange(width) < lengths[:, None]  # [B, T]; as an index it takes the tokens row by row
    ends = np.cumsum(lengths)
    bounds = [(int(end - n), int(end)) for end, n in zip(ends, lengths, strict=True) if n]
    # Each row counts from 0: rotary embeddings see it as if it were alone.
    positions = np.broadcast_to(np.arange(width), inside.shape)[inside]
    ids, labels, supervised = batch.input_ids[inside], batch.labels[inside], batch.loss_mask[inside] > 0
    fill = -len(ids) % FILL_TO  # at the end, in no row of `bounds`, and supervised nowhere
    arrays = (np.pad(array, (0, fill)) for array in (ids, positions, labels, supervised))
    tokens, places, targets, mask = (torch.from_numpy(array.astype(np.int64)) for array in arrays)
    return tokens[None], places[None], targets, mask.bool(), bounds


AttentionInterface.register(NAME, attend)
# transformers would otherwise build a mask [S, S] for a function that needs none.
AttentionMaskInterface.register(NAME, lambda *_, **__: None)
