"""`python -m ci.rehearse`: HW (n300), FAULT, and OUT, a folder to keep it in. Ends with the failing phase's code.

ROAD=1: the road from a clone to a training step instead (ci/rehearse/road.py), with a FAULT of its own.
"""

from __future__ import annotations

import os
import shlex
import subprocess
import sys
import tempfile
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

from ci.hardware import STEPS, Step
from ci.hardware.job import say
from ci.rehearse import road
from ci.rehearse.faults import FAULTS, NOTHING, Fault, watch
from ci.rehearse.ground import Ground, prepare, record_figures
from common.errors import RecipeError, UsageError
from common.paths import ROOT

PROVEN = (
    "proven here: the phases run in this order and under these conditions, with these codes; what is refused, killed,"
    "\n  reset, quarantined and written down; that a training through the backend of boards is graded, and can fail"
)
NOT_PROVEN = (
    "not proven: anything about a card. The devices are files, ttml is a double, the recorded figures are the double's"
    "\n  own of just now, tt-smi is a script that writes down what it is asked, and no container was started"
)


@dataclass(frozen=True)
class Outcome:
    """What came of a job: the phase that failed, what tt-smi was asked to reset, the quarantine, and the verdict."""

    failed: tuple[str, int]  # and its exit code; "" and 0 where all went well
    resets: Sequence[str]
    quarantine: str | None  # the text of that file
    next_preflight: int | None  # the exit code of the next job's, on a machine that was taken out of service
    verdict: str | None  # as the summary's title has it; None: there is no summary

    def __str__(self) -> str:
        return came_to(*self.failed, len(self.resets), self.next_preflight, self.verdict)

    def is_that_of(self, fault: Fault) -> bool:
        """Return whether the job came to what this fault must come to."""
        return str(self) == wanted(fault)


def came_to(phase: str, code: int, resets: int, next_preflight: int | None, verdict: str | None) -> str:
    """Return in words what a job came to."""
    red = f"{phase} ends with {code}" if phase else "green"
    service = "in service"
    if next_preflight is not None:
        service = f"out of service, where the next job's preflight ends with {next_preflight}"
    return f"{red}, {resets} resets, the machine {service}, the summary says {verdict or 'nothing'}"


def wanted(fault: Fault) -> str:
    """Return in words what a job with this fault must come to."""
    return came_to(fault.phase, fault.code, fault.resets, 4 if fault.quarantined else None, fault.verdict)


def main() -> int:
    """Rehearse; 0 where the job is green, 1 where it comes to something else than it must."""
    name, board = os.environ.get("FAULT") or "", os.environ.get("HW") or "n300"
    try:
        if os.environ.get("ROAD") == "1":
            return road.main()
        if name and name not in FAULTS:
            raise UsageError(f"no fault {name!r}", where="FAULT", todo=f"one of {', '.join(FAULTS)}")
        with tempfile.TemporaryDirectory(prefix="rehearsal-") as temporary:
            folder = Path(os.environ.get("OUT") or temporary).expanduser().absolute()
            if folder.exists() and any(folder.iterdir()):
                raise UsageError("there is something in this folder already", where=str(folder), todo="give a new one")
            planted = f"; planted: {FAULTS[name].says}" if name else ""
            say(f"rehearsing the hardware job on {board}, in {folder}{planted}")
            ground = prepare(folder, board)
            record_figures(ground)
            say("recorded as its figures: those of a training by the double, within what another seed does to them")
            return print_outcome(perform(ground, FAULTS.get(name, NOTHING)), FAULTS.get(name, NOTHING))
    except RecipeError as error:
        print(f"error: {error}", file=sys.stderr)
        return error.code


def perform(ground: Ground, fault: Fault) -> Outcome:
    """Every step of the job that is due, as a workflow would run them."""
    environment = ground.environment(fault.switches, **fault.environment)
    failed = ("", 0)
    fault.before(ground)
    with fault.during(ground):
        for step in STEPS:
            if not step.due(failed=bool(failed[1]), cancelled=False):
                say(f"\n== {step.phase}: not due    if: {step.when or 'success()'}")
            elif (code := run(ground, step, environment, fault)) and not failed[1]:
                failed = (step.phase, code)
    quarantine = ground.quarantine.read_text("utf-8") if ground.quarantine.is_file() else None
    following = None
    if quarantine is not None:
        say("\nthe next job on this machine:")
        following = run(ground, STEPS[0], environment | {"OUT": f"{ground.out}-of-the-next"}, NOTHING)
    return Outcome(failed, ground.resets, quarantine, following, verdict(ground))


def verdict(ground: Ground) -> str | None:
    """The last word of the title that `collect` has written."""
    path = ground.out / "summary.md"
    return path.read_text("utf-8").partition("\n")[0].rpartition(": ")[2] if path.is_file() else None


def run(ground: Ground, step: Step, environment: Mapping[str, str], fault: Fault) -> int:
    """One step, as a process of its own; its exit code."""
    command = ["ci/hardware.sh", step.phase]
    say(f"\n== {shlex.join(command)}    if: {step.when or 'success()'}")
    process = subprocess.Popen(command, cwd=ROOT, env=environment)
    if step.phase == "train" and fault.in_training:
        watch(process, ground, fault.in_training)
    code = process.wait()
    say(f"== {step.phase}: exit code {code}")
    return code


def print_outcome(outcome: Outcome, fault: Fault) -> int:
    """Print what came of the job, and whether the fault must come to that; the rehearsal's exit code."""
    say(f"\nthe job: {outcome}")
    say(f"tt-smi was asked to reset: {'; '.join(outcome.resets) or 'nothing'}")
    if outcome.quarantine is not None:
        say("the machine is out of service:\n  " + outcome.quarantine.rstrip().replace("\n", "\n  "))
    say(f"{PROVEN}\n{NOT_PROVEN}")
    phase, code = outcome.failed
    say(f"RED: {phase} ended with {code}" if code else "GREEN")
    if fault is NOTHING and code:
        return code
    as_it_must = outcome.is_that_of(fault)
    say("as it must be" if as_it_must else f"NOT as it must be, which is: {wanted(fault)}")
    return code if as_it_must else code or 1


if __name__ == "__main__":
    sys.exit(main())
