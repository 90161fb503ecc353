"""`recipe verify run` finds sound runs sound, and fails on each planted defect."""

from __future__ import annotations

import contextlib
import json
import os
import shutil
from collections.abc import Iterator
from pathlib import Path

import pytest

pytest.importorskip("torch", reason="the CPU engine is torch")

from common.errors import VerificationError
from tests.doubles.tiny_recipe import FROM_SCRATCH, tiny_scratch
from tests.support.runs import run_tiny
from tools.cli import main
from tools.verify import calibrate
from tools.verify import run as verify_run
from tools.verify.calibrate import DEFECTS, Defect
from tools.verify.specimen import Specimen, specimen


@pytest.fixture(scope="module")
def made() -> Iterator[Specimen]:
    with pytest.MonkeyPatch.context() as patch, specimen() as found:
        patch.setattr(os, "fsync", lambda descriptor: None)
        yield found


def verdicts(run: Path) -> dict[str, str]:
    return {result.id: result.verdict for result in verify_run.verify(run)}


def test_a_sound_run_passes_every_line_that_one_device_has(made):
    assert verdicts(made.sound) == {line.id: "pass" for line in verify_run.LINES} | {"replicas": "not checkable"}


def test_a_run_from_random_weights_over_a_text_passes_too(tmp_path, monkeypatch):
    monkeypatch.setenv("RECIPES_HOME", str(tmp_path / "home"))
    small = tiny_scratch(tmp_path / "play.txt")
    more = ("device_config.threads=1", "eval_config.max_new_tokens=1", "training_config.scheduler.warmup_steps=0")
    run = run_tiny(FROM_SCRATCH, tmp_path / "out", *small, *more, steps=2)
    found = verdicts(run)
    assert {name for name, verdict in found.items() if verdict != "pass"} == {"frozen", "replicas"}
    assert found["frozen"] == found["replicas"] == "not checkable"


def test_every_line_has_a_planted_defect():
    assert {defect.caught_by for defect in DEFECTS} == {line.id for line in verify_run.LINES}


@pytest.mark.parametrize("defect", DEFECTS, ids=lambda defect: defect.says)
def test_a_planted_defect_is_caught(made, defect):
    assert calibrate.look(defect.plant(made), defect.caught_by).verdict == "fail"


def test_a_defect_that_nothing_catches_is_told_and_fails(made, monkeypatch):
    harmless = Defect("nothing at all", "export", lambda made: made.copy())
    monkeypatch.setattr(
        calibrate, "calibrate", lambda: iter([calibrate.DefectResult(harmless.says, "export", False, "")])
    )
    assert calibrate.look(harmless.plant(made), harmless.caught_by).verdict == "pass"
    said: list[str] = []
    with pytest.raises(VerificationError, match="1 of 1 planted defects were not caught: nothing at all"):
        calibrate.print_calibration(False, said.append)
    assert said == ["MISSED  nothing at all, by export: "]


def test_an_unsound_specimen_is_no_calibration(made, monkeypatch):
    broken = next(defect for defect in DEFECTS if defect.caught_by == "moved").plant(made)
    monkeypatch.setattr(calibrate, "specimen", lambda: contextlib.nullcontext(Specimen(made.root, broken)))
    with pytest.raises(VerificationError, match="the run without a defect fails score"):
        list(calibrate.calibrate(()))


@pytest.mark.slow  # two processes that import torch, after the one that starts them
def test_gradients_that_are_not_summed_are_noticed(made):
    """In two processes of their own, as `recipe verify calibrate` does it."""
    found = calibrate.sync_off(made)
    assert found.caught, found.evidence
    assert "the devices' parameters differ after step 1" in found.evidence


def test_the_command_ends_with_6_and_lists_the_lines_for_machines(made, monkeypatch, capsys):
    run = next(defect for defect in DEFECTS if defect.caught_by == "history").plant(made)
    monkeypatch.setattr(verify_run, "LINES", [line for line in verify_run.LINES if line.id in ("files", "history")])
    monkeypatch.setattr("sys.argv", ["recipe", "verify", "run", str(run), "--json"])
    with pytest.raises(SystemExit) as ended:
        main.main()
    captured = capsys.readouterr()
    assert ended.value.code == 6
    assert [line["verdict"] for line in json.loads(captured.out)["lines"]] == ["fail", "fail"]
    assert "2 of 2 lines failed: files, history" in captured.err


def test_data_that_is_gone_is_not_checkable_and_no_pass(made, monkeypatch):
    run = made.copy()
    monkeypatch.setenv("RECIPES_HOME", str(made.root / "elsewhere"))
    manifest = json.loads((run / "manifest.json").read_text())
    gone = {**manifest, "recipe_dir": str(shutil.copytree(made.root / "specimen", made.root / "gone" / "specimen"))}
    (run / "manifest.json").write_text(json.dumps(gone))
    rows = made.root / "gone" / "specimen" / "rows.jsonl"
    rows.write_text("".join(rows.read_text().splitlines(keepends=True)[2:]))
    found = verdicts(run)
    assert {name for name, verdict in found.items() if verdict == "not checkable"} >= {"replay", "score", "leakage"}


def test_a_recipe_of_another_version_is_not_checkable_and_no_leak(made):
    run = made.copy()
    manifest = json.loads((run / "manifest.json").read_text())
    recipe = Path(shutil.copytree(made.root / "specimen", made.root / "old" / "specimen"))
    (recipe / "dataset.py").write_text("from common.data.gone import read_source\n")
    (run / "manifest.json").write_text(json.dumps({**manifest, "recipe_dir": str(recipe)}))
    assert calibrate.look(run, "leakage").verdict == "not checkable"
