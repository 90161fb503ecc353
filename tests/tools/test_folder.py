"""The one reader of a run's folder: what a run is, where its recipe is, and what strict reading refuses."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from common.errors import MachineError, UsageError
from tests.support.run_folders import held, write_run
from tools.recipes import RECIPES
from tools.runs.folder import is_locked, is_run, read_run, runs_in


@pytest.mark.parametrize("lost", ["manifest.json", "config.resolved.yaml"])
def test_a_run_that_lost_a_file_is_one_that_is_looked_at_and_not_judged(tmp_path, lost):
    run = write_run(tmp_path)
    (run / lost).unlink()
    assert is_run(run)
    found = read_run(run)
    assert (found.last_step, found.known_config is None) == (40, lost != "manifest.json")
    assert found.facts.get("seed") == (None if lost == "manifest.json" else 1)
    assert [fault for fault in found.faults if lost in fault]
    with pytest.raises((MachineError, UsageError), match=lost.partition(".")[0]):
        read_run(run, strict=True)


def test_a_folder_with_checkpoints_or_an_export_alone_is_no_run(tmp_path):
    (tmp_path / "export").mkdir()
    (tmp_path / "export" / "config.json").write_text("{}")
    assert not is_run(tmp_path / "export")
    with pytest.raises(UsageError, match="no run there"):
        read_run(tmp_path / "export")


def test_the_recipe_is_where_the_run_had_it_else_in_this_checkout_else_an_error(tmp_path):
    """A folder that went away, as that of a clone or of a container does, is not believed."""
    theirs = tmp_path / "theirs"
    theirs.mkdir()
    (theirs / "config.yaml").write_text("")
    here = next(RECIPES.glob("*/config.yaml")).parent
    assert read_run(write_run(tmp_path, "a", recipe_dir=str(theirs))).recipe_dir == theirs
    assert read_run(write_run(tmp_path, "b", recipe_dir="/gone", recipe=here.name)).recipe_dir == here
    with pytest.raises(UsageError, match="no recipe called 'gone'"):
        _ = read_run(write_run(tmp_path, "c", recipe_dir="/gone", recipe="gone")).recipe_dir


def damage(run: Path, line: str) -> None:
    text = (run / "metrics.jsonl").read_text().splitlines(keepends=True)
    (run / "metrics.jsonl").write_text("".join([*text[:3], line, *text[3:]]))


@pytest.mark.parametrize(
    ("line", "words"), [("no json\n", "left out, no JSON: lines 4"), ('"x"\n', "not of the known form: 1")]
)
def test_a_damaged_record_is_said_and_strict_reading_refuses_it(tmp_path, line, words):
    run = write_run(tmp_path, base={}, config_digest="")
    damage(run, line)
    found = read_run(run)
    assert found.last_step == 40
    assert any(words in fault for fault in found.faults)
    facts = json.loads((run / "manifest.json").read_text())
    facts["base"] = {"name": "", "identity": "", "origin": "", "licence": ""}
    (run / "manifest.json").write_text(json.dumps(facts))
    with pytest.raises(MachineError, match=words):
        read_run(run, strict=True)


def test_a_line_that_a_kill_cut_off_is_no_damage(tmp_path):
    base = {"name": "", "identity": "", "origin": "", "licence": ""}
    run = write_run(tmp_path, base=base, config_digest="")
    with (run / "metrics.jsonl").open("a") as file:
        file.write('{"step": 41')
    assert read_run(run, strict=True).last_step == 40


def test_a_held_run_is_locked_and_looking_at_it_writes_nothing(tmp_path):
    run = write_run(tmp_path)
    assert not is_locked(run)
    assert not (run / ".lock").exists()
    with held(run):
        assert is_locked(run)
    assert not is_locked(run)


def test_runs_come_newest_first(tmp_path):
    for name in ("20260101T000000Z-a", "20260301T000000Z-c", "20260201T000000Z-b"):
        write_run(tmp_path, name)
    assert [run.name[-1] for run in runs_in(tmp_path)] == ["c", "b", "a"]
