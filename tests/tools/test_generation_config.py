"""generation_config.json of an export, as each of its readers takes it."""

from __future__ import annotations

import pytest

from common.config.schema import Evaluation
from tools.export.hf_folder import sampling


def by_vllm(settings: dict) -> dict:
    """What vLLM takes of generation_config.json (vllm/config/model.py), over its own defaults."""
    taken = ("repetition_penalty", "temperature", "top_k", "top_p", "min_p", "max_new_tokens")
    own = {"temperature": 1.0, "top_k": 0, "top_p": 1.0, "repetition_penalty": 1.0, "max_new_tokens": None}
    return own | {name: settings[name] for name in taken if settings.get(name) is not None}


SETTINGS = [
    {},
    {"repetition_penalty": 1.1},
    {"temperature": 0.8, "top_k": 40},
    {"temperature": 0.7, "top_p": 0.9, "repetition_penalty": 1.2},
]


@pytest.mark.parametrize("chosen", SETTINGS)
def test_vllm_samples_as_the_recipe_and_caps_nothing(chosen):
    recipe = Evaluation(every=0, prompts=[], **chosen)
    found = by_vllm(sampling(recipe))

    assert found["max_new_tokens"] is None
    assert found["temperature"] == recipe.temperature
    assert found["repetition_penalty"] == recipe.repetition_penalty
    if recipe.temperature:
        assert (found["top_k"], found["top_p"]) == (recipe.top_k, recipe.top_p)


@pytest.mark.parametrize("chosen", SETTINGS)
def test_transformers_sample_as_the_recipe(chosen):
    transformers = pytest.importorskip("transformers", reason="not in this environment")
    recipe = Evaluation(every=0, prompts=[], **chosen)
    found = transformers.GenerationConfig(**sampling(recipe), max_length=64)
    mode = found.get_generation_mode()

    assert mode == ("sample" if recipe.temperature else "greedy_search")
    assert (found.repetition_penalty or 1.0) == recipe.repetition_penalty
    if recipe.temperature:
        assert (found.temperature, found.top_k, found.top_p) == (recipe.temperature, recipe.top_k, recipe.top_p)
