"""What of this machine is this job's: the run that the process of `train` started, in a container or not."""

from __future__ import annotations

import contextlib

from ci.hardware.job import Job, say
from common import hardware, host
from common.errors import MachineError
from common.ops import launcher, stop
from common.ops.container import process
from common.ops.engine import connect


def end_own(job: Job, now: bool = False) -> None:
    """End this job's run if it goes on: asked to save first, killed where it does not listen. Nobody else's."""
    for running in stop.going_on(say):
        if not is_own(job, running):
            continue
        try:
            stop.finish(running, now, say)
        except MachineError as error:
            say(str(error))
            stop.finish(running, now=True, say=say)
    if not job.native:
        with contextlib.suppress(MachineError):  # no engine, no containers
            launcher.remove_ended(connect())


def is_own(job: Job, running: stop.Native | stop.Contained) -> bool:
    """Whether the process that `train` started has the board, or launched the container."""
    if isinstance(running, stop.Contained):
        return launcher.label(running.container, "launcher") == job.record.get("process")
    return process(running.owner.pid) == job.record.get("process")


def strangers(job: Job) -> list[int]:
    """Processes that have a card of this job open, with a lease or without; its own run left out."""
    own, keys = job.record.get("process"), set(job.record["cards"])
    cards = host.cards([node.path for node in hardware.detect().nodes])
    pids = [pid for card in cards if card.pci in keys for pid in card.holders]
    return [pid for pid in dict.fromkeys(pids) if process(pid) != own]
