"""A list of checks: every one is run, but for those whose `needs` did not pass."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from typing import Any, Literal

from common.errors import RecipeError

Verdict = Literal["pass", "fail", "not checkable", "skipped"]


@dataclass(frozen=True)
class ChecklistLine:
    """One check: `check` returns the evidence it passes with, or raises CheckEnded with another verdict.

    `says` is the claim in words; it is skipped unless the lines whose ids are in `needs` passed.
    """

    id: str
    says: str
    check: Callable[[Any], str]
    needs: tuple[str, ...] = ()


@dataclass(frozen=True)
class Result:
    id: str
    verdict: Verdict
    says: str
    evidence: str

    def __str__(self) -> str:
        return f"{self.verdict.upper()}: {self.evidence}"


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


def go_through(
    lines: Sequence[ChecklistLine], subject: Any, begun: Callable[[ChecklistLine], None]
) -> Iterator[Result]:
    """Yield the result of each line on `subject`; `begun` is called before each, as a device may hang in it."""
    verdicts: dict[str, Verdict] = {}
    for line in lines:
        begun(line)
        lacking = [need for need in line.needs if verdicts[need] != "pass"]
        verdict: Verdict = "skipped"
        if lacking:
            evidence = f"needs {lacking[0]}, which is: {verdicts[lacking[0]]}"
        else:
            verdict, evidence = _judged(line, subject)
        verdicts[line.id] = verdict
        yield Result(line.id, verdict, line.says, evidence)


def _judged(line: ChecklistLine, subject: Any) -> tuple[Verdict, str]:
    try:
        return "pass", line.check(subject)
    except CheckEnded as outcome:
        return outcome.verdict, outcome.evidence
    except RecipeError as error:
        return "fail", error.what
    except Exception as error:  # what a device's library raises has no common class
        return "fail", f"{type(error).__name__}: {' '.join(str(error).split())[:300]}"
