"""`recipe verify ddp` on the double of a two-chip board, and with the defects that it is there for."""

from __future__ import annotations

import contextlib
import json
import os
import sys
from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest

pytest.importorskip("torch", reason="the double computes with torch")

from common.data.tokens import Batch
from engines.ttml.engine import TTML
from tests.doubles.machines import MACHINES, fake_machine
from tests.doubles.tiny_recipe import FROM_SCRATCH, tiny_scratch
from tests.support.boards import DESCRIPTOR, machine
from tests.support.engines import make_batch
from tests.support.shipped import that_name
from tools.checklist import CheckEnded
from tools.cli import main
from tools.verify.ddp import LINES as LINES_OF_DDP
from tools.verify.ddp import Curve

PROMISED = [recipe for recipe, _board in that_name("tests/runs/test_verify_ddp.py")]
LINES = ("losses", "gradients", "replicas", "held-out", "control")
Verify = Callable[..., tuple[int, str]]


@pytest.fixture
def verify(tmp_path, monkeypatch, capsys) -> Verify:
    monkeypatch.setenv("RECIPES_HOME", str(tmp_path / "home"))
    monkeypatch.setenv("RECIPES_SYSFS_ROOT", str(fake_machine(tmp_path / "n300", MACHINES["n300"])))
    monkeypatch.setattr(os, "fsync", lambda descriptor: None)  # no test pulls the plug, and the disk is slow
    overrides = [word for text in tiny_scratch(tmp_path / "play.txt") for word in ("--set", text)]

    def command(
        *options: str, recipe: Path = FROM_SCRATCH, generation: str = "C", named: bool = True, **faults: Any
    ) -> tuple[int, str]:
        words = ["recipe", "verify", "ddp", "--recipe", str(recipe), "--hw", "n300", "--steps", "3", "--no-container"]
        words += [*overrides, *options]
        monkeypatch.setattr(sys, "argv", words)
        with machine(tmp_path, 2, generation, **faults):
            if not named:
                del os.environ["TT_MESH_GRAPH_DESC_PATH"]
            with pytest.raises(SystemExit) as ended:
                main.main()
        said = capsys.readouterr()
        return int(ended.value.code or 0), said.out + said.err

    return command


def verdicts(said: str) -> dict[str, str]:
    return {line["id"]: line["verdict"] for line in json.loads(said[: said.rindex("}") + 1])["lines"]}


@pytest.mark.parametrize("recipe", PROMISED or [FROM_SCRATCH], ids=lambda path: path.name)
def test_two_chips_train_as_one(verify, recipe):
    """Every recipe whose results name this file; without one, the tests' own."""
    code, said = verify(recipe=recipe)
    assert code == 0, said
    assert "PASS: the same bits on 2 devices after each of 3 steps" in said
    assert "PASS: the devices' parameters differ after step 1" in said
    assert "strong scaling, one batch for all:" in said


def test_a_descriptor_that_nobody_named_is_known_before_the_one_device_is_opened(verify, tmp_path, monkeypatch):
    """As on a board outside of its image. Take refuse_launch out of Comparison: the two devices never find each other.

    Generation B, as no later one needs it: those can be told to look again.
    """
    folder = tmp_path / "tt_metal/fabric/mesh_graph_descriptors"
    folder.mkdir(parents=True)
    (folder / "n300_mesh_graph_descriptor.textproto").write_text(DESCRIPTOR.format(devices=2))
    monkeypatch.setenv("TT_METAL_RUNTIME_ROOT", str(tmp_path))
    code, said = verify("--json", generation="B", named=False)
    assert code == 0, said
    assert verdicts(said) == dict.fromkeys(LINES, "pass")


def test_json_has_every_line_and_figure(verify):
    code, said = verify("--json", "--weak")
    assert code == 0, said
    assert verdicts(said) == dict.fromkeys(LINES, "pass")
    speed = json.loads(said)["speed"]
    assert speed["efficiency"] == pytest.approx(speed["all"] / speed["one"] / 2)
    assert 0 <= speed["all_reduce_share"] < 1


def test_a_backend_that_does_not_sum_its_gradients_is_caught(verify, monkeypatch):
    def off(self: Any, _on: bool) -> None:
        self.grad_sync, self.check_replicas = False, False

    monkeypatch.setattr(TTML, "set_grad_sync", off)
    code, said = verify()
    assert code == 6, said
    assert "FAIL: the parameters of the 2 devices differ after step 1" in said
    assert "is not the training of one device: " in said


def test_a_check_that_sees_nothing_fails_the_control(verify, monkeypatch):
    monkeypatch.setattr(TTML, "replicas", lambda self: ["the same"] * self.devices)
    code, said = verify("--json")
    assert code == 6
    assert verdicts(said) == {**dict.fromkeys(LINES, "pass"), "control": "fail"}


def test_a_gradient_of_another_size_is_caught_though_adamw_forgives_it(verify, monkeypatch):
    backward = TTML._backward
    monkeypatch.setattr(
        TTML, "_backward", lambda self, batch, supervised: backward(self, batch, supervised // self.devices)
    )
    code, said = verify("--json")
    assert code == 6
    assert verdicts(said) == {**dict.fromkeys(LINES, "pass"), "gradients": "fail"}


def test_rows_that_one_device_does_not_have_are_caught(verify, monkeypatch):
    step_of = TTML.train_step

    def other_rows(self: Any, batches: list[Batch], rate: float, step: int) -> Any:
        other = make_batch(seed=9, width=64, lengths=(60,) * 8, vocab=40)
        return step_of(self, [other] if self.devices > 1 else batches, rate, step)

    monkeypatch.setattr(TTML, "train_step", other_rows)
    code, said = verify("--json")
    assert code == 6
    assert verdicts(said)["losses"] == "fail"
    assert verdicts(said)["held-out"] == "skipped"


@pytest.mark.parametrize(("step", "apart", "holds"), [(8, 0.029, True), (8, 0.031, False), (100, 0.1, True)])
def test_what_is_allowed_grows_with_the_steps_and_not_within_the_first(step, apart, holds):
    """With one bound for any number of steps, --steps 100 fails a sound board; with a wider one, 8 steps see less."""
    curves = [Curve(losses=[3.0] * 100, norms=[1.0] * 100) for _ in range(2)]
    curves[1].losses[step - 1] += apart
    curves[1].norms[step - 1] += apart * 3.3
    found: Any = SimpleNamespace(
        one=curves[0], several=curves[1], config=SimpleNamespace(training=SimpleNamespace(precision="bf16"))
    )
    for line in LINES_OF_DDP[:2]:
        expected = contextlib.nullcontext() if holds else pytest.raises(CheckEnded, match=f"at step {step}")
        with expected:
            assert f"at step {step}" in line.check(found)


def test_one_device_has_nothing_to_compare(verify):
    code, said = verify("--set", "device_config.mesh_shape=[1,1]")
    assert code == 2
    assert "n300 has one device" in said
