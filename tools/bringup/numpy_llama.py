"""What a Llama computes, and the gradients of its loss, in numpy's float64.

Written down once more and shared with no engine: a board's image has no torch, and an engine cannot be the judge of
itself. Every operation has its derivative next to it, as a function that `Tape.back` calls in reverse order.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping
from typing import Any

import numpy as np

from common.data.tokens import Batch
from common.model import llama
from engines.ttml.limits import rope_of

Array = np.ndarray[Any, Any]


def logits(weights: Mapping[str, Array], architecture: Mapping[str, Any], ids: Array) -> Array:
    """Return [B, T, V] of ids [B, T]: Llama (Touvron et al., 2023) in Hugging Face's layout, causal."""
    tape = Tape(weights)
    return _forward(tape, architecture, ids).value


def nll(weights: Mapping[str, Array], architecture: Mapping[str, Any], batch: Batch) -> Array:
    """Return -log p(label) of every position, [B, T], in nats."""
    found = logits(weights, architecture, batch.input_ids)
    top = found.max(axis=-1, keepdims=True)
    log_sum = top[..., 0] + np.log(np.exp(found - top).sum(axis=-1))
    chosen: Array = np.take_along_axis(found, batch.labels[..., None].astype(np.int64), axis=-1)[..., 0]
    per_token: Array = log_sum - chosen
    return per_token


def loss(weights: Mapping[str, Array], architecture: Mapping[str, Any], batch: Batch) -> float:
    """Return sum(mask x nll) / sum(mask)."""
    return float((nll(weights, architecture, batch) * batch.loss_mask).sum() / batch.loss_mask.sum())


def gradient(weights: Mapping[str, Array], architecture: Mapping[str, Any], batch: Batch) -> dict[str, Array]:
    """Return the derivative of `loss` by every weight, by its name."""
    tape = Tape(weights)
    found = _forward(tape, architecture, batch.input_ids)
    wanted = np.arange(found.value.shape[-1]) == batch.labels[..., None]
    found.slope += (_softmax(found.value) - wanted) * (batch.loss_mask / batch.loss_mask.sum())[..., None]
    tape.back()
    return {name: node.slope for name, node in tape.weights.items()}


class Node:
    """A value, and the derivative of the loss by it, which what uses the value adds to."""

    def __init__(self, value: Array) -> None:
        self.value, self.slope = value, np.zeros(value.shape)


class Tape:
    """Operations in their order, each with what it does to the slopes of its inputs."""

    def __init__(self, weights: Mapping[str, Array]) -> None:
        self.weights = {name: Node(value) for name, value in weights.items()}
        self._steps: list[tuple[Node, Callable[[Array], None]]] = []

    def put(self, value: Array, back: Callable[[Array], None]) -> Node:
        """Return a node of `value`; `back` gets its slope."""
        node = Node(value)
        self._steps.append((node, back))
        return node

    def back(self) -> None:
        for node, back in reversed(self._steps):
            back(node.slope)

    # --- operations: x [B, T, width], weights [out, in] ---

    def embedding(self, ids: Array, table: Node) -> Node:
        return self.put(table.value[ids], lambda slope: np.add.at(table.slope, ids, slope))

    def linear(self, x: Node, weight: Node) -> Node:
        def back(slope: Array) -> None:
            x.slope += slope @ weight.value
            weight.slope += slope.reshape(-1, slope.shape[-1]).T @ x.value.reshape(-1, x.value.shape[-1])

        return self.put(x.value @ weight.value.T, back)

    def add(self, x: Node, y: Node) -> Node:
        def back(slope: Array) -> None:
            x.slope += slope
            y.slope += slope

        return self.put(x.value + y.value, back)

    def norm(self, x: Node, gain: Node, epsilon: float) -> Node:
        """RMSNorm (Zhang and Sennrich, 2019)."""
        scale = 1 / np.sqrt((x.value * x.value).mean(axis=-1, keepdims=True) + epsilon)

        def back(slope: Array) -> None:
            gain.slope += (slope * x.value * scale).sum(axis=(0, 1))
            inner = slope * gain.value
            along = (inner * x.value).mean(axis=-1, keepdims=True)
            x.slope += scale * (inner - x.value * scale**2 * along)

        return self.put(x.value * scale * gain.value, back)

    def gated(self, gate: Node, up: Node) -> Node:
        """SwiGLU's middle (Shazeer, 2020): silu(gate) x up."""
        open_ = 1 / (1 + np.exp(-gate.value))

        def back(slope: Array) -> None:
            gate.slope += slope * up.value * open_ * (1 + gate.value * (1 - open_))
            up.slope += slope * gate.value * open_

        return self.put(gate.value * open_ * up.value, back)

    def heads(self, x: Node, head: int) -> Node:
        """[B, T, heads x head] to [B, heads, T, head]."""

        def back(slope: Array) -> None:
            x.slope += slope.swapaxes(1, 2).reshape(x.value.shape)

        rows, width = x.value.shape[:2]
        return self.put(x.value.reshape(rows, width, -1, head).swapaxes(1, 2), back)

    def turned(self, x: Node, cos: Array, sin: Array) -> Node:
        """RoPE: turn element j of a head together with j + d/2, as Hugging Face does; back is the other way round."""

        def back(slope: Array) -> None:
            x.slope += _turn(slope, cos, -sin)

        return self.put(_turn(x.value, cos, sin), back)

    def attention(self, query: Node, key: Node, value: Node) -> Node:
        """Causal attention; query [B, heads, T, head], of which several share a head of key and value. To [B, T, :]."""
        rows, heads, width, head = query.value.shape
        shape = (rows, key.value.shape[1], -1, width, head)  # each head of keys with the queries that share it
        q, k, v = query.value.reshape(shape), key.value[:, :, None], value.value[:, :, None]
        later = np.triu(np.full((width, width), -np.inf), 1)
        shares = _softmax(q @ k.swapaxes(-1, -2) / math.sqrt(head) + later)

        def back(slope: Array) -> None:
            out = slope.reshape(rows, width, heads, head).swapaxes(1, 2).reshape(shape)
            value.slope += (shares.swapaxes(-1, -2) @ out).sum(axis=2)
            scores = out @ v.swapaxes(-1, -2)
            scores = shares * (scores - (shares * scores).sum(axis=-1, keepdims=True)) / math.sqrt(head)
            query.slope += (scores @ k).reshape(query.value.shape)
            key.slope += (scores.swapaxes(-1, -2) @ q).sum(axis=2)

        return self.put((shares @ v).reshape(rows, heads, width, head).swapaxes(1, 2).reshape(rows, width, -1), back)


