"""Three processes train as one: gradients, evaluation, refused steps, resuming. rank_checks.py runs in them."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path
from typing import Any

import numpy as np
import pytest

pytest.importorskip("torch", reason="the CPU engine is torch")

from common.data.tokens import Batch
from common.errors import MachineError
from engines.cpu.ranks import Ranks, ranks_of
from tests.support.engines import config_for, make_batch
from tools.verify.tiny_base import write_tiny_base

ROOT = Path(__file__).resolve().parents[2]


@pytest.fixture(scope="module")
def found(tmp_path_factory) -> dict[str, Any]:
    folder = tmp_path_factory.mktemp("ranks")
    base = write_tiny_base(folder / "base")
    torchrun = [sys.executable, "-m", "torch.distributed.run", "--nproc-per-node", "3", "--standalone"]
    command = [*torchrun, "-m", "tests.runs.rank_checks", str(base), str(folder / "found.json")]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, check=False, timeout=240)
    assert done.returncode == 0, done.stderr[-3000:]
    return json.loads((folder / "found.json").read_text())


@pytest.mark.parametrize("what", ["full", "lora", "accumulated", "silent rank"])
def test_three_processes_give_the_losses_and_weights_of_one(found, what):
    result = found[what]
    assert result["losses"] == pytest.approx(result["expected"], rel=1e-5)
    assert result["losses"][0] != result["losses"][2], "it trains"
    assert result["apart"] < 1e-3, "a step moves a weight by 1e-2; AdamW magnifies the rounding of a tiny gradient"
    assert result["alike"] == [True] * 4


def test_bf16_weights_stay_alike_on_all_ranks(found):
    assert found["bf16"]["losses"] == pytest.approx(found["bf16"]["expected"], rel=0.02)
    assert found["bf16"]["alike"] == [True] * 4


def test_each_rank_evaluates_its_rows_and_rank_0_has_them_all(found):
    one, three = found["evaluation"]["one"], found["evaluation"]["three"]
    for expected, rows in zip(one, three, strict=True):
        assert rows == pytest.approx(expected, rel=1e-4)
        assert len(rows) == 8
    assert three[0] != three[2], "the adapter counts, and `disable_adapter` turns it off on every rank"


def test_adapters_that_no_gradient_reaches_are_named_before_the_first_step(found):
    """Take the check out of _settle_buckets: the first step ends in PyTorch's own words, and a traceback."""
    assert "no gradient reaches 10 trained tensors" in found["unreached"], "A of gate and up is one"
    assert "layers.0.mlp.gate_proj.lora_B" in found["unreached"]


def test_a_loss_that_is_not_finite_on_one_rank_is_refused_by_all(found):
    result = found["not finite"]
    assert "step 2 is not finite" in result["refused"]
    assert result["kept"]
    assert np.isfinite(result["goes on"]).all()


def test_without_synchronisation_the_replicas_differ(found):
    assert found["control"]["replicas"] == 3


def test_resumed_on_three_ranks_is_bit_for_bit_the_unbroken_run(found):
    """The sum of three numbers depends on their order, and so on DDP's buckets."""
    assert found["resumed"]["resumed"] == found["resumed"]["unbroken"]


@pytest.mark.parametrize(("rows", "world"), [(8, 2), (8, 3), (2, 4), (64, 32)])
def test_the_ranks_rows_together_are_the_batch_in_order(rows, world):
    batch = make_batch(tuple(range(1, rows + 1)), width=96)
    parts: list[Batch] = [Ranks(rank, world).rows_of(batch) for rank in range(world)]
    assert np.concatenate([part.rows for part in parts]).tolist() == list(range(rows))
    assert np.array_equal(np.concatenate([part.labels for part in parts]), batch.labels)


def test_a_mesh_of_processes_that_are_not_there_is_refused(tmp_path):
    config = config_for(write_tiny_base(tmp_path / "base"), device__mesh_shape=(1, 2))
    with pytest.raises(MachineError, match="needs 2 processes, this is one of 1"):
        ranks_of(config)
