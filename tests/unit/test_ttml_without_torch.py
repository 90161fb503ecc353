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
PROGRAM = """
import builtins, importlib, sys

HEAVY = {"torch", "transformers", "peft", "accelerate"}
plain_import, plain_import_module = builtins.__import__, importlib.import_module


def allowed(importer):
    return importer.partition(".")[0] in {"ttml", "ttnn"} | HEAVY


def checked_import(name, globals=None, *rest):
    importer = (globals or {}).get("__name__", "?")
    if name.partition(".")[0] in HEAVY and not any(
        allowed(frame_name) for frame_name in (importer, *importers())
    ):
        raise ImportError(f"{importer} imports {name}")
    return plain_import(name, globals, *rest)


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

import json
from pathlib import Path

import numpy as np

from common.backends.ttml import open_ttml
from common.hardware import get
from common.models import resolve
from common.train import checkpoint
from common.train.generate import generate
from tests.boards import board_config
from tests.engines import make_batch
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


@pytest.mark.skipif(importlib.util.find_spec("torch") is None, reason="the doubles of ttml are torch")
@pytest.mark.parametrize("lora", ["null", '{"rank": 4, "alpha": 8.0, "tie_groups": TIES}'], ids=["full", "lora"])
@pytest.mark.parametrize("generation", ["B", "C"])
def test_training_checkpoints_and_answers_need_no_torch(tmp_path, lora, generation):
    variables = environment(generation)
    path = os.pathsep.join([str(ROOT), variables["PYTHONPATH"]])
    ties = str(TIES[generation]).replace("'", '"')
    done = subprocess.run(
        [sys.executable, "-c", PROGRAM, str(tmp_path), lora.replace("TIES", ties)],
        env={**os.environ, **variables, "PYTHONPATH": path, "OMP_NUM_THREADS": "1"},
        capture_output=True,
        text=True,
        check=False,
        timeout=300,
    )
    assert done.returncode == 0, done.stderr[-3000:]
    assert done.stdout.strip().endswith("done")