def _forward(tape: Tape, architecture: Mapping[str, Any], ids: Array) -> Node:
    """Return the logits as the last node of `tape`."""
    weights, epsilon = tape.weights, architecture["rms_norm_eps"]
    head = architecture["hidden_size"] // architecture["num_attention_heads"]
    turn = rotation(architecture, ids.shape[1])
    x = tape.embedding(ids, weights[llama.EMBEDDING])
    for layer in range(architecture["num_hidden_layers"]):
        at = {name.split(".")[-2]: node for name, node in weights.items() if f".layers.{layer}." in name}
        y = tape.norm(x, at["input_layernorm"], epsilon)
        query, key, value = (tape.heads(tape.linear(y, at[f"{name}_proj"]), head) for name in "qkv")
        attended = tape.attention(tape.turned(query, *turn), tape.turned(key, *turn), value)
        x = tape.add(x, tape.linear(attended, at["o_proj"]))
        y = tape.norm(x, at["post_attention_layernorm"], epsilon)
        gated = tape.gated(tape.linear(y, at["gate_proj"]), tape.linear(y, at["up_proj"]))
        x = tape.add(x, tape.linear(gated, at["down_proj"]))
    last = llama.EMBEDDING if architecture["tie_word_embeddings"] else llama.HEAD
    return tape.linear(tape.norm(x, weights[llama.FINAL_NORM], epsilon), weights[last])


def rotation(architecture: Mapping[str, Any], width: int) -> tuple[Array, Array]:
    """Return cos and sin [T, head_dim / 2] of RoPE (Su et al., 2021), stretched as Llama 3's config.json says.

    Llama 3: frequencies that turn fewer than low_freq_factor times in the original context are divided by the factor,
    those of more than high_freq_factor stay, and between the two they are blended linearly in the number of turns.
    """
    rope, head = rope_of(architecture), architecture["hidden_size"] // architecture["num_attention_heads"]
    frequency = rope["rope_theta"] ** -(np.arange(0, head, 2) / head)
    if rope["rope_type"] == "llama3":
        turns = rope["original_max_position_embeddings"] * frequency / (2 * math.pi)
        low, high = rope["low_freq_factor"], rope["high_freq_factor"]
        kept = np.clip((turns - low) / (high - low), 0, 1)
        frequency = frequency * (kept + (1 - kept) / rope["factor"])
    angle = np.arange(width)[:, None] * frequency
    return np.cos(angle), np.sin(angle)


def _turn(x: Array, cos: Array, sin: Array) -> Array:
    first, second = np.split(x, 2, axis=-1)
    return np.concatenate([first * cos - second * sin, second * cos + first * sin], axis=-1)


def _softmax(x: Array) -> Array:
    powers: Array = np.exp(x - x.max(axis=-1, keepdims=True))
    shares: Array = powers / powers.sum(axis=-1, keepdims=True)
    return shares
