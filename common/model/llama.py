"""A Llama's tensors by their Hugging Face names: shapes, parameter counts, config.json. Arithmetic only."""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import Any

PREFIX = "base_model.model."  # PEFT's, before each name in adapter_model.safetensors
EMBEDDING, HEAD, FINAL_NORM = "model.embed_tokens.weight", "lm_head.weight", "model.norm.weight"
Shape = tuple[int, ...]
SIZES = tuple(f"{name}_size" for name in ("vocab", "hidden", "intermediate"))
SIZES += ("num_hidden_layers", "num_attention_heads", "max_position_embeddings")
SIZES_OR_NONE = ("num_key_value_heads", "head_dim")


def shapes(architecture: Mapping[str, Any]) -> dict[str, Shape]:
    """Return name -> shape of every weight of the Llama of `architecture` (the keys of its config.json).

    A tied output head is the embedding and has no entry of its own.
    """
    vocab, hidden, wide = (architecture[f"{name}_size"] for name in ("vocab", "hidden", "intermediate"))
    queries, keys = attention_widths(architecture)
    found: dict[str, Shape] = {EMBEDDING: (vocab, hidden)}
    for layer in range(architecture["num_hidden_layers"]):
        at = f"model.layers.{layer}."
        found |= {
            f"{at}self_attn.q_proj.weight": (queries, hidden),
            f"{at}self_attn.k_proj.weight": (keys, hidden),
            f"{at}self_attn.v_proj.weight": (keys, hidden),
            f"{at}self_attn.o_proj.weight": (hidden, queries),
            f"{at}mlp.gate_proj.weight": (wide, hidden),
            f"{at}mlp.up_proj.weight": (wide, hidden),
            f"{at}mlp.down_proj.weight": (hidden, wide),
            f"{at}input_layernorm.weight": (hidden,),
            f"{at}post_attention_layernorm.weight": (hidden,),
        }
    found[FINAL_NORM] = (hidden,)
    if not architecture.get("tie_word_embeddings"):
        found[HEAD] = (vocab, hidden)
    return found


def lacks(config: Mapping[str, Any]) -> list[str]:
    """Return the sizes of a config.json that are no whole numbers above 0; those of SIZES_OR_NONE may be null."""
    asked = [name for name in (*SIZES, *SIZES_OR_NONE) if name in SIZES or config.get(name) is not None]
    return [name for name in asked if type(config.get(name)) is not int or not 0 < config[name] < 2**31]


def attention_widths(architecture: Mapping[str, Any]) -> tuple[int, int]:
    """Return the rows of q_proj, and those of k_proj and of v_proj: heads x head_dim each."""
    heads = architecture["num_attention_heads"]
    head_dim = architecture.get("head_dim") or architecture["hidden_size"] // heads
    return heads * head_dim, kv_heads(architecture) * head_dim


def kv_heads(architecture: Mapping[str, Any]) -> int:
    """Return the heads of keys and values: as many as of queries where config.json does not say."""
    return int(architecture.get("num_key_value_heads") or architecture["num_attention_heads"])


def parameters(architecture: Mapping[str, Any]) -> int:
    """Return the number of all parameters, a tied head counted once."""
    return sum(map(math.prod, shapes(architecture).values()))


def hf_config(architecture: Mapping[str, Any]) -> dict[str, Any]:
    """Return the config.json of a Llama of `architecture` that has no special tokens but those its tokenizer names."""
    return {
        "architectures": ["LlamaForCausalLM"],
        "model_type": "llama",
        **architecture,
        "head_dim": architecture["hidden_size"] // architecture["num_attention_heads"],
        "hidden_act": "silu",
        **dict.fromkeys(("attention_bias", "mlp_bias"), False),
        **dict.fromkeys(("bos_token_id", "eos_token_id", "pad_token_id")),
        "dtype": "float32",
    }
