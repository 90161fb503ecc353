"""The blocks of a Llama, forward and backward by hand: with the head, all that a training step spends its time on.

A block is two Functions, its attention and its MLP, each with norm and residual. Against what autograd makes of
transformers' modules they save memory and passes over it: normalized tensors, activations and attention weights are
made again in the backward pass, gradients are added up inside of products, projections that share an A multiply by it
once, and the last block goes on with the tokens that a loss needs. tests/engines/test_blocks.py holds it all against
transformers and autograd.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any, Protocol, cast

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from transformers import LlamaForCausalLM

from engines.cpu.lora import Frozen, LoraLinear
from engines.cpu.ragged import Attending, Layout, Together

# Shapes: S tokens, U of them queries (all but in the last block), H hidden_size, R rank, K key/value heads, G query
# heads of each, D width of a head; n queries and m keys of one product.


def hidden_states(model: LlamaForCausalLM, layout: Layout, work: torch.dtype, recompute: bool) -> Tensor:
    """Return the last hidden states [U, H] of the needed tokens of `layout`, with products in the dtype `work`.

    With `recompute` the backward pass computes each block again from its input, instead of keeping what it needs of it.
    """
    x = model.model.embed_tokens(layout.ids)  # [S, H]
    cos, sin = (table[0].float() for table in model.model.rotary_emb(x, layout.positions[None]))  # [S, D] each
    layers = list(model.model.layers)
    for layer in layers:
        last = layer is layers[-1]
        attending, queries = (layout.attending_last, layout.needed) if last else (layout.attending, None)
        attention, mlp = layer.self_attn, layer.mlp
        attend = Attention(cos, sin, attending, queries, attention.head_dim, attention.scaling)
        modules = [attention.q_proj, attention.k_proj, attention.v_proj, attention.o_proj]
        x = half_block(attend, x, layer.input_layernorm, modules, work, recompute)
        modules = [mlp.gate_proj, mlp.up_proj, mlp.down_proj]
        x = half_block(Mlp(), x, layer.post_attention_layernorm, modules, work, recompute)
    return cast(Tensor, model.model.norm(x))


# --- linear layers ----------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Slots:
    """Where a linear layer's tensors are in a list, None where it has none, and how its adapter acts."""

    weight: int
    bias: int | None = None
    a: int | None = None
    b: int | None = None
    scale: float = 0.0
    dropout: float = 0.0


def tensors_of(modules: Sequence[nn.Module], work: torch.dtype) -> tuple[list[Slots], list[Tensor]]:
    """Return all tensors of linear layers, a shared A once, and where each layer's are."""
    tensors: list[Tensor] = []

    def slot(tensor: Any) -> int:
        found = next((index for index, known in enumerate(tensors) if known is tensor), len(tensors))
        tensors[found:] = tensors[found:] or [tensor]
        return found

    slots = []
    for module in modules:
        weight16 = module.weight16 if isinstance(module, Frozen) and work is torch.bfloat16 else None
        weight = slot(module.weight if weight16 is None else weight16)
        bias = None if module.bias is None else slot(module.bias)
        if isinstance(module, LoraLinear) and module.enabled:
            dropout = module.dropout if module.training else 0.0
            slots.append(Slots(weight, bias, slot(module.lora_A), slot(module.lora_B), module.scale, dropout))
        else:
            slots.append(Slots(weight, bias))
    return slots, tensors


