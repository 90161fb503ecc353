"""A Llama small enough for any machine, for checks of a device: its weights, its batches, and what it computes.

The arithmetic is numpy's in float64, written down once more and not shared with any engine: a board's image has no
torch, and an engine cannot be the judge of itself.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import Any

import ml_dtypes
import numpy as np

from common.config import Config
from common.data.tokens import Batch
from common.hardware import TILE, Hardware, round_up
from common.model import llama
from common.model.init import normal
from engines.ttml.limits import rope_of

Array = np.ndarray[Any, Any]
WIDTH = TILE  # tokens in a row
TOKENS = 300  # ids below this one are used
# Every size is whole tiles, as in real bases; several heads, of queries and of keys, so that their order shows.
ARCHITECTURE: dict[str, Any] = {
    "model_type": "llama",
    "vocab_size": 320,
    "hidden_size": 128,
    "intermediate_size": 160,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "max_position_embeddings": 128,
    "rope_theta": 10000.0,
    "rms_norm_eps": 1e-5,
    "hidden_act": "silu",
    "tie_word_embeddings": False,
}
PADDED_VOCABULARY = {**ARCHITECTURE, "vocab_size": TOKENS}  # no whole number of tiles
TIED = {**ARCHITECTURE, "tie_word_embeddings": True}
# Llama 3's RoPE, for so few positions that it turns the slower frequencies of this model.
ROPE = {"rope_type": "llama3", "factor": 8.0, "high_freq_factor": 4.0, "low_freq_factor": 1.0}
SCALED_ROPE = {**ARCHITECTURE, "rope_scaling": {**ROPE, "original_max_position_embeddings": 32}}


def config_for(hw: Hardware, mesh: tuple[int, int], **values: Any) -> Config:
    """Return the config of a full fine-tune of it on `mesh`; dotted keys with __ for the dot."""
    config = Config.model_validate(
        {
            "recipe": "a small Llama",
            "hw": hw.name,
            "training_config": {
                "batch_size": rows_for(math.prod(mesh)),
                "learning_rate": 1e-2,
                "max_steps": 10,
                "max_grad_norm": 0.0,
                "precision": "bf16",
            },
            "model_config": {"base": "a small Llama"},
            "data_config": {"source": "random tokens"},
            "eval_config": {"every": 0, "prompts": ["-"]},
            "checkpoint_config": {"every": 0},
            "device_config": {"mesh_shape": mesh},
        }
    )
    return config.with_values(**{key.replace("__", "."): value for key, value in values.items()})


def rows_for(devices: int) -> int:
    """Return the rows of a batch: at least 8, and as many on every device."""
    return round_up(8, devices)


def weights_for(architecture: Mapping[str, Any] = ARCHITECTURE, seed: int = 1) -> dict[str, Array]:
    """Return float32 by Hugging Face names. No two elements of a tensor are meant to be alike, gains included.

    A standard deviation of 0.1 gives attention scores of about 1.3 (0.1^2 x hidden_size): a wrong order of rows or a
    wrong rotation changes what is attended to.
    """
    found = {}
    for name, shape in llama.shapes(architecture).items():
        values = normal(seed, name, shape, 0.1)
        found[name] = values if len(shape) == 2 else 1 + values
    return found


def batch_of(rows: int = 8, seed: int = 0) -> Batch:
    """Return random tokens, a full tile wide. Row r has its first 2 + 3 (r mod 8) predictions unsupervised."""
    tokens = np.random.Generator(np.random.PCG64(seed)).integers(0, TOKENS, (rows, WIDTH + 1))
    starts = 2 + 3 * (np.arange(rows) % 8)
    mask = (np.arange(WIDTH) >= starts[:, None]).astype(np.float32)
    ids, labels = (np.ascontiguousarray(part, np.uint32) for part in (tokens[:, :-1], tokens[:, 1:]))
    return Batch(ids, labels, mask, np.arange(rows, dtype=np.int64))


def rounded(weights: Mapping[str, Array]) -> dict[str, Array]:
    """Return what a board stores of `weights`, bf16 to nearest even, as float64."""
    return {name: array.astype(ml_dtypes.bfloat16).astype(np.float64) for name, array in weights.items()}


# --- what it computes -----------------------------------------------------------------------------------------------


def logits(weights: Mapping[str, Array], architecture: Mapping[str, Any], ids: Array) -> Array:
    """Return [B, T, V] of ids [B, T]: Llama (Touvron et al., 2023) in Hugging Face's layout, causal."""
    heads, kv_heads = architecture["num_attention_heads"], architecture["num_key_value_heads"]
    rows, width = ids.shape
    head = architecture["hidden_size"] // heads
    turn = rotation(architecture, width)
    hidden_by_later = np.triu(np.full((width, width), -np.inf), 1)
    x = weights[llama.EMBEDDING][ids]
    for layer in range(architecture["num_hidden_layers"]):
        at = f"model.layers.{layer}."

        def linear(values: Array, name: str, at: str = at) -> Array:
            product: Array = values @ weights[f"{at}{name}.weight"].T
            return product

        y = _norm(x, weights[f"{at}input_layernorm.weight"])
        query, key, value = (
            linear(y, f"self_attn.{name}_proj").reshape(rows, width, -1, head).swapaxes(1, 2) for name in "qkv"
        )
        query, key = _turned(query, *turn), _turned(key, *turn)
        key, value = (np.repeat(part, heads // kv_heads, axis=1) for part in (key, value))
        scores = query @ key.swapaxes(-1, -2) / math.sqrt(head) + hidden_by_later
        attended = _softmax(scores) @ value
        x = x + linear(attended.swapaxes(1, 2).reshape(rows, width, -1), "self_attn.o_proj")
        y = _norm(x, weights[f"{at}post_attention_layernorm.weight"])
        gate = linear(y, "mlp.gate_proj")
        x = x + linear(gate / (1 + np.exp(-gate)) * linear(y, "mlp.up_proj"), "mlp.down_proj")
    head_weight = weights[llama.EMBEDDING if architecture["tie_word_embeddings"] else llama.HEAD]
    result: Array = _norm(x, weights[llama.FINAL_NORM]) @ head_weight.T
    return result


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


def _turned(x: Array, cos: Array, sin: Array) -> Array:
    """Turn element j of a head together with j + d/2, as Hugging Face does."""
    first, second = np.split(x, 2, axis=-1)
    return np.concatenate([first * cos - second * sin, second * cos + first * sin], axis=-1)


def _norm(x: Array, gain: Array) -> Array:
    scaled: Array = x / np.sqrt((x * x).mean(axis=-1, keepdims=True) + ARCHITECTURE["rms_norm_eps"]) * gain
    return scaled


def _softmax(x: Array) -> Array:
    powers: Array = np.exp(x - x.max(axis=-1, keepdims=True))
    shares: Array = powers / powers.sum(axis=-1, keepdims=True)
    return shares
