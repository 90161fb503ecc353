"""A run from its command to its folder; how its ends are recorded, and what a resume refuses, keeps and says."""

from __future__ import annotations

import errno
import json
import os
import shutil
import signal
import sys
import types
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest

pytest.importorskip("torch", reason="the CPU engine is torch")

from common.errors import DataError, MachineError, Stopped, TrainingError, UsageError
from common.files import try_lock
from common.train import checkpoint, metrics
from common.train.run import Run
from engines.cpu.engine import TorchCPU
from tests.doubles.tiny_recipe import make_tiny_recipe
from tests.support.runs import folders, log, manifest, outcome, run_tiny
from tools.launch.after_run import STEPS, after_run, train_here
from tools.launch.resolve import resolve

STEP_KEYS = ["step", "loss", "lr", "grad_norm", "tokens", "supervised_tokens", "seconds"]
EVAL_KEYS = ["step", "eval_loss", "eval_loss_se", "eval_tokens"]


@pytest.fixture(scope="module", autouse=True)
def home(tmp_path_factory) -> Iterator[None]:
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("RECIPES_HOME", str(tmp_path_factory.mktemp("home")))
        patch.setattr(os, "fsync", lambda descriptor: None)  # no test pulls the plug, and the disk is slow
        yield


@pytest.fixture(scope="module")
def shared_recipe(tiny_base, tmp_path_factory) -> Path:
    folder = make_tiny_recipe(tmp_path_factory.mktemp("recipe") / "tiny", tiny_base)
    config = json.loads((folder / "config.yaml").read_text())
    config["eval_config"]["max_new_tokens"] = 2
    (folder / "config.yaml").write_text(json.dumps(config))
    return folder


@pytest.fixture(scope="module")
def finished(shared_recipe, tmp_path_factory) -> Path:
    """An unbroken run; read only."""
    return run_tiny(shared_recipe, tmp_path_factory.mktemp("finished"), export=False)


@pytest.fixture
def recipe(shared_recipe, tmp_path) -> Path:
    """A copy to change."""
    return shutil.copytree(shared_recipe, tmp_path / "tiny")


@pytest.fixture
def go(recipe, tmp_path) -> Callable[..., Path]:
    """Run the copy; `auto` unless told otherwise."""

    def run(*overrides: str, resume: str | Path = "auto", **options: Any) -> Path:
        return run_tiny(recipe, tmp_path / "out", *overrides, resume=str(resume), export=False, **options)

    return run


def stop(go: Callable[..., Path], at: int, *overrides: str, **options: Any) -> Path:
    """Run to step `at`; return the folder."""
    with pytest.raises(Stopped) as stopped:
        go(*overrides, stop_at=at, **options)
    return Path(stopped.value.where or "")


# --- what a run leaves --------------------------------------------------------------------------------------------


def test_the_folder_holds_what_a_run_is_made_of(finished):
    names = {path.name for path in finished.iterdir()} - {".lock"}
    assert names == {
        "config.resolved.yaml",
        "manifest.json",
        "metrics.jsonl",
        "evaluations.jsonl",
        "train.log",
        "samples.md",
        "checkpoints",
    }
    assert [path.name for path in sorted((finished / "checkpoints").iterdir())] == [
        "latest",
        "step-00000002",
        "step-00000004",
        "step-00000006",
    ]


def test_metrics_have_one_line_a_step_and_one_an_evaluation(finished):
    records = metrics.read(finished / "metrics.jsonl")
    assert [record["step"] for record in records] == [0, 1, 2, 3, 3, 4, 5, 6, 6]
    for record in records:
        assert list(record) == (EVAL_KEYS if "eval_loss" in record else STEP_KEYS)
    text = (finished / "metrics.jsonl").read_text()
    assert all(json.loads(line, parse_constant=pytest.fail) for line in text.splitlines())


def test_training_lowers_the_held_out_loss(finished):
    first, *_, last = (r["eval_loss"] for r in metrics.read(finished / "metrics.jsonl") if "eval_loss" in r)
    assert last < first - 0.2


