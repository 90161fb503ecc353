"""A root caller's run folder is user 1000's while the run goes on, and root's again when it has ended.

A container never runs as root; what it writes would then not be the caller's. Any other caller's container runs as
that caller, and nothing is lent.
"""

from __future__ import annotations

import contextlib
import os
from collections.abc import Iterator, Sequence
from pathlib import Path

from common.errors import MachineError
from common.paths import home
from tools.containers.spec import USER
from tools.runs.folder import runs_in

CACHES = ("bases", "corpora", "tokens", "tokenizers", "kernels", "hub")  # what a run writes below RECIPES_HOME


class EngineLost(MachineError):
    """The Docker engine stopped answering; the container that it ran may run on."""


def candidates(out: Path, new: str, recipe: str) -> list[Path]:
    """Folders that a run of `recipe` may write to: its own new one, and unfinished ones that it may go on with."""
    mine = (run for run in runs_in(out) if run.fact("recipe") == recipe and run.fact("exit_reason") != "done")
    here = out.resolve()  # a link in it may lead anywhere, and what is lent is then somebody else's to change
    return [out / new, *(run.folder for run in mine if run.folder.parent == here)]


@contextlib.contextmanager
def lent(folders: Sequence[Path]) -> Iterator[None]:
    """User 1000 owns `folders` within the block. The first is the new run's; it goes again if nothing came into it.

    Where the engine was lost, the run may go on and write: they stay lent until its container is cleared away.
    """
    new = folders[0]
    new.mkdir(parents=True, exist_ok=True)
    mine = [folder for folder in folders if folder.stat().st_uid == 0]
    runs_on = False
    try:
        for folder in mine:
            give(folder, 0, USER)
        share_caches()
        yield
    except EngineLost:
        runs_on = True
        raise
    finally:
        for folder in [] if runs_on else mine:
            give(folder, USER, 0)
        with contextlib.suppress(OSError):
            new.rmdir()


def caches() -> list[Path]:
    """The folders of RECIPES_HOME, made. They stay user 1000's: root can use them all the same."""
    folders = [home() / name for name in CACHES]
    for folder in folders:
        folder.mkdir(parents=True, exist_ok=True)
    return folders


def share_caches() -> None:
    """Make the folders of RECIPES_HOME, and let the user that a root caller's container has write them."""
    for folder in caches():
        if os.getuid() == 0:
            give(folder, 0, USER)


def give(folder: Path, before: int, after: int) -> None:
    """Hand what `before` owns in `folder`, the folder too, to `after`; links are handed over, never followed."""
    if not folder.is_dir():
        return
    # Each by its name in a folder that is open, and a folder after all in it: who already owns a part could put a link
    # in the place of a folder in the meantime.
    for place, names, files, opened in os.fwalk(folder, topdown=False):
        for name in (*names, *files, *(["."] if Path(place) == folder else [])):
            if os.stat(name, dir_fd=opened, follow_symlinks=False).st_uid == before:
                _chown(Path(place, name), after, name, opened)


def _chown(path: Path, user: int, name: str, folder: int) -> None:
    """Give the file `name` of the opened `folder`, which messages call `path`, to a user."""
    try:
        os.chown(name, user, user, dir_fd=folder, follow_symlinks=False)
    except PermissionError as error:
        raise MachineError(
            "not even root may hand this over, so a container that is not root could not write to it",
            where=str(path),
            todo="a file system that squashes root? name another folder with --out or RECIPES_HOME, or do not be root",
        ) from error
