"""The run beside the recorded figures of its training, and the checks that need none."""

from __future__ import annotations

import importlib.util
import json
import os
from pathlib import Path
from typing import Any

from ci.hardware.commands import ended, recipe
from ci.hardware.job import Failed, Job, say
from common.errors import MachineError, VerificationError

SECONDS = 7 * 60  # each of the two
UNGRADED = "UNGRADED"


def grade(job: Job) -> str:
    """Grade and verify the run; Failed has the code of the verb, VerificationError says that a grade was lost."""
    found = graded(job)
    verified = verify(job)
    if found["verdict"] == "ungraded":
        return f"{ungraded(job, found)}; {verified}"
    figures = [line["figure"] for line in found["lines"] if is_held(line)]
    return f"{found['verdict']}: {', '.join(figures)}, beside {found['entry']['what']}; {verified}"


def graded(job: Job) -> dict[str, Any]:
    """What `recipe grade` says; a verdict of which no figure was held counts as none. Raises Failed for a fail."""
    said, errors = job.out / "grade.json", job.out / "grade.txt"
    code = ended(recipe("grade", str(job.run), "--json"), SECONDS, said, errors)
    try:
        found: dict[str, Any] = json.loads(said.read_text("utf-8"))
    except ValueError:
        raise failure("grade", code, errors) from None
    for line in found.get("lines", ()):
        say(f"{line['verdict'].upper():12}  {line['figure']}: {line['says']}")
    if code not in (0, None) and found["verdict"] != "ungraded":
        raise failure("grade", code, errors)
    held = any(is_held(line) for line in found.get("lines", ()))
    if found["verdict"] != "ungraded" and (not held or found["entry"]["evidence"] != "measured"):
        return {"verdict": "ungraded", "recorded": [{"board": job.board.name, **found["entry"]}]}
    return found


def is_held(line: dict[str, Any]) -> bool:
    """Whether a line of a grade holds a figure against one."""
    return line["figure"] != "settings" and str(line["verdict"]) != "not compared"


def ungraded(job: Job, found: dict[str, Any]) -> str:
    """The words for it. Raises VerificationError where the board has figures that this training should be held to."""
    mine = [entry for entry in found["recorded"] if entry["board"] == job.board.name]
    if lost := [entry["what"] for entry in mine if entry["evidence"] == "measured"]:
        raise VerificationError(
            f"{job.board.name} has recorded figures, and none is of this training: {'; '.join(lost)}",
            where=str(job.run),
            todo="train what is recorded (NAME, STEPS, the recipe's config), or record this: recipe grade RUN --record",
        )
    words = f"{UNGRADED}: nothing of {job.recipe} is recorded on {job.board.name}, so its figures were held to nothing"
    if os.environ.get("GITHUB_ACTIONS"):
        say(f"::warning title={UNGRADED}::{words}")
    return words


def verify(job: Job) -> str:
    """`recipe verify run`, where this Python can. Raises Failed where a check does not hold."""
    if importlib.util.find_spec("torch") is None:
        return f"not verified, as that needs torch: recipe verify run {job.run.name if job.run else 'RUN'} on any CPU"
    said, errors = job.out / "verify.json", job.out / "verify.txt"
    code = ended(recipe("verify", "run", str(job.run), "--json"), SECONDS, said, errors)
    if code != 0:
        raise failure("verify run", code, errors)
    return "recipe verify run holds"


def failure(verb: str, code: int | None, errors: Path) -> Failed:
    """A verb's own code and words; that of a machine where it did not end."""
    said = errors.read_text("utf-8").removeprefix("error: ").strip()
    how = "did not end" if code is None else f"ended with {code}"
    return Failed(code or MachineError.code, said or f"recipe {verb} {how}")
