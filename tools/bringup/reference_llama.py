"""Llamas small enough for any machine, for checks of a device: their weights and batches."""

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
# Heads of 64 that share one of keys as TinyLlama's do (32 over 4) and nanollama3's (6 over 3).
GROUPED: tuple[dict[str, Any], ...] = tuple(
    {
        **ARCHITECTURE,
        "hidden_size": 64 * heads,
        "num_attention_heads": heads,
        "num_key_value_heads": of_keys,
        "num_hidden_layers": 1,
    }
    for heads, of_keys in ((16, 2), (6, 3))
)
RECTANGULAR = {**ARCHITECTURE, "intermediate_size": 1024, "num_key_value_heads": 4}  # no grouped heads
LONG_ROWS = {
    **ARCHITECTURE,
    "num_attention_heads": 2,
    "num_hidden_layers": 1,
    "max_position_embeddings": 1024,
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

    A standard deviation of 0.1 at a hidden size of 128 gives attention scores of about 1.3 (0.1^2 x 128), and as much
    at any other size: a wrong order of rows or a wrong rotation changes what is attended to.
    """
    found = {}
    for name, shape in llama.shapes(architecture).items():
        values = normal(
            seed, name, shape, 0.1 * math.sqrt(128 / architecture["hidden_size"]) if len(shape) == 2 else 0.1
        )
        found[name] = values if len(shape) == 2 else 1 + values
    return found


def batch_of(rows: int = 8, seed: int = 0, width: int = WIDTH) -> Batch:
    """Return random tokens, [rows, width]. Row r has its first 2 + 3 (r mod 8) predictions unsupervised."""
    tokens = np.random.Generator(np.random.PCG64(seed)).integers(0, TOKENS, (rows, width + 1))
    starts = 2 + 3 * (np.arange(rows) % 8)
    mask = (np.arange(width) >= starts[:, None]).astype(np.float32)
    ids, labels = (np.ascontiguousarray(part, np.uint32) for part in (tokens[:, :-1], tokens[:, 1:]))
    return Batch(ids, labels, mask, np.arange(rows, dtype=np.int64))


def rounded(weights: Mapping[str, Array]) -> dict[str, Array]:
    """Return what a board stores of `weights`, bf16 to nearest even, as float64."""
    return {name: array.astype(ml_dtypes.bfloat16).astype(np.float64) for name, array in weights.items()}
