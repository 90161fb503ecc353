"""One owner per board: a lock file for each card, which ends with its process, whatever ends that."""

from __future__ import annotations

import contextlib
import dataclasses
import errno
import fcntl
import json
import os
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import IO

from common.errors import MachineError
from common.files import disk_errors, utc_now
from common.hardware import Hardware
from tools.machine import detect, host
from tools.machine.detect import system_root


@dataclass(frozen=True)
class Owner:
    """Who has a board: a process here, its run, since when, and the container it launched."""

    board: str
    pid: int
    run: str
    container: str | None = None
    since: str = dataclasses.field(default_factory=utc_now)

    def __str__(self) -> str:
        inside = f", in the container {self.container}" if self.container else ""
        return f"process {self.pid} with the run {self.run}{inside}, since {self.since}"


def folder() -> Path:
    """Where leases lie: one place for all users of a machine, empty after a start."""
    return system_root() / "run/lock"


def path_of(key: str) -> Path:
    return folder() / f"recipes-{key}.lock"


@contextlib.contextmanager
def taken(keys: Sequence[str], owner: Owner) -> Iterator[None]:
    """Have the cards `keys` (their PCI addresses) until the block ends. Raises MachineError naming who has one."""
    with contextlib.ExitStack() as files:
        for key in sorted(keys):  # in one order, so that two who want several cards cannot each have some
            file = files.enter_context(_open(path_of(key)))
            with disk_errors("take the lease of a card", path_of(key)):
                if not _lock(file):
                    raise busy(owner.board, str(_read(file) or "another process"))
                _write(file, json.dumps(dataclasses.asdict(owner)))
            files.callback(_forget, file)
        yield


@contextlib.contextmanager
def of_board(hw: Hardware, nodes: Sequence[str], run: str) -> Iterator[None]:
    """Have the board for a run on this machine's own Python, which then sees no other card.

    In a container the launcher has it already, and no other card is there.
    """
    if host.in_container():
        yield
        return
    cards = host.cards(nodes)
    with taken([card.key for card in cards], Owner(hw.name, os.getpid(), run)):
        if others := [host.holder(pid) for card in cards for pid in card.holders]:  # such as one without a launcher
            raise busy(hw.name, ", ".join(dict.fromkeys(others)))
        with detect.alone(nodes):
            yield


def busy(board: str, who: str) -> MachineError:
    return MachineError(
        f"{board} is in use by {who}",
        where="the lease of the board",
        todo=f"wait for it, or end it: recipe stop --hw {board} (it saves a checkpoint first)",
    )


def held(key: str) -> Owner | None:
    """Who has this card's lease now, if that is written there. A lease whose process is gone is none."""
    if free(key):
        return None
    with path_of(key).open(encoding="utf-8") as file:
        return _read(file)


def free(key: str) -> bool:
    """Whether nobody has this card's lease. An owner that is just ending has it for a moment after its name is gone."""
    try:
        file = path_of(key).open(encoding="utf-8")
    except OSError:
        return True
    with file:
        return _lock(file)


def all_held() -> dict[str, Owner]:
    """Every lease on this machine that somebody has, by its key."""
    keys = sorted(path.name[len("recipes-") : -len(".lock")] for path in folder().glob("recipes-*.lock"))
    return {key: owner for key in keys if (owner := held(key))}


def _open(path: Path) -> IO[str]:
    """The lock file, writable for everyone, as runs of several users ask for one board.

    A kernel refuses O_CREAT on another user's file in a folder like /run/lock, so that comes only where there is none.
    """
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        try:
            number = os.open(path, os.O_RDWR | os.O_NOFOLLOW | os.O_CLOEXEC)
        except FileNotFoundError:
            number = os.open(path, os.O_RDWR | os.O_CREAT | os.O_NOFOLLOW | os.O_CLOEXEC, 0o666)
            os.fchmod(number, 0o666)  # whatever the umask
    except OSError as error:
        raise MachineError(
            f"the lease of a card cannot be opened: {os.strerror(error.errno or 0)}",
            where=str(path),
            todo="its folder must be writable for everyone (mode 1777), the file for every user of the board (0666)",
        ) from error
    return os.fdopen(number, "r+", encoding="utf-8")


def _lock(file: IO[str]) -> bool:
    try:
        fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError:
        return False
    return True


def _write(file: IO[str], text: str) -> None:
    os.ftruncate(file.fileno(), 0)
    if os.pwrite(file.fileno(), data := text.encode(), 0) != len(data):  # at once: no rest is left for its close
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))


def _forget(file: IO[str]) -> None:
    """Take the owner's name out, if the disk takes that: a lease ends with its process, whatever is written there."""
    with contextlib.suppress(OSError), file:
        _write(file, "")


def _read(file: IO[str]) -> Owner | None:
    """What the owner wrote; None where it has not yet, or another program did."""
    try:
        file.seek(0)
        return Owner(**json.load(file))
    except (ValueError, TypeError):
        return None
