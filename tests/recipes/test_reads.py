"""A key that nothing reads is found, and one that only a board's settings give a meaning is not called dead."""

from __future__ import annotations

import os
import shutil
from pathlib import Path

import pytest

pytest.importorskip("torch", reason="the CPU engine is torch")

from tests.doubles.tiny_recipe import FINE_TUNE
from tests.recipes.reads import of_other_boards, recorded, unread
from tests.support.runs import run_tiny


@pytest.fixture
def recipe(tmp_path, monkeypatch) -> Path:
    monkeypatch.setattr(os, "fsync", lambda descriptor: None)
    copy = shutil.copytree(FINE_TUNE, tmp_path / "fine_tune")
    with (copy / "config.yaml").open("a") as file:
        file.write("logging_config: {wandb_mode: online}\n")
    text = (copy / "config.yaml").read_text()
    (copy / "config.yaml").write_text(text.replace("eval_config:\n", "eval_config:\n  temperature: 0.8\n  top_k: 40\n"))
    (copy / "hw").mkdir()
    (copy / "hw/cpu.yaml").write_text("eval_config: {temperature: 0}\n")
    return copy


def test_a_key_that_nothing_reads_is_dead_and_one_that_a_board_reads_is_not(recipe, tiny_base, tmp_path):
    small = (f"model_config.base={tiny_base}", "training_config.batch_size=8", "eval_config.max_new_tokens=1")
    with recorded() as read:
        run_tiny(recipe, tmp_path / "out", *small, steps=1, export=False)
    assert set(unread(recipe, read, small)) == {
        "training_config.scheduler.type",  # a single step is all warm-up
        "eval_config.top_k",
        "logging_config.wandb_mode",
    }
    boards = of_other_boards(recipe, small)
    assert len(boards) == 1, "all boards have the same settings here"
    with recorded() as more:
        run_tiny(recipe, tmp_path / "out", *boards[0], *small, steps=7, export=False)
    assert set(unread(recipe, read | more, small)) == {"logging_config.wandb_mode"}