def test_the_manifest_says_what_ran(finished):
    values = manifest(finished)
    assert values["format"] == 1
    assert values["exit_reason"] == "done"
    assert values["start"] <= values["trained"] <= values["end"]
    assert values["backend"]["backend"] == "torch-cpu"
    assert values["backend"]["threads"] == 1
    assert values["backend"]["compiled"] is False
    assert values["base_parameters"] == 94528
    assert values["reasons"]["precision"] == "as configured"
    assert {"torch", "transformers", "numpy", "python"} <= set(values["backend"]["versions"])
    for key in ("training_digest", "config_digest", "tokenizer_sha256", "metrics_sha256"):
        assert len(values[key]) == 64
    assert len(values["data"]["tokens_sha256"]) == 64
    assert values["parent"] is None
    assert values["resumed"] == []


def test_samples_show_every_answer_under_its_prompt(finished):
    text = (finished / "samples.md").read_text()
    assert text.count("## ") == 4
    assert [text.count(f"**{name}**") for name in ("untrained", "step 3", "step 6")] == [4, 4, 4]


def test_the_log_has_the_lines_of_the_screen(finished):
    assert "held-out loss after step 6" in log(finished)
    assert "tiny on cpu" in log(finished), "lines from before the folder was there, too"


def test_the_state_of_each_checkpoint_names_its_training(finished):
    found = checkpoint.verify(finished / "checkpoints" / "step-00000004")
    assert found.state["training_digest"] == manifest(finished)["training_digest"]
    assert found.state["tokens_sha256"] == manifest(finished)["data"]["tokens_sha256"]


def test_the_loop_s_own_numbers_are_those_of_the_engine(finished):
    lines = [r for r in metrics.read(finished / "metrics.jsonl") if "loss" in r]
    assert all(0 < r["supervised_tokens"] < r["tokens"] and r["seconds"] > 0 for r in lines)
    assert lines[-1]["lr"] == pytest.approx(0.001)


# --- stopping -----------------------------------------------------------------------------------------------------


def test_stop_at_a_step_that_the_run_has_passed_stops_at_once(go):
    folder = stop(go, 3)
    assert stop(go, 3) == folder
    assert stop(go, 2) == folder
    assert outcome(folder)["step"] == 3


def test_stop_at_the_last_step_leaves_only_the_end(go, finished):
    folder = stop(go, 6)
    assert manifest(folder)["exit_reason"].startswith("stopped: stopped by --stop-at 6")
    assert "trained" not in manifest(folder)
    assert go() == folder
    assert outcome(folder) == outcome(finished)
    assert manifest(folder)["exit_reason"] == "done"


def test_stop_at_a_step_that_is_none_is_refused(go):
    with pytest.raises(UsageError, match="--stop-at 7 is not a step of this run of 6"):
        go(stop_at=7)


def test_a_second_signal_ends_without_saving(go, tmp_path, monkeypatch):
    step_of = TorchCPU.train_step

    def interrupted(self, batches, rate, step):
        for _ in range(2 * (step == 3)):
            os.kill(os.getpid(), signal.SIGINT)
        return step_of(self, batches, rate, step)

    monkeypatch.setattr(TorchCPU, "train_step", interrupted)
    with pytest.raises(KeyboardInterrupt):
        go()
    (folder,) = folders(tmp_path / "out")
    assert outcome(folder)["step"] == 2
    assert "KeyboardInterrupt" in manifest(folder)["exit_reason"]


def signal_at(monkeypatch, call: str) -> None:
    original = getattr(Run, call)

    def interrupted(self, *given, **named):
        os.kill(os.getpid(), signal.SIGTERM)
        return original(self, *given, **named)

    monkeypatch.setattr(Run, call, interrupted)


def test_a_signal_after_the_steps_ends_with_75_and_loses_nothing(finished, go, monkeypatch, tmp_path):
    signal_at(monkeypatch, "finish")
    with pytest.raises(Stopped, match=r"stopped by SIGTERM .*before the export") as stopped:
        go()
    assert stopped.value.code == 75
    monkeypatch.undo()
    assert outcome(go()) == outcome(finished)
    assert len(folders(tmp_path / "out")) == 1, "it went on in its folder"


