"""The operations of `ttml.ops`, as far as a Llama and its masked loss need them.

Inside, every tensor has the devices as its first dimension: a [B,1,T,H] activation is [D,B,1,T,H].
"""

from __future__ import annotations

import enum
import math
from typing import Any

import torch
import torch.nn.functional as F
import ttnn

from . import _faults, _strict
from .autograd import AutoContext, Tensor, apply, fails_in_backward, multiply_like

TILE = 32
BLOCKED = -1e9  # the score where the mask does not attend


class ReduceType(enum.Enum):
    NONE = 0
    MEAN = 1
    SUM = 2


def cross_entropy_loss(prediction: Tensor, target: Tensor, reduce: ReduceType = ReduceType.MEAN) -> Tensor:
    """prediction [B,1,T,V] and target [B,T] (UINT32, ROW_MAJOR) to [1,1,1,1] (MEAN) or [B,1,T,1] (NONE).

    `target[t]` is compared with `prediction[t]`: nothing is shifted, nothing is ignored.
    """
    _strict.member("reduce", reduce, ReduceType)
    if reduce is ReduceType.SUM:
        raise ttnn.fatal("cross_entropy_loss: unsupported reduction type")
    rows, length, vocab = prediction.shape()[0], *prediction.shape()[-2:]
    labels = target._native
    if labels.shape != [rows, length] or prediction.get_rank() != 4:
        raise ttnn.fatal(f"cross_entropy_loss: target {labels.shape} does not fit prediction {prediction.shape()}")
    if (labels.dtype, labels.layout) != (ttnn.DataType.UINT32, ttnn.Layout.ROW_MAJOR):
        raise ttnn.fatal("cross_entropy_loss: target must be UINT32 and ROW_MAJOR")
    if int(labels.data.max()) >= vocab:
        raise ttnn.fatal(f"cross_entropy_loss: target {int(labels.data.max())} is outside the vocabulary of {vocab}")

    def nll(logits: torch.Tensor) -> torch.Tensor:
        per_token = F.cross_entropy(logits.flatten(0, -2), labels.data.flatten(), reduction="none")
        per_token = per_token.view(*logits.shape[:-1], 1)
        return per_token if reduce is ReduceType.NONE else per_token.mean((1, 2, 3, 4)).view(-1, 1, 1, 1, 1)

    return apply(nll, prediction, indices=[target])


def mul(a: Tensor, b: Any) -> Tensor:
    return multiply_like(torch.mul, a, b)


def div(a: Tensor, b: Any) -> Tensor:
    return multiply_like(torch.div, a, b)


def add(a: Tensor, b: Tensor) -> Tensor:
    return a + b


def sub(a: Tensor, b: Tensor) -> Tensor:
    return a - b


def mean(tensor: Tensor) -> Tensor:
    """Over everything on a device: [1,1,1,1]."""
    return apply(lambda x: x.flatten(1).mean(1).view(-1, 1, 1, 1, 1), tensor)


def silu(tensor: Tensor) -> Tensor:
    return apply(F.silu, tensor)


def swiglu(tensor: Tensor, w1: Tensor, w2: Tensor, w3: Tensor) -> Tensor:
    """The product of the three linear layers of an MLP, by their weights (1,1,out,in): gate, down, up."""
    return linear(mul(silu(linear(tensor, w1)), linear(tensor, w3)), w2)


def linear(tensor: Tensor, weight: Tensor, bias: Tensor | None = None) -> Tensor:
    """[B,1,T,in] by (1,1,out,in), plus (1,1,1,out)."""

    def product(x: torch.Tensor, w: torch.Tensor, *b: torch.Tensor) -> torch.Tensor:
        rows = _faults.weight_of_product(w)[:, 0, 0]
        y = torch.bmm(x.flatten(1, -2), rows.transpose(1, 2)).view(*x.shape[:-1], -1)
        return y + b[0] if b else y

    return apply(product, tensor, weight, *([] if bias is None else [bias]))


def embedding(ids: Tensor, weight: Tensor) -> Tensor:
    """[B,1,1,T] (UINT32, ROW_MAJOR) to [B,1,T,H]. Its backward needs T and H in whole tiles."""
    tokens = ids._native
    if (tokens.dtype, tokens.layout) != (ttnn.DataType.UINT32, ttnn.Layout.ROW_MAJOR):
        raise ttnn.fatal("embedding: token ids must be UINT32 and ROW_MAJOR")
    at = tokens.data[:, :, 0, 0]  # [D,B,T]
    device = torch.arange(len(at))[:, None, None]

    def look_up(table: torch.Tensor) -> torch.Tensor:
        rows = table[:, 0, 0][device, at].unsqueeze(2)
        whole = at.shape[-1] % TILE == 0 and table.shape[-1] % TILE == 0
        return rows if whole else fails_in_backward(rows, "embedding_bw: T and H must be multiples of 32")

    return apply(look_up, weight, indices=[ids])


