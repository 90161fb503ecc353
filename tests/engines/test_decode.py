"""Answers of a batch: prompts that begin alike, rows that end, a cache that grows, all by transformers' own logits."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest

pytest.importorskip("torch", reason="the CPU engine is torch")

import torch
from transformers import LlamaForCausalLM

from common.model.weights import Weights
from engines.cpu import decode
from engines.cpu.engine import open_cpu
from engines.cpu.lora import lora_layers
from tools.generate.chat import architecture_of, folder_config
from tools.verify.tiny_base import write_tiny_base


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A Llama whose query heads share keys, with an output head of its own."""
    folder = tmp_path_factory.mktemp("grouped") / "tiny"
    return write_tiny_base(folder, hidden=96, layers=3, heads=6, kv_heads=3, tied=False)


BEGIN = [7, 8, 9, 10, 11]
PROMPTS = {
    "nothing in common": [[5, 6], [6, 5, 4, 3], [9]],
    "a common beginning": [[*BEGIN, 20], [*BEGIN, 21, 22, 23, 24], [*BEGIN, 30, 31]],
    "one is the beginning of another": [BEGIN, [*BEGIN, 40, 41], [*BEGIN, 40]],
    "the same twice": [BEGIN, BEGIN],
    "one alone": [[*BEGIN, 50]],
}


@pytest.mark.parametrize("prompts", PROMPTS.values(), ids=PROMPTS)
@pytest.mark.parametrize("precision", ["fp32", "bf16-mixed", "bf16"])
def test_rows_that_stay_have_the_logits_they_have_alone(folder, monkeypatch, prompts, precision):
    monkeypatch.setattr(decode, "ROOM", 4)  # so that it grows
    model = LlamaForCausalLM.from_pretrained(folder, dtype=torch.float32).eval()
    settings: dict[str, Any] = {"training.precision": precision, "device.threads": 2}
    rng, rows, widths = np.random.default_rng(3), [list(prompt) for prompt in prompts], set()
    lengths = np.array([len(row) for row in rows])
    ids = np.zeros((len(rows), lengths.max()), np.int64)
    for row, tokens in enumerate(rows):
        ids[row, : len(tokens)] = tokens
    with open_cpu(folder_config(folder).with_values(**settings)) as backend:
        backend.build(architecture_of(folder))
        backend.load(Weights([folder / "model.safetensors"]))
        cache = None
        for step in range(9):
            logits, cache = backend.next_token_logits(ids, lengths, cache)
            widths.add(len(cache.hidden))
            for row in np.flatnonzero(lengths).tolist():
                with torch.no_grad():
                    alone = model(torch.tensor([rows[row]])).logits[0, -1].numpy()
                assert np.abs(logits[row] - alone).max() < (1e-5 if precision == "fp32" else np.std(alone) / 10)
            ids = rng.integers(6, 300, (len(rows), 1))
            if step in (2, 5) and np.count_nonzero(lengths) > 1:
                lengths[np.flatnonzero(lengths)[step % 2]] = 0  # the first of them, later the second
            for row in np.flatnonzero(lengths).tolist():
                rows[row].append(int(ids[row, 0]))
    assert widths == set(range(max(1, len(prompts) - 2), len(prompts) + 1)), "rows that ended leave the batch"


@pytest.mark.parametrize(
    "groups", [[["q_proj", "k_proj", "v_proj"], ["gate_proj", "up_proj"]], []], ids=["tied", "not"]
)
@pytest.mark.parametrize("precision", ["fp32", "bf16-mixed", "bf16"])
def test_adapters_add_what_a_model_has_that_they_are_merged_into(folder, groups, precision):
    merged = LlamaForCausalLM.from_pretrained(folder, dtype=torch.float32).eval()
    lora = {"rank": 4, "alpha": 8.0, "tie_groups": groups}
    rows, lengths = [[5, 6, 7], [8, 9]], np.array([3, 2])
    ids, cache, generator = np.array([[5, 6, 7], [8, 9, 0]]), None, torch.Generator().manual_seed(1)
    config = folder_config(folder).with_values(**{"training.precision": precision, "model.lora": lora})
    with open_cpu(config) as backend, torch.no_grad():
        backend.build(architecture_of(folder))
        backend.load(Weights([folder / "model.safetensors"]))
        for name, layer in lora_layers(backend.model):
            layer.lora_B.normal_(0, 0.3, generator=generator)
            merged.get_submodule(name).weight += layer.scale * layer.lora_B.float() @ layer.lora_A.float()
        for token in (20, 21, 22):
            logits, cache = backend.next_token_logits(ids, lengths, cache)
            for row, tokens in enumerate(rows):
                alone = merged(torch.tensor([tokens])).logits[0, -1].numpy()
                assert np.abs(logits[row] - alone).max() < (1e-4 if precision == "fp32" else np.std(alone) / 10)
                tokens.append(token + row)
            ids = np.array([[token], [token + 1]])


def test_what_all_prompts_begin_with_is_computed_once(folder, monkeypatch):
    seen, real = [], decode.hidden_states

    def counting(*given: Any) -> torch.Tensor:
        seen.append(given[1].numel())
        return real(*given)

    monkeypatch.setattr(decode, "hidden_states", counting)
    with open_cpu(folder_config(folder)) as backend:
        backend.build(architecture_of(folder))
        backend.load(Weights([folder / "model.safetensors"]))
        backend.next_token_logits(np.array([[*BEGIN, 20], [*BEGIN, 21]]), np.array([6, 6]))
    assert seen == [len(BEGIN), 2], "five tokens once, then one a row"
