"""What of this machine is this job's: the run that the process of `train` started, in a container or not."""

from __future__ import annotations

import contextlib

from ci.hardware.job import Job, say
from common.errors import MachineError
from tools.containers import launcher
from tools.containers.launcher import Container
from tools.containers.spec import process
from tools.launch import stop
from tools.machine import detect, host


def end_own(job: Job, now: bool = False) -> None:
    """End this job's run if it goes on: asked to save first, killed where it does not listen. Nobody else's.

    Raises MachineError where it cannot even be killed, as it waits in the kernel for a card.
    """
    for running in stop.going_on(say):
        if is_own(job, running) and (now or not ends(job, running)):
            stop.finish(running, now=True, say=say)
    if not job.native:
        with contextlib.suppress(MachineError):  # no engine, no containers
            launcher.remove_ended()


def ends(job: Job, running: stop.Native | Container) -> bool:
    """Ask the run to save and end, and wait; whether it did. Asked once more than `train` has, it would not save."""
    try:
        if job.record.get("asked"):
            say(f"waiting for {running}, which was asked to end")
            stop.wait(running)
        else:
            stop.finish(running, now=False, say=say)
    except MachineError as error:
        say(str(error))
        return False
    return True


def is_own(job: Job, running: stop.Native | Container) -> bool:
    """Whether the process that `train` started has the board, or launched the container."""
    if isinstance(running, Container):
        return running.launcher == job.record.get("process")
    return process(running.owner.pid) == job.record.get("process")


def strangers(job: Job) -> list[int]:
    """Processes that have a card of this job open, with a lease or without; its own run left out.

    `end_own` came first: no container of this job is left, or it could not be ended, and there is no reset.
    """
    own, keys = job.record.get("process"), set(job.record["cards"])
    cards = host.cards([node.path for node in detect.nodes()])
    pids = [pid for card in cards if card.pci in keys for pid in card.holders]
    return [pid for pid in dict.fromkeys(pids) if process(pid) != own]