def rmsnorm(tensor: Tensor, gamma: Tensor, epsilon: float) -> Tensor:
    return apply(lambda x, g: x * torch.rsqrt(x.square().mean(-1, keepdim=True) + epsilon) * g, tensor, gamma)


def dropout(tensor: Tensor, probability: float) -> Tensor:
    """Seeded by the context's generator alone; every device drops the same places."""
    generator = torch.Generator().manual_seed(AutoContext.get_instance()._generator.getrandbits(32))
    kept = torch.rand(tensor.shape(), generator=generator) >= probability
    return apply(lambda x: x * kept / (1 - probability), tensor)


def slice_last_dim(tensor: Tensor, start: int, end: int) -> Tensor:
    return apply(lambda x: _faults.cut(x, start, end), tensor)


# --- attention --------------------------------------------------------------------------------------------------


class RopeScalingParams:
    """Llama 3's stretching of low frequencies; off while factor or original length is zero."""

    def __init__(self) -> None:
        self.original_context_length = 0
        self.scaling_factor = 0.0
        self.high_freq_factor = 4.0
        self.low_freq_factor = 1.0


class RotaryEmbeddingParams:
    """The tables, [max_sequence_length, head_dim / 2], in bf16."""

    def __init__(self, cos: torch.Tensor, sin: torch.Tensor) -> None:
        self.cos, self.sin = cos.bfloat16(), sin.bfloat16()


def build_rope_params(
    sequence_length: int, head_dim: int, theta: float = 10000.0, scaling: RopeScalingParams | None = None
) -> RotaryEmbeddingParams:
    if head_dim % TILE or head_dim > 256:
        raise ValueError(f"RoPE head_dim must be a multiple of 32 and at most 256, got {head_dim}")
    frequency = theta ** -(torch.arange(0, head_dim, 2).double() / head_dim)
    if scaling and scaling.scaling_factor and scaling.original_context_length:
        turns = scaling.original_context_length * frequency / (2 * math.pi)
        kept = (turns - scaling.low_freq_factor) / (scaling.high_freq_factor - scaling.low_freq_factor)
        kept = kept.clamp(0, 1)
        frequency = frequency * (kept + (1 - kept) / scaling.scaling_factor)
    angle = torch.arange(sequence_length).double()[:, None] * frequency
    return RotaryEmbeddingParams(angle.cos(), angle.sin())


def rope(tensor: Tensor, params: RotaryEmbeddingParams) -> Tensor:
    """Rotate pairs of neighbours, (0,1), (2,3), ..., of [B,heads,T,head_dim].

    Positions beyond the table come out as zeros; nothing is raised. A head wider than 128 has tables, and no kernel:
    with fp32 accumulation, which ttml asks for, rotary_embedding_llama stops there.
    """
    length, head_dim = tensor.shape()[-2:]
    if head_dim > 128:
        raise ttnn.fatal(f"rotary_embedding_llama: head_dim {head_dim} > 128 with fp32_dest_acc_en")
    missing = max(0, length - len(params.cos))
    cos = F.pad(params.cos[:length].float(), (0, 0, 0, missing))
    sin = F.pad(params.sin[:length].float(), (0, 0, 0, missing))

    def rotate(x: torch.Tensor) -> torch.Tensor:
        even, odd = x[..., 0::2], x[..., 1::2]
        return torch.stack([even * cos - odd * sin, odd * cos + even * sin], -1).flatten(-2)

    return apply(rotate, tensor)


def split_heads(tensor: Tensor, start: int, heads: int, head_dim: int) -> Tensor:
    """Rows [start, start + heads * head_dim) of a [B,1,T,*] projection as [B,heads,T,head_dim]."""

    def split(x: torch.Tensor) -> torch.Tensor:
        part = x[:, :, 0, :, start : start + heads * head_dim]
        return part.unflatten(-1, (heads, head_dim)).transpose(2, 3)

    return apply(split, tensor)


def heads_fusion(tensor: Tensor) -> Tensor:
    """[B,heads,T,head_dim] to [B,1,T,heads * head_dim]."""
    return apply(lambda x: x.transpose(2, 3).flatten(-2).unsqueeze(2), tensor)


def scaled_dot_product_attention(query: Tensor, key: Tensor, value: Tensor, mask: Tensor | None = None) -> Tensor:
    """Causal without a mask; with one, only the mask counts (1 = attend, 0 = block). Grouped keys and values.

    Its backward needs T in whole tiles.
    """
    length = query.shape()[-2]

    def attend(q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, *given: torch.Tensor) -> torch.Tensor:
        k, v = (_faults.shared_heads(x, q.shape[2] // x.shape[2]) for x in (k, v))
        scores = _faults.scores(q, k)
        allowed = given[0] if given else torch.ones(length, length).tril()
        out = (scores * allowed + (1 - allowed) * BLOCKED).softmax(-1) @ v
        return out if length % TILE == 0 else fails_in_backward(out, "sdpa_bw: u_scaler shape mismatch")

    return apply(attend, query, key, value, *([] if mask is None else [mask]))