def test_a_signal_between_two_steps_after_the_run_ends_with_75_and_what_is_left_is_done_next(go, monkeypatch):
    did: list[str] = []

    def stopped_meanwhile(run, _manifest, _console):
        did.append(f"export of step {run.step}")
        os.kill(os.getpid(), signal.SIGTERM)

    monkeypatch.setitem(STEPS, "export", stopped_meanwhile)
    monkeypatch.setitem(STEPS, "before_after", lambda *_: did.append("before_after"))
    folder = go()
    with pytest.raises(Stopped, match=r"stopped by SIGTERM .*before the step 'before_after'") as stopped:
        after_run(folder, ("export", "before_after"))
    assert stopped.value.code == 75
    assert manifest(folder)["exit_reason"].startswith("stopped: ")
    assert did == ["export of step 6"]
    after_run(folder, ("before_after",))
    assert manifest(folder)["exit_reason"] == "done"
    assert did[1:] == ["before_after"]


def test_a_signal_before_the_first_step_has_nothing_to_save_and_does_not_say_so(go, monkeypatch):
    signal_at(monkeypatch, "evaluate")
    with pytest.raises(KeyboardInterrupt):
        go()


def test_a_signal_before_the_first_step_of_a_resumed_run_ends_with_75(finished, go, monkeypatch):
    stop(go, 2)
    signal_at(monkeypatch, "evaluate")
    with pytest.raises(Stopped, match="stopped by SIGTERM before step 3"):
        go()
    monkeypatch.undo()
    assert outcome(go()) == outcome(finished)


def test_signals_are_given_back_after_the_loop(go):
    before = signal.getsignal(signal.SIGTERM), signal.getsignal(signal.SIGINT)
    go()
    assert (signal.getsignal(signal.SIGTERM), signal.getsignal(signal.SIGINT)) == before


def test_a_run_killed_after_its_last_step_only_finishes(go, finished, monkeypatch):
    folder = go()
    values = {**manifest(folder), "exit_reason": "running", "end": None}
    (folder / "manifest.json").write_text(json.dumps(values))
    monkeypatch.setattr(TorchCPU, "train_step", pytest.fail)
    monkeypatch.setattr(TorchCPU, "eval_nll", pytest.fail)
    assert go() == folder
    assert manifest(folder)["exit_reason"] == "done"
    assert outcome(folder) == outcome(finished)
    assert not list((folder / "checkpoints").glob("*.replaced*")), "nor is what was saved saved again"


# --- an epoch's seam ----------------------------------------------------------------------------------------------


@pytest.mark.parametrize(("batch", "stops"), [(7, (2,)), (4, (3, 4))], ids=["at the seam", "around it"])
def test_resumed_at_an_epoch_seam(go, batch, stops):
    """14 training rows: with batches of 7 the second epoch begins at step 3, with 4 within step 4."""
    size = f"training_config.batch_size={batch}"
    unbroken = outcome(go(size, resume="never"))
    for at in stops:
        stop(go, at, size)
    assert outcome(go(size)) == unbroken


# --- which run is resumed -----------------------------------------------------------------------------------------


def test_a_finished_run_is_not_resumed(go):
    assert go() != go()


def test_a_run_that_ended_before_it_saved_is_not_taken_for_the_one_that_follows(recipe, tmp_path, monkeypatch):
    """The next launch looks into its folder, finds nothing to go on from, and trains in a folder of its own."""

    def trained(out: Path) -> str:
        launch = resolve(recipe, hw="cpu", out=out, command=("recipe", "run", "tiny"))
        train_here(launch)
        return launch.run

    with monkeypatch.context() as patch:
        patch.setattr(TorchCPU, "train_step", lambda *_: (_ for _ in ()).throw(TrainingError("it ends here")))
        with pytest.raises(TrainingError, match="it ends here"):
            trained(tmp_path / "out")
    run = trained(tmp_path / "out")
    assert len(folders(tmp_path / "out")) == 2
    assert manifest(tmp_path / "out" / run)["exit_reason"] == "done"
    assert [path.parent.name for path in (tmp_path / "out").glob("*/.lock") if run in path.read_text()] == [run]


