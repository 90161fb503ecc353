"""Names and links that lead out of a folder of ours: nothing is read, written or deleted through them."""

from __future__ import annotations

import json
import os
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest

from common.errors import MachineError, UsageError
from common.files import clear, inside, try_lock, write_atomic
from common.model import bases
from common.train import checkpoint, resume
from tests.support import run_folders
from tools.runs.folder import read_run

OUT_OF_IT = ["../victim", "/etc/hostname", "a/../../victim", "a/b", "..", ".", "", "a\0b"]


@pytest.fixture
def victim(tmp_path: Path) -> Path:
    """Somebody's file beside the folder, which must stay as it is."""
    path = tmp_path / "victim"
    path.write_text("as it was")
    return path


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    path = tmp_path / "folder"
    path.mkdir()
    return path


@pytest.mark.parametrize("name", OUT_OF_IT)
def test_a_name_that_leads_out_of_a_folder_is_none(name: str, folder: Path):
    with pytest.raises(MachineError, match="is no name of a file in this folder"):
        inside(folder, name)
    assert inside(folder, "model.safetensors") == folder / "model.safetensors"


@pytest.mark.parametrize("name", OUT_OF_IT)
def test_a_checkpoint_that_names_other_files_does_not_verify(name: str, tmp_path: Path, victim: Path):
    saved = run_folders.write_run(tmp_path / "out", checkpoints=[1]) / "checkpoints/step-00000001"
    assert checkpoint.verify(saved).step == 1
    state = json.loads((saved / "state.json").read_text())
    (saved / "state.json").write_text(json.dumps(state | {"sha256": {name: "0" * 64}}))
    with pytest.raises(MachineError, match="is no name of a file"):
        checkpoint.verify(saved)


def test_a_base_is_held_to_every_pinned_hash_whatever_its_own_record_lists(folder: Path):
    """Who can write into RECIPES_HOME could leave the weights out of base.json, and put others there."""
    (folder / "base.json").write_text('{"sha256": {}}')
    (folder / "model.safetensors").write_bytes(b"other weights")
    with pytest.raises(MachineError, match=r"damaged: model\.safetensors"):
        bases.verify(folder, {"files": {"model.safetensors": "0" * 64}})
    with pytest.raises(MachineError, match="is no name of a file"):
        bases.verify(folder, {"files": {"../victim": "0" * 64}})


def test_nothing_is_written_through_a_link(folder: Path, victim: Path):
    (folder / "manifest.json").symlink_to(victim)
    (folder / f".manifest.json.{os.getpid()}").symlink_to(victim)
    write_atomic(folder / "manifest.json", "new")
    assert (folder / "manifest.json").read_text() == "new"
    assert [path.name for path in folder.iterdir()] == ["manifest.json"]
    (folder / ".lock").symlink_to(victim)
    with pytest.raises(MachineError, match="could not lock the run's folder"):
        try_lock(folder, "a run")
    assert victim.read_text() == "as it was"


def test_of_a_link_the_link_alone_is_deleted(folder: Path, tmp_path: Path):
    for name in ("checkpoints/step-00000001", "left"):
        (folder / name).parent.mkdir(exist_ok=True)
        (folder / name).symlink_to(tmp_path / "kept")
    (tmp_path / "kept").mkdir()
    (tmp_path / "kept/file").touch()
    clear(folder / "left")
    checkpoint.delete(folder / "checkpoints/step-00000001")
    clear(folder / "not there")
    assert list(folder.rglob("*")) == [folder / "checkpoints"]
    assert (tmp_path / "kept/file").is_file()
    clear(tmp_path / "kept")
    assert not (tmp_path / "kept").exists()


def test_a_run_goes_on_in_a_folder_of_its_own_user_alone(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    """In a folder of runs that others write into, a run of theirs with this training's digest has weights of theirs."""
    base = {"name": "tiny", "identity": "1" * 64, "origin": "here", "licence": "none"}
    facts: dict[str, Any] = {
        "exit_reason": "running",
        "training_digest": "d" * 64,
        "config_digest": "c" * 64,
        "base": base,
    }
    for name in ("1-mine", "2-theirs"):
        run_folders.write_run(tmp_path / "out", name, **facts)
    run_folders.write_run(tmp_path / "elsewhere", "3", **facts)
    (tmp_path / "out/3-link").symlink_to(tmp_path / "elsewhere/3")
    stat = Path.stat

    def looked_at(path: Path, **how: Any) -> Any:
        values = list(stat(path, **how))
        return os.stat_result([*values[:4], 4711 if path.name == "2-theirs" else values[4], *values[5:]])

    monkeypatch.setattr(Path, "stat", looked_at)
    plan: Any = SimpleNamespace(launch=SimpleNamespace(out=tmp_path / "out"), training_digest="d" * 64)
    said: list[str] = []
    assert [folder.name for folder, _ in resume.unfinished(plan, said.append)] == ["1-mine"]
    assert [line.partition(":")[0] for line in said] == [
        "3-link is a link or another user's",
        "2-theirs is a link or another user's",
    ]


def test_the_code_that_a_manifest_names_is_this_users(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    """`recipe verify run` and `repro` run the recipe of a run's folder, which may be somebody else's."""
    theirs = tmp_path / "theirs"
    theirs.mkdir()
    (theirs / "config.yaml").touch()
    run = read_run(run_folders.write_run(tmp_path / "out", recipe="no-such-recipe", recipe_dir=str(theirs)))
    assert run.recipe_dir == theirs
    stat = Path.stat

    def looked_at(path: Path, **how: Any) -> Any:
        values = list(stat(path, **how))
        return os.stat_result([*values[:4], 4711 if path == theirs else values[4], *values[5:]])

    monkeypatch.setattr(Path, "stat", looked_at)
    with pytest.raises(UsageError, match="no recipe called 'no-such-recipe'"):
        _ = run.recipe_dir
