"""A Llama in a Hugging Face folder as a GGUF file: one tensor in memory at a time, without torch."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np
from gguf import GGMLQuantizationType, GGUFWriter, LlamaFileType, quants

from common.data.chat import ChatTokenizer
from common.errors import UsageError
from common.model.llama import EMBEDDING, FINAL_NORM, HEAD, attention_widths, kv_heads
from common.model.weights import Weights
from engines.ttml.limits import rope_of
from tools.export.gguf.vocabulary import vocabulary_of

Array = np.ndarray[Any, Any]

TYPES = {
    "f32": (GGMLQuantizationType.F32, LlamaFileType.ALL_F32),
    "f16": (GGMLQuantizationType.F16, LlamaFileType.MOSTLY_F16),
    "q8_0": (GGMLQuantizationType.Q8_0, LlamaFileType.MOSTLY_Q8_0),
}
WHOLE = {EMBEDDING: "token_embd.weight", FINAL_NORM: "output_norm.weight", HEAD: "output.weight"}
LAYER = {
    "input_layernorm": "attn_norm",
    "self_attn.q_proj": "attn_q",
    "self_attn.k_proj": "attn_k",
    "self_attn.v_proj": "attn_v",
    "self_attn.o_proj": "attn_output",
    "post_attention_layernorm": "ffn_norm",
    "mlp.gate_proj": "ffn_gate",
    "mlp.up_proj": "ffn_up",
    "mlp.down_proj": "ffn_down",
}
# Of a model that continues text. Without any, llama.cpp takes ChatML, whose marks such a model never saw; and one that
# raises an exception keeps its server from starting.
NO_TEMPLATE = "{% for message in messages %}{{ message['content'] }}{% endfor %}"


def write_gguf(path: Path, folder: Path, kind: str, name: str) -> None:
    """Write the Llama in `folder` to `path`; `kind` of TYPES is how matrices are stored (norms are f32).

    Rows of the embedding and of the head that are no token are left out. Raises UsageError for a model or a tokenizer
    that GGUF's "llama" cannot say.
    """
    from tools.generate.chat import architecture_of

    architecture = architecture_of(folder)
    refuse_other_llamas(architecture, folder)
    vocabulary, tokenizer = vocabulary_of(folder), ChatTokenizer.load(folder)
    weights = Weights(sorted(folder.glob("*.safetensors")))
    writer = GGUFWriter(path, "llama")
    try:
        add_facts(writer, architecture, kind, name)
        vocabulary.add_to(writer)
        writer.add_chat_template(tokenizer.template or NO_TEMPLATE)
        names = names_of(weights, architecture, folder)
        for theirs, ours in names.items():
            shape = list(weights.shapes[ours])
            if ours in (EMBEDDING, HEAD):
                shape[0] = len(vocabulary.tokens)
            stored = stored_as(tuple(shape), kind)
            size = quants.quant_shape_to_byte_shape(shape, stored) if stored == GGMLQuantizationType.Q8_0 else shape
            wide = np.dtype({"F32": np.float32, "F16": np.float16}.get(stored.name, np.uint8))
            writer.add_tensor_info(theirs, size, wide, int(np.prod(size)) * wide.itemsize, stored)
        writer.write_header_to_file()
        writer.write_kv_data_to_file()
        writer.write_ti_data_to_file()
        for ours in names.values():
            array = weights[ours].astype(np.float32)
            if ours in (EMBEDDING, HEAD):
                array = array[: len(vocabulary.tokens)]
            writer.write_tensor_data(encoded(arranged(array, ours, architecture), kind, ours))
    finally:
        writer.close()


def refuse_other_llamas(architecture: Mapping[str, Any], folder: Path) -> None:
    """Raise UsageError for a Llama with biases or stretched rotary positions: none of ours, and none that was tried."""
    rope = rope_of(architecture)
    found = [key for key in ("attention_bias", "mlp_bias") if architecture.get(key)]
    if rope["rope_type"] != "default":
        found.append(f"rope_type={rope['rope_type']}")
    if found:
        raise UsageError(
            f"no GGUF is written of a Llama with {found[0]}",
            where=str(folder / "config.json"),
            todo="use a server that takes Hugging Face folders: recipe serve RUN",
        )


def add_facts(writer: GGUFWriter, architecture: Mapping[str, Any], kind: str, name: str) -> None:
    """Add the keys general.* and llama.*."""
    heads = architecture["num_attention_heads"]
    width = head_width(architecture)
    writer.add_name(name)
    writer.add_file_type(TYPES[kind][1])
    writer.add_context_length(architecture["max_position_embeddings"])
    writer.add_embedding_length(architecture["hidden_size"])
    writer.add_block_count(architecture["num_hidden_layers"])
    writer.add_feed_forward_length(architecture["intermediate_size"])
    writer.add_head_count(heads)
    writer.add_head_count_kv(kv_heads(architecture))
    writer.add_key_length(width)
    writer.add_value_length(width)
    writer.add_rope_dimension_count(width)
    writer.add_rope_freq_base(float(rope_of(architecture)["rope_theta"]))
    writer.add_layer_norm_rms_eps(float(architecture["rms_norm_eps"]))


def head_width(architecture: Mapping[str, Any]) -> int:
    return attention_widths(architecture)[0] // int(architecture["num_attention_heads"])


def names_of(weights: Weights, architecture: Mapping[str, Any], folder: Path) -> dict[str, str]:
    """Return GGUF's names of the tensors and ours. Without a head of its own, a model's head is its embedding.

    Raises UsageError for a tensor that is missing or unknown: llama.cpp would take the embedding for a missing head.
    """
    tied = architecture.get("tie_word_embeddings", False)
    whole = {theirs: ours for ours, theirs in WHOLE.items() if not (tied and ours == HEAD)}
    layers = range(architecture["num_hidden_layers"])
    names = whole | {
        f"blk.{layer}.{theirs}.weight": f"model.layers.{layer}.{ours}.weight"
        for layer in layers
        for ours, theirs in LAYER.items()
    }
    if other := {*names.values()} ^ {name for name in weights if not (tied and name == HEAD)}:
        raise UsageError(f"the tensor {min(other)} is missing or unknown", where=str(folder))
    return names


def stored_as(shape: tuple[int, ...], kind: str) -> GGMLQuantizationType:
    """Return how a tensor is stored: norms in f32, and in f16 a row that q8_0's blocks of 32 do not divide."""
    if len(shape) == 1:
        return GGMLQuantizationType.F32
    return GGMLQuantizationType.F16 if kind == "q8_0" and shape[-1] % 32 else TYPES[kind][0]


def encoded(array: Array, kind: str, name: str) -> Array:
    """Return an fp32 tensor as it is stored. Raises UsageError for a weight that f16 has no number for."""
    stored = stored_as(array.shape, kind)
    if stored == GGMLQuantizationType.F16 and np.abs(array).max() > np.finfo(np.float16).max:
        raise UsageError(f"{name} has weights beyond f16's largest number", where=f"--type {kind}", todo="--type f32")
    return np.asarray(quants.quantize(np.ascontiguousarray(array), stored))


def arranged(array: Array, name: str, architecture: Mapping[str, Any]) -> Array:
    """Return a tensor with its rows in GGUF's order.

    transformers rotate row i of a head with row i + half, GGUF's "llama" neighbors: so a head's halves are interleaved,
    in queries and keys.
    """
    if not name.endswith(("q_proj.weight", "k_proj.weight")):
        return array
    half = head_width(architecture) // 2
    return array.reshape(-1, 2, half, array.shape[1]).swapaxes(1, 2).reshape(array.shape)