def test_a_run_of_another_training_is_not_resumed(go):
    folder = stop(go, 3)
    other = go("training_config.learning_rate=0.02")
    assert other != folder
    assert manifest(other)["resumed"] == []
    assert go() == folder


def test_a_running_run_is_not_touched(go, tmp_path):
    folder = stop(go, 3)
    before = {path: path.read_bytes() for path in folder.rglob("*") if path.is_file() and path.name != ".lock"}
    lock = try_lock(folder)
    assert lock is not None
    with lock:
        other = go()
    assert other != folder
    assert f"{folder.name} has the same training and is running: not touched" in log(other)
    assert {p: p.read_bytes() for p in folder.rglob("*") if p.is_file() and p.name != ".lock"} == before
    assert go() == folder, "once it is dead it can go on"


def test_a_run_without_any_checkpoint_is_left_and_a_new_one_begun(go, finished):
    folder = stop(go, 1)
    shutil.rmtree(folder / "checkpoints")
    other = go()
    assert other != folder
    assert outcome(other) == outcome(finished)


@pytest.mark.parametrize("text", ["{", "[1]", '{"exit_reason": "running"}', '{"format": 2}'])
def test_foreign_folders_among_the_runs_are_no_obstacle(go, tmp_path, text):
    (tmp_path / "out" / "20990101T000000Z-strange").mkdir(parents=True)
    (tmp_path / "out" / "20990101T000000Z-strange" / "manifest.json").write_text(text)
    go()


def test_all_checkpoints_damaged_is_a_new_run_that_says_so(go):
    folder = stop(go, 3)
    for path in (folder / "checkpoints").glob("*/model.safetensors"):
        path.unlink()
    for path in (folder / "checkpoints").glob("*/adapter_model.safetensors"):
        path.unlink()
    other = go()
    assert other != folder
    assert log(other).count("is missing") == 2


# --- what a resume refuses, keeps and says ------------------------------------------------------------------------


def change_a_row(recipe: Path) -> None:
    path = recipe / "data" / "rows.jsonl"
    path.write_text(path.read_text().replace("steps downhill", "runs uphill"))


def test_changed_data_are_refused_on_an_automatic_resume(go, recipe):
    stop(go, 3)
    change_a_row(recipe)
    with pytest.raises(DataError, match="data changed since step 3") as caught:
        go()
    assert caught.value.code == 3
    assert "--resume never" in (caught.value.todo or "")
    go(resume="never")


def test_changed_data_are_refused_for_a_path_and_can_be_accepted(go, recipe):
    folder = stop(go, 3)
    change_a_row(recipe)
    with pytest.raises(DataError, match="data changed") as caught:
        go(resume=folder)
    assert "--accept-changes" in (caught.value.todo or "")
    branch = go(resume=folder, accept_changes=True)
    assert "accepted: other tokens" in manifest(branch)["resumed"][0]["notes"]
    steps = [record["step"] for record in metrics.read(branch / "evaluations.jsonl")]
    assert steps == [6], "evaluations of other rows cannot be compared, and step 0 cannot be made again"
    assert manifest(branch)["exit_reason"] == "done"


def test_a_changed_training_is_refused_for_a_path_and_can_be_accepted(go):
    folder = stop(go, 3)
    change = "training_config.learning_rate=0.02"
    with pytest.raises(UsageError, match=r"learning_rate: 0.01 -> 0.02") as caught:
        go(change, "eval_config.every=2", resume=folder)
    assert caught.value.code == 2
    assert "eval_config" not in caught.value.what, "what is no training is no reason"
    assert "--accept-changes" in (caught.value.todo or "")
    branch = go(change, resume=folder / "checkpoints" / "step-00000002", accept_changes=True)
    values = manifest(branch)
    assert values["parent"] == f"{folder.name}/step-00000002"
    assert any("learning_rate: 0.01 -> 0.02" in note for note in values["resumed"][0]["notes"])
    assert [r["step"] for r in metrics.read(branch / "metrics.jsonl") if "lr" in r] == [1, 2, 3, 4, 5, 6]


def test_a_longer_run_from_a_finished_one_is_another_training(go, finished):
    with pytest.raises(UsageError, match="max_steps: 6 -> 8"):
        go(resume=finished, steps=8)
    branch = go(resume=finished, steps=8, accept_changes=True)
    assert outcome(branch)["step"] == 8


