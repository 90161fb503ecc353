# ruff: noqa: E402  what needs torch is imported after the skip
"""Every key of a config does something: changed alone, it changes what a run computes, writes or says.

One run for each key, so that `make test-all` alone makes them; that no key is missing is a test of `make test`.
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

from common.data import vocabulary
from common.errors import RecipeError
from engines.cpu import blocks
from tests.doubles.tiny_recipe import FROM_SCRATCH, make_tiny_recipe, write_play
from tests.support.key_changes import CHANGES
from tests.support.runs import manifest, outcome, run_tiny
from tools.export.hf_folder import export_dtype
from tools.runs import trained
from tools.verify.tiny_base import write_tiny_base

pytestmark = pytest.mark.slow


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
    of_rows, of_text = ((home / "dataset.py").read_text() for home in (folder, FROM_SCRATCH))
    both = of_rows.replace("def splits", "def of_rows") + of_text.replace("def splits", "def of_text")
    both = both.replace("from __future__ import annotations\n", "")
    both += "\n\ndef splits(config, folder):\n    return (of_text if config.data.corpus else of_rows)(config, folder)\n"
    (folder / "dataset.py").write_text(f"from __future__ import annotations\n{both}")
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
    mlp = blocks.Mlp.forward

    def counted(*given: Any) -> Any:
        forwards.append(1)
        return mlp(*given)

    monkeypatch.setattr(blocks.Mlp, "forward", counted)

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
