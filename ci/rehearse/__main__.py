"""`python -m ci.rehearse`: HW (n300), FAULT, and OUT, a folder to keep it in. Ends with the failing phase's code."""

from __future__ import annotations

import os
import shlex
import subprocess
import sys
import tempfile
import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

from ci.hardware import STEPS, Step
from ci.hardware.job import say
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
class Done:
    """A step of the job, and its exit code; None where it was not due."""

    step: Step
    code: int | None
    seconds: float = 0


@dataclass(frozen=True)
class Outcome:
    """What came of a job: its steps, what tt-smi was asked to reset, the quarantine file's text, and the verdict."""

    done: Sequence[Done]
    resets: Sequence[str]
    quarantine: str | None
    next_preflight: int | None  # the exit code of the next job's, on a machine that was taken out of service
    verdict: str | None  # as the summary's title has it; None: there is no summary

    @property
    def failed(self) -> Done | None:
        return next((each for each in self.done if each.code), None)

    def is_that_of(self, fault: Fault) -> bool:
        failed = (self.failed.step.phase, self.failed.code) if self.failed else ("", 0)
        wanted = (fault.phase, fault.code), fault.resets, fault.quarantined, 4 if fault.quarantined else None
        found = failed, len(self.resets), self.quarantine is not None, self.next_preflight
        return (found, self.verdict) == (wanted, fault.verdict)


def main() -> int:
    """Rehearse; 0 where the job is green, 1 where it comes to something else than it must."""
    name, board = os.environ.get("FAULT") or "", os.environ.get("HW") or "n300"
    try:
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
            return report(perform(ground, FAULTS.get(name, NOTHING)), FAULTS.get(name, NOTHING))
    except RecipeError as error:
        print(f"error: {error}", file=sys.stderr)
        return error.code


def perform(ground: Ground, fault: Fault) -> Outcome:
    """Every step of the job that is due, as a workflow would run them."""
    environment = ground.environment(fault.switches, **fault.environment)
    done: list[Done] = []
    with fault.during(ground):
        for step in STEPS:
            if step.due(failed=any(before.code for before in done), cancelled=False):
                done.append(run(ground, step, environment, fault))
            else:
                done.append(Done(step, None))
    quarantine = ground.quarantine.read_text("utf-8") if ground.quarantine.is_file() else None
    following = None
    if quarantine is not None:
        say("\nthe next job on this machine:")
        following = run(ground, STEPS[0], environment | {"OUT": f"{ground.out}-of-the-next"}, NOTHING).code
    return Outcome(done, ground.resets, quarantine, following, verdict(ground))


def verdict(ground: Ground) -> str | None:
    """The last word of the title that `collect` has written."""
    path = ground.out / "summary.md"
    return path.read_text("utf-8").partition("\n")[0].rpartition(": ")[2] if path.is_file() else None


def run(ground: Ground, step: Step, environment: Mapping[str, str], fault: Fault) -> Done:
    """One step, as a process of its own."""
    command, began = ["ci/hardware.sh", step.phase], time.monotonic()
    say(f"\n== {shlex.join(command)}    if: {step.when or 'success()'}")
    process = subprocess.Popen(command, cwd=ROOT, env=environment)
    if step.phase == "train" and fault.in_training:
        watch(process, ground, fault.in_training)
    code = process.wait()
    say(f"== {step.phase}: exit code {code}")
    return Done(step, code, time.monotonic() - began)


def report(outcome: Outcome, fault: Fault) -> int:
    """Print what came of the job, and whether the fault must come to that; the rehearsal's exit code."""
    say(f"\n{'phase':10}  {'if':26}  {'exit code':9}  seconds")
    for each in outcome.done:
        code = "not due" if each.code is None else str(each.code)
        say(f"{each.step.phase:10}  {each.step.when or 'success()':26}  {code:9}  {each.seconds:7.0f}")
    say(f"the summary says: {outcome.verdict or 'nothing'}")
    say(f"tt-smi was asked to reset: {'; '.join(outcome.resets) or 'nothing'}")
    if outcome.quarantine is not None:
        say(f"the machine is out of service; the next job's preflight ended with {outcome.next_preflight}")
        say("  " + outcome.quarantine.rstrip().replace("\n", "\n  "))
    say(f"{PROVEN}\n{NOT_PROVEN}")
    failed, as_it_must = outcome.failed, outcome.is_that_of(fault)
    say(f"RED: {failed.step.phase} ended with {failed.code}" if failed else "GREEN")
    if fault is NOTHING and failed:
        return failed.code or 1
    say("as it must be" if as_it_must else f"NOT as it must be, which is: {wanted(fault)}")
    return (failed.code or 1 if failed else 0) if as_it_must else 1


def wanted(fault: Fault) -> str:
    red = f"{fault.phase} ends with {fault.code}" if fault.phase else "green"
    service = f"{'' if fault.quarantined else 'not '}taken out of service"
    return f"{red}, {fault.resets} resets, {service}, the summary says {fault.verdict}"


if __name__ == "__main__":
    sys.exit(main())
