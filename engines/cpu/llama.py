"""A Llama's tensors as torch modules: the names, the order and the rotary angles of transformers, without importing it.

That import takes longer than torch's own, and a training has to wait for it before its first step. These modules hold
what blocks.py and decode.py compute with; only steps that are compiled need transformers' own (engine.py), and so do
rotary embeddings of another type than the default one. tests/engines/test_llama.py holds ours against theirs.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, cast

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from common.model.llama import attention_widths, kv_heads

THETA = 10_000.0  # rope_theta where config.json has none: transformers/models/llama/configuration_llama.py
EPSILON = 1e-6  # rms_norm_eps, likewise


class Llama(nn.Module):
    """What transformers call LlamaForCausalLM; `architecture` is its config.json."""

    def __init__(self, architecture: Mapping[str, Any]) -> None:
        super().__init__()
        self.model = Decoder(architecture)
        self.lm_head = nn.Linear(architecture["hidden_size"], architecture["vocab_size"], bias=False)

    @property
    def dtype(self) -> torch.dtype:
        """The dtype of the weights."""
        return self.lm_head.weight.dtype


class Decoder(nn.Module):
    """The embedding, the blocks and the last norm."""

    def __init__(self, architecture: Mapping[str, Any]) -> None:
        super().__init__()
        vocabulary, hidden = architecture["vocab_size"], architecture["hidden_size"]
        # The row of the padding token gets no gradient.
        self.embed_tokens = nn.Embedding(vocabulary, hidden, architecture.get("pad_token_id"))
        blocks = nn.ModuleList(Block(architecture, index) for index in range(architecture["num_hidden_layers"]))
        self.layers: Any = blocks  # a ModuleList has nothing but modules to the type checker
        self.norm = Norm(architecture)
        self.rotary_emb = rotary_embedding(architecture)


class Block(nn.Module):
    """Attention and MLP, each with the norm before it."""

    def __init__(self, architecture: Mapping[str, Any], index: int) -> None:
        super().__init__()
        self.self_attn = Attention(architecture, index)
        self.mlp = Mlp(architecture)
        self.input_layernorm = Norm(architecture)
        self.post_attention_layernorm = Norm(architecture)


class Attention(nn.Module):
    """The four projections of attention."""

    def __init__(self, architecture: Mapping[str, Any], index: int) -> None:
        super().__init__()
        hidden, bias = architecture["hidden_size"], architecture.get("attention_bias", False)
        queries, keys = attention_widths(architecture)
        self.layer_idx, self.head_dim = index, keys // kv_heads(architecture)
        self.scaling = self.head_dim**-0.5
        self.q_proj = nn.Linear(hidden, queries, bias=bias)
        self.k_proj = nn.Linear(hidden, keys, bias=bias)
        self.v_proj = nn.Linear(hidden, keys, bias=bias)
        self.o_proj = nn.Linear(queries, hidden, bias=bias)


class Mlp(nn.Module):
    """The three projections of the MLP, and what acts on the gate."""

    def __init__(self, architecture: Mapping[str, Any]) -> None:
        super().__init__()
        hidden, wide = architecture["hidden_size"], architecture["intermediate_size"]
        bias = architecture.get("mlp_bias", False)
        self.gate_proj = nn.Linear(hidden, wide, bias=bias)
        self.up_proj = nn.Linear(hidden, wide, bias=bias)
        self.down_proj = nn.Linear(wide, hidden, bias=bias)
        self.act_fn = F.silu  # another activation is refused (engines/cpu/__init__.py)


class Norm(nn.Module):
    """RMSNorm over the last axis, with a gain."""

    def __init__(self, architecture: Mapping[str, Any]) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.ones(architecture["hidden_size"]))
        self.variance_epsilon = architecture.get("rms_norm_eps", EPSILON)

    def forward(self, x: Tensor) -> Tensor:
        """Return x [..., H] normalized in fp32, in the dtype of x but for the gain's."""
        wide = x.float()
        normed = wide * torch.rsqrt(wide.pow(2).mean(-1, keepdim=True) + self.variance_epsilon)
        return self.weight * normed.to(x.dtype)


class Rotary(nn.Module):
    """The angles of rotary embeddings that nothing stretches (Su et al., 2021)."""

    inverse_frequencies: Tensor

    def __init__(self, theta: float, width: int) -> None:
        super().__init__()
        # Never on meta, where a model's weights may be that are still to come.
        exponents = torch.arange(0, width, 2, dtype=torch.float, device="cpu") / width
        self.register_buffer("inverse_frequencies", 1.0 / theta**exponents, persistent=False)

    @torch.no_grad()
    def forward(self, x: Tensor, position_ids: Tensor) -> tuple[Tensor, Tensor]:
        """Return cosines and sines at `position_ids` [B, n], [B, n, D] each, in the dtype of x."""
        angles = position_ids[..., None].float() * self.inverse_frequencies
        both_halves = torch.cat((angles, angles), dim=-1)
        return both_halves.cos().to(x.dtype), both_halves.sin().to(x.dtype)


def rotary_embedding(architecture: Mapping[str, Any]) -> nn.Module:
    """Return what gives cosines and sines; for angles that are stretched, or of a part of a head, transformers' own."""
    given = {**(architecture.get("rope_scaling") or {}), **(architecture.get("rope_parameters") or {})}
    if given.get("rope_type", given.get("type", "default")) == "default" and "partial_rotary_factor" not in given:
        theta = given.get("rope_theta", architecture.get("rope_theta") or THETA)
        return Rotary(float(theta), attention_widths(architecture)[1] // kv_heads(architecture))
    return transformers_rotary(architecture)


def transformers_llama(architecture: Mapping[str, Any]) -> Llama:
    """Return transformers' own model, whose modules and tensors are those of a `Llama`: its forward can be compiled."""
    from transformers import LlamaForCausalLM

    return cast(Llama, LlamaForCausalLM(transformers_config(architecture)))


def transformers_rotary(architecture: Mapping[str, Any]) -> nn.Module:
    """Return transformers' rotary embeddings, which are in no file of weights: never on meta."""
    from transformers.models.llama.modeling_llama import LlamaRotaryEmbedding

    with torch.device("cpu"):
        return cast(nn.Module, LlamaRotaryEmbedding(transformers_config(architecture)))


def transformers_config(architecture: Mapping[str, Any]) -> Any:
    """Return transformers' LlamaConfig of a config.json; what they warn of, such as unknown keys, is not shown."""
    import transformers

    transformers.utils.logging.set_verbosity_error()
    return transformers.LlamaConfig.from_dict(dict(architecture))
