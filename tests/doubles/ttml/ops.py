"""A double of `ttml.ops`: the namespaces under which the operations of `_ops` are found."""

from __future__ import annotations

from types import SimpleNamespace

from . import _ops, _strict
from ._ops import ReduceType

__all__ = [
    "ReduceType",
    "attention",
    "binary",
    "dropout",
    "embedding",
    "linear",
    "loss",
    "rmsnorm",
    "rope",
    "swiglu",
    "unary",
]

loss = SimpleNamespace(cross_entropy_loss=_ops.cross_entropy_loss)
binary = SimpleNamespace(add=_ops.add, sub=_ops.sub, mul=_ops.mul, div=_ops.div)
unary = SimpleNamespace(mean=_ops.mean, silu=_ops.silu)
linear = SimpleNamespace(linear=_ops.linear)
embedding = SimpleNamespace(embedding=_ops.embedding)
swiglu = SimpleNamespace(swiglu=_ops.swiglu)
rmsnorm = SimpleNamespace(rmsnorm=_ops.rmsnorm)
dropout = SimpleNamespace(dropout=_ops.dropout)
attention = SimpleNamespace(scaled_dot_product_attention=_ops.scaled_dot_product_attention)
rope = SimpleNamespace(
    RopeScalingParams=_ops.RopeScalingParams, build_rope_params=_ops.build_rope_params, rope=_ops.rope
)

for _namespace in (loss, binary, unary, linear, embedding, swiglu, rmsnorm, dropout, attention, rope):
    _strict.bound(_namespace)
