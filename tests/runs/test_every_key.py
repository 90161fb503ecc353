# ruff: noqa: E402  what needs torch is imported after the skip
"""Every key of a config does something: changed alone, it changes what a run computes, writes or says.

A new key fails here until it has a line in CHANGES; a key that nobody reads has none that would pass.
"""

from __future__ import annotations

import json
import os
import re
import shutil
import sys
import types
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

torch = pytest.importorskip("torch", reason="the CPU engine is torch")

from transformers.models.llama.modeling_llama import LlamaMLP

from common.config.load import Config, _keys
from common.data import vocabulary
from common.errors import RecipeError
from tests.doubles.tiny_recipe import FROM_SCRATCH, make_tiny_recipe, write_play
from tests.support.runs import manifest, outcome, run_tiny
from tools.export.hf_folder import export_dtype
from tools.runs import trained
from tools.verify.tiny_base import write_tiny_base

SCRATCH: dict[str, Any] = {
    "model_config.init": "random",
    "model_config.base": None,
    "model_config.lora": None,
    "model_config.architecture": {
        "vocab_size": 320,
        "hidden_size": 32,
        "intermediate_size": 32,
        "num_hidden_layers": 1,
        "num_attention_heads": 1,
        "num_key_value_heads": 1,
        "max_position_embeddings": 64,
    },
    "data_config.source": None,
    "data_config.split_by": None,
    "data_config.corpus": "data/play.txt",
    "data_config.tokenizer": {"type": "bpe"},
    "data_config.max_length": 32,
}
# The changed value, and what must hold for it to matter. OTHER is the folder of another base.
CHANGES: dict[str, tuple[Any, dict[str, Any]]] = {
    "training_config.seed": (2, {}),
    "training_config.batch_size": (2, {}),
    "training_config.micro_batch_size": (2, {}),
    "training_config.learning_rate": (0.001, {}),
    "training_config.max_steps": (2, {}),
    "training_config.num_epochs": (0.5, {}),
    "training_config.max_grad_norm": (0.01, {}),
    "training_config.precision": ("bf16-mixed", {}),
    "training_config.optimizer.type": ("AdamWFullPrecision", {"training_config.precision": "bf16"}),
    "training_config.optimizer.weight_decay": (1.0, {}),
    "training_config.optimizer.beta1": (0.5, {}),
    "training_config.optimizer.beta2": (0.9, {}),
    "training_config.optimizer.epsilon": (1e-3, {}),
    "training_config.optimizer.stochastic_rounding": (True, {"training_config.precision": "bf16"}),
    "training_config.scheduler.type": ("linear", {}),
    "training_config.scheduler.warmup_steps": (2, {}),
    "training_config.scheduler.min_lr_ratio": (0.7, {}),
    "model_config.init": ("random", {}),
    "model_config.base": ("OTHER", {}),
    "model_config.preset": ("wide", {}),
    "model_config.architecture": ({"vocab_size": 32}, {}),
    "model_config.initializer": ("gpt2", SCRATCH),
    "model_config.lora": (None, {}),
    "model_config.lora.rank": (2, {}),
    "model_config.lora.alpha": (4.0, {}),
    "model_config.lora.dropout": (0.5, {}),
    "model_config.lora.target_modules": (["o_proj"], {}),
    "model_config.lora.tie_groups": ([], {}),
    "model_config.gradient_checkpointing": (True, {}),
    "data_config.source": ("data/other.jsonl", {}),
    "data_config.corpus": ("data/other.txt", SCRATCH),
    "data_config.tokenizer.type": ("char", SCRATCH),
    "data_config.tokenizer.vocab_size": (300, SCRATCH),
    "data_config.num_proc": (1, SCRATCH),
    "data_config.system_prompt": ("Be brief.", {}),
    "data_config.held_out_share": (0.6, {}),
    "data_config.split_by": (None, {}),
    "data_config.max_length": (32, {}),
    "data_config.control": ("permuted_responses", {}),
    "data_config.supervise_all": (True, {}),
    "eval_config.every": (1, {}),
    "eval_config.prompts": (["Who are you?"], {}),
    "eval_config.max_rows": (2, {}),
    "eval_config.patience": (1, {"eval_config.every": 1, "training_config.learning_rate": 1e-30}),
    "eval_config.max_new_tokens": (5, {}),
    "eval_config.temperature": (1.0, {}),
    "eval_config.top_k": (2, {"eval_config.temperature": 5.0}),
    "eval_config.top_p": (0.1, {"eval_config.temperature": 5.0}),
    "eval_config.repetition_penalty": (50.0, {}),
    "checkpoint_config.every": (1, {}),
    "checkpoint_config.keep_last": (1, {"checkpoint_config.every": 1}),
    "checkpoint_config.keep_best": (True, {"eval_config.every": 1}),
    "device_config.mesh_shape": ([1, 2], {}),
    "device_config.enable_ddp": (True, {}),
    "device_config.threads": (2, {"training_config.max_steps": 1, "eval_config.prompts": ["Who?"]}),
    "device_config.compile": ("always", {}),
    "logging_config.use_wandb": (True, {}),
    "logging_config.wandb_mode": ("online", {"logging_config.use_wandb": True}),
    "logging_config.use_tensorboard": (True, {}),
    "logging_config.log_level": ("WARNING", {}),
    "logging_config.log_every": (3, {}),
    "export_config.dtype": ("bf16", {}),
}


