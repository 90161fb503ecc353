"""llama.cpp in an environment of its own, made on demand below RECIPES_HOME, to read a file as its users will."""

from __future__ import annotations

import hashlib
import json
import re
import signal
import subprocess
import sys
import tempfile
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

from common.errors import MachineError, VerificationError
from common.files import move_into_place
from common.paths import ROOT, home

LOCK = ROOT / "requirements" / "readers.txt"
PEER = Path(__file__).with_name("peer.py")
Say = Callable[[str], None]


def version() -> str:
    """Return name and version of the reader."""
    found = re.search(r"^(xllamacpp)==(\S+)", LOCK.read_text(encoding="utf-8"), re.MULTILINE)
    assert found, "the lock has the reader"
    return f"{found[1]} {found[2]}"


def python_of_reader(say: Say) -> Path:
    """Return the Python of the reader's environment, made now where there is none for this lock and this Python.

    Raises MachineError where it cannot be made, for want of the network above all.
    """
    made_from = hashlib.sha256(LOCK.read_bytes() + sys.version.encode()).hexdigest()
    folder = home() / "readers" / made_from[:16]
    python = folder / "bin" / "python"
    if python.is_file():
        return python
    say(f"fetching {version()}, which is to read the file, into {folder}")
    folder.parent.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(prefix=".reader-", dir=folder.parent) as scratch:
        made = Path(scratch) / "venv"
        run([sys.executable, "-m", "venv", str(made)])
        pip = [str(made / "bin" / "python"), "-m", "pip", "install", "--quiet", "--disable-pip-version-check"]
        run([*pip, "--no-deps", "--require-hashes", "--only-binary", ":all:", "-r", str(LOCK)])
        move_into_place(made, folder)
    return python


def run(command: list[str]) -> None:
    """Run a command of the set-up. Raises MachineError with its last line."""
    done = subprocess.run(command, capture_output=True, text=True)
    if done.returncode:
        raise MachineError(f"{version()} could not be set up: {last_line(done.stderr or done.stdout)}")


def read(python: Path, job: Mapping[str, Any]) -> dict[str, Any]:
    """Return what the reader made of a job: the ids of its texts, and greedy answers to its prompts.

    Raises VerificationError where it cannot read the file, MachineError where it cannot run on this processor.
    """
    with tempfile.TemporaryDirectory(prefix="recipes-reader-") as scratch:
        folder = Path(scratch)
        (folder / "job.json").write_text(json.dumps(job), encoding="utf-8")
        done = subprocess.run([python, "-I", PEER, folder], capture_output=True, text=True, errors="replace")
        if done.returncode == -signal.SIGILL:
            raise MachineError(f"{version()} does not run on this processor")
        if done.returncode:
            ended = f"(signal {-done.returncode}) " if done.returncode < 0 else ""
            raise VerificationError(f"{version()} cannot read it: {ended}{last_line(done.stderr)}")
        return dict(json.loads((folder / "out.json").read_text(encoding="utf-8")))


def last_line(text: str) -> str:
    return (text.strip().splitlines() or ["it said nothing"])[-1].strip()