def test_a_branch_from_a_finished_run_has_a_checkpoint_of_its_own(go, finished):
    branch = go(resume=finished)
    assert outcome(branch) == outcome(finished)
    assert checkpoint.steps_saved(branch / "checkpoints") == [6]


def test_a_branch_leaves_its_parent_as_it_was(go, finished):
    before = {path: path.read_bytes() for path in finished.rglob("*") if path.is_file()}
    go(resume=finished / "checkpoints" / "step-00000002")
    assert {path: path.read_bytes() for path in finished.rglob("*") if path.is_file()} == before


def test_a_branch_that_was_stopped_is_resumed_in_its_folder_and_exactly(go, finished):
    folder = stop(go, 4, resume=finished / "checkpoints" / "step-00000002")
    assert go() == folder
    assert outcome(folder) == outcome(finished)
    assert "not bit-exact" not in log(folder), "the same command: nothing changed"


def test_accepting_changes_needs_a_path(go):
    for resume in ("auto", "never"):
        with pytest.raises(UsageError, match="--accept-changes"):
            go(resume=resume, accept_changes=True)


@pytest.mark.parametrize("where", ["", "data", "config.yaml"])
def test_a_path_that_is_no_run_is_refused(go, recipe, where):
    with pytest.raises(UsageError, match="no run and no checkpoint there"):
        go(resume=recipe / where)


def test_a_path_to_a_damaged_checkpoint_is_refused(go, finished, tmp_path):
    copy = shutil.copytree(finished, tmp_path / "copy")
    (copy / "checkpoints" / "step-00000004" / "optimizer.safetensors").write_bytes(b"")
    with pytest.raises(MachineError, match=r"optimizer.safetensors is damaged"):
        go(resume=copy / "checkpoints" / "step-00000004")


def test_another_split_of_the_batch_is_said_and_goes_on(go, finished):
    folder = stop(go, 3)
    assert go("training_config.micro_batch_size=2") == folder
    notes = manifest(folder)["resumed"][0]["notes"]
    assert "changed: training_config.micro_batch_size: 4 -> 2" in notes
    assert notes[-1] == "not bit-exact from here"
    assert notes[-1] in log(folder)
    ours, theirs = ([r["loss"] for r in outcome(path)["metrics"] if "loss" in r] for path in (folder, finished))
    assert ours == pytest.approx(theirs, rel=1e-4)


def test_other_threads_are_said(go):
    folder = stop(go, 3)
    go("device_config.threads=2")
    assert manifest(folder)["resumed"][0]["notes"] == [
        "changed: device_config.threads: 1 -> 2",
        "not bit-exact from here",
    ]


def test_threads_that_nobody_configured_stay_what_they_were(go):
    folder = stop(go, 3)
    go("device_config.threads=null")
    assert manifest(folder)["backend"]["threads"] == 1
    assert manifest(folder)["resumed"][0]["notes"] == []


def test_the_decision_to_compile_is_kept_and_said(go):
    folder = stop(go, 3)
    go("device_config.compile=always")
    assert manifest(folder)["backend"]["compiled"] is False
    assert manifest(folder)["resumed"][0]["notes"] == [
        "device_config.compile is decided once in a run: it goes on eager"
    ]


def test_what_has_no_effect_on_the_bits_is_only_said(go, finished):
    folder = stop(go, 3)
    go("logging_config.log_every=5", "checkpoint_config.keep_last=1")
    notes = manifest(folder)["resumed"][0]["notes"]
    assert len(notes) == 2
    assert all(note.startswith("changed: ") for note in notes)
    assert outcome(folder) == outcome(finished)


def test_other_prompts_on_resume_are_answered_from_there_on(go):
    folder = stop(go, 3)
    go('eval_config.prompts=["What is a fox?", "Something new?"]')
    text = (folder / "samples.md").read_text()
    assert text.count("**step 6**") == 2
    assert "Something new?" in text


# --- what a run refuses -------------------------------------------------------------------------------------------


