"""A double of `ttml.core`: gradient clipping and, in `distributed`, what concerns several devices."""

from __future__ import annotations

import torch
import ttnn

from . import _distributed as distributed
from . import _strict
from ._parameters import NamedParameters
from .autograd import Tensor, create_tensor

__all__ = ["clip_grad_norm", "distributed"]


@_strict.bound
def clip_grad_norm(
    parameters: NamedParameters, max_norm: float, p_norm_type: float = 2.0, error_if_nonfinite: bool = False
) -> Tensor:
    """Scale the gradients of everything that requires them; returns the norm before the scaling.

    Each device has a norm of its own. Norm and factor are bf16, so that the clip is exact to 0.4 % only.
    """
    _strict.member("parameters", parameters, NamedParameters)
    _strict.boolean("error_if_nonfinite", error_if_nonfinite)
    limit, order = _strict.number("max_norm", max_norm), _strict.number("p_norm_type", p_norm_type)
    tensors = [t for t in parameters.values() if t.get_requires_grad() and t.is_grad_initialized()]
    norms = [t.get_grad().data.flatten(1).float().norm(order, dim=1) for t in tensors]
    norm = torch.stack(norms).norm(order, dim=0).bfloat16()  # [devices]
    if error_if_nonfinite and not norm.isfinite().all():
        raise ttnn.fatal("The total norm of gradients is non-finite, so it cannot be clipped.")
    factor = (limit / (norm.float() + 1e-6)).bfloat16().clamp(max=1.0)
    for tensor in tensors:
        gradient = tensor.get_grad()
        scaled = gradient.data * factor.view(-1, *[1] * (gradient.data.dim() - 1))
        tensor.set_grad(ttnn.Tensor(scaled, gradient.layout, gradient.tensor_topology()))
    return create_tensor(ttnn.Tensor(norm.unsqueeze(1)))
