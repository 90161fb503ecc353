"""Programs that the job starts: each with a time limit, and killed with all that it started."""

from __future__ import annotations

import contextlib
import os
import shutil
import signal
import subprocess
import sys
from collections.abc import Sequence
from pathlib import Path

from common.ops.findings import Finding
from common.recipes import ROOT

SNAPSHOT_SECONDS = 30  # a card that does not answer makes tt-smi wait for ever


def recipe(*words: str) -> list[str]:
    """The command `recipe`, by this Python."""
    return [sys.executable, "-m", "common", *words]


def ended(command: Sequence[str], seconds: float, output: Path, errors: Path | None = None) -> int | None:
    """Run a command, its output to the file `output`; its exit code, or None where it did not end in time."""
    with output.open("wb") as out, contextlib.ExitStack() as files:
        err = subprocess.STDOUT if errors is None else files.enter_context(errors.open("wb"))
        process = subprocess.Popen(
            command, cwd=ROOT, stdin=subprocess.DEVNULL, stdout=out, stderr=err, start_new_session=True
        )
        try:
            return process.wait(seconds)
        except subprocess.TimeoutExpired:
            return None
        finally:
            kill_group(process)


def kill_group(process: subprocess.Popen[bytes]) -> None:
    """Kill a process that leads a session, and whatever of its session is left."""
    with contextlib.suppress(ProcessLookupError):
        os.killpg(process.pid, signal.SIGKILL)
    process.wait()


def tt_smi() -> str | None:
    return shutil.which("tt-smi")


def snapshot(output: Path) -> Finding:
    """What tt-smi says about every card of this host, into a file. That it does not answer says something, too."""
    program = tt_smi()
    if program is None:
        return Finding("board.answers", None, "no tt-smi here to ask the cards with")
    code = ended([program, "-s"], SNAPSHOT_SECONDS, output)
    if code == 0:
        return Finding("board.answers", True, f"tt-smi -s answers: {output.name}")
    said = f"has not ended after {SNAPSHOT_SECONDS} s" if code is None else f"ends with {code}"
    return Finding("board.answers", False, f"tt-smi -s {said}", f"see {output.name}; a card that hangs needs a reset")