def test_the_table_has_every_key():
    keys = {".".join(path) for path in _keys(Config)}
    sections = {key for key in keys if any(other.startswith(f"{key}.") for other in keys)}
    shapes = {key for key in keys if key.startswith("model_config.architecture.")}  # all of them refused together
    assert set(CHANGES) == keys - sections - shapes | {"model_config.lora", "model_config.architecture"}


@pytest.fixture(scope="module")
def recipe(tiny_base, tmp_path_factory) -> Path:
    folder = make_tiny_recipe(tmp_path_factory.mktemp("recipe") / "tiny", tiny_base)
    lines = (folder / "data" / "rows.jsonl").read_text().splitlines()
    (folder / "data" / "other.jsonl").write_text("\n".join(lines[4:]) + "\n")
    (folder / "presets").mkdir()
    (folder / "presets" / "wide.yaml").write_text("training_config: {learning_rate: 0.003}\n")
    write_tiny_base(folder.parent / "other", seed=5)
    write_play(folder / "data" / "play.txt")
    write_play(folder / "data" / "other.txt", scenes=70)
    of_text = FROM_SCRATCH / "dataset.py"
    both = (folder / "dataset.py").read_text() + of_text.read_text().partition("import annotations")[2]
    (folder / "dataset.py").write_text(both)
    config = json.loads((folder / "config.yaml").read_text())
    config["training_config"]["max_steps"] = 3
    config["eval_config"]["max_new_tokens"] = 3
    (folder / "config.yaml").write_text(json.dumps(config))
    return folder


SEEN: dict[str, dict[str, Any]] = {}  # what runs without the change showed: many share one


@pytest.fixture
def observe(recipe, tmp_path, monkeypatch, capsys) -> Iterator[Any]:
    """Run with overrides; return all that can be seen of it but its config, digests, folder and speed."""
    modes, forwards, threads = [], [], []
    wandb = types.ModuleType("wandb")
    run = types.SimpleNamespace(log=lambda *values, **more: None, finish=lambda: None)

    def init(mode: str, **options: Any) -> Any:
        modes.append(mode)
        return run

    wandb.init = init  # type: ignore[attr-defined]
    monkeypatch.setitem(sys.modules, "wandb", wandb)
    monkeypatch.setitem(sys.modules, "torch.utils.tensorboard", None)
    monkeypatch.setattr(torch, "compile", lambda function, **options: function)
    monkeypatch.setattr(os, "fsync", lambda descriptor: None)
    monkeypatch.setenv("RECIPES_HOME", str(recipe.parent / "home"))
    use_threads = vocabulary.use_threads

    def used(num_proc: int | None) -> None:
        threads.append(num_proc)
        use_threads(num_proc)

    monkeypatch.setenv("RAYON_NUM_THREADS", "1")
    monkeypatch.setattr(vocabulary, "use_threads", used)
    mlp = LlamaMLP.forward

    def counted(self: Any, x: Any) -> Any:
        forwards.append(1)
        return mlp(self, x)

    monkeypatch.setattr(LlamaMLP, "forward", counted)

    def run_with(values: dict[str, Any]) -> dict[str, Any]:
        overrides = [f"{key}={json.dumps(value)}" for key, value in values.items()]
        forwards.clear()
        modes.clear()
        threads.clear()
        shutil.rmtree(recipe.parent / "home" / "tokens", ignore_errors=True)
        try:
            folder = run_tiny(recipe, tmp_path / "out", *overrides, export=False)
        except RecipeError as error:
            return {"error": str(error)}
        screen = re.sub(r"[\d,]+ tokens/s|\d+m\d\ds( to go)?", "", capsys.readouterr().out)
        return {
            **outcome(folder),
            "screen": screen.replace("built (no stored tokens for these rows)", "reused (nothing changed)"),
            "checkpoints": sorted(path.name for path in (folder / "checkpoints").iterdir()),
            "engine": manifest(folder)["backend"],
            "wandb": list(modes),
            "encoded by": list(threads),
            "layers run": len(forwards),
            "export": export_dtype(trained.read(folder, lambda text: None)),
        }

    yield run_with
    torch.set_num_threads(1)


@pytest.mark.parametrize("key", CHANGES)
def test_a_changed_key_is_seen(key, observe, recipe):
    value, context = CHANGES[key]
    value = str(recipe.parent / "other") if value == "OTHER" else value
    if str(context) not in SEEN:
        SEEN[str(context)] = observe(context)
    before, after = SEEN[str(context)], observe({**context, key: value})
    assert "error" not in before
    assert before != after
    if "error" in after:
        assert key.rpartition(".")[2] in after["error"], "refused, and for this key"


def test_what_is_compared_is_the_same_when_nothing_changes(observe):
    observe({})
    assert observe({}) == observe({})
