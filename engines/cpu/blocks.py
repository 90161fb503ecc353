"""The blocks of a Llama, forward and backward by hand: with the head, all that a training step spends its time on.

A block is two Functions, its sublayers attention and MLP, each with norm and residual. Against what autograd makes of
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

from engines.cpu.llama import Llama
from engines.cpu.lora import Frozen, LoraLinear
from engines.cpu.ragged import AttentionGroup, AttentionLayout, Layout

# Shapes: S tokens, U of them queries (all but in the last block), H hidden_size, R rank, K key/value heads, G query
# heads of each, D width of a head; P blocks of queries that are multiplied together, n queries and m keys of each.


def hidden_states(model: Llama, layout: Layout, work: torch.dtype, recompute: bool) -> Tensor:
    """Return the last hidden states [U, H] of the needed tokens of `layout`, with products in the dtype `work`.

    With `recompute` the backward pass computes each block again from its input, instead of keeping what it needs of it.
    """
    x = model.model.embed_tokens(layout.ids)  # [S, H]
    angles = [table[0].float() for table in model.model.rotary_emb(x, layout.positions[None])]  # cos, sin: [S, D]
    layers = list(model.model.layers)
    heads = len(layers[0].self_attn.k_proj.weight) // layers[0].self_attn.head_dim
    attend = Attention(heads, angles, layout.attending, None, work)
    for layer in layers:
        attention, mlp = layer.self_attn, layer.mlp
        if layer is layers[-1]:
            attend = Attention(heads, angles, layout.attending_last, layout.needed, work)
        modules = [attention.q_proj, attention.k_proj, attention.v_proj, attention.o_proj]
        x = with_residual(attend, x, layer.input_layernorm, modules, work, recompute)
        modules = [mlp.gate_proj, mlp.up_proj, mlp.down_proj]
        x = with_residual(Mlp(), x, layer.post_attention_layernorm, modules, work, recompute)
    return cast(Tensor, model.model.norm(x))


# --- linear layers ----------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class LinearSpec:
    """A linear layer: the indices of its tensors in a list, None where it has none, and how its adapter acts."""

    weight: int
    bias: int | None = None
    a: int | None = None
    b: int | None = None
    scale: float = 0.0
    dropout: float = 0.0


def tensors_of(modules: Sequence[nn.Module], work: torch.dtype) -> tuple[list[LinearSpec], list[Tensor]]:
    """Return the linear layers with the indices of their tensors, and these tensors, a shared A once."""
    tensors: list[Tensor] = []

    def index_of(tensor: Any) -> int:
        for index, known in enumerate(tensors):
            if known is tensor:
                return index
        tensors.append(tensor)
        return len(tensors) - 1

    specs = []
    for module in modules:
        weight16 = module.weight16 if isinstance(module, Frozen) and work is torch.bfloat16 else None
        weight = index_of(module.weight if weight16 is None else weight16)
        bias = None if module.bias is None else index_of(module.bias)
        if isinstance(module, LoraLinear) and module.enabled:
            dropout = module.dropout if module.training else 0.0
            specs.append(
                LinearSpec(weight, bias, index_of(module.lora_A), index_of(module.lora_B), module.scale, dropout)
            )
        else:
            specs.append(LinearSpec(weight, bias))
    return specs, tensors


class Linears:
    """Linear layers with their adapters, y = x W^T + b + scale (x A^T) B^T, and the gradients of their tensors."""

    def __init__(
        self, specs: Sequence[LinearSpec], tensors: Sequence[Tensor], needed: Sequence[bool], work: torch.dtype
    ):
        self.specs, self.needed = specs, needed
        self.tensors = [tensor.to(work) for tensor in tensors]
        self.gradients: list[Tensor | None] = [None] * len(tensors)
        # By A: scale (x A^T) [S, R], and where there is dropout what x was multiplied by, 0 or 1 / (1 - dropout).
        self.low: dict[int, Tensor] = {}
        self.kept: dict[int, Tensor] = {}

    def saved(self) -> list[Tensor]:
        """Return what the backward pass needs besides the input of each product: `low` and `kept`."""
        return [*self.low.values(), *self.kept.values()]

    def restore(self, saved: Iterator[Tensor]) -> None:
        """Take back what `saved` returned."""
        dropout = {spec.a: spec.dropout for spec in self.specs if spec.a is not None}
        self.low = {a: next(saved) for a in dropout}
        self.kept = {a: next(saved) for a in dropout if dropout[a]}

    def forward(self, x: Tensor, layers: slice) -> list[Tensor]:
        """Return x [S, I] through each of some of the layers: [S, O] each."""
        found = []
        for spec in self.specs[layers]:
            weight = self.tensors[spec.weight].t()
            y = x @ weight if spec.bias is None else torch.addmm(self.tensors[spec.bias], x, weight)
            if spec.a is not None and spec.b is not None:
                if spec.a not in self.low:
                    if spec.dropout:
                        share = torch.full_like(x, 1 - spec.dropout)
                        self.kept[spec.a] = torch.bernoulli(share).div_(share)
                    self.low[spec.a] = (self._dropped(x, spec.a) @ self.tensors[spec.a].t()).mul_(spec.scale)
                y.addmm_(self.low[spec.a], self.tensors[spec.b].t())
            found.append(y)
        return found

    def backward(self, x: Tensor, grads: Sequence[Tensor], layers: slice) -> Tensor:
        """Return the gradient of x [S, I] from those of the outputs, [S, O] each.

        Those of the tensors are put into `gradients`.
        """
        dx: Tensor | None = None
        low: dict[int, Tensor] = {}
        for spec, dy in zip(self.specs[layers], grads, strict=True):
            weight = self.tensors[spec.weight]
            dx = dy @ weight if dx is None else dx.addmm_(dy, weight)
            if self.needed[spec.weight]:
                self.gradients[spec.weight] = dy.t() @ x
            if spec.bias is not None and self.needed[spec.bias]:
                self.gradients[spec.bias] = dy.sum(0)
            if spec.a is not None and spec.b is not None:
                b = self.tensors[spec.b]
                self.gradients[spec.b] = dy.t() @ self.low[spec.a]
                low[spec.a] = low[spec.a].addmm_(dy, b) if spec.a in low else dy @ b
        assert dx is not None, "no layers"
        scales = {spec.a: spec.scale for spec in self.specs}
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


# --- a sublayer -------------------------------------------------------------------------------------------------------


class Sublayer(Protocol):
    """What a sublayer of a block does between its norm and its residual."""

    def forward(self, h: Tensor, linears: Linears) -> list[Tensor]:
        """Return [the output, what else the backward pass needs ...] for normalized input h [S, H]."""

    def backward(self, dy: Tensor, h: Tensor, linears: Linears, saved: Sequence[Tensor]) -> Tensor:
        """Return the gradient of h from that of the output, with what `forward` returned after it."""

    @property
    def queries(self) -> Tensor | None:
        """The tokens that have an output, int64 [U]; None for all."""


def with_residual(
    sublayer: Sublayer, x: Tensor, norm: Any, modules: Sequence[nn.Module], work: torch.dtype, recompute: bool
) -> Tensor:
    """Return x + sublayer(norm(x)) [U, H] for x [S, H]."""
    specs, tensors = tensors_of(modules, work)
    settings = Settings(sublayer, specs, norm.variance_epsilon, work, recompute)
    return cast(Tensor, ResidualSublayer.apply(settings, x, norm.weight, *tensors))  # type: ignore[no-untyped-call]


@dataclass(frozen=True)
class Settings:
    """All of a sublayer that is no tensor of the model."""

    sublayer: Sublayer
    specs: Sequence[LinearSpec]
    epsilon: float
    work: torch.dtype
    recompute: bool


class ResidualSublayer(torch.autograd.Function):
    """x + sublayer(norm(x)) of x [S, H] in the residual stream's dtype, the norm's gain [H] and the layers' tensors."""

    @staticmethod
    def forward(ctx: Any, settings: Settings, x: Tensor, gain: Tensor, *tensors: Tensor) -> Tensor:
        ctx.settings, ctx.random = settings, torch.get_rng_state() if settings.recompute else None
        linears = Linears(settings.specs, tensors, (), settings.work)
        root = inverse_rms(x, settings.epsilon)
        y, *saved = settings.sublayer.forward(rms_norm(x, root, gain, settings.work), linears)
        ctx.save_for_backward(x, root, gain, *tensors, *(() if settings.recompute else (*linears.saved(), *saved)))
        return y + (x if settings.sublayer.queries is None else x[settings.sublayer.queries])

    @staticmethod
    def backward(ctx: Any, *gradients: Tensor) -> tuple[Tensor | None, ...]:
        (upstream,), settings, sublayer = gradients, ctx.settings, ctx.settings.sublayer
        saved = iter(ctx.saved_tensors)
        x, root, gain = next(saved), next(saved), next(saved)
        tensors = [next(saved) for _ in ctx.needs_input_grad[3:]]
        linears = Linears(settings.specs, tensors, ctx.needs_input_grad[3:], settings.work)
        h = rms_norm(x, root, gain, settings.work)
        if settings.recompute:
            with torch.random.fork_rng(devices=[]):
                torch.set_rng_state(ctx.random)  # so that dropout is the same
                _, *kept = sublayer.forward(h, linears)
        else:
            linears.restore(saved)
            kept = list(saved)
        dh = sublayer.backward(upstream.to(settings.work), h, linears, kept)
        if sublayer.queries is not None:
            upstream = torch.zeros_like(x).index_copy_(0, sublayer.queries, upstream)
        dx, dgain = rms_norm_backward(dh, x, root, gain, upstream, ctx.needs_input_grad[2])
        pairs = zip(linears.gradients, tensors, strict=True)
        return None, dx, dgain, *(None if grad is None else grad.to(tensor.dtype) for grad, tensor in pairs)


