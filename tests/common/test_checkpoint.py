"""A checkpoint is whole or it is not there: at whatever moment its writing ends."""

from __future__ import annotations

import errno
import json
import os
import resource
import sys
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import pytest

from common.errors import MachineError
from common.train import checkpoint
from common.train.checkpoint import read_tensors
from tests.support.engines import config_for

FACTS = {"training_digest": "t", "tokens_sha256": "d"}


def tensors(step: int) -> Iterator[tuple[str, np.ndarray]]:
    """Full fine-tuning's, of a step."""
    yield "model/a.weight", np.full((3, 4), step, np.float32)
    yield "optimizer/exp_avg/a.weight", np.full((3, 4), -step, np.float32)
    yield "optimizer/step", np.array([step])


def save(folder: Path, *steps: int) -> Path:
    for step in steps:
        path = checkpoint.save(folder, step, tensors(step), config_for(folder), FACTS)
    return path


def newest(folder: Path) -> tuple[int | None, list[str]]:
    skipped: list[str] = []
    found = checkpoint.newest(folder, skipped.append)
    return None if found is None else found.step, skipped


def latest(folder: Path) -> str:
    return (folder / "latest").read_text().strip()


def test_what_is_saved_comes_back(tmp_path):
    found = checkpoint.verify(save(tmp_path, 7))
    assert found.folder.name == "step-00000007"
    assert found.step == 7
    assert found.state["format"] == 1
    assert {key: found.state[key] for key in FACTS} == FACTS
    loaded = read_tensors(found.folder)
    assert set(loaded) == {name for name, _ in tensors(7)}
    assert len(loaded) == 3
    assert all(np.array_equal(loaded[name], array) and loaded[name].dtype == array.dtype for name, array in tensors(7))
    with pytest.raises(KeyError):
        loaded["model/none"]
    assert latest(tmp_path) == "step-00000007"


def test_bf16_comes_back(tmp_path):
    import ml_dtypes

    array = np.array([1.0, 1.0078125, -3e38], ml_dtypes.bfloat16)
    pairs = [("model/a", array), ("optimizer/step", np.array([1]))]
    loaded = read_tensors(checkpoint.save(tmp_path, 1, iter(pairs), config_for(tmp_path), FACTS))["model/a"]
    assert loaded.dtype == array.dtype
    assert loaded.tobytes() == array.tobytes()


def test_an_adapter_has_peft_s_files(tmp_path):
    config = config_for(tmp_path, model__lora={"rank": 4, "alpha": 6.0})
    folder = checkpoint.save(tmp_path, 1, tensors(1), config, FACTS)
    names = {"adapter_model.safetensors", "adapter_config.json", "optimizer.safetensors", "state.json"}
    assert {path.name for path in folder.iterdir()} == names
    adapter = json.loads((folder / "adapter_config.json").read_text())
    assert (adapter["peft_type"], adapter["r"], adapter["lora_alpha"]) == ("LORA", 4, 6.0)
    assert set(checkpoint.verify(folder).state["sha256"]) == names - {"state.json"}
    assert set(read_tensors(folder)) == {name for name, _ in tensors(1)}


def test_the_bytes_are_those_of_the_values(tmp_path):
    first, second = save(tmp_path / "a", 3), save(tmp_path / "b", 3)
    for path in first.iterdir():
        assert path.read_bytes() == (second / path.name).read_bytes(), path.name


