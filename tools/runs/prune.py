"""Makes room: deletes checkpoints and exports of runs that are over, and nothing else of them."""

from __future__ import annotations

import contextlib
import shutil
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path

from common.errors import RecipeError
from common.files import try_lock
from common.train import checkpoint
from tools.runs.folder import RunFolder, Say, read_run


@dataclass(frozen=True)
class Folder:
    """A folder that would go, and what it takes, in bytes."""

    path: Path
    size: int


def locked(runs: Sequence[RunFolder], stack: contextlib.ExitStack, say: Say) -> Iterator[RunFolder]:
    """Yield the runs that no process has, read again once they are held: until `stack` closes none of them starts."""
    for run in runs:
        lock = try_lock(run.folder)
        if lock is None:
            say(f"{run.name} is running: not touched")
            continue
        stack.enter_context(lock)
        yield read_run(run.folder)


def removable(run: RunFolder, keep: int, exports: bool, named: bool, say: Say) -> list[Folder]:
    """Return what can go: all checkpoints but the `keep` newest and the run's result; its `exports`, too, if asked.

    With `keep` 0 a run that is not done keeps the checkpoint that it can go on from, unless it was `named`.
    """
    if run.known_config is None:
        say(f"{run.name}: its config cannot be read, so which checkpoint stands for it is not known: not touched")
        return []
    folder = run.folder / "checkpoints"
    steps = checkpoint.steps_saved(folder)
    done = run.fact("exit_reason") == "done"
    kept = set(steps[:keep])
    if steps and (keep or (not done and not named)):
        try:
            kept.add(run.result(lambda _line: None).step)
        except RecipeError:  # none verifies
            kept.add(steps[0])
        if not keep:
            say(f"{run.name} is not done: it keeps a checkpoint to go on from; name the run to delete that, too")
    going = [checkpoint.folder_of(folder, step) for step in steps if step not in kept]
    going += [run.folder / "export"] if exports else []
    going += [left for place in (folder, run.folder) for left in place.glob(f"{checkpoint.PRUNED}*")]
    return [Folder(path, size_of(path)) for path in going if path.is_dir() and not path.is_symlink()]


def remove(folder: Folder) -> None:
    if folder.path.name.startswith(checkpoint.PRUNED):  # left by a prune that was cut off
        shutil.rmtree(folder.path)
    else:
        checkpoint.delete(folder.path)


def size_of(folder: Path) -> int:
    return sum(path.lstat().st_size for path in folder.rglob("*") if not path.is_dir())


def shown_size(size: float) -> str:
    """Return a size for people: `7.9 MB`."""
    return f"{size / 1e9:.1f} GB" if size >= 1e9 else f"{size / 1e6:.1f} MB"
