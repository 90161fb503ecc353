"""The run itself: watched by its own watchdog, and by a limit that asks it to save before it is killed."""

from __future__ import annotations

import contextlib
import signal
import subprocess
import sys
import time
from typing import BinaryIO

from ci.hardware.commands import kill_group, recipe
from ci.hardware.job import Failed, Job, say
from ci.hardware.own import end_own
from common.errors import MachineError, TrainingError
from common.paths import ROOT
from common.signals import handled
from tools.containers.spec import STOP_SECONDS, process
from tools.runs.folder import read_run

SIGNALS = (signal.SIGINT, signal.SIGTERM, signal.SIGHUP)


def train(job: Job) -> str:
    """Raises Failed with the run's code where that is not 0."""
    words = ["run", job.recipe, "--hw", job.board.name, "--resume", "never", "--out", str(job.runs), *job.where]
    words += ["--steps", job.steps] if job.steps else []
    say(f"+ recipe {' '.join(words)}")
    signals: list[int] = []
    path = job.out / "screen.txt"  # a file: at a pipe whose reader is killed, the run would break off when it speaks
    with (
        handled(SIGNALS, lambda number, _frame: signals.append(number)),
        path.open("wb") as written,
        path.open("rb") as screen,
    ):
        child = subprocess.Popen(
            recipe(*words), cwd=ROOT, stdin=subprocess.DEVNULL, stdout=written, stderr=subprocess.STDOUT,
            start_new_session=True,
        )  # fmt: skip
        job.note(process=process(child.pid))
        why = attend(job, child, screen, signals)
        show(screen)
    code = child.returncode
    if code == 0:
        return f"{job.run.name}: {read_run(job.run).fact('exit_reason')}" if job.run else "no run folder"
    if code is None:
        raise Failed(TrainingError.code, f"recipe run goes on{why}, and cannot be killed: it waits for a card")
    if code < 0:
        raise Failed(TrainingError.code, f"recipe run was killed by {signal.Signals(-code).name}{why}")
    raise Failed(code, f"recipe run ended with {code}{why}: {reason(job)}")


def reason(job: Job) -> str:
    """What the run said last, its error if there is one, with the indented lines that belong to it."""
    lines = (job.out / "screen.txt").read_text("utf-8", "replace").splitlines()
    firsts = [number for number, line in enumerate(lines) if line[:1].strip()]
    errors = [number for number in firsts if lines[number].startswith("error: ")]
    if not firsts:
        return "it said nothing"
    begin = (errors or firsts)[-1]
    end = next((number for number in firsts if number > begin), len(lines))
    return "\n".join(lines[begin:end]).removeprefix("error: ")


def attend(job: Job, child: subprocess.Popen[bytes], screen: BinaryIO, signals: list[int]) -> str:
    """Wait for the run; ask it to end at a signal or its limit; kill it if it does not listen. Says why it ended.

    It is asked once, whatever comes: a second time would end it without saving, and a runner that cancels a job sends
    SIGINT, then SIGTERM.
    """
    limit = time.monotonic() + 60 * job.minutes
    while not signals and time.monotonic() < limit:
        if over(child, screen):
            return ""
    why = f", at its limit of {job.minutes:g} minutes"
    if signals:
        why = f", asked to by {signal.Signals(signals[0]).name}"
    say(f"stopping the run{why}")
    job.note(asked=True)
    child.send_signal(signal.SIGTERM)
    patience = time.monotonic() + STOP_SECONDS
    while time.monotonic() < patience:
        if over(child, screen):
            return why
    try:
        end_own(job, now=True)
    except MachineError as error:
        say(str(error))
    kill_group(child)
    return f"{why}, killed as it had not ended {STOP_SECONDS} s later"


def over(child: subprocess.Popen[bytes], screen: BinaryIO) -> bool:
    """Whether it has ended; waits for that a moment, and shows what it has printed."""
    with contextlib.suppress(subprocess.TimeoutExpired):
        child.wait(0.5)
    show(screen)
    return child.returncode is not None


def show(screen: BinaryIO) -> None:
    sys.stdout.buffer.write(screen.read())
    sys.stdout.buffer.flush()