# --- damage -------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", ["model.safetensors", "optimizer.safetensors", "state.json"])
@pytest.mark.parametrize("harm", ["cut", "flipped", "missing"])
def test_a_damaged_newest_is_passed_over_and_said(tmp_path, name, harm):
    path = save(tmp_path, 1, 2) / name
    content = bytearray(path.read_bytes())
    content[len(content) // 2] ^= 1
    path.unlink()
    if harm != "missing":
        path.write_bytes(bytes(content) if harm == "flipped" else bytes(content[: len(content) // 2]))
    step, skipped = newest(tmp_path)
    assert step == 1
    assert len(skipped) == 1
    assert skipped[0].startswith("skipped step-00000002: ")
    assert name in skipped[0] or name == "state.json", "a flipped bit in a hash looks like damage of its file"


def test_nothing_verifies_nothing_is_chosen(tmp_path):
    (save(tmp_path, 1) / "model.safetensors").unlink()
    (save(tmp_path, 2) / "state.json").write_text("[]")
    (save(tmp_path, 3) / "state.json").write_text('{"format": 1}')
    step, skipped = newest(tmp_path)
    assert step is None
    assert len(skipped) == 3
    assert newest(tmp_path / "none") == (None, [])


def test_an_unknown_format_is_refused_by_name(tmp_path):
    path = save(tmp_path, 1) / "state.json"
    path.write_text(json.dumps({**json.loads(path.read_text()), "format": 2}))
    with pytest.raises(MachineError, match=r"format 2\b") as caught:
        checkpoint.verify(path.parent)
    assert "step-00000001" in (caught.value.where or "")


def test_a_step_saved_again_over_a_damaged_one_keeps_both(tmp_path):
    (save(tmp_path, 1) / "model.safetensors").write_bytes(b"")
    save(tmp_path, 1)
    assert newest(tmp_path) == (1, [])
    assert (tmp_path / "step-00000001.replaced-0" / "state.json").is_file()


# --- an end at every moment of the writing ------------------------------------------------------------------------

WATCHED = ("open", "os.mkdir", "os.rename", "os.remove", "os.rmdir", "shutil.rmtree")


def end_at(moment: int, folder: Path) -> bool:
    """Save step 2 in a child that ends, without any clean-up, before its `moment`-th file operation.

    False when the save had fewer operations and the child came through.
    """
    child = os.fork()
    if child == 0:
        count = 0

        def hook(event: str, arguments: tuple[object, ...]) -> None:
            nonlocal count
            if event in WATCHED and str(folder) in str(arguments):
                count += 1
                if count == moment:
                    os._exit(9)

        sys.addaudithook(hook)
        try:
            save(folder, 2)
        finally:
            os._exit(0 if count < moment else 1)
    return os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]) == 9


def test_a_process_that_ends_at_any_moment_of_a_save_leaves_a_whole_checkpoint(tmp_path):
    config_for(tmp_path)  # imported before the fork
    moment, after = 0, []
    ended = True
    while ended:
        moment += 1
        folder = tmp_path / str(moment)
        save(folder, 1)
        ended = end_at(moment, folder)
        step, skipped = newest(folder)
        assert step in (1, 2)
        assert skipped == [], "what is not whole does not have a checkpoint's name"
        checkpoint.verify(folder / latest(folder))
        assert int(latest(folder)[-8:]) <= step, "latest moves last"
        after.append(step)
        save(folder, 2)
        assert newest(folder) == (2, [])
        assert not list(folder.glob(".*")), "no litter stays"
    assert moment > 8
    assert after[0] == 1
    assert after[-1] == 2
    assert sorted(after) == after


def test_a_leftover_of_a_process_that_was_killed_goes(tmp_path):
    (tmp_path / ".step-00000001-abcdefgh" / "step-00000001").mkdir(parents=True)
    save(tmp_path, 1)
    assert not list(tmp_path.glob(".*"))
    assert newest(tmp_path) == (1, [])


@pytest.mark.parametrize("number", [errno.ENOSPC, errno.EDQUOT, errno.EIO, errno.EROFS])
@pytest.mark.parametrize("at", ["fsync", "rename"])
def test_a_full_or_failing_disk_is_one_message_and_the_old_checkpoint_survives(tmp_path, monkeypatch, number, at):
    save(tmp_path, 1)

    def fail(*_arguments: object, **_options: object) -> None:
        raise OSError(number, os.strerror(number))

    monkeypatch.setattr(os, at, fail)
    with pytest.raises(MachineError, match="could not save the checkpoint of step 2") as caught:
        save(tmp_path, 2)
    monkeypatch.undo()
    assert os.strerror(number) in str(caught.value)
    assert newest(tmp_path) == (1, [])
    assert latest(tmp_path) == "step-00000001"
    assert {path.name for path in tmp_path.iterdir()} == {"latest", "step-00000001"}


def save_with_room_for(size: int, folder: Path) -> str:
    """What saving step 2 says in a child that may write no file larger than `size` bytes."""
    reading, writing = os.pipe()
    child = os.fork()
    if child == 0:
        resource.setrlimit(resource.RLIMIT_FSIZE, (size, size))
        try:
            save(folder, 2)
        except BaseException as error:
            os.write(writing, f"{type(error).__name__}: {error}".encode())
        finally:
            os._exit(0)
    os.close(writing)
    os.waitpid(child, 0)
    with os.fdopen(reading, encoding="utf-8") as pipe:
        return pipe.read()


@pytest.mark.parametrize("size", [0, 20, 100, 200])
def test_no_room_in_any_file_of_a_checkpoint(tmp_path, size):
    """The writers of the tensor files are not Python's, and have errors of their own."""
    save(tmp_path, 1)
    said = save_with_room_for(size, tmp_path)
    assert said.startswith("MachineError: could not save the checkpoint of step 2: File too large")
    assert newest(tmp_path) == (1, [])
    assert latest(tmp_path) == "step-00000001"
    assert {path.name for path in tmp_path.iterdir()} == {"latest", "step-00000001"}


# --- pruning ------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("last", "keep", "left"),
    [(2, [], [4, 3]), (1, [], [4]), (9, [], [4, 3, 2, 1]), (1, [2], [4, 2]), (1, [0], [4]), (1, [4], [4])],
)
def test_prune_keeps_the_newest_and_the_named(tmp_path, last, keep, left):
    save(tmp_path, 1, 2, 3, 4)
    checkpoint.prune(tmp_path, last, keep, newest=4)
    assert checkpoint.steps_saved(tmp_path) == left
    assert newest(tmp_path) == (4, [])


def test_prune_never_takes_the_one_just_saved_for_a_damaged_newer_one(tmp_path):
    save(tmp_path, 1, 2, 3)  # 3 was damaged and passed over; the run saved 2 again
    checkpoint.prune(tmp_path, 1, [], newest=2)
    assert checkpoint.steps_saved(tmp_path) == [3, 2]


def test_a_prune_that_is_cut_off_leaves_no_half_of_a_checkpoint_under_its_name(tmp_path, monkeypatch):
    save(tmp_path, 1, 2)

    def cut_off(folder: Path) -> None:
        next(folder.iterdir()).unlink()
        raise KeyboardInterrupt

    monkeypatch.setattr("shutil.rmtree", cut_off)
    with pytest.raises(KeyboardInterrupt):
        checkpoint.prune(tmp_path, 1, [], newest=2)
    assert checkpoint.steps_saved(tmp_path) == [2]
    monkeypatch.undo()
    save(tmp_path, 3)
    assert not list(tmp_path.glob(".*")), "the next save sweeps up"
