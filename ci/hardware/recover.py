"""After a failure: end what is left of the run, reset the board where that did not close it, or quarantine the machine.

tt-smi resets from the host alone. It takes addresses of one kind; PCI addresses, as nodes are numbered anew by a reset.
"""

from __future__ import annotations

import os

from ci.hardware.commands import ended, kernel_log, snapshot
from ci.hardware.job import Job, say
from ci.hardware.own import end_own, strangers
from ci.hardware.preflight import examine, quarantine_file
from common.errors import MachineError
from common.files import utc_now
from tools.doctor.findings import Diagnosis
from tools.machine import host, lease
from tools.machine.lease import Owner

# A doctor that does not end has perhaps asked a card that does not answer.
OF_THE_BOARD = ("board.nodes", "board.driver", "board.firmware", "board.memory", "board.answers", "doctor")
RESETS = 3
RESET_SECONDS = 180


def recover(job: Job) -> str:
    """Raises MachineError where the machine is not fit for the next job; it is quarantined then, or somebody else's."""
    kernel_log(job.out / "dmesg-failed.txt")  # a reset says much there
    try:
        end_own(job)
    except MachineError as error:
        raise quarantined(job, f"its run cannot be ended: {error.what}") from error
    if job.run is None:
        return "this job did not come to train on the board: it is left as it is"
    if not job.closed:
        examine(job, "failed")  # for whoever looks into it; no reason for or against a reset
    elif not unfit(job, "failed"):
        return "the run closed the board, and nothing is wrong with it: no reset"
    for attempt in range(1, RESETS + 1):
        found = [] if (why := reset(job, attempt)) else unfit(job, f"after-reset-{attempt}")
        why = why or "; ".join(f"{finding.id}: {finding.evidence}" for finding in found)
        if not why:
            return f"the board was reset ({attempt} of at most {RESETS} times), and nothing is wrong with it"
        say(f"after reset {attempt} of {RESETS}: {why}")
    raise quarantined(job, f"{RESETS} resets did not help: {why}")


def unfit(job: Job, name: str) -> list[Diagnosis]:
    """What is wrong with the board itself, as preflight would find it: no reset makes room on a disk."""
    found = [*examine(job, name), snapshot(job.out / f"tt-smi-{name}.json")]
    return [finding for finding in found if finding.ok is False and finding.id in OF_THE_BOARD]


def reset(job: Job, attempt: int) -> str:
    """Reset this job's cards, having their leases meanwhile; why it failed, or nothing.

    Raises MachineError where somebody else has one, or where nothing here can reset.
    """
    program, record = host.tt_smi(), job.record
    cards: list[str] = record["cards"]
    if program is None or len(cards) < record["nodes"]:
        lack = "there is no tt-smi here" if program is None else "not every card has a PCI address"
        raise quarantined(job, f"a run did not close the board, and it cannot be reset: {lack}")
    with lease.taken(cards, Owner(job.board.name, os.getpid(), "ci/hardware.sh recover")):
        if found := strangers(job):
            raise lease.busy(job.board.name, ", ".join(map(host.holder, found)))
        words = reset_words(job.board.name, cards, attempt)
        say(f"+ tt-smi {' '.join(words)}")
        code = ended([program, *words], RESET_SECONDS, job.out / f"tt-smi-reset-{attempt}.txt")
    return "" if code == 0 else f"tt-smi {words[0]} " + (f"ended with {code}" if code else "did not end")


def reset_words(board: str, cards: list[str], attempt: int) -> list[str]:
    """A Galaxy whose CPLD firmware is below 1.16 knows no `-r`, only a reset of all its trays."""
    return ["-glx_reset_auto"] if board.startswith("galaxy") and attempt > 1 else ["-r", ",".join(cards)]


def quarantined(job: Job, why: str) -> MachineError:
    """Take this machine out of service until a person has looked at it. What is in the file already stays."""
    path = quarantine_file()
    lines = [
        f"board: {job.board.name}",
        f"when: {utc_now()}",
        f"run: {job.run.name if job.run else 'none'}",
        f"why: {why}",
    ]
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        with path.open("x", encoding="utf-8") as file:
            file.write("\n".join(lines) + "\n")
        path.chmod(0o644)  # whatever the umask: every job after this one reads it
    except OSError as error:
        if not path.is_file():
            return MachineError(
                f"the machine could not be taken out of service: {os.strerror(error.errno or 0)}; {why}",
                where=str(path),
                todo="take its runner offline by hand, and look at the board",
            )
    return MachineError(
        f"the machine is out of service: {why}",
        where=str(path),
        todo="look at the board (a driver reload, a power cycle); when it is well again, remove that file",
    )