class Linears:
    """Linear layers with their adapters, y = x W^T + b + scale (x A^T) B^T, and the gradients of their tensors."""

    def __init__(self, slots: Sequence[Slots], tensors: Sequence[Tensor], needed: Sequence[bool], work: torch.dtype):
        self.slots, self.needed = slots, needed
        self.tensors = [tensor.to(work) for tensor in tensors]
        self.gradients: list[Tensor | None] = [None] * len(tensors)
        # By A: scale (x A^T) [S, R], and where there is dropout what x was multiplied by, 0 or 1 / (1 - dropout).
        self.low: dict[int, Tensor] = {}
        self.kept: dict[int, Tensor] = {}

    def saved(self) -> list[Tensor]:
        """Return what the backward pass needs besides the input of each product."""
        return [*self.low.values(), *self.kept.values()]

    def restore(self, saved: Iterator[Tensor]) -> None:
        """Take back what `saved` returned."""
        dropout = {slots.a: slots.dropout for slots in self.slots if slots.a is not None}
        self.low = {a: next(saved) for a in dropout}
        self.kept = {a: next(saved) for a in dropout if dropout[a]}

    def forward(self, x: Tensor, layers: slice) -> list[Tensor]:
        """Return x [S, I] through each of some of the layers: [S, O] each."""
        found = []
        for slots in self.slots[layers]:
            weight = self.tensors[slots.weight].t()
            y = x @ weight if slots.bias is None else torch.addmm(self.tensors[slots.bias], x, weight)
            if slots.a is not None and slots.b is not None:
                if slots.a not in self.low:
                    if slots.dropout:
                        share = torch.full_like(x, 1 - slots.dropout)
                        self.kept[slots.a] = torch.bernoulli(share).div_(share)
                    self.low[slots.a] = (self._dropped(x, slots.a) @ self.tensors[slots.a].t()).mul_(slots.scale)
                y.addmm_(self.low[slots.a], self.tensors[slots.b].t())
            found.append(y)
        return found

    def backward(self, x: Tensor, slopes: Sequence[Tensor], layers: slice) -> Tensor:
        """Return the gradient of x [S, I] from those of the outputs, [S, O] each; note those of the tensors."""
        dx: Tensor | None = None
        low: dict[int, Tensor] = {}
        for slots, dy in zip(self.slots[layers], slopes, strict=True):
            weight = self.tensors[slots.weight]
            dx = dy @ weight if dx is None else dx.addmm_(dy, weight)
            if self.needed[slots.weight]:
                self.gradients[slots.weight] = dy.t() @ x
            if slots.bias is not None and self.needed[slots.bias]:
                self.gradients[slots.bias] = dy.sum(0)
            if slots.a is not None and slots.b is not None:
                b = self.tensors[slots.b]
                self.gradients[slots.b] = dy.t() @ self.low[slots.a]
                low[slots.a] = low[slots.a].addmm_(dy, b) if slots.a in low else dy @ b
        assert dx is not None, "no layers"
        scales = {slots.a: slots.scale for slots in self.slots}
        for index, dlow in low.items():
            dlow.mul_(scales[index])
            self.gradients[index] = dlow.t() @ self._dropped(x, index)
            if index in self.kept:
                dx.add_((dlow @ self.tensors[index]).mul_(self.kept[index]))
            else:
                dx.addmm_(dlow, self.tensors[index])
        return dx

    def _dropped(self, x: Tensor, a: int) -> Tensor:
        return x * self.kept[a] if a in self.kept else x


# --- half a block -----------------------------------------------------------------------------------------------------


class Half(Protocol):
    """What half a block does between its norm and its residual."""

    def forward(self, h: Tensor, linears: Linears) -> list[Tensor]:
        """Return [the output, what else the backward pass needs ...] for normalized input h [S, H]."""

    def backward(self, dy: Tensor, h: Tensor, linears: Linears, saved: Sequence[Tensor]) -> Tensor:
        """Return the gradient of h from that of the output, with what `forward` returned after it."""

    @property
    def queries(self) -> Tensor | None:
        """The tokens that have an output, int64 [U]; None for all."""


def half_block(
    half: Half, x: Tensor, norm: Any, modules: Sequence[nn.Module], work: torch.dtype, recompute: bool
) -> Tensor:
    """Return x + half(norm(x)) [U, H] for x [S, H]."""
    slots, tensors = tensors_of(modules, work)
    shape = Shape(half, slots, norm.variance_epsilon, work, recompute)
    return cast(Tensor, HalfBlock.apply(shape, x, norm.weight, *tensors))  # type: ignore[no-untyped-call]


@dataclass(frozen=True)
class Shape:
    """All of half a block that is no tensor of the model."""

    half: Half
    slots: Sequence[Slots]
    epsilon: float
    work: torch.dtype
    recompute: bool


class HalfBlock(torch.autograd.Function):
    """x + half(norm(x)), for x [S, H] in the dtype of the residuals, the norm's gain [H] and the layers' tensors."""

    @staticmethod
    def forward(ctx: Any, shape: Shape, x: Tensor, gain: Tensor, *tensors: Tensor) -> Tensor:
        ctx.shape, ctx.random = shape, torch.get_rng_state() if shape.recompute else None
        linears = Linears(shape.slots, tensors, (), shape.work)
        root = inverse_root(x, shape.epsilon)
        y, *saved = shape.half.forward(normalized(x, root, gain, shape.work), linears)
        ctx.save_for_backward(x, root, gain, *tensors, *(() if shape.recompute else (*linears.saved(), *saved)))
        return y + (x if shape.half.queries is None else x[shape.half.queries])

    @staticmethod
    def backward(ctx: Any, *gradients: Tensor) -> tuple[Tensor | None, ...]:
        (upstream,), shape, half = gradients, ctx.shape, ctx.shape.half
        saved = iter(ctx.saved_tensors)
        x, root, gain = next(saved), next(saved), next(saved)
        tensors = [next(saved) for _ in ctx.needs_input_grad[3:]]
        linears = Linears(shape.slots, tensors, ctx.needs_input_grad[3:], shape.work)
        h = normalized(x, root, gain, shape.work)
        if shape.recompute:
            with torch.random.fork_rng(devices=[]):
                torch.set_rng_state(ctx.random)  # so that dropout is the same
                _, *kept = half.forward(h, linears)
        else:
            linears.restore(saved)
            kept = list(saved)
        dh = half.backward(upstream.to(shape.work), h, linears, kept)
        if half.queries is not None:
            upstream = torch.zeros_like(x).index_copy_(0, half.queries, upstream)
        dx, dgain = normalized_back(dh, x, root, gain, upstream, ctx.needs_input_grad[2])
        pairs = zip(linears.gradients, tensors, strict=True)
        return None, dx, dgain, *(None if slope is None else slope.to(tensor.dtype) for slope, tensor in pairs)


