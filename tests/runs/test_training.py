"""Every recipe, made small: what one command leaves, and that a run which was stopped, however it was stopped, and
resumed equals the unbroken run bit for bit.
"""

from __future__ import annotations

import json
import math
import os
import signal
from collections.abc import Callable, Iterable, Iterator
from pathlib import Path

import pytest
from click.testing import CliRunner

pytest.importorskip("torch", reason="the CPU engine is torch")

from common import config as configs
from common import hardware
from common.errors import Stopped
from common.train import metrics
from engines.cpu.engine import TorchCPU
from tests.doubles.tiny_recipe import tiny_scratch
from tests.support.runs import folders, log, manifest, outcome, run_tiny
from tests.support.shipped import FOLDERS
from tools.cli import main
from tools.verify.tiny_base import write_tiny_base

STEPS = 6
SMALL = (
    "training_config.precision=fp32",
    "eval_config.every=2",
    "eval_config.max_new_tokens=1",
    "checkpoint_config.every=4",
    "device_config.threads=1",
    "device_config.compile=never",
    "training_config.scheduler.warmup_steps=1",
    "device_config.mesh_shape=[1,1]",  # several processes: tests/runs/test_data_parallel.py
    "data_config.max_length=64",
)


@pytest.fixture(scope="module", params=FOLDERS, ids=lambda path: path.name)
def recipe(request) -> Path:
    return request.param