def inverse_rms(x: Tensor, epsilon: float) -> Tensor:
    """Return 1 / sqrt(mean(x^2) + epsilon) of each row of x [..., H], float32 [..., 1]."""
    square: Tensor = torch.linalg.vector_norm(x, dim=-1, keepdim=True, dtype=torch.float32).square_()  # one pass
    return square.div_(x.shape[-1]).add_(epsilon).rsqrt_()


def rms_norm(x: Tensor, root: Tensor, gain: Tensor, work: torch.dtype) -> Tensor:
    """Return RMSNorm of x [..., H] in the dtype `work`, for its `inverse_rms`."""
    return (x * root).to(x.dtype).mul_(gain).to(work)


def rms_norm_backward(
    dh: Tensor, x: Tensor, root: Tensor, gain: Tensor, residual: Tensor, gain_too: bool
) -> tuple[Tensor, Tensor | None]:
    """Return the gradients of x, `residual` added, and of the gain [H] if asked, for the gradient dh [S, H]."""
    dh, x = dh.float(), x.float()
    dgain = (dh * x).mul_(root).sum(0).to(gain.dtype) if gain_too else None
    dnormed = dh * gain
    # dx = root dnormed - x (x . dnormed) root^3 / H
    along = (dnormed * x).sum(1, keepdim=True).mul_(root**3 / x.shape[1])
    dx = torch.addcmul(residual.float(), dnormed, root).addcmul_(x, along, value=-1)
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
        dgated = linears.backward(silu * up, [dy], slice(2, 3))
        dup = silu.mul_(dgated)
        dgate = torch.ops.aten.silu_backward(dgated.mul_(up), gate)
        return linears.backward(h, [dgate, dup], slice(0, 2))


