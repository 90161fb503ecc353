"""Programs that the job starts: each with a time limit, and killed with all that it started."""

from __future__ import annotations

import contextlib
import os
import re
import shutil
import signal
import subprocess
import sys
from collections.abc import Sequence
from pathlib import Path

from common.paths import ROOT
from tools.doctor.findings import Diagnosis
from tools.machine import host

KILL_SECONDS = 10  # a killed process that has not gone by then waits in the kernel for a card, perhaps for ever
KERNEL = re.compile(r"tenstorrent|iommu|hugetlb|pcieport|aer:|out of memory|oom-kill", re.IGNORECASE)
KERNEL_LINES = 200  # about a board, the last ones: the rest of a host's log is nobody's business
SNAPSHOT_SECONDS = 30  # a card that does not answer makes tt-smi wait for ever


def recipe(*words: str) -> list[str]:
    """The command `recipe`, by this Python."""
    return [sys.executable, "-m", "tools.cli", *words]


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
    """Kill a process that leads a session, and what is left of that; does not wait for what cannot be killed."""
    with contextlib.suppress(ProcessLookupError):
        os.killpg(process.pid, signal.SIGKILL)
    with contextlib.suppress(subprocess.TimeoutExpired):
        process.wait(KILL_SECONDS)


def kernel_log(output: Path) -> None:
    """What the kernel says about boards and memory, into a file. Many hosts let only root read it."""
    code = ended(["dmesg"], 20, output) if shutil.which("dmesg") else 127
    printed = output.read_text("utf-8", "replace").splitlines() if code == 0 else []
    lines = [line for line in printed if KERNEL.search(line)][-KERNEL_LINES:]
    output.write_text("\n".join(lines or [f"nothing of a board (dmesg ends with {code})"]) + "\n")


def snapshot(output: Path) -> Diagnosis:
    """What tt-smi says about every card of this host, into a file. That it does not answer says something, too."""
    program = host.tt_smi()
    if program is None:
        return Diagnosis("board.answers", None, "no tt-smi here to ask the cards with")
    code = ended([program, "-s"], SNAPSHOT_SECONDS, output)
    if code == 0:
        return Diagnosis("board.answers", True, f"tt-smi -s answers: {output.name}")
    said = f"has not ended after {SNAPSHOT_SECONDS} s" if code is None else f"ends with {code}"
    return Diagnosis("board.answers", False, f"tt-smi -s {said}", f"see {output.name}; a card that hangs needs a reset")
