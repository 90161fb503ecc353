"""A list of checks: every one is run, but for those whose `needs` did not pass."""

from __future__ import annotations

import json
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass
from typing import Any, Literal

from common.errors import RecipeError

FORMAT = 1  # of the JSON
Verdict = Literal["pass", "fail", "not checkable", "skipped"]


@dataclass(frozen=True)
class ChecklistLine:
    """One check: `check` returns the evidence it passes with, or raises CheckEnded with another verdict.

    `says` is the claim in words; it is skipped unless the lines whose ids are in `needs` passed. `todo` is what to look
    at where it fails.
    """

    id: str
    says: str
    check: Callable[[Any], str]
    needs: tuple[str, ...] = ()
    todo: str = ""


@dataclass(frozen=True)
class Result:
    id: str
    verdict: Verdict
    says: str
    evidence: str
    todo: str = ""
    """What to look at; only of a line that failed."""

    def __str__(self) -> str:
        return f"{self.verdict.upper()}: {self.evidence}" + (f"; {self.todo}" if self.todo else "")


class CheckEnded(Exception):
    """Raised in a check to end it with a verdict and its evidence."""

    def __init__(self, verdict: Verdict, evidence: str) -> None:
        super().__init__(evidence)
        self.verdict: Verdict = verdict
        self.evidence = evidence


def hold(condition: bool, evidence: str) -> str:
    """Return `evidence` if the condition holds; else fail the check with it."""
    if not condition:
        raise CheckEnded("fail", evidence)
    return evidence


def failed(results: Sequence[Result]) -> list[str]:
    """Return the ids of the lines that failed."""
    return [result.id for result in results if result.verdict == "fail"]


def silent(_line: str) -> None:
    """Say nothing: for a report that a machine reads."""


def go_through(lines: Sequence[ChecklistLine], subject: Any, say: Callable[[str], None] = silent) -> list[Result]:
    """Return the result of each line on `subject`. Each is said before it, as a device may hang in it, and after."""
    results: dict[str, Result] = {}
    for line in lines:
        say(f"{line.id}: {line.says} ...")
        lacking = [results[need] for need in line.needs if results[need].verdict != "pass"]
        verdict: Verdict = "skipped"
        if lacking:
            evidence = f"needs {lacking[0].id}, which is: {lacking[0].verdict}"
        else:
            verdict, evidence = _judged(line, subject)
        results[line.id] = Result(line.id, verdict, line.says, evidence, line.todo if verdict == "fail" else "")
        say(f"  {results[line.id]}")
    return list(results.values())


def to_json(results: Sequence[Result], **facts: Any) -> str:
    """Return the results for machines, after `facts` about what was looked at."""
    return json.dumps({"format": FORMAT, **facts, "lines": [asdict(result) for result in results]}, indent=1)


def _judged(line: ChecklistLine, subject: Any) -> tuple[Verdict, str]:
    try:
        return "pass", line.check(subject)
    except CheckEnded as outcome:
        return outcome.verdict, outcome.evidence
    except RecipeError as error:
        return "fail", error.what
    except Exception as error:  # what a device's library raises has no common class
        return "fail", f"{type(error).__name__}: {' '.join(str(error).split())[:300]}"