@pytest.fixture(scope="module", autouse=True)
def home(recipe, tmp_path_factory) -> Iterator[None]:
    """Token files are made once for all runs of a recipe, whose builder is seen at work."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("RECIPES_HOME", str(tmp_path_factory.mktemp("home")))
        patch.setattr(os, "fsync", lambda descriptor: None)  # no test pulls the plug, and the disk is slow
        yield


@pytest.fixture(scope="module")
def small(recipe, tmp_path_factory) -> tuple[str, ...]:
    """What makes the recipe small: a tiny base where it starts from one, else a tiny model and corpus."""
    config = configs.load(recipe, hardware.get("cpu"))
    if config.model.init == "random":
        return (*SMALL, *tiny_scratch(tmp_path_factory.mktemp("corpus") / "play.txt"))
    if (config.data.source or "").startswith("hub:"):
        pytest.skip("its rows come from the Hub, and no test uses the network")
    base = write_tiny_base(tmp_path_factory.mktemp("base") / "tiny", context=16384)  # a fork may ask what is long
    return (*SMALL, f"model_config.base={base}")


@pytest.fixture(scope="module")
def unbroken(recipe, small, tmp_path_factory) -> Path:
    """A run by `recipe run`."""
    out = tmp_path_factory.mktemp("unbroken")
    command("run", str(recipe), "--hw", "cpu", "--steps", str(STEPS), "--out", str(out), *sets(small))
    return folders(out)[0]


@pytest.fixture
def go(recipe, small, tmp_path) -> Callable[..., Path]:
    def run(*overrides: str, resume: str = "auto", **options) -> Path:
        return run_tiny(recipe, tmp_path, *small, *overrides, steps=STEPS, resume=resume, export=False, **options)

    return run


# --- what one command leaves ------------------------------------------------------------------------------------------


def test_its_data_is_built_once_and_holds_no_error(recipe, small, unbroken):
    """Errors only: a fork may be born with warnings, of a licence that is still to be named, say."""
    assert "reused (nothing changed)" in command("data", "build", str(recipe), "--hw", "cpu", *sets(small))
    assert command("data", "check", str(recipe), "--hw", "cpu", *sets(small))


def test_it_trains_and_evaluates(unbroken):
    records = outcome(unbroken)["metrics"]
    assert [record["step"] for record in records if "loss" in record] == list(range(1, STEPS + 1))
    assert [record["step"] for record in records if "eval_loss" in record] == [0, 2, 4, 6]
    assert all(math.isfinite(record.get("loss", record.get("eval_loss"))) for record in records)
    assert manifest(unbroken)["exit_reason"] == "done"


def test_every_evaluation_prompt_has_its_answers(unbroken):
    entries = metrics.read(unbroken / "evaluations.jsonl")
    prompts = [sample["prompt"] for sample in entries[0]["samples"]]
    assert prompts
    assert all([sample["prompt"] for sample in entry["samples"]] == prompts for entry in entries)
    text = (unbroken / "samples.md").read_text()
    assert all(prompt.splitlines()[0] in text for prompt in prompts)


def test_the_trained_model_answers(unbroken):
    assert command("generate", str(unbroken), "--prompt", "What is it?", "--max-new-tokens", "2").strip()


def test_its_export_is_proven_and_checks_again(unbroken):
    assert manifest(unbroken)["export"]["status"] == "verified"
    assert command("export", str(unbroken), "--check")


def test_its_report_is_written(recipe, unbroken):
    assert recipe.name in (unbroken / "report.html").read_text()


# --- stopped and resumed ----------------------------------------------------------------------------------------------


def test_resume_never_twice_gives_the_same_numbers(unbroken, go):
    again = go(resume="never")
    assert outcome(again) == outcome(unbroken)
    assert again.name != unbroken.name
    assert [record["step"] for record in outcome(again)["metrics"]] == [0, 1, 2, 2, 3, 4, 4, 5, 6, 6]


def test_stopped_twice_on_request_and_resumed(unbroken, go, tmp_path):
    for stop in (2, 3):
        with pytest.raises(Stopped, match=f"after step {stop}") as stopped:
            go(stop_at=stop)
        assert stopped.value.code == 75
        assert outcome(folders(tmp_path)[0])["step"] == stop
    folder = go()
    assert [folder] == folders(tmp_path), "auto goes on in the same folder"
    assert outcome(folder) == outcome(unbroken)
    assert [event["step"] for event in manifest(folder)["resumed"]] == [2, 3]
    assert manifest(folder)["exit_reason"] == "done"


@pytest.mark.parametrize("name", ["SIGTERM", "SIGINT"])
def test_stopped_by_a_signal_and_resumed(unbroken, go, tmp_path, monkeypatch, name):
    step_of = TorchCPU.train_step

    def interrupted(self, batches, rate, step):
        if step == 3:
            os.kill(os.getpid(), signal.Signals[name])
        return step_of(self, batches, rate, step)

    monkeypatch.setattr(TorchCPU, "train_step", interrupted)
    with pytest.raises(Stopped, match=f"stopped by {name} after step 3, which is saved"):
        go()
    monkeypatch.undo()
    assert manifest(folders(tmp_path)[0])["exit_reason"].startswith("stopped: ")
    assert outcome(go()) == outcome(unbroken)


def test_a_crash_loses_the_steps_after_the_checkpoint_and_nothing_else(unbroken, go, tmp_path, monkeypatch):
    step_of = TorchCPU.train_step

    def crashing(self, batches, rate, step):
        if step == 6:
            raise RuntimeError("a crash")
        return step_of(self, batches, rate, step)

    monkeypatch.setattr(TorchCPU, "train_step", crashing)
    with pytest.raises(RuntimeError):
        go()
    monkeypatch.undo()
    assert manifest(folders(tmp_path)[0])["exit_reason"] == "failed: RuntimeError: a crash"
    assert outcome(folders(tmp_path)[0])["metrics"][-1]["step"] == 5, "step 5 is on record, step 4 was saved"
    folder = go()
    assert outcome(folder) == outcome(unbroken)
    assert manifest(folder)["resumed"][0]["step"] == 4


def test_a_branch_from_a_checkpoint_equals_the_unbroken_run(unbroken, go, tmp_path):
    folder = go(resume=str(unbroken / "checkpoints" / "step-00000004"))
    assert folder.parent == tmp_path
    assert manifest(folder)["parent"] == f"{unbroken.name}/step-00000004"
    assert outcome(folder) == outcome(unbroken)


def test_a_damaged_newest_checkpoint_costs_steps_and_no_bit(unbroken, go, tmp_path):
    go("checkpoint_config.every=2")
    folder = folders(tmp_path)[0]
    reopen(folder)
    (folder / "checkpoints" / "step-00000006" / "optimizer.safetensors").write_bytes(b"damaged")
    assert outcome(go("checkpoint_config.every=2")) == outcome(unbroken)
    assert "skipped step-00000006: optimizer.safetensors is damaged" in log(folder)
    assert manifest(folder)["resumed"][0]["step"] == 4


def test_one_batch_of_8_equals_4_times_2_accumulated(go):
    """The loss is that of the whole batch, whatever it is split into: equal to fp32 rounding."""
    whole = go("training_config.batch_size=8", resume="never")
    parts = go("training_config.batch_size=8", "training_config.micro_batch_size=2", resume="never")
    one, four = outcome(whole), outcome(parts)
    for key in ("loss", "grad_norm", "eval_loss"):
        found = [[r[key] for r in run["metrics"] if key in r] for run in (one, four)]
        assert found[0]
        assert found[0] == pytest.approx(found[1], rel=1e-4), key
    assert [r["supervised_tokens"] for r in one["metrics"] if "loss" in r] == [
        r["supervised_tokens"] for r in four["metrics"] if "loss" in r
    ]
    assert manifest(whole)["training_digest"] == manifest(parts)["training_digest"], "the split is no other training"


def sets(overrides: Iterable[str]) -> list[str]:
    return [word for override in overrides for word in ("--set", override)]


def command(*words: str) -> str:
    """What `recipe WORDS` prints, in this process. Raises what it raises."""
    done = CliRunner().invoke(main.recipe, words, env={"HW": None})
    if done.exception:
        raise done.exception
    assert done.exit_code == 0
    return done.output


def reopen(folder: Path) -> None:
    """As if the run had been killed after its last checkpoint."""
    path = folder / "manifest.json"
    path.write_text(json.dumps({**json.loads(path.read_text()), "exit_reason": "running", "end": None}))
