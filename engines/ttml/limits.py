"""What ttml can train: it would refuse the rest late, or compute something else and not say so."""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import Any

from common.config import Config
from common.errors import MachineError, UsageError
from common.hardware import TILE, Hardware

# RoPE's kernel, rotary_embedding_llama, allows no wider head with fp32 accumulation, which ttml asks for
# (tt-train's rope_op.cpp passes ComputeKernelConfig::precise(); tt-metal, June 2026). Its tables would go to 256.
LARGEST_HEAD = 128


def mesh_of(hw: Hardware, config: Config) -> tuple[int, int]:
    return config.device.mesh_shape or hw.mesh_shape


def refuse_config(hw: Hardware, config: Config) -> None:
    """Raise UsageError for a key that ttml cannot honour."""
    training, devices = config.training, math.prod(mesh_of(hw, config))
    if training.precision not in ("auto", "bf16"):
        raise UsageError(
            f"{hw.name} trains in bf16, not in {training.precision}",
            where="training_config.precision",
            todo="leave it out, or set bf16; fp32 master weights are optimizer.type: AdamWFullPrecision",
        )
    if training.batch_size % devices:
        raise UsageError(
            f"a batch of {training.batch_size} rows cannot be shared out to {devices} devices",
            where="training_config.batch_size",
            todo=f"set a multiple of {devices}: it is the total over all devices",
        )
    if training.optimizer.stochastic_rounding and training.optimizer.type != "AdamW":
        raise UsageError(
            f"{training.optimizer.type} has no stochastic rounding: what it keeps in fp32 loses nothing",
            where="training_config.optimizer.stochastic_rounding",
            todo="leave it out, or set optimizer.type: AdamW",
        )


def refuse_architecture(architecture: Mapping[str, Any]) -> None:
    """Raise MachineError for a Llama (the keys of its config.json) that ttml cannot compute."""
    get, hidden = architecture.get, architecture["hidden_size"]
    head_dim = hidden // architecture["num_attention_heads"]
    rope_type, context = rope_of(architecture)["rope_type"], int(architecture["max_position_embeddings"])
    limits = {
        f"model_type is {get('model_type')}": get("model_type", "llama") != "llama",
        f"rms_norm_eps is {get('rms_norm_eps')}, ttml's is 1e-5": get("rms_norm_eps", 1e-6) != 1e-5,
        f"hidden_act is {get('hidden_act')}": get("hidden_act", "silu") != "silu",
        "its projections have biases": bool(get("attention_bias") or get("mlp_bias")),
        "head_dim is not hidden_size / heads": (get("head_dim") or head_dim) != head_dim,
        f"rope_type is {rope_type}": rope_type not in ("default", "llama3"),
        f"head_dim {head_dim} is above {LARGEST_HEAD}, where its RoPE with fp32 accumulation stops": (
            head_dim > LARGEST_HEAD
        ),
    }
    sizes = {"head_dim": head_dim, "hidden_size": hidden, "intermediate_size": architecture["intermediate_size"]}
    for name, size in (sizes | {"max_position_embeddings": context}).items():
        limits[f"{name} {size} is no multiple of {TILE}"] = bool(size % TILE)
    if wrong := [text for text, holds in limits.items() if holds]:
        raise MachineError(
            f"ttml cannot compute this model: {'; '.join(wrong)}",
            where="model_config.architecture, or config.json of model_config.base",
            todo="choose another model, or train this one with HW=cpu",
        )


def rope_of(architecture: Mapping[str, Any]) -> dict[str, Any]:
    """Return rope_theta, rope_type and what its scaling has, from a config.json of transformers 4 or 5."""
    scaling = (architecture.get("rope_scaling") or {}) | (architecture.get("rope_parameters") or {})
    found = {"rope_theta": architecture.get("rope_theta") or 10000.0} | scaling
    return found | {"rope_type": found.get("rope_type") or found.get("type") or "default"}


def rope_scaling(rope: Mapping[str, Any]) -> dict[str, Any]:
    """Return the fields of ttml's LlamaRopeScalingConfig; none of them means no scaling."""
    if rope["rope_type"] != "llama3":
        return {}
    return {
        "scaling_factor": float(rope["factor"]),
        "high_freq_factor": float(rope["high_freq_factor"]),
        "low_freq_factor": float(rope["low_freq_factor"]),
        "original_context_length": int(rope["original_max_position_embeddings"]),
    }
