"""Grading a run: the same bits, a band, or what others published; and the planted regressions that must fail."""

from __future__ import annotations

import json
import os
import shutil
import subprocess
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import yaml

pytest.importorskip("torch", reason="the CPU engine is torch")

from ci import docs
from common.errors import UsageError, VerificationError
from common.paths import ROOT
from tests.doubles.tiny_recipe import make_tiny_recipe
from tests.support.runs import manifest, run_tiny
from tools.cli import main
from tools.results import grade, record
from tools.results.schema import load
from tools.runs.folder import read_run

FAILS = pytest.raises(VerificationError, match="graded fail")


@pytest.fixture(scope="module", autouse=True)
def home(tmp_path_factory) -> Iterator[None]:
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("RECIPES_HOME", str(tmp_path_factory.mktemp("home")))
        patch.setattr(os, "fsync", lambda descriptor: None)
        yield


@pytest.fixture(scope="module")
def recipe(tiny_base, tmp_path_factory) -> Path:
    folder = make_tiny_recipe(tmp_path_factory.mktemp("recipe") / "tiny", tiny_base)
    (folder / "results.yaml").write_text("# kept\nformat: 1\nrecipe: tiny\nentries: []\n")
    return folder


@pytest.fixture(scope="module")
def go(recipe, tmp_path_factory) -> Callable[..., Path]:
    def run(*overrides: str) -> Path:
        folder = run_tiny(
            recipe, tmp_path_factory.mktemp("out"), "eval_config.max_new_tokens=1", *overrides, export=False
        )
        edit(folder, git_dirty=False, git_commit="4e118d7" + "0" * 33)  # whatever tree the tests run from
        return folder

    return run


@pytest.fixture(scope="module")
def recorded(recipe, go) -> Path:
    """A run that is on record, with a band from another precision."""
    first, other = go(), go("training_config.precision=bf16-mixed")
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(record, "refuse_unclean", lambda run: None)
        record.record(first, [other], True, lambda line: None)
    return first


def edit(folder: Path, **values: object) -> Path:
    path = folder / "manifest.json"
    path.write_text(json.dumps({**json.loads(path.read_text()), **values}))
    return folder


def elsewhere(folder: Path) -> Path:
    """As if the run had been made on another kind of CPU."""
    return edit(folder, cpu_class="GenuineIntel family 6, avx2")


def verdicts(folder: Path) -> dict[str, str]:
    return {line.figure: line.verdict for line in grade.grade(read_run(folder, strict=True)).lines}


def report(folder: Path) -> dict[str, Any]:
    said: list[str] = []
    grade.print_grade(folder, True, said.append)
    found: dict[str, Any] = json.loads(said[0])
    return found


def test_the_same_run_again_passes_bit_for_bit(recorded, go):
    found = verdicts(go())
    assert {found.pop("tokens/s"), found.pop("peak MiB")} <= set(grade.ORDER), "of this very process: not to hold on to"
    assert set(found.values()) == {"pass"}
    assert set(found) == {"settings", "loss at 1", "loss at 5", "loss at 6", "bits", "held-out at 6"}


def test_on_another_kind_of_cpu_the_band_decides_and_speed_is_not_compared(recorded, go):
    found = verdicts(elsewhere(go()))
    assert found["loss at 6"] == found["held-out at 6"] == "pass"
    assert found["bits"] == found["tokens/s"] == found["peak MiB"] == "not compared"


@pytest.mark.parametrize("place", [lambda folder: folder, elsewhere], ids=["the same bits", "the band"])
def test_a_doubled_learning_rate_fails(recorded, go, place):
    folder = place(go("training_config.learning_rate=0.02"))
    found = verdicts(folder)
    assert found["settings"] == "warn"
    assert found["loss at 1"] == "pass", "the first loss comes before the first update"
    assert found["loss at 6"] == "fail"
    with FAILS as error:
        grade.print_grade(folder, False, lambda line: None)
    assert error.value.code == 6


