"""A board's image has no torch: whatever the ttml path imports must do without, all but the doubles."""

from __future__ import annotations

import importlib.util

import pytest

from tests.support.boards import TIES
from tests.support.no_torch import run_without_torch

PARTS = """
import json
from pathlib import Path

import numpy as np

from engines.ttml.engine import open_ttml
from common.hardware import get
from common.model.bases import resolve
from common.train import checkpoint
from common.train.generate import generate
from tests.support.boards import board_config
from tests.support.engines import make_batch
from tools.verify.tiny_base import write_tiny_base

folder, lora = Path(sys.argv[1]), json.loads(sys.argv[2])
base = resolve(str(write_tiny_base(folder / "base")))
config = board_config(folder / "base", model__lora=lora, eval__max_new_tokens=3)
facts = {"training_digest": "", "tokens_sha256": ""}
losses = []
for start in (0, 2):
    with open_ttml(get("n150"), config) as backend:
        backend.build(base.architecture)
        backend.load(base.weights())
        if start:
            backend.load_state(checkpoint.Tensors(checkpoint.verify(saved).folder))
        for step in (start + 1, start + 2):
            losses.append(backend.train_step(make_batch().split(2), 1e-2, step).loss)
        backend.eval_nll(make_batch())
        answers = generate(backend, [[7, 8, 9], [10]], config.eval, eos_ids=[2], vocab_size=300)
        saved = checkpoint.save(folder / "checkpoints", start + 2, backend.state(), config, facts)
assert losses[3] < losses[0] and all(answers), (losses, answers)
assert "torch" in sys.modules, "the double stands on it"
"""

RECIPE = """
import importlib.util, json, os
from pathlib import Path

find_spec = importlib.util.find_spec
importlib.util.find_spec = lambda name, *rest: None if name.partition(".")[0] in HEAVY else find_spec(name, *rest)

from tools.verify.tiny_base import write_tiny_base
from tests.doubles.tiny_recipe import FROM_SCRATCH, make_tiny_recipe, tiny_scratch
from tools.launch.after_run import train_here
from tools.launch.resolve import resolve
from tests.doubles.machines import fake_machine

folder, recipe = Path(sys.argv[1]), FROM_SCRATCH
os.environ.update(RECIPES_HOME=str(folder / "home"), RECIPES_SYSFS_ROOT=str(fake_machine(folder / "n150", ["n150"])))
small = ["training_config.precision=bf16", "eval_config.every=0", "eval_config.max_new_tokens=2"]
if sys.argv[2] == "from_scratch":
    small += tiny_scratch(folder / "play.txt")
else:
    recipe = make_tiny_recipe(folder / "tiny", write_tiny_base(folder / "base"))
train_here(resolve(recipe, hw="n150", overrides=tuple(small), steps=2, out=folder / "runs"))
(path,) = (folder / "runs").glob("*/manifest.json")
manifest = json.loads(path.read_text())
assert manifest["exit_reason"] == "done", manifest["exit_reason"]
assert manifest["export"]["status"] == "unverified", manifest["export"]
assert "names and shapes were checked" in manifest["export"]["reason"], manifest["export"]
"""


@pytest.mark.skipif(importlib.util.find_spec("torch") is None, reason="the doubles of ttml are torch")
@pytest.mark.parametrize("lora", ["null", '{"rank": 4, "alpha": 8.0, "tie_groups": TIES}'], ids=["full", "lora"])
@pytest.mark.parametrize("generation", ["B", "C"])
def test_training_checkpoints_and_answers_need_no_torch(tmp_path, lora, generation):
    ties = str(TIES[generation]).replace("'", '"')
    run_without_torch(PARTS, generation, str(tmp_path), lora.replace("TIES", ties))


@pytest.mark.skipif(importlib.util.find_spec("torch") is None, reason="the doubles of ttml are torch")
@pytest.mark.parametrize("recipe", ["fine_tune", "from_scratch"])
def test_a_whole_run_on_a_board_needs_no_torch(tmp_path, recipe):
    """Config, data, tokenizer, weights, loop, checkpoint, samples, export and card."""
    run_without_torch(RECIPE, "C", str(tmp_path), recipe)
