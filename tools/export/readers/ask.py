"""Puts questions to other software, in its own environment: a process with a time limit, without network or secrets."""

from __future__ import annotations

import contextlib
import json
import os
import signal
import subprocess
import tempfile
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from common.errors import MachineError, VerificationError
from tools.export.readers.environment import Say, last_line, python_of

MAIN = Path(__file__).with_name("probes") / "ask.py"
SECONDS = 1800  # a 1.1 B model in fp32 is converted and asked on two cores in less
Answers = dict[str, list[Any]]
# What a reader gets of our environment: no token, no key, nothing that names an index.
KEPT = ("PATH", "LANG", "LC_ALL", "OMP_NUM_THREADS", "OPENBLAS_CORETYPE")
SETTINGS = {
    "HF_HUB_OFFLINE": "1",
    "HF_HUB_DISABLE_TELEMETRY": "1",
    "DO_NOT_TRACK": "1",
    "VLLM_NO_USAGE_STATS": "1",
    "VLLM_ENABLE_V1_MULTIPROCESSING": "0",  # its engine in the process that is ended when the time is up
    "VLLM_CPU_KVCACHE_SPACE": "1",  # GiB
}


def ask(
    lock: str,
    probe: str,
    opened: Mapping[str, Any],
    asked: Mapping[str, Sequence[Sequence[Any]]],
    say: Say,
) -> Answers:
    """Return a probe's answers, a list for each question of `asked` that it knows; an error's is {"error": text}.

    Raises MachineError where there is no such environment here, or its software does not run on this processor;
    VerificationError where it cannot open what it is given.
    """
    python = python_of(lock, say)
    with tempfile.TemporaryDirectory(prefix="recipes-reader-") as name:
        folder = Path(name)
        (folder / "job.json").write_text(json.dumps({"open": opened, "asked": asked}), encoding="utf-8")
        code, said = run([str(python), "-I", str(MAIN), probe, name], environment(folder))
        if code == -signal.SIGILL:
            raise MachineError("does not run on this processor")
        answers = folder / "answers.json"
        if code or not answers.is_file():
            ended = f"(signal {-code}) " if code < 0 else ""
            raise VerificationError(f"cannot open it: {ended}{last_line(said)}")
        return dict(json.loads(answers.read_text(encoding="utf-8")))


def environment(home: Path) -> dict[str, str]:
    """Return what a reader's process has for its environment, with `home` for whatever it keeps."""
    kept = {key: os.environ[key] for key in KEPT if key in os.environ}
    return {**kept, **SETTINGS, **dict.fromkeys(("HOME", "TMPDIR", "XDG_CACHE_HOME", "HF_HOME"), str(home))}


def run(command: Sequence[str], env: Mapping[str, str]) -> tuple[int, str]:
    """Run a command; return its exit code and what it said last. Raises VerificationError when its time is up."""
    with tempfile.TemporaryFile("w+", encoding="utf-8", errors="replace") as log:
        # A session of its own: whatever it started ends with it.
        child = subprocess.Popen(
            command, env=dict(env), stdin=subprocess.DEVNULL, stdout=log, stderr=log, start_new_session=True
        )
        try:
            code = child.wait(SECONDS)
        except subprocess.TimeoutExpired:
            raise VerificationError(f"did not answer within {SECONDS // 60} minutes") from None
        finally:
            with_children(child.pid)
            child.wait()
        log.seek(0)
        return code, log.read()


def with_children(session: int) -> None:
    """End all processes of a session; none may be left."""
    with contextlib.suppress(ProcessLookupError):
        os.killpg(session, signal.SIGKILL)