def test_a_ruined_model_is_not_evaluated_as_if_it_were_one(go, tmp_path):
    with pytest.raises(TrainingError, match=r"not finite|held-out loss after step 6 is nan"):
        go("training_config.learning_rate=1e30", "training_config.scheduler.warmup_steps=6")
    (folder,) = folders(tmp_path / "out")
    assert manifest(folder)["exit_reason"].startswith("failed: ")
    assert "NaN" not in (folder / "metrics.jsonl").read_text()


def test_a_last_step_that_ruins_the_model_is_a_failure(go, tmp_path, monkeypatch):
    update = TorchCPU._update

    def ruin(self, rate):
        update(self, float("nan") if self.steps_done == 5 else rate)

    monkeypatch.setattr(TorchCPU, "_update", ruin)
    with pytest.raises(TrainingError, match="held-out loss after step 6 is nan"):
        go()
    assert outcome(folders(tmp_path / "out")[0])["step"] == 4, "what was ruined is not saved"


def test_nothing_held_out_is_refused(go):
    with pytest.raises(DataError, match="no row is held out"):
        go("data_config.held_out_share=0")


def test_rows_longer_than_the_model_are_refused(go, tiny_base, tmp_path):
    short = shutil.copytree(tiny_base, tmp_path / "short")
    config = json.loads((short / "config.json").read_text())
    (short / "config.json").write_text(json.dumps({**config, "max_position_embeddings": 64}))
    with pytest.raises(DataError, match="needs 96 tokens, the model has positions for 64") as caught:
        go(f"model_config.base={short}")
    assert "data_config.max_length=64" in (caught.value.todo or "")
    go(f"model_config.base={short}", "data_config.max_length=64")


@pytest.mark.parametrize("content", [b"", b"damaged" * 40])
def test_weights_that_cannot_be_read_are_one_message(go, tiny_base, tmp_path, content):
    broken = shutil.copytree(tiny_base, tmp_path / "broken")
    (broken / "model.safetensors").write_bytes(content)
    with pytest.raises(MachineError, match=r"model.safetensors"):
        go(f"model_config.base={broken}")


@pytest.mark.parametrize(
    "what", ["metrics.jsonl", "evaluations.jsonl", "samples.md", "manifest.json", "train.log", "config.resolved.yaml"]
)
def test_no_room_for_any_file_of_a_run_is_one_message(go, monkeypatch, what):
    real = Path.open

    def full(self: Path, mode: str = "r", *arguments: Any, **options: Any):
        if what in self.name and mode != "r":
            raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC), str(self))
        return real(self, mode, *arguments, **options)

    monkeypatch.setattr(Path, "open", full)
    with pytest.raises(MachineError, match="No space left"):
        go()


# --- keys of checkpoints, trackers --------------------------------------------------------------------------------


def test_keep_last_and_keep_best(go, monkeypatch):
    every = ("checkpoint_config.every=1", "eval_config.every=1", "checkpoint_config.keep_last=2")
    assert checkpoint.steps_saved(go(*every, resume="never") / "checkpoints") == [6, 5]
    evaluate, best = TorchCPU.eval_nll, 3

    def pretended(self, batch):
        nll, tokens = evaluate(self, batch)
        return nll * (0.5 if self.steps_done == best else 1.0), tokens

    monkeypatch.setattr(TorchCPU, "eval_nll", pretended)
    folder = go(*every, "checkpoint_config.keep_best=true", resume="never")
    assert checkpoint.steps_saved(folder / "checkpoints") == [6, 5, 3]
    lazy = ("checkpoint_config.every=0", "eval_config.every=1", "checkpoint_config.keep_best=true")
    folder = go(*lazy, "checkpoint_config.keep_last=1", resume="never")
    assert 3 in checkpoint.steps_saved(folder / "checkpoints"), "the best is saved though no checkpoint was due"


def test_trackers_that_are_not_installed_cost_one_line(go, monkeypatch):
    for name in ("wandb", "torch.utils.tensorboard"):
        monkeypatch.setitem(sys.modules, name, None)
    folder = go("logging_config.use_wandb=true", "logging_config.use_tensorboard=true")
    assert log(folder).count("is not installed here") == 2
    assert manifest(folder)["exit_reason"] == "done"


