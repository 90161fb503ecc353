"""The matrix products that a step of ours cannot do without, and how fast this machine multiplies at their shapes.

A step that took no longer than these products would be at its floor: each weight once forward and once for the gradient
of its input, once more where it is trained, the adapters' own products, the attention of each piece of a row, and the
head over the supervised positions.
"""

from __future__ import annotations

import time
from collections import Counter
from collections.abc import Iterator
from typing import Any

import torch

from common.data.tokens import Batch
from engines.cpu import blocks, cross_entropy, ragged

Product = tuple[int, int, int, int]  # how many at once; [m, k] @ [k, n]


def products_of(backend: Any, batch: Batch) -> Counter[Product]:
    """Return how often each product is needed, for one micro-batch of a backend on the CPU."""
    model, layout = backend.model, ragged.lay_out(batch)
    found: Counter[Product] = Counter()
    layers = list(model.model.layers)
    # Without the tokens that only fill; attention is counted as it is filled up, whose products are small.
    everyone = max(span[-1] for group in layout.attending.groups for span in group.spans)
    for layer in layers:
        needed = int(layout.place.max()) + 1 if layer is layers[-1] else everyone
        attention, mlp = layer.self_attn, layer.mlp
        found.update(of_linears([attention.q_proj], needed))
        found.update(of_linears([attention.k_proj, attention.v_proj], everyone))
        found.update(of_linears([attention.o_proj], needed))
        found.update(of_linears([mlp.gate_proj, mlp.up_proj], needed))
        found.update(of_linears([mlp.down_proj], needed))
        keys = len(attention.k_proj.weight)
        heads, groups = keys // attention.head_dim, len(attention.q_proj.weight) // keys
        for group in (layout.attending_last if layer is layers[-1] else layout.attending).groups:
            count, n, _, m = group.bias.shape
            b, n, width = heads * count, n * groups, attention.head_dim
            # Scores and their gradient's two; then the same of weights times values.
            found.update(2 * [(b, n, width, m), (b, n, m, width), (b, m, n, width)])
    found.update(of_head(model.lm_head.weight, len(layout.labels)))
    return found


def of_linears(modules: list[Any], tokens: int) -> Iterator[Product]:
    """Yield the products of linear layers with one input of `tokens` rows, forward and backward."""
    linears, tensors = blocks.tensors_of(modules, torch.float32)
    for layer in linears:
        outs, ins = tensors[layer.weight].shape
        yield 1, tokens, ins, outs
        yield 1, tokens, outs, ins
        if tensors[layer.weight].requires_grad:
            yield 1, outs, tokens, ins
        if layer.b is not None:
            rank = tensors[layer.b].shape[1]
            yield from ((1, tokens, rank, outs), (1, tokens, outs, rank), (1, outs, tokens, rank))
    for rank, ins in {layer.a: tensors[layer.a].shape for layer in linears if layer.a is not None}.values():
        yield from ((1, tokens, ins, rank), (1, tokens, rank, ins), (1, rank, tokens, ins))


def of_head(weight: torch.Tensor, rows: int) -> Iterator[Product]:
    """Yield the products of a head [V, H], in the chunks of `rows` and blocks of V in which they are made."""
    (vocabulary, hidden), chunk = weight.shape, cross_entropy.chunk_of(weight)
    for start in range(0, rows, chunk):
        for first in range(0, vocabulary, cross_entropy.BLOCK):
            m, n = min(chunk, rows - start), min(cross_entropy.BLOCK, vocabulary - first)
            yield from ((1, m, hidden, n), (1, m, n, hidden))
            if weight.requires_grad:
                yield 1, n, m, hidden


def gflop(products: Counter[Product]) -> float:
    """Return the arithmetic of all products together, in 1e9 operations; a multiplication and an addition are two."""
    return sum(2e-9 * count * b * m * k * n for (b, m, k, n), count in products.items())


def seconds(products: Counter[Product], dtype: torch.dtype, times: int = 5) -> float:
    """Return how long all products take one after the other: each measured `times` times, the best one counted."""
    total = 0.0
    for (b, m, k, n), count in products.items():
        left, right = torch.randn(b, m, k).to(dtype), torch.randn(b, k, n).to(dtype)
        if b == 1:
            left, right = left[0], right[0]
        taken = []
        for _ in range(times + 1):  # the first makes the kernel
            started = time.perf_counter()
            torch.matmul(left, right)
            taken.append(time.perf_counter() - started)
        total += count * min(taken[1:])
    return total
