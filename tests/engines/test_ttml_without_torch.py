"""A board's image has no torch: whatever the ttml path imports must do without, all but the doubles."""

from __future__ import annotations

import importlib.util
import os
import subprocess
import sys
from pathlib import Path

import pytest

from tests.boards import TIES
from tests.doubles import environment

ROOT = Path(__file__).resolve().parents[2]

# Runs in a process of its own. Every import of torch, or of what brings it, is refused unless the doubles ask for it.
GUARD = """
import builtins, importlib, sys

HEAVY = {"torch", "transformers", "peft", "accelerate"}
plain_import, plain_import_module = builtins.__import__, importlib.import_module


def allowed(importer):
    return importer.partition(".")[0] in {"ttml", "ttnn"} | HEAVY


def checked_import(name, globals=None, *rest, **named):
    importer = (globals or {}).get("__name__", "?")
    if name.partition(".")[0] in HEAVY and not any(
        allowed(frame_name) for frame_name in (importer, *importers())
    ):
        raise ImportError(f"{importer} imports {name}")
    return plain_import(name, globals, *rest, **named)


def importers():
    frame = sys._getframe(2)
    while frame:
        yield frame.f_globals.get("__name__", "?")
        frame = frame.f_back


def checked_import_module(name, package=None):
    if name.partition(".")[0] in HEAVY and not any(map(allowed, importers())):
        raise ImportError(f"{name} is imported by its name")
    return plain_import_module(name, package)


builtins.__import__, importlib.import_module = checked_import, checked_import_module
for way in (lambda: __import__("torch"), lambda: importlib.import_module("transformers")):
    try:
        way()
    except ImportError:
        continue
    raise SystemExit("the check itself does not work")
"""
PARTS = """
import json
from pathlib import Path

import numpy as np

from engines.ttml.engine import open_ttml
from common.hardware import get
from common.model.bases import resolve
from common.train import checkpoint
from common.train.generate import generate
from tests.boards import board_config
from tests.on_engines import make_batch
from tests.tiny import write_tiny_base

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
print("done")
"""

RECIPE = """
import importlib.util, json, os
from pathlib import Path

find_spec = importlib.util.find_spec
importlib.util.find_spec = lambda name, *rest: None if name.partition(".")[0] in HEAVY else find_spec(name, *rest)

from tests.tiny import write_tiny_base
from tests.tiny_recipe import FROM_SCRATCH, make_tiny_recipe, tiny_scratch
from tools.launch.after_run import train_here
from tools.launch.resolve import resolve
from tests.hosts import fake_machine

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
print("done")
"""


def run(program: str, generation: str, *arguments: str) -> None:
    variables = environment(generation)
    path = os.pathsep.join([str(ROOT), variables["PYTHONPATH"]])
    done = subprocess.run(
        [sys.executable, "-c", GUARD + program, *arguments],
        env={**os.environ, **variables, "PYTHONPATH": path, "OMP_NUM_THREADS": "1"},
        capture_output=True,
        text=True,
        check=False,
        timeout=300,
    )
    assert done.returncode == 0, done.stdout[-2000:] + done.stderr[-3000:]
    assert done.stdout.strip().endswith("done")


@pytest.mark.skipif(importlib.util.find_spec("torch") is None, reason="the doubles of ttml are torch")
@pytest.mark.parametrize("lora", ["null", '{"rank": 4, "alpha": 8.0, "tie_groups": TIES}'], ids=["full", "lora"])
@pytest.mark.parametrize("generation", ["B", "C"])
def test_training_checkpoints_and_answers_need_no_torch(tmp_path, lora, generation):
    ties = str(TIES[generation]).replace("'", '"')
    run(PARTS, generation, str(tmp_path), lora.replace("TIES", ties))


@pytest.mark.skipif(importlib.util.find_spec("torch") is None, reason="the doubles of ttml are torch")
@pytest.mark.parametrize("recipe", ["fine_tune", "from_scratch"])
def test_a_whole_run_on_a_board_needs_no_torch(tmp_path, recipe):
    """Config, data, tokenizer, weights, loop, checkpoint, samples, export and card."""
    run(RECIPE, "C", str(tmp_path), recipe)