def inverse_root(x: Tensor, epsilon: float) -> Tensor:
    """Return 1 / sqrt(mean(x^2) + epsilon) of each row of x [S, H], float32 [S, 1]."""
    square: Tensor = torch.linalg.vector_norm(x, dim=1, keepdim=True, dtype=torch.float32).square_()  # one pass
    return square.div_(x.shape[1]).add_(epsilon).rsqrt_()


def normalized(x: Tensor, root: Tensor, gain: Tensor, work: torch.dtype) -> Tensor:
    """Return RMSNorm of x [S, H] in the dtype `work`, for its `inverse_root`."""
    return (x * root).to(x.dtype).mul_(gain).to(work)


def normalized_back(
    dh: Tensor, x: Tensor, root: Tensor, gain: Tensor, residual: Tensor, gain_too: bool
) -> tuple[Tensor, Tensor | None]:
    """Return the gradients of x, `residual` added, and of the gain [H] if asked, for the gradient dh [S, H]."""
    dh, x = dh.float(), x.float()
    dgain = (dh * x).mul_(root).sum(0).to(gain.dtype) if gain_too else None
    slope = dh * gain
    # d (x root) / dx = root - x (x . slope) root^3 / H
    along = (slope * x).sum(1, keepdim=True).mul_(root**3 / x.shape[1])
    dx = torch.addcmul(residual.float(), slope, root).addcmul_(x, along, value=-1)
    return dx.to(residual.dtype), dgain


# --- the MLP ----------------------------------------------------------------------------------------------------------


class Mlp:
    """down(silu(gate(h)) up(h)); the layers are gate, up and down."""

    queries = None

    def forward(self, h: Tensor, linears: Linears) -> list[Tensor]:
        """Return the output [S, H], then what `backward` needs."""
        gate, up = linears.forward(h, slice(0, 2))
        (y,) = linears.forward(F.silu(gate).mul_(up), slice(2, 3))
        return [y, gate, up]

    def backward(self, dy: Tensor, h: Tensor, linears: Linears, saved: Sequence[Tensor]) -> Tensor:
        """Return the gradient of h [S, H] for that of the output."""
        gate, up = saved
        silu = F.silu(gate)
        slope = linears.backward(silu * up, [dy], slice(2, 3))
        dup = silu.mul_(slope)
        dgate = torch.ops.aten.silu_backward(slope.mul_(up), gate)
        return linears.backward(h, [dgate, dup], slice(0, 2))


