"""The library that watches a process's calls (watch.c), and the memory that it shares with whoever started it."""

from __future__ import annotations

import ctypes
import mmap
import os
import shutil
import subprocess
from pathlib import Path

PHASES = ("start", "data", "step", "evaluation", "checkpoint", "finish", "export", "card", "report", "after the end")


class Control(ctypes.Structure):
    """What the struct of this name in watch.c has, and behind it what a run's own markers write (victim.py)."""

    phase: int
    target: int
    at: int
    seen: int
    calls: int
    but_writes: int
    no_writes: int
    struck: int
    signal: int
    whom: int
    busy: int
    pids: list[int]
    what: bytes
    saved: int
    visits: list[int]
    calls_in: list[int]
    no_writes_in: list[int]
    seconds_in: list[float]
    since: float

    _fields_ = (
        *((name, ctypes.c_int64) for name in ("phase", "target", "at", "seen", "calls")),
        *((name, ctypes.c_int64) for name in ("but_writes", "no_writes", "struck")),
        *((name, ctypes.c_int64) for name in ("signal", "whom", "busy")),
        ("pids", ctypes.c_int64 * 4),  # of the command, then of its ranks
        ("what", ctypes.c_char * 256),
        ("saved", ctypes.c_int64),  # the last step whose checkpoint was said to be saved
        ("visits", ctypes.c_int64 * len(PHASES)),  # how often each phase began
        ("calls_in", ctypes.c_int64 * len(PHASES)),  # calls of each phase
        ("no_writes_in", ctypes.c_int64 * len(PHASES)),  # those of them that are no writes of data
        ("seconds_in", ctypes.c_double * len(PHASES)),  # and its time
        ("since", ctypes.c_double),  # when the phase began or was gone back to
    )


def shared() -> Control:
    """Return a Control, all zero, in memory that a fork shares with its parent."""
    return Control.from_buffer(mmap.mmap(-1, ctypes.sizeof(Control)))


def compiler() -> str | None:
    """Return this machine's C compiler, or None: one without the headers of the C library is none."""
    found = shutil.which("cc")
    if found is None:
        return None
    words = [found, "-E", "-x", "c", "-include", "stdio.h", os.devnull, "-o", os.devnull]
    return found if subprocess.run(words, capture_output=True, check=False).returncode == 0 else None


def build(folder: Path) -> Path | None:
    """Compile watch.c into `folder`; return the library, or None on a machine without a C compiler."""
    cc = compiler()
    if cc is None:
        return None
    library = folder / "watch.so"
    source = Path(__file__).with_name("watch.c")
    subprocess.run([cc, "-O1", "-shared", "-fPIC", "-pthread", "-o", str(library), str(source)], check=True)
    return library


def loaded() -> bool:
    """Return whether the library is in this process."""
    return hasattr(ctypes.CDLL(None), "torture_watch")


def watch(root: Path, log: int, control: Control) -> bool:
    """Watch this process from here on; return False where the library is not preloaded."""
    if loaded():
        ctypes.CDLL(None).torture_watch(os.fsencode(root), log, ctypes.byref(control))
    return loaded()
