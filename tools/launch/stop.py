"""`recipe stop`: end a run of this machine, in a container or not, so that it saves a checkpoint first."""

from __future__ import annotations

import contextlib
import os
import signal
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path

from common.errors import MachineError, UsageError
from tools.containers import launcher
from tools.containers.launcher import Container
from tools.containers.spec import STOP_SECONDS
from tools.machine import lease
from tools.machine.lease import Owner

Say = Callable[[str], None]


@dataclass(frozen=True)
class Native:
    """A run on this machine's own Python, known by the lease of its board."""

    key: str
    owner: Owner

    @property
    def run(self) -> str:
        return self.owner.run

    @property
    def hw(self) -> str:
        return self.owner.board

    def __str__(self) -> str:
        return f"{self.run} ({self.hw}, process {self.owner.pid})"

    def end(self, now: bool) -> None:
        try:
            with contextlib.suppress(ProcessLookupError):  # it has just ended
                os.kill(self.owner.pid, signal.SIGKILL if now else signal.SIGTERM)
        except PermissionError as error:
            raise MachineError(
                "the run is another user's, and only that user or root may end it", where=str(self), todo="ask them"
            ) from error

    def ended(self) -> bool:
        return lease.free(self.key)


def stop(run: str | None, board: str | None, now: bool, say: Say) -> None:
    """End the one run that goes on, or the one named by its run (or the run's folder) or its board.

    Raises UsageError where several do and none is named, MachineError where it does not end.
    """
    jobs = going_on(say)
    found = [job for job in jobs if run is None or job.run == Path(run).name]
    found = [job for job in found if board in (None, job.hw)]
    if not found and jobs and (run or board):
        raise UsageError(f"no run {run or f'on {board}'} goes on here", todo=f"these do: {listed(jobs)}")
    if len(found) > 1:
        raise UsageError(f"{len(found)} runs go on here: {listed(found)}", todo="name one: recipe stop RUN, or --hw")
    if not found:
        say("no run goes on here")
    for job in found:
        finish(job, now, say)


def listed(jobs: Sequence[Native | Container]) -> str:
    return "; ".join(map(str, jobs))


def finish(job: Native | Container, now: bool, say: Say) -> None:
    """Ask the run to end, and wait for that."""
    say(f"{'killing' if now else 'stopping'} {job}")
    job.end(now)
    wait(job)
    say("it has ended; the same command goes on from its last checkpoint")


def wait(job: Native | Container) -> None:
    """Wait until a run that was asked to end has. Raises MachineError where it takes too long."""
    until = time.monotonic() + STOP_SECONDS
    while not job.ended():
        if time.monotonic() > until:
            raise MachineError(
                f"{job.run} has not ended after {STOP_SECONDS} s",
                where=str(job),
                todo="wait, or end it without saving: recipe stop --now; on a board look at `recipe doctor` then",
            )
        time.sleep(0.1)


def going_on(say: Say) -> list[Native | Container]:
    """Runs in containers of ours, then runs on this machine's own Python that have a board."""
    leases = {owner.pid: (key, owner) for key, owner in lease.all_held().items() if owner.container is None}
    native = [Native(key, owner) for key, owner in leases.values()]
    try:
        return [*(container for container in launcher.ours() if container.running), *native]
    except MachineError as error:
        say(f"runs in containers are not seen: {error.what}")
        return [*native]
