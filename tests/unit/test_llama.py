"""Parameter counts: arithmetic, the presets, and what transformers build."""

from __future__ import annotations

import math
from pathlib import Path

import pytest
import yaml

from common import llama

PRESETS = Path(__file__).resolve().parents[2] / "recipes" / "nano-transformer-scratch" / "presets"
COUNTS = {  # vocabulary / hidden / layers / feed-forward / key-value width
    "pico": 1_967_808,  # 1024 / 192 / 4 / 512 / 192, tied
    "nano": 5_180_672,  # 256 / 256 / 6 / 768 / 256, tied
    "nanollama3_char": 9_810_816,  # 96 / 384 / 6 / 1024 / 192; the figure that tt-train publishes
    "llama_22m": 22_025_088,  # 32000 / 384 / 6 / 1024 / 192, tied
    "mini": 27_402_752,  # 256 / 512 / 8 / 1536 / 512, tied
    "midi": 92_228_352,  # 256 / 768 / 12 / 2304 / 768, tied
    "llama_123m": 122_962_944,  # 32000 / 1024 / 8 / 2816 / 256, tied
    "mega": 1_130_981_376,  # 256 / 2048 / 22 / 5632 / 2048, tied
}


def architecture(preset: str) -> dict:
    return yaml.safe_load((PRESETS / f"{preset}.yaml").read_text())["model_config"]["architecture"]


def test_every_preset_has_a_count():
    assert {path.stem for path in PRESETS.glob("*.yaml")} == set(COUNTS)


@pytest.mark.parametrize("preset", COUNTS)
def test_a_preset_has_the_count_it_says(preset):
    shape = architecture(preset)
    assert llama.parameters(shape) == COUNTS[preset]
    assert f"# {COUNTS[preset]:,} parameters" in (PRESETS / f"{preset}.yaml").read_text()
    assert (shape["hidden_size"] // shape["num_attention_heads"]) % 32 == 0, "a board's rotary embedding wants that"


@pytest.mark.parametrize("preset", COUNTS)
def test_the_model_that_is_built_has_these_tensors(preset):
    torch = pytest.importorskip("torch", reason="it builds the model that is counted")
    from transformers import LlamaConfig, LlamaForCausalLM

    shape = architecture(preset)
    with torch.device("meta"):
        model = LlamaForCausalLM(LlamaConfig.from_dict(llama.hf_config(shape)))
    built = {name: tuple(parameter.shape) for name, parameter in model.named_parameters()}
    assert built == llama.shapes(shape)
    assert sum(math.prod(size) for size in built.values()) == COUNTS[preset]


def test_components_add_up_and_a_tied_head_is_counted_once():
    tied, untied = architecture("nano"), architecture("nano") | {"tie_word_embeddings": False}
    assert llama.parameters_by_component(tied)["output head"] == 0
    assert llama.parameters(untied) - llama.parameters(tied) == 256 * 256
    assert sum(llama.parameters_by_component(untied).values()) == llama.parameters(untied)
