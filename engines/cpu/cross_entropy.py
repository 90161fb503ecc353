"""The loss over a large vocabulary without ever holding all its logits.

Rows go through the head in chunks; each chunk's gradient with respect to the hidden states is made while its logits
are still in cache, so the backward pass has nothing left to compute but a scale. The idea is that of fused
linear-cross-entropy kernels (Hsu et al., 2024, "Liger Kernel"), here in plain torch for a CPU's caches.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

# Shapes: N supervised tokens, C of them in a chunk, H hidden_size, V rows of the vocabulary.

# Of fp32 logits at a time: 64 rows of a vocabulary of 49,152. Each chunk reads all of `weight` again, so few rows are
# slow; another number adds up in another order, and so changes the last bits of a training.
CHUNK_BYTES = 12_582_912


class LinearCrossEntropy(torch.autograd.Function):
    """The sum over rows of -log softmax(hidden @ weight.T)[label], in nats; differentiable in hidden and weight."""

    @staticmethod
    def forward(ctx: Any, hidden: Tensor, weight: Tensor, labels: Tensor) -> Tensor:
        """Return a float32 scalar for `hidden` [N, H] and `weight` [V, H] of one dtype, and `labels` int64 [N]."""
        ctx.weight_dtype = weight.dtype
        need_hidden, need_weight, _ = ctx.needs_input_grad
        # Autocast does not reach into a Function: one cast here, for all chunks.
        work = weight.to(hidden.dtype)
        grad_hidden = torch.empty_like(hidden) if need_hidden else None
        grad_weight = torch.zeros_like(weight, dtype=torch.float32) if need_weight else None  # chunks add up in fp32
        total = torch.zeros((), dtype=torch.float32)
        chunk = chunk_of(weight)
        for start in range(0, hidden.shape[0], chunk):
            rows, target = hidden[start : start + chunk], labels[start : start + chunk, None]  # [C, H], [C, 1]
            logits = (rows @ work.t()).float()  # [C, V]
            logits -= logits.amax(dim=1, keepdim=True)  # softmax is the same, and exp cannot overflow
            picked = logits.gather(1, target)  # [C, 1]; before the next line overwrites it
            weights = logits.exp_()  # in place, and once: both the loss and the softmax come of them
            totals = weights.sum(dim=1, keepdim=True)  # [C, 1]
            total += (totals.log() - picked).sum()
            if not (need_hidden or need_weight):  # under no_grad: the loss alone
                continue
            # d nll / d logits = softmax - one_hot(label)
            grad = weights.div_(totals)
            grad.scatter_add_(1, target, torch.full_like(target, -1, dtype=grad.dtype))
            grad = grad.to(hidden.dtype)
            if grad_hidden is not None:
                grad_hidden[start : start + chunk] = grad @ work  # [C, V] @ [V, H]
            if grad_weight is not None:
                grad_weight += (grad.t() @ rows).float()  # [V, C] @ [C, H]
        ctx.save_for_backward(grad_hidden, grad_weight)
        return total

    @staticmethod
    def backward(ctx: Any, *grad_outputs: Tensor) -> tuple[Tensor | None, Tensor | None, None]:
        (upstream,) = grad_outputs
        grad_hidden, grad_weight = ctx.saved_tensors
        # `upstream` is a scalar: 1 / the supervised tokens of the step (engine.py).
        hidden = None if grad_hidden is None else grad_hidden * upstream.to(grad_hidden.dtype)
        weight = None if grad_weight is None else (grad_weight * upstream).to(ctx.weight_dtype)
        return hidden, weight, None


def chunk_of(weight: Tensor) -> int:
    """Return C: how many rows' logits over `weight` [V, H] fill CHUNK_BYTES; at least 64."""
    return max(64, CHUNK_BYTES // (4 * weight.shape[0]))


def nll_rows(hidden: Tensor, weight: Tensor, labels: Tensor) -> Tensor:
    """Return -log softmax(hidden @ weight.T)[label] per row, float32 [N], without gradients."""
    parts, chunk = [], chunk_of(weight)
    for start in range(0, hidden.shape[0], chunk):
        logits = (hidden[start : start + chunk] @ weight.t()).float()
        picked = logits.gather(1, labels[start : start + chunk, None]).squeeze(1)
        parts.append(torch.logsumexp(logits, dim=1) - picked)
    return torch.cat(parts) if parts else torch.empty(0)
