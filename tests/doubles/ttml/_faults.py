"""Kernels that compute gradients wrongly and say nothing, one for each upstream fault that a bring-up line names.

Off unless TTML_DOUBLE_KERNEL_FAULTS has the name. How far the real ones are off is not published: these are plain
versions of what their issues say.
"""

from __future__ import annotations

import math
from typing import Any

import torch
import torch.nn.functional as F
from ttnn import _switches

TILE = 32


class _GroupsInAnotherOrder(torch.autograd.Function):
    """Keys or values for each head of queries; back, as if the heads that share one lay apart (tt-metal 57825)."""

    @staticmethod
    def forward(ctx: Any, x: torch.Tensor, times: int) -> torch.Tensor:
        ctx.times = times
        return x.repeat_interleave(times, dim=2)

    @staticmethod
    def backward(ctx: Any, slope: torch.Tensor) -> tuple[torch.Tensor, None]:
        return slope.unflatten(2, (ctx.times, -1)).sum(2), None


def shared_heads(x: torch.Tensor, times: int) -> torch.Tensor:
    """[D,B,kv_heads,T,d] to [D,B,heads,T,d]: the heads that share one lie next to each other."""
    if times > 1 and x.shape[3] > TILE and "grouped-heads" in _switches.KERNEL_FAULTS:
        return _GroupsInAnotherOrder.apply(x, times)
    return x.repeat_interleave(times, dim=2)


class _RowsOfATileLater(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, w: torch.Tensor) -> torch.Tensor:
        return w.view_as(w)

    @staticmethod
    def backward(ctx: Any, slope: torch.Tensor) -> torch.Tensor:
        return slope.roll(TILE, dims=-2)


def weight_of_product(w: torch.Tensor) -> torch.Tensor:
    """[D,1,1,out,in], whose gradient is a product with a transposed first factor (tt-metal 57829: rectangular)."""
    if w.shape[-2] >= 8 * w.shape[-1] and "transposed-a" in _switches.KERNEL_FAULTS:
        return _RowsOfATileLater.apply(w)
    return w


class _CutUnmasked(torch.autograd.Function):
    """The first columns; back, the others have a gradient as large as theirs (tt-metal 53219)."""

    @staticmethod
    def forward(ctx: Any, x: torch.Tensor, start: int, end: int) -> torch.Tensor:
        ctx.around = (start, x.shape[-1] - end)
        return x[..., start:end]

    @staticmethod
    def backward(ctx: Any, slope: torch.Tensor) -> tuple[torch.Tensor, None, None]:
        padded, end = F.pad(slope, ctx.around), ctx.around[0] + slope.shape[-1]
        padded[..., end:] = slope.abs().mean(-1, keepdim=True)
        return padded, None, None


def cut(x: torch.Tensor, start: int, end: int) -> torch.Tensor:
    if end % TILE and "padded-columns" in _switches.KERNEL_FAULTS:
        return _CutUnmasked.apply(x, start, end)
    return x[..., start:end]


class _KeysSummedInBf16(torch.autograd.Function):
    """q k^T / sqrt(d); back, dK is summed over tiles of queries and cut to bf16 after each (tt-metal 53313)."""

    @staticmethod
    def forward(ctx: Any, q: torch.Tensor, k: torch.Tensor) -> torch.Tensor:
        ctx.save_for_backward(q, k)
        return q @ k.transpose(-1, -2) / math.sqrt(q.shape[-1])

    @staticmethod
    def backward(ctx: Any, slope: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        q, k = ctx.saved_tensors
        scaled, total = slope / math.sqrt(q.shape[-1]), torch.zeros_like(k)
        for start in range(0, q.shape[-2], TILE):
            tile = slice(start, start + TILE)
            total += scaled[..., tile, :].transpose(-1, -2) @ q[..., tile, :]
            total = (total.view(torch.int32) & ~0xFFFF).view(torch.float32)
        return scaled @ k, total


def scores(q: torch.Tensor, k: torch.Tensor) -> torch.Tensor:
    if "dk-in-bf16" in _switches.KERNEL_FAULTS:
        return _KeysSummedInBf16.apply(q, k)
    return q @ k.transpose(-1, -2) / math.sqrt(q.shape[-1])