# --- attention --------------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class HeadGroup:
    """An AttentionGroup's tokens as rows of [S K, ...], where each token has a row for each key/value head.

    One index_select takes all that a group multiplies, in the order head, block, token. Query heads that share keys
    stand below each other, so that one product serves all of them. query_rows are int64 [K P n], key_rows [K P m];
    bias [P, n, 1, m] is as in AttentionGroup, in the dtype of the scores.
    """

    query_rows: Tensor
    key_rows: Tensor
    bias: Tensor
    spans: tuple[tuple[int, int, int, int], ...]

    @staticmethod
    def of(group: AttentionGroup, heads: int, work: torch.dtype) -> HeadGroup:
        """Return the group for so many key/value heads and scores in the dtype `work`."""
        each = torch.arange(heads)[:, None]
        rows = [(places * heads + each).flatten() for places in (group.queries, group.keys)]
        return HeadGroup(rows[0], rows[1], group.bias.to(work), group.spans)

    def queries(self, x: Tensor, heads: int, width: int) -> Tensor:
        """Return x [U, K G W] of the queries as [K P, n G, W]."""
        return x.view(len(x) * heads, -1).index_select(0, self.query_rows).view(heads * len(self.bias), -1, width)

    def keys(self, x: Tensor, heads: int) -> Tensor:
        """Return x [S, K D] of the keys as [K P, m, D]."""
        rows = x.view(len(x) * heads, -1).index_select(0, self.key_rows)
        return rows.view(heads * len(self.bias), -1, rows.shape[1])

    def weights(self, queries: Tensor, keys: Tensor) -> Tensor:
        """Return the attention weights [K P, n G, m] of scaled queries [K P, n G, D] over keys [K P, m, D]."""
        scores = queries @ keys.transpose(1, 2)
        count, n, _, m = self.bias.shape
        scores.view(-1, count, n, scores.shape[1] // n, m).add_(self.bias)
        return torch.softmax(scores, -1)

    def add_to(self, total: Tensor, grad: Tensor, heads: int) -> None:
        """Add the gradients of the keys, grad [K P, m, D], to those of their tokens, total [S, K D]."""
        each = grad.view(heads, len(self.bias), *grad.shape[1:])
        tokens = total.view(len(total), heads, -1).transpose(0, 1)
        for block, first, start, end in self.spans:
            tokens[:, start:end] += each[:, block, first : first + end - start]


class Attention:
    """o(softmax(rope(q(h)) rope(k(h))^T) v(h)) within each row; the layers are q, k, v and o.

    Products are in the dtype of h; RoPE, the softmax and its gradient are computed in float32. `queries` int64 [U] are
    the tokens that have an output, `heads` is how many keys a token has. Nothing here depends on a layer: all with the
    same queries share one Attention.
    """

    def __init__(
        self,
        heads: int,
        angles: Sequence[Tensor],
        attending: AttentionLayout,
        queries: Tensor | None,
        work: torch.dtype,
    ) -> None:
        self.heads, self.queries, self.width = heads, queries, angles[0].shape[1]
        # Both halves of a head are rotated by the same angles: [S, 1, 1, D / 2]. Scores are divided by sqrt(D) here.
        self.angles = [table[:, None, None, : self.width // 2] for table in angles]
        mine = self.angles if queries is None else [table[queries] for table in self.angles]
        self.angles_q = [table * self.width**-0.5 for table in mine]
        self.groups = [HeadGroup.of(group, self.heads, work) for group in attending.groups]
        # int64 [U K]: the row of each query and head among the outputs [K P n, G D] of all groups, one after another.
        place, begin = torch.empty(len(attending.place), self.heads, dtype=torch.int64), 0
        for group in attending.groups:
            end = begin + len(group.queries)
            here = (attending.place >= begin) & (attending.place < end)
            first = heads * begin + torch.arange(heads) * (end - begin)
            place[here] = (attending.place[here] - begin)[:, None] + first
            begin = end
        self.place = place.flatten()

    def forward(self, h: Tensor, linears: Linears) -> list[Tensor]:
        """Return the output [U, H], then what `backward` needs."""
        q, k, v = linears.forward(h, slice(0, 3))
        q = rotated(q if self.queries is None else q[self.queries], *self.angles_q)  # [U, K G D]
        k = rotated(k, *self.angles)  # [S, K D]
        attended = [self._weights(q, k, group) @ group.keys(v, self.heads) for group in self.groups]
        out = self._in_order(attended)  # [U, K G D]
        (y,) = linears.forward(out, slice(3, 4))
        return [y, q, k, v, out]

    def backward(self, dy: Tensor, h: Tensor, linears: Linears, saved: Sequence[Tensor]) -> Tensor:
        """Return the gradient of h [S, H] for that of the output [U, H]."""
        (q, k, v, out), heads = saved, self.heads
        dout = linears.backward(out, [dy], slice(3, 4))
        # Through the softmax: dS = P (dP - rowsum(P dP)), and rowsum(P dP) = dO . O (Dao et al., 2022, appendix B.2).
        along = (dout.float() * out).view(len(out), -1, self.width).sum(-1)  # [U, K G]
        dk, dv = torch.zeros(k.shape), torch.zeros(v.shape)  # pieces add up in float32
        dqs = []
        for group in self.groups:
            weights = self._weights(q, k, group)  # [K P, n G, m]
            dattended = group.queries(dout, heads, self.width)  # [K P, n G, D]
            group.add_to(dv, weights.transpose(1, 2) @ dattended, heads)
            scores = (dattended @ group.keys(v, heads).transpose(1, 2)).float()  # dP, then dS
            scores = scores.sub_(group.queries(along, heads, 1)).mul_(weights).to(h.dtype)
            dqs.append(scores @ group.keys(k, heads))
            group.add_to(dk, scores.transpose(1, 2) @ group.queries(q, heads, self.width), heads)
        # The derivative of a rotation is the rotation back.
        dq = rotated(self._in_order(dqs), self.angles_q[0], -self.angles_q[1])
        if self.queries is not None:
            dq = dq.new_zeros(len(h), dq.shape[1]).index_copy_(0, self.queries, dq)
        dk = rotated(dk, self.angles[0], -self.angles[1])
        return linears.backward(h, [dq, dk.to(h.dtype), dv.to(h.dtype)], slice(0, 3))

    def _weights(self, q: Tensor, k: Tensor, group: HeadGroup) -> Tensor:
        return group.weights(group.queries(q, self.heads, self.width), group.keys(k, self.heads))

    def _in_order(self, found: Sequence[Tensor]) -> Tensor:
        """Return what was found for the queries of each group, [K P, n G, D], as [U, K G D]."""
        rows = [each.view(len(group.query_rows), -1) for each, group in zip(found, self.groups, strict=True)]
        every = rows[0] if len(rows) == 1 else torch.cat(rows)
        return every.index_select(0, self.place).view(len(self.place) // self.heads, -1)


def rotated(x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
    """Return x [S, heads D] with rotary embeddings applied, in its dtype, for float32 cos and sin [S, 1, 1, D / 2]."""
    wide = x.float().view(len(x), -1, 2, cos.shape[-1])
    out = wide * cos
    out[:, :, 0].addcmul_(wide[:, :, 1], sin[:, :, 0], value=-1)
    out[:, :, 1].addcmul_(wide[:, :, 0], sin[:, :, 0])
    return out.view(x.shape).to(x.dtype)
