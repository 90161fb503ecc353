"""A Llama's tensors by their Hugging Face names: shapes, parameter counts, config.json. Arithmetic only."""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import Any

EMBEDDING, HEAD, FINAL_NORM = "model.embed_tokens.weight", "lm_head.weight", "model.norm.weight"
Shape = tuple[int, ...]


def shapes(architecture: Mapping[str, Any]) -> dict[str, Shape]:
    """Name -> shape of every weight of the Llama of `architecture` (the keys of its config.json).

    A tied output head is the embedding and has no entry of its own.
    """
    vocab, hidden = architecture["vocab_size"], architecture["hidden_size"]
    wide, heads = architecture["intermediate_size"], architecture["num_attention_heads"]
    head = architecture.get("head_dim") or hidden // heads
    queries, keys = heads * head, architecture["num_key_value_heads"] * head
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


def component(name: str) -> str:
    """What a tensor belongs to: embedding, attention, feed-forward, norms or output head."""
    if name in (EMBEDDING, HEAD):
        return "embedding" if name == EMBEDDING else "output head"
    if "norm" in name:
        return "norms"
    return "attention" if ".self_attn." in name else "feed-forward"


def parameters_by_component(architecture: Mapping[str, Any]) -> dict[str, int]:
    """Component -> parameters, in the order of the forward pass."""
    counts = dict.fromkeys(("embedding", "attention", "feed-forward", "norms", "output head"), 0)
    for name, shape in shapes(architecture).items():
        counts[component(name)] += math.prod(shape)
    return counts


def parameters(architecture: Mapping[str, Any]) -> int:
    """All parameters, a tied head counted once."""
    return sum(parameters_by_component(architecture).values())


def hf_config(architecture: Mapping[str, Any]) -> dict[str, Any]:
    """config.json of a Llama of `architecture` that has no special tokens but those its tokenizer names."""
    return {
        "architectures": ["LlamaForCausalLM"],
        "model_type": "llama",
        **architecture,
        "head_dim": architecture["hidden_size"] // architecture["num_attention_heads"],
        "hidden_act": "silu",
        "attention_bias": False,
        "mlp_bias": False,
        "bos_token_id": None,
        "eos_token_id": None,
        "pad_token_id": None,
        "dtype": "float32",
    }
