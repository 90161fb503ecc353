"""One recipe from its rows to a verified export, through the command: the run that `make test` makes."""

from __future__ import annotations

import json
import sys
from pathlib import Path

import pytest

pytest.importorskip("torch", reason="the CPU engine is torch")

from common.train import metrics
from tests.doubles.tiny_recipe import make_tiny_recipe
from tests.support.runs import folders, manifest
from tools.cli import main

# Nats a supervised token, in fp32 on one thread. Instruction sets differ by 1e-6; a wrong mask or lost moments by 1e-2.
LOSSES = [6.2937, 6.1103, 5.8205, 5.7943, 5.5746, 5.6792]
HELD_OUT = {0: 6.3480, 3: 5.9938, 6: 5.8892}
CLOSE = 2e-4


@pytest.fixture
def recipe(monkeypatch, capsys):
    """Run the command in this process; return its exit code and its screen."""

    def command(*words: object) -> tuple[int, str]:
        monkeypatch.setattr(sys, "argv", ["recipe", *map(str, words)])
        with pytest.raises(SystemExit) as ended:
            main.main()
        said = capsys.readouterr()
        return int(ended.value.code or 0), said.out + said.err

    return command


@pytest.mark.usefixtures("home")
def test_data_training_a_stop_the_rest_export_and_report(recipe, tiny_base: Path, tmp_path: Path):
    tiny, out = make_tiny_recipe(tmp_path / "tiny", tiny_base), tmp_path / "out"
    code, screen = recipe("data", "build", tiny, "--hw", "cpu")
    assert (code, "data built" in screen) == (0, True), screen

    code, screen = recipe("run", tiny, "--hw", "cpu", "--out", out, "--stop-at", 3)
    assert (code, "reused (nothing changed)" in screen) == (75, True), screen
    (folder,) = folders(out)
    assert manifest(folder)["exit_reason"].startswith("stopped: stopped by --stop-at 3")
    assert not (folder / "export").exists()

    code, screen = recipe("run", tiny, "--hw", "cpu", "--out", out)
    assert (code, f"resuming {folder.name} after step 3" in screen) == (0, True), screen
    assert screen.splitlines()[-1].endswith(f": make serve RUN={folder} BASE=1"), "what to do next is the last line"
    assert folders(out) == [folder], "it goes on in its folder"
    records = metrics.read(folder / "metrics.jsonl")
    assert [record["loss"] for record in records if "loss" in record] == pytest.approx(LOSSES, abs=CLOSE)
    held_out = {record["step"]: record["eval_loss"] for record in records if "eval_loss" in record}
    assert held_out == pytest.approx(HELD_OUT, abs=CLOSE)

    facts = manifest(folder)
    assert facts["exit_reason"] == "done"
    assert facts["export"]["status"] == "verified"
    assert json.loads((folder / "export/merged/config.json").read_text())["model_type"] == "llama"
    assert (folder / "before_after.md").read_text().count("## ") >= 4, "every prompt, before and after"
    assert "It ended as it should." in (folder / "report.html").read_text()
