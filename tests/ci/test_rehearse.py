"""The hardware job as a whole, without a card: green, and red with each planted fault, by the phase that must see it.

`make rehearse HW=n300` in .ci/run is the same; what trains takes most of a minute and is marked slow here.
"""

from __future__ import annotations

import json
import shutil
from pathlib import Path

import pytest

pytest.importorskip("torch", reason="the double computes with torch")

from ci.rehearse import __main__ as rehearsal
from ci.rehearse.faults import FAULTS, NOTHING
from ci.rehearse.ground import STEPS, Ground, prepare, record_figures, write_machine
from common.paths import ROOT
from tests.doubles.machines import pci

pytestmark = [
    pytest.mark.skipif(not (ROOT / ".venv/bin/python").exists(), reason="ci/hardware.sh needs .venv: make setup"),
]
CHEAP = ["busy-card", "wrong-count"]
SLOW = pytest.mark.slow


@pytest.fixture(scope="module")
def bare(tmp_path_factory) -> Ground:
    """An n300 and a recipe of which nothing is recorded."""
    return prepare(tmp_path_factory.mktemp("ground"), "n300")


@pytest.fixture(scope="module")
def recorded(bare) -> Ground:
    record_figures(bare)
    return bare


def again(ground: Ground, folder: Path) -> Ground:
    """The same ground in another folder, as it was before a job: the machine new, recipe and figures kept."""
    for name in ("tiny", "base", "home"):
        shutil.copytree(ground.folder / name, folder / name)
    copy = Ground(folder, ground.board)
    text = (copy.recipe / "config.yaml").read_text("utf-8")
    (copy.recipe / "config.yaml").write_text(text.replace(str(ground.folder), str(folder)), "utf-8")
    write_machine(copy)
    return copy


@pytest.mark.parametrize("name", CHEAP)
def test_a_fault_before_training_is_refused_and_nothing_is_reset(bare, tmp_path, capfd, name):
    outcome = rehearsal.perform(again(bare, tmp_path), FAULTS[name])
    assert outcome.is_that_of(FAULTS[name])
    said = capfd.readouterr().out
    assert {"busy-card": "where: board.owner", "wrong-count": "where: board.nodes"}[name] in said
    assert "recover: this job did not come to train on the board: it is left as it is" in said
    assert rehearsal.print_outcome(outcome, FAULTS[name]) == 4
    assert "RED: preflight ended with 4\nas it must be" in capfd.readouterr().out


@SLOW
def test_the_job_is_green_and_says_what_was_held(recorded, tmp_path):
    ground = again(recorded, tmp_path)
    outcome = rehearsal.perform(ground, NOTHING)
    assert outcome.is_that_of(NOTHING)
    text = (ground.out / "summary.md").read_text()
    assert text.startswith(f"# {ground.recipe} on n300, {STEPS} steps: pass\n")
    assert "| pass | loss at 6 |" in text
    (run,) = (ground.out / "runs").iterdir()
    assert json.loads((run / "manifest.json").read_text())["backend"]["world"] == 2
    assert (run / "report.html").is_file()


@SLOW
def test_a_board_of_which_nothing_is_recorded_is_green_and_ungraded(bare, tmp_path):
    ground = again(bare, tmp_path)
    (ground.recipe / "results.yaml").write_text("format: 1\nrecipe: tiny\nentries: []\n")
    outcome = rehearsal.perform(ground, NOTHING)
    assert outcome.failed == ("", 0)
    assert not outcome.is_that_of(NOTHING)  # a rehearsal has recorded figures: green is a pass
    assert outcome.verdict == "UNGRADED"
    assert f"{STEPS} steps: UNGRADED\n" in (ground.out / "summary.md").read_text()


@SLOW
@pytest.mark.parametrize("name", [name for name in FAULTS if name not in CHEAP])
def test_every_other_fault_is_red_in_its_phase_and_recovered_from(recorded, tmp_path, capfd, name):
    ground = again(recorded, tmp_path)
    outcome = rehearsal.perform(ground, FAULTS[name])
    assert outcome.is_that_of(FAULTS[name])
    assert set(outcome.resets) <= {f"-r {pci(0)}"}
    assert rehearsal.print_outcome(outcome, FAULTS[name]) == FAULTS[name].code
    if name == "hung-step":
        assert "one of the devices stopped answering the others" in (ground.out / "summary.md").read_text()
    if name == "reset-fails":
        assert "why: 3 resets did not help" in (outcome.quarantine or "")


def test_a_fault_that_is_not_caught_is_our_bug(bare, capsys):
    assert rehearsal.print_outcome(rehearsal.Outcome(("", 0), [], None, None, "pass"), FAULTS["hung-step"]) == 1
    assert "NOT as it must be, which is: train ends with 5, 1 resets" in capsys.readouterr().out


@pytest.mark.parametrize(
    ("resets", "next_preflight", "verdict", "code"),
    [
        ([], None, "pass", 0),
        (["-r x"], None, "pass", 1),
        ([], 4, "pass", 1),
        ([], None, "UNGRADED", 1),
        ([], None, None, 1),
    ],
)
def test_green_is_a_pass_without_reset_or_quarantine(capsys, resets, next_preflight, verdict, code):
    quarantine = "why" if next_preflight else None
    outcome = rehearsal.Outcome(("", 0), resets, quarantine, next_preflight, verdict)
    assert rehearsal.print_outcome(outcome, NOTHING) == code
    assert ("NOT as it must be" in capsys.readouterr().out) is bool(code)


def test_what_cannot_be_rehearsed_says_why(monkeypatch, capsys, tmp_path):
    for name, value, words in (
        ("HW", "galaxy", "galaxy has 32 devices"),
        ("HW", "cpu", "cpu has no card"),
        ("FAULT", "rain", "one of busy-card, "),
        ("OUT", str(Path(__file__).parent), "something in this folder already"),
    ):
        with monkeypatch.context() as patch:
            for other in ("HW", "FAULT", "OUT"):
                patch.delenv(other, raising=False)
            patch.setenv(name, value)
            assert rehearsal.main() == 2
            assert words in capsys.readouterr().err