@pytest.mark.parametrize("place", [lambda folder: folder, elsewhere], ids=["the same bits", "the band"])
def test_a_broken_mask_fails(recorded, go, place, monkeypatch):
    from common.data.tokens import Batch, TokenSplit

    gather = TokenSplit.gather

    def all_ones(self, rows):
        batch = gather(self, rows)
        mask = batch.loss_mask.copy()
        mask[:, :8] = 1
        return Batch(batch.input_ids, batch.labels, mask, batch.rows)

    monkeypatch.setattr(TokenSplit, "gather", all_ones)
    folder = place(go())
    assert verdicts(folder)["loss at 1"] == "fail"


@pytest.mark.parametrize(("slower", "verdict"), [(1.0, "pass"), (1.1, "warn"), (1.2, "fail")])
def test_a_slower_step_fails_from_20_percent_on(recorded, tmp_path, slower, verdict):
    folder = Path(shutil.copytree(recorded, tmp_path / "run"))
    lines = [json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines()]
    for line in lines:
        line |= {"seconds": line["seconds"] * slower} if "seconds" in line else {}
    (folder / "metrics.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines))
    assert verdicts(folder)["tokens/s"] == verdict


def test_a_hidden_change_that_no_recorded_step_shows_fails_by_its_bits(recorded, tmp_path):
    folder = Path(shutil.copytree(recorded, tmp_path / "run"))
    lines = (folder / "metrics.jsonl").read_text().splitlines()
    at = next(n for n, line in enumerate(lines) if json.loads(line)["step"] == 3)
    changed = json.loads(lines[at])
    lines[at] = json.dumps(changed | {"grad_norm": changed["grad_norm"] * (1 + 1e-15)})
    (folder / "metrics.jsonl").write_text("\n".join(lines) + "\n")
    found = verdicts(folder)
    assert found["bits"] == "fail"
    assert found["loss at 6"] == "pass"


def test_another_length_or_model_is_no_regression_but_another_training(recorded, go):
    for override in ("training_config.max_steps=4", "model_config.lora=null"):
        with pytest.raises(UsageError, match="nothing is recorded for this training"):
            grade.grade(read_run(go(override), strict=True))


def test_json_for_machines(recorded):
    found = report(recorded)
    assert found["verdict"] in ("pass", "warn")
    assert found["format"] == 1
    assert found["entry"]["exact"]["threads"] == 1
    assert {"figure": "settings", "verdict": "pass", "says": "the same training"} in found["lines"]


def test_what_is_not_recorded_is_ungraded_for_machines_too(recorded, go, monkeypatch, capsys):
    monkeypatch.setattr(sys, "argv", ["recipe", "grade", str(go("training_config.max_steps=4")), "--json"])
    capsys.readouterr()
    with pytest.raises(SystemExit) as ended:
        main.main()
    assert ended.value.code == 2
    said = json.loads(capsys.readouterr().out)
    assert said["verdict"] == "ungraded"
    assert [entry["board"] for entry in said["recorded"]] == ["cpu"]


def test_grading_where_no_bits_are_expected_needs_no_numpy(recorded, tmp_path):
    """As on a board's host, which has requirements/launcher.txt alone."""
    run = elsewhere(shutil.copytree(recorded, tmp_path / "run"))
    bare = "import sys; sys.modules |= dict.fromkeys(('numpy', 'torch', 'safetensors', 'transformers'))"
    command = [sys.executable, "-c", f"{bare}; from tools.cli.main import main; main()", "grade", str(run)]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    assert "PASS          held-out at 6" in done.stdout


def test_what_others_published_warns_and_fails_nothing(recorded, recipe, tmp_path):
    theirs = Path(shutil.copytree(recipe, tmp_path / "tiny"))
    entry = {
        "board": "cpu",
        "evidence": "published",
        "what": "theirs",
        "stack": "x",
        "source": "a page",
        "machine": "m",
    }
    band = {"loss": {6: 0.001}, "origin": "a page"}
    (theirs / "results.yaml").write_text(
        yaml.safe_dump(
            {"format": 1, "recipe": "tiny", "entries": [entry | {"loss_at": {1: 99.0, 6: 98.0}, "band": band}]}
        )
    )
    folder = edit(Path(shutil.copytree(recorded, tmp_path / "run")), recipe_dir=str(theirs))
    found = verdicts(folder)
    assert (found["loss at 1"], found["loss at 6"]) == ("not compared", "warn")
    assert report(folder)["verdict"] == "warn"


# --- recording --------------------------------------------------------------------------------------------------------


def test_a_record_replaces_the_entry_of_its_training_and_nothing_else(recorded, recipe, go, tmp_path, monkeypatch):
    monkeypatch.setattr(record, "refuse_unclean", lambda run: None)
    mine = Path(shutil.copytree(recipe, tmp_path / "tiny"))
    folder = edit(Path(shutil.copytree(recorded, tmp_path / "run")), recipe_dir=str(mine))
    before = (mine / "results.yaml").read_text()
    said: list[str] = []
    record.record(folder, [], False, said.append)
    after = (mine / "results.yaml").read_text()
    assert after.startswith("# kept\n")
    assert len(yaml.safe_load(after)["entries"]) == 1
    assert any(line.startswith("-    tokens_per_second:") for line in said), "the change is printed"
    assert not any("loss_at" in line for line in said if line.startswith(("-", "+")))
    assert "tokens_per_second" in before
    other = edit(Path(shutil.copytree(recorded, tmp_path / "other")), recipe_dir=str(mine), overrides=["a.b=1"])
    record.record(other, [], False, said.append)
    assert len(yaml.safe_load((mine / "results.yaml").read_text())["entries"]) == 2


def test_the_figures_are_those_of_the_run(recorded, recipe):
    entry = yaml.safe_load((recipe / "results.yaml").read_text())["entries"][0]
    run = read_run(recorded, strict=True)
    assert entry["loss_at"] == {step: run.losses[step] for step in (1, 5, 6)}
    assert entry["held_out"]["loss"] == run.last_score["eval_loss"]
    assert entry["commit"] == manifest(recorded)["git_commit"]
    assert 'training_config.precision: "fp32" -> "bf16-mixed"' in entry["band"]["origin"]
    assert f"{run.losses[6]:.5g} at 6" in docs._shown(load(recipe).numbers[0])


@pytest.mark.parametrize(
    ("values", "words"),
    [
        ({"git_dirty": True}, "not of a commit"),
        ({"git_dirty": None}, "not of a commit"),
        ({"exit_reason": "stopped: by SIGTERM"}, "not done"),
    ],
)
def test_only_a_finished_run_of_a_clean_tree_is_recorded(recorded, recipe, tmp_path, values, words):
    folder = edit(Path(shutil.copytree(recorded, tmp_path / "run")), **values)
    before = (recipe / "results.yaml").read_text()
    with pytest.raises(UsageError, match=words):
        record.record(folder, [], False, lambda line: None)
    assert (recipe / "results.yaml").read_text() == before


def test_a_tree_with_changes_records_nothing(recorded, tmp_path, monkeypatch):
    for words in (["init", "-q"], ["-c", "user.name=a", "-c", "user.email=b", "commit", "-qm", "x", "--allow-empty"]):
        subprocess.run(["git", "-C", str(tmp_path), *words], check=True)
    monkeypatch.setattr("tools.git.ROOT", tmp_path)
    record.refuse_unclean(read_run(recorded, strict=True))
    (tmp_path / "results.yaml").touch()
    record.refuse_unclean(read_run(recorded, strict=True))
    (tmp_path / "new.py").touch()
    with pytest.raises(UsageError, match=r"not clean: new\.py"):
        record.refuse_unclean(read_run(recorded, strict=True))


def test_a_band_comes_from_runs_of_the_same_data_and_length(recorded, go):
    with pytest.raises(UsageError, match="other tokens, or of another length"):
        record.refuse_unlike(read_run(recorded, strict=True), read_run(go("training_config.max_steps=2"), strict=True))


def test_no_run_and_no_step_are_said(tmp_path, monkeypatch, capsys):
    with pytest.raises(UsageError, match="no run there"):
        read_run(tmp_path, strict=True)
    monkeypatch.setattr("sys.argv", ["recipe", "grade", str(tmp_path), "--speed"])
    with pytest.raises(SystemExit) as ended:
        main.main()
    assert ended.value.code == 2
    assert "add --record" in capsys.readouterr().err
