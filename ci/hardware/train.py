"""The run itself: watched by its own watchdog, and by a limit that asks it to save before it is killed."""

from __future__ import annotations

import contextlib
import signal
import subprocess
import sys
import threading
import time
from typing import IO

from ci.hardware.commands import kill_group, recipe
from ci.hardware.job import Failed, Job, say
from ci.hardware.own import end_own
from common.errors import TrainingError
from common.handlers import handled
from common.ops.container import STOP_SECONDS, process
from common.recipes import ROOT

SIGNALS = (signal.SIGINT, signal.SIGTERM, signal.SIGHUP)


def train(job: Job) -> str:
    """Raises Failed with the run's code where that is not 0."""
    words = ["run", job.recipe, "--hw", job.board.name, "--resume", "never", "--out", str(job.runs), *job.where]
    words += ["--steps", str(job.steps)] if job.steps else []
    say(f"+ recipe {' '.join(words)}")
    signals: list[int] = []
    with handled(SIGNALS, lambda number, _frame: signals.append(number)):
        child = subprocess.Popen(
            recipe(*words), cwd=ROOT, stdin=subprocess.DEVNULL, stdout=subprocess.PIPE, stderr=subprocess.STDOUT,
            start_new_session=True,
        )  # fmt: skip
        job.note(process=process(child.pid))
        assert child.stdout is not None
        shown = threading.Thread(target=show, args=(child.stdout, job), daemon=True)
        shown.start()
        why = attend(job, child, signals)
        shown.join(10)
    code = child.returncode
    if code == 0:
        return f"{job.run.name if job.run else 'no run folder'}: {job.manifest.get('exit_reason')}"
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


def attend(job: Job, child: subprocess.Popen[bytes], signals: list[int]) -> str:
    """Wait for the run; hand signals on; stop it at its limit, and kill it if it does not listen. Says why it ended."""
    until, why = time.monotonic() + 60 * job.minutes, ""
    while True:
        with contextlib.suppress(subprocess.TimeoutExpired):
            child.wait(0.5)
            return why
        now = time.monotonic()
        if signals:
            name = signal.Signals(signals.pop(0)).name
            why = why or f", asked to by {name}"
        elif now < until:
            continue
        elif not why:
            why = f", at its limit of {job.minutes:g} minutes"
        else:
            end_own(job, now=True)
            kill_group(child)
            return f"{why}, killed as it had not ended {STOP_SECONDS} s later"
        say(f"stopping the run{why}")
        child.send_signal(signal.SIGTERM)  # a second one ends it without saving
        until = now + STOP_SECONDS


def show(output: IO[bytes], job: Job) -> None:
    """What the run prints: to this screen, and into screen.txt."""
    with (job.out / "screen.txt").open("wb") as copy:
        for line in output:
            copy.write(line)
            copy.flush()
            sys.stdout.buffer.write(line)
            sys.stdout.buffer.flush()
