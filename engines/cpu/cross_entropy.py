"""The loss over a large vocabulary without ever holding all its logits.

Hidden states go through the head in chunks of rows, and the vocabulary in blocks: what is done to logits after their
product is done while they are in cache. Their gradient with respect to the hidden states is made at once, so the
backward pass has nothing left to compute but a scale. The idea is that of fused linear-cross-entropy kernels (Hsu et
al., 2024, "Liger Kernel"), here in plain torch for a CPU's caches.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import torch
from torch import Tensor

# Shapes: N supervised tokens, C of them in a chunk, H hidden_size, V rows of the vocabulary, W of them in a block.

# Rows: each chunk reads all of `weight` again. On one core of an EPYC the fp32 products of a head of 49,152 by 576 ran
# at 52 and 76 GFLOPS (logits, then hidden states) with 64 rows at a time over the whole vocabulary, and at 87 and 97
# with 448 rows over blocks of 4,096; in bf16 at 151 and 141, and 195 and 194.
CHUNK_ROWS = 256
# Bytes of fp32 logits: so many rows more where a vocabulary is small. Another number adds up in another order, and so
# changes the last bits of a training.
CHUNK_BYTES = 12_582_912
BLOCK = 4096  # rows of the vocabulary


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
            softmax = Softmax(rows, work, target, keep=need_hidden or need_weight)
            total += softmax.nll().sum()
            grad_rows = torch.zeros_like(rows, dtype=torch.float32)  # blocks add up in fp32, too
            for first, grad in softmax.gradients():  # [C, W]
                block = slice(first, first + BLOCK)
                if need_hidden:
                    grad_rows += grad @ work[block]  # [C, W] @ [W, H]
                if grad_weight is not None:
                    grad_weight[block] += grad.t() @ rows  # [W, C] @ [C, H]
            if grad_hidden is not None:
                grad_hidden[start : start + chunk] = grad_rows
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


class Softmax:
    """softmax(rows @ weight.T) for rows [C, H] and labels `target` [C, 1], block after block of the vocabulary.

    Exponentials are taken against the largest logit so far, so that none overflows, and corrected by what it is in the
    end (Milakov and Gimelshein, 2018). `keep` holds them, C x V float32, for `gradients`.
    """

    def __init__(self, rows: Tensor, weight: Tensor, target: Tensor, keep: bool) -> None:
        self.target, self.dtype = target, rows.dtype
        count = rows.shape[0]
        self.top = torch.full((count, 1), float("-inf"))
        self.total = torch.zeros(count, 1)  # of exp(logit - top)
        self.picked = torch.zeros(count, 1)  # the label's logit, less the top when its block came
        self.picked_top = torch.zeros(count, 1)
        self.blocks: list[tuple[Tensor, Tensor]] = []  # exponentials [C, W], and the top that they were taken against
        for first in range(0, weight.shape[0], BLOCK):
            logits = (rows @ weight[first : first + BLOCK].t()).float()  # [C, W]
            top = torch.maximum(self.top, logits.amax(dim=1, keepdim=True))
            logits -= top
            here = self._labels_in(first, logits.shape[1])
            self.picked[here] = logits[here].gather(1, target[here] - first)
            self.picked_top[here] = top[here]
            exponentials = logits.exp_()  # in place, and once: both the loss and the softmax come of them
            self.total = self.total * (self.top - top).exp_() + exponentials.sum(dim=1, keepdim=True)
            self.top = top
            if keep:
                self.blocks.append((exponentials, top))

    def nll(self) -> Tensor:
        """Return -log of the label's probability, float32 [C]."""
        return (self.total.log() - (self.picked + (self.picked_top - self.top)))[:, 0]

    def gradients(self) -> Iterator[tuple[int, Tensor]]:
        """Yield each block's first word and the gradient [C, W] of `nll` by its logits: softmax - one_hot(label)."""
        for index, (exponentials, top) in enumerate(self.blocks):
            first = index * BLOCK
            grad = exponentials.div_(self.total * (self.top - top).exp_())
            here = self._labels_in(first, grad.shape[1])
            grad[here, self.target[here, 0] - first] -= 1
            yield first, grad.to(self.dtype)

    def _labels_in(self, first: int, count: int) -> Tensor:
        return ((self.target >= first) & (self.target < first + count))[:, 0].nonzero()[:, 0]


def chunk_of(weight: Tensor) -> int:
    """Return C: how many rows' logits over `weight` [V, H] fill CHUNK_BYTES; at least CHUNK_ROWS."""
    return max(CHUNK_ROWS, CHUNK_BYTES // (4 * weight.shape[0]))


def nll_rows(hidden: Tensor, weight: Tensor, labels: Tensor) -> Tensor:
    """Return -log softmax(hidden @ weight.T)[label] per row, float32 [N], without gradients."""
    parts, chunk = [torch.empty(0)], chunk_of(weight)
    for start in range(0, hidden.shape[0], chunk):
        at = slice(start, start + chunk)
        parts.append(Softmax(hidden[at], weight, labels[at, None], keep=False).nll())
    return torch.cat(parts)
