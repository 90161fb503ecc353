"""Our modules of a Llama beside transformers' own: names, shapes, order, norms and angles; and who waits for whom."""

from __future__ import annotations

import subprocess
import sys
from typing import Any

import pytest

pytest.importorskip("torch", reason="the CPU engine is torch")

import torch
from transformers import LlamaConfig, LlamaForCausalLM

from engines.cpu.llama import Llama, rotary_embedding

SMALL = {
    "vocab_size": 64,
    "hidden_size": 48,
    "intermediate_size": 80,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "max_position_embeddings": 512,
}
STRETCHED = {
    "rope_type": "llama3",
    "factor": 8.0,
    "low_freq_factor": 1.0,
    "high_freq_factor": 4.0,
    "original_max_position_embeddings": 128,
}
SHAPES: dict[str, dict[str, Any]] = {
    "as config.json leaves it": {},
    "fewer keys": {"num_key_value_heads": 2, "rms_norm_eps": 1e-5, "rope_theta": 100_000},
    "wide heads": {"head_dim": 32, "num_key_value_heads": 1},
    "biases": {"attention_bias": True, "mlp_bias": True},
    "a padding token": {"pad_token_id": 3},
    "parameters of RoPE": {"rope_parameters": {"rope_type": "default", "rope_theta": 5e5}, "rope_theta": 7},
    "stretched": {"rope_scaling": STRETCHED, "rope_theta": 5e5},
    "nothing stretched": {"rope_scaling": None},
}


@pytest.mark.parametrize("differs", SHAPES.values(), ids=SHAPES)
def test_tensors_norms_and_angles_are_those_of_transformers(differs):
    architecture = {**SMALL, **differs}
    theirs, ours = LlamaForCausalLM(LlamaConfig.from_dict(dict(architecture))), Llama(architecture)

    def tensors(model: torch.nn.Module) -> list[tuple[str, torch.Size]]:
        return [(name, parameter.shape) for name, parameter in model.named_parameters()]

    assert tensors(ours) == tensors(theirs), "the optimizer and the norm of gradients go through them in this order"
    assert list(ours.state_dict()) == list(theirs.state_dict())
    assert ours.model.embed_tokens.padding_idx == theirs.model.embed_tokens.padding_idx
    x, places = torch.randn(1, 400, 48), torch.arange(400)[None]
    for mine, real in zip(rotary_embedding(architecture)(x, places), theirs.model.rotary_emb(x, places), strict=True):
        assert torch.equal(mine, real)
    assert torch.equal(ours.model.norm(x), theirs.model.norm(x))
    for mine, real in zip(ours.model.layers, theirs.model.layers, strict=True):
        assert mine.self_attn.layer_idx == real.self_attn.layer_idx
        assert (mine.self_attn.head_dim, mine.self_attn.scaling) == (real.self_attn.head_dim, real.self_attn.scaling)
        assert mine.input_layernorm.variance_epsilon == real.input_layernorm.variance_epsilon


def test_a_training_starts_without_transformers():
    code = f"""
import sys, torch
from engines.cpu import engine, llama
llama.Llama({SMALL!r})
sys.exit("transformers" in sys.modules)
"""
    assert subprocess.run([sys.executable, "-c", code], check=False).returncode == 0


def test_what_transformers_warn_of_is_no_line_of_a_training():
    code = f"""
from engines.cpu.llama import rotary_embedding
rotary_embedding({SMALL!r} | {{"rope_scaling": {STRETCHED!r} | {{"odd": 1}}}})
"""
    done = subprocess.run([sys.executable, "-c", code], check=True, capture_output=True, text=True)
    assert "odd" not in done.stdout + done.stderr