# --- attention --------------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Attention:
    """o(softmax(rope(q(h)) rope(k(h))^T) v(h)) within each row; the layers are q, k, v and o.

    From the turn to the values it is float32, whatever the other products are: products as small as these gain nothing
    by bf16, for which oneDNN compiles kernels for each length of a row. `cos` and `sin` are float32 [S, D]; `queries`
    int64 [U] are the tokens that have an output.
    """

    cos: Tensor
    sin: Tensor
    attending: Attending
    queries: Tensor | None
    width: int
    scaling: float

    def forward(self, h: Tensor, linears: Linears) -> list[Tensor]:
        """Return the output [U, H], then what `backward` needs."""
        q, k, v = linears.forward(h, slice(0, 3))
        cos, sin, cos_q, sin_q = self._angles()
        q = q if self.queries is None else q[self.queries]
        heads = k.shape[1] // self.width
        q = turned(q.view(len(q), heads, -1, self.width), cos_q, sin_q)  # [K, U, G, D]
        k = turned(k.view(len(k), heads, 1, self.width), cos, sin)[:, :, 0]  # [K, S, D]
        v = v.view(len(v), heads, self.width).transpose(0, 1).float().contiguous()  # [K, S, D]
        attended = [weights_of(q, k, group) @ taken(v, group.keys, group) for group in self.attending.groups]
        out = self._in_order(attended, q).transpose(0, 1).reshape(q.shape[1], -1).to(h.dtype)  # [U, K G D]
        (y,) = linears.forward(out, slice(3, 4))
        return [y, q, k, v, out]

    def backward(self, dy: Tensor, h: Tensor, linears: Linears, saved: Sequence[Tensor]) -> Tensor:
        """Return the gradient of h [S, H] for that of the output [U, H]."""
        q, k, v, out = saved
        dout = linears.backward(out, [dy], slice(3, 4))
        heads, queries, groups, width = q.shape
        # Through the softmax: dS = P (dP - rowsum(P dP)), and rowsum(P dP) = dO . O (Dao et al., 2022, appendix B.2).
        dout = dout.float()
        along = (dout * out).view(queries, heads, groups, width).sum(-1).transpose(0, 1)  # [K, U, G]
        dout = dout.view(queries, heads, groups, width).transpose(0, 1)
        dk, dv = torch.zeros_like(k), torch.zeros_like(v)
        dqs = []
        for group in self.attending.groups:
            weights, slope = weights_of(q, k, group), taken(dout, group.queries, group)  # [P K, n G, m], [P K, n G, D]
            add_back(dv, weights.transpose(1, 2) @ slope, group)
            scores = slope @ taken(v, group.keys, group).transpose(1, 2)  # dP, then dS
            scores.sub_(taken(along[..., None], group.queries, group)).mul_(weights)
            dqs.append(scores @ taken(k, group.keys, group))
            add_back(dk, scores.transpose(1, 2) @ taken(q, group.queries, group), group)
        dq = self._in_order(dqs, q)
        cos, sin, cos_q, sin_q = self._angles()
        # The derivative of a turn is the turn back.
        dq = turned(dq, cos_q[:, None], -sin_q[:, None]).view(queries, -1).to(h.dtype)
        if self.queries is not None:
            dq = dq.new_zeros(len(h), dq.shape[1]).index_copy_(0, self.queries, dq)
        dk = turned(dk[:, :, None], cos[:, None], -sin[:, None]).view(len(h), -1).to(h.dtype)
        dv = dv.transpose(0, 1).reshape(len(h), -1).to(h.dtype)
        return linears.backward(h, [dq, dk, dv], slice(0, 3))

    def _in_order(self, found: Sequence[Tensor], q: Tensor) -> Tensor:
        """Return what was found for the queries of each group, [K P, n G, D], as q [K, U, G, D] has them."""
        heads, _, groups, width = q.shape
        everyone = [each.view(heads, -1, groups, width) for each in found]
        return (everyone[0] if len(found) == 1 else torch.cat(everyone, dim=1))[:, self.attending.place]

    def _angles(self) -> tuple[Tensor, Tensor, Tensor, Tensor]:
        """Return cosines and sines of keys, [S, 1, D / 2] each, then of queries [U, 1, D / 2], scaling included."""
        # Both halves of a head turn by the same angles.
        cos, sin = (table[:, None, : self.width // 2] for table in (self.cos, self.sin))
        cos_q, sin_q = (table if self.queries is None else table[self.queries] for table in (cos, sin))
        return cos, sin, cos_q * self.scaling, sin_q * self.scaling


def turned(x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
    """Return x [a, b, G, D] with rotary embeddings applied, float32 [b, a, G, D].

    `cos` and `sin` are broadcast against [b, a, G, D / 2]. The swap costs no pass of its own: heads come
    first in attention, tokens in all else.
    """
    half = x.shape[-1] // 2
    wide = x.transpose(0, 1).float()
    out = torch.empty(wide.shape)
    for mine, other, sign in ((slice(None, half), slice(half, None), -1), (slice(half, None), slice(None, half), 1)):
        torch.mul(wide[..., mine], cos, out=out[..., mine]).addcmul_(wide[..., other], sin, value=sign)
    return out


def taken(x: Tensor, places: Tensor, group: Together) -> Tensor:
    """Return x [K, S, ..., D] at `places` [P n] as one matrix [n ..., D] for each head and part: [K P, n ..., D].

    Query heads that share keys stand below each other, so that one product serves all of them.
    """
    return x.index_select(1, places).view(x.shape[0] * len(group.hidden), -1, x.shape[-1])


def add_back(total: Tensor, slope: Tensor, group: Together) -> None:
    """Add the gradients of the keys of a group, slope [K P, m, D], to those of their tokens, total [K, S, D]."""
    each = slope.view(len(total), len(group.hidden), *slope.shape[1:])
    for part, first, start, end in group.spans:
        total[:, start:end] += each[:, part, first : first + end - start]


def weights_of(q: Tensor, k: Tensor, group: Together) -> Tensor:
    """Return the attention weights [K P, n G, m] of q [K, U, G, D], which is scaled, over k [K, S, D]."""
    scores = taken(q, group.queries, group) @ taken(k, group.keys, group).transpose(1, 2)
    parts, n, _, m = group.hidden.shape
    scores.view(len(q), parts, n, -1, m).masked_fill_(group.hidden, float("-inf"))
    return torch.softmax(scores, -1)
