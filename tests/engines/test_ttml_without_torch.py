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
            backend.load_state(checkpoint.read_tensors(checkpoint.verify(saved).folder))
        for step in (start + 1, start + 2):
            losses.append(backend.train_step(make_batch().split(2), 1e-2, step).loss)
        backend.eval_nll(make_batch())
        answers = generate(backend, [[7, 8, 9], [10]], config.eval, eos_ids=[2], vocab_size=300)
        saved = checkpoint.save(folder / "checkpoints", start + 2, backend.state(), config, facts)
assert losses[3] < losses[0] and all(answers), (losses, answers)
assert "torch" in sys.modules, "the double stands on it"
"""


@pytest.mark.skipif(importlib.util.find_spec("torch") is None, reason="the doubles of ttml are torch")
@pytest.mark.parametrize(
    ("generation", "lora"),
    [("B", "null"), ("C", '{"rank": 4, "alpha": 8.0, "tie_groups": TIES}')],
    ids=["unfused, full", "fused, lora"],
)
def test_training_checkpoints_and_answers_need_no_torch(tmp_path, generation, lora):
    ties = str(TIES[generation]).replace("'", '"')
    run_without_torch(PARTS, generation, str(tmp_path), lora.replace("TIES", ties))
