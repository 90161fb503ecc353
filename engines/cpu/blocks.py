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
from transformers import LlamaForCausalLM

from engines.cpu.lora import Frozen, LoraLinear
from engines.cpu.ragged import AttentionGroup, AttentionLayout, Layout

# Shapes: S tokens, U of them queries (all but in the last block), H hidden_size, R rank, K key/value heads, G query
# heads of each, D width of a head; P blocks of queries that are multiplied together, n queries and m keys of each.


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
class Attention:
    """o(softmax(rope(q(h)) rope(k(h))^T) v(h)) within each row; the layers are q, k, v and o.

    From RoPE to the values it is float32, whatever the other products are: products as small as these gain nothing
    by bf16, for which oneDNN compiles kernels for each length of a row. `cos` and `sin` are float32 [S, D]; `queries`
    int64 [U] are the tokens that have an output.
    """

    cos: Tensor
    sin: Tensor
    attending: AttentionLayout
    queries: Tensor | None
    width: int
    scaling: float

    def forward(self, h: Tensor, linears: Linears) -> list[Tensor]:
        """Return the output [U, H], then what `backward` needs."""
        q, k, v = linears.forward(h, slice(0, 3))
        cos, sin, cos_q, sin_q = self._angles()
        q = q if self.queries is None else q[self.queries]
        heads = k.shape[1] // self.width
        q = rotated(q.view(len(q), heads, -1, self.width), cos_q, sin_q)  # [K, U, G, D]
        k = rotated(k.view(len(k), heads, 1, self.width), cos, sin)[:, :, 0]  # [K, S, D]
        v = v.view(len(v), heads, self.width).transpose(0, 1).float().contiguous()  # [K, S, D]
        attended = [attention_weights(q, k, group) @ gathered(v, group.keys, group) for group in self.attending.groups]
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
            weights = attention_weights(q, k, group)  # [K P, n G, m]
            dattended = gathered(dout, group.queries, group)  # [K P, n G, D]
            scatter_add(dv, weights.transpose(1, 2) @ dattended, group)
            scores = dattended @ gathered(v, group.keys, group).transpose(1, 2)  # dP, then dS
            scores.sub_(gathered(along[..., None], group.queries, group)).mul_(weights)
            dqs.append(scores @ gathered(k, group.keys, group))
            scatter_add(dk, scores.transpose(1, 2) @ gathered(q, group.queries, group), group)
        dq = self._in_order(dqs, q)
        cos, sin, cos_q, sin_q = self._angles()
        # The derivative of a rotation is the rotation back.
        dq = rotated(dq, cos_q[:, None], -sin_q[:, None]).view(queries, -1).to(h.dtype)
        if self.queries is not None:
            dq = dq.new_zeros(len(h), dq.shape[1]).index_copy_(0, self.queries, dq)
        dk = rotated(dk[:, :, None], cos[:, None], -sin[:, None]).view(len(h), -1).to(h.dtype)
        dv = dv.transpose(0, 1).reshape(len(h), -1).to(h.dtype)
        return linears.backward(h, [dq, dk, dv], slice(0, 3))

    def _in_order(self, found: Sequence[Tensor], q: Tensor) -> Tensor:
        """Return what was found for the queries of each group, [K P, n G, D], as q [K, U, G, D] has them."""
        heads, _, groups, width = q.shape
        everyone = [each.view(heads, -1, groups, width) for each in found]
        return (everyone[0] if len(found) == 1 else torch.cat(everyone, dim=1))[:, self.attending.place]

    def _angles(self) -> tuple[Tensor, Tensor, Tensor, Tensor]:
        """Return cosines and sines of keys, [S, 1, D / 2] each, then of queries [U, 1, D / 2], scaling included."""
        # Both halves of a head are rotated by the same angles.
        cos, sin = (table[:, None, : self.width // 2] for table in (self.cos, self.sin))
        cos_q, sin_q = (table if self.queries is None else table[self.queries] for table in (cos, sin))
        return cos, sin, cos_q * self.scaling, sin_q * self.scaling


def rotated(x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
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


def gathered(x: Tensor, places: Tensor, group: AttentionGroup) -> Tensor:
    """Return x [K, S, ..., D] at `places` [P n] as one matrix [n ..., D] for each head and block: [K P, n ..., D].

    Query heads that share keys stand below each other, so that one product serves all of them.
    """
    return x.index_select(1, places).view(x.shape[0] * len(group.masked), -1, x.shape[-1])


def scatter_add(total: Tensor, grad: Tensor, group: AttentionGroup) -> None:
    """Add the gradients of the keys of a group, grad [K P, m, D], to those of their tokens, total [K, S, D]."""
    each = grad.view(len(total), len(group.masked), *grad.shape[1:])
    for block, first, start, end in group.spans:
        total[:, start:end] += each[:, block, first : first + end - start]


def attention_weights(q: Tensor, k: Tensor, group: AttentionGroup) -> Tensor:
    """Return the attention weights [K P, n G, m] of q [K, U, G, D], which is scaled, over k [K, S, D]."""
    scores = gathered(q, group.queries, group) @ gathered(k, group.keys, group).transpose(1, 2)
    count, n, _, m = group.masked.shape
    scores.view(len(q), count, n, -1, m).masked_fill_(group.masked, float("-inf"))
    return torch.softmax(scores, -1)
