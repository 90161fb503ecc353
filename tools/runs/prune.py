"""Makes room: deletes checkpoints and exports of runs that are over, and nothing else of them."""

from __future__ import annotations

import contextlib
import shutil
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path

from common.config import Config
from common.errors import RecipeError
from common.train import checkpoint
from common.train.resume import try_lock
from tools.runs import run_record, trained
from tools.runs.run_record import RunRecord

Say = Callable[[str], None]


@dataclass(frozen=True)
class Folder:
    """A folder that would go, and what it takes, in bytes."""

    path: Path
    size: int


def locked(records: Sequence[RunRecord], stack: contextlib.ExitStack, say: Say) -> Iterator[RunRecord]:
    """The runs that no process has, read again once they are held: until `stack` closes none of them starts."""
    for record in records:
        lock = try_lock(record.folder)
        if lock is None:
            say(f"{record.name} is running: not touched")
            continue
        stack.enter_context(lock)
        yield run_record.read(record.folder)


def removable(record: RunRecord, keep: int, exports: bool, named: bool, say: Say) -> list[Folder]:
    """What of a run can go: all but its `keep` newest checkpoints and the one that stands for it; its export if asked.

    With `keep` 0 a run that is not done keeps the checkpoint that it can go on from, unless it was `named`.
    """
    if record.config is None:
        say(f"{record.name}: its config cannot be read, so which checkpoint stands for it is not known: not touched")
        return []
    folder = record.folder / "checkpoints"
    steps = checkpoint.steps_saved(folder)
    done = record.manifest.get("exit_reason") == "done"
    kept = set(steps[:keep])
    if steps and (keep or (not done and not named)):
        kept.add(standing_step(record.folder, record.config, steps[0]))
        if not keep:
            say(f"{record.name} is not done: it keeps a checkpoint to go on from; name the run to delete that, too")
    going = [checkpoint.folder_of(folder, step) for step in steps if step not in kept]
    going += [record.folder / "export"] if exports else []
    going += [left for place in (folder, record.folder) for left in place.glob(f"{checkpoint.PRUNED}*")]
    return [Folder(path, size_of(path)) for path in going if path.is_dir() and not path.is_symlink()]


def standing_step(folder: Path, config: Config, newest: int) -> int:
    """The step of the checkpoint that stands for a run: the newest that verifies; with keep_best, the best one."""
    try:
        return trained.result(folder, config, ignore).step
    except RecipeError:  # none verifies
        return newest


def ignore(_line: str) -> None:
    """What is passed over does not matter here: no checkpoint that verifies is deleted for it."""


def remove(folder: Folder) -> None:
    if folder.path.name.startswith(checkpoint.PRUNED):  # left by a prune that was cut off
        shutil.rmtree(folder.path)
    else:
        checkpoint.delete(folder.path)


def size_of(folder: Path) -> int:
    return sum(path.lstat().st_size for path in folder.rglob("*") if not path.is_dir())


def shown_size(size: float) -> str:
    """`7.9 MB`."""
    return f"{size / 1e9:.1f} GB" if size >= 1e9 else f"{size / 1e6:.1f} MB"