class FakeWandb(types.ModuleType):
    """Records what a run says to it."""

    def __init__(self) -> None:
        super().__init__("wandb")
        self.records: list[tuple[int, dict[str, Any]]] = []
        self.options: dict[str, Any] = {}
        self.finished = 0

    def init(self, **options: Any) -> FakeWandb:
        self.options = options
        return self

    def log(self, values: dict[str, Any], step: int) -> None:
        self.records.append((step, values))

    def finish(self) -> None:
        self.finished += 1


@pytest.mark.parametrize("mode", ["offline", "online"])
def test_wandb_gets_the_numbers_of_metrics_jsonl(go, monkeypatch, mode):
    wandb = FakeWandb()
    monkeypatch.setitem(sys.modules, "wandb", wandb)
    folder = stop(go, 4, "logging_config.use_wandb=true", f"logging_config.wandb_mode={mode}")
    records = metrics.read(folder / "metrics.jsonl")
    assert [{"step": step, **values} for step, values in wandb.records] == records
    assert wandb.options["mode"] == mode
    assert wandb.options["project"] == "tiny"
    assert wandb.finished == 1, "closed though the run was stopped"


def test_a_resumed_run_is_one_run_to_wandb(go, monkeypatch):
    first, second = FakeWandb(), FakeWandb()
    monkeypatch.setitem(sys.modules, "wandb", first)
    folder = stop(go, 4, "logging_config.use_wandb=true")
    monkeypatch.setitem(sys.modules, "wandb", second)
    assert go("logging_config.use_wandb=true", resume="auto") == folder
    assert first.options["id"] == second.options["id"] == folder.name
    assert second.options["resume"] == "allow"


def test_tensorboard_gets_the_numbers_of_metrics_jsonl(go, monkeypatch):
    events: list[tuple[str, float, int]] = []

    class SummaryWriter:
        def __init__(self, folder: str) -> None:
            assert folder.endswith("tensorboard")

        def add_scalar(self, name: str, value: float, step: int) -> None:
            events.append((name, value, step))

        def close(self) -> None:
            events.append(("closed", 0, 0))

    module = types.ModuleType("torch.utils.tensorboard")
    module.SummaryWriter = SummaryWriter  # type: ignore[attr-defined]
    monkeypatch.setitem(sys.modules, "torch.utils.tensorboard", module)
    folder = go("logging_config.use_tensorboard=true")
    records = metrics.read(folder / "metrics.jsonl")
    expected = [(k, v, r["step"]) for r in records for k, v in r.items() if k != "step"]
    assert events == [*expected, ("closed", 0, 0)]


# --- between the training and the end -----------------------------------------------------------------------------


def test_a_run_that_cannot_be_opened_says_why_and_not_that_it_has_no_page(recipe, tmp_path, monkeypatch):
    def full(path: Path, text: str) -> None:
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC), str(path))

    monkeypatch.setattr("common.train.opening.write_atomic", full)
    with pytest.raises(MachineError, match="No space left on device"):
        train_here(resolve(recipe, hw="cpu", out=tmp_path))


def test_what_fails_right_after_the_training_is_recorded(recipe, tmp_path, monkeypatch):
    def changed(folder: Path, say: object) -> None:
        raise MachineError("the base changed")

    with monkeypatch.context() as patch:
        patch.setattr("tools.runs.trained.read", changed)
        with pytest.raises(MachineError, match="the base changed"):
            run_tiny(recipe, tmp_path)
    (folder,) = folders(tmp_path)
    assert manifest(folder)["exit_reason"] == "failed: the base changed"
    assert run_tiny(recipe, tmp_path, resume="auto") == folder
    assert manifest(folder)["exit_reason"] == "done"


def test_a_training_without_its_end_is_not_done(recipe, tmp_path):
    script = recipe / "train.py"
    script.write_text(script.read_text().replace("run.finish()", "return"))
    with pytest.raises(UsageError, match=r"train\(\) ended before the training did"):
        run_tiny(recipe, tmp_path)
    (folder,) = folders(tmp_path)
    assert manifest(folder)["exit_reason"].startswith("failed: train() ended")
    assert not (folder / "export").exists()
