"""A list of checks that goes on after one that fails, and leaves out what stands on it."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from typing import Any, Literal

from common.errors import RecipeError

Verdict = Literal["pass", "fail", "not checkable", "skipped"]


@dataclass(frozen=True)
class Line:
    """`check` returns the figure it passes with, and raises for every other verdict. It needs other lines passed."""

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


class Outcome(Exception):
    """Ends a check with a verdict and its evidence."""

    def __init__(self, verdict: Verdict, evidence: str) -> None:
        super().__init__(evidence)
        self.verdict: Verdict = verdict
        self.evidence = evidence


def hold(condition: bool, evidence: str) -> str:
    """`evidence` where the condition holds; else the line fails with it."""
    if not condition:
        raise Outcome("fail", evidence)
    return evidence


def failed(results: Sequence[Result]) -> list[str]:
    """The ids of the lines that failed."""
    return [result.id for result in results if result.verdict == "fail"]


def go_through(lines: Sequence[Line], subject: Any, begun: Callable[[Line], None]) -> Iterator[Result]:
    """Check `subject` line by line; `begun` is told of each before it starts, as a device may hang in it."""
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


def _judged(line: Line, subject: Any) -> tuple[Verdict, str]:
    try:
        return "pass", line.check(subject)
    except Outcome as outcome:
        return outcome.verdict, outcome.evidence
    except RecipeError as error:
        return "fail", error.what
    except Exception as error:  # what a device's library raises has no common class
        return "fail", f"{type(error).__name__}: {' '.join(str(error).split())[:300]}"
