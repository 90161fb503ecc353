"""How a reader's answers compare with our engine's: a row of the table."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import numpy as np

from tools.export.readers.ask import Answers
from tools.export.readers.questions import Expected, log_probabilities

# Nats that a log-probability may differ by, all in fp32. Of sound readers the farthest was 1.5e-4 away (mlx-lm, the
# fine-tuned SmolLM2); one that took another base for rotary positions 2.8.
ALLOWED = 1e-3
COLUMNS = {
    "ids": "ids of 24 texts",
    "chat": "chat template",
    "logits": "log-probabilities, largest difference",
    "greedy": "greedy tokens",
    "ends": "ends at the end token",
    "snippet": "the card's code",
}


@dataclass
class Row:
    """`verdict` is agrees, differs, refuses or not tried; `reason` says what of the last three."""

    reader: str
    version: str
    opens: str
    verdict: str = "agrees"
    reason: str = ""
    cells: dict[str, str] = field(default_factory=dict)

    def line(self) -> str:
        """Return the row in one line."""
        found = ", ".join(f"{COLUMNS[name]}: {cell}" for name, cell in self.cells.items())
        return ": ".join(part for part in (self.version, self.opens, self.verdict, self.reason, found) if part)


def compare(row: Row, expected: Expected, answers: Answers) -> Row:
    """Put into `row` how the answers compare. What was not asked, or cannot be, has no cell.

    A reader agrees only in what it was asked: with no cell at all it refuses.
    """
    for name, title in COLUMNS.items():
        found = answers.get(name)
        if not found:
            continue
        errors = [one["error"] for one in found if isinstance(one, dict) and "error" in one]
        if name in ("ids", "chat"):
            wanted = getattr(expected, name)
            same = sum(own == other for own, other in zip(wanted, found, strict=True))
            row.cells[name], good = f"{same} of {len(wanted)}", same + len(errors) == len(wanted)
        elif errors:
            row.cells[name], good = "refused", True
        else:
            row.cells[name], good = JUDGES[name](found[0], expected)
        if not good and row.verdict != "differs":
            row.verdict, row.reason = "differs", title
        elif errors and row.verdict == "agrees":
            row.verdict, row.reason = "refuses", f"{title}: {errors[0]}"
    if not row.cells:
        row.verdict, row.reason = "refuses", "answered none of the questions"
    return row


def logits(found: Sequence[float | None], expected: Expected) -> tuple[str, bool]:
    """Judge logits, or log-probabilities, of the token after the prompt; None stands for an id that is not listed."""
    chosen = np.flatnonzero(np.isfinite(expected.log_probabilities))  # without the ids that no answer may hold
    values = np.full(len(expected.log_probabilities), np.nan)
    values[: len(found)] = [np.nan if one is None else one for one in found[: len(values)]]
    difference = log_probabilities(values[chosen]) - expected.log_probabilities[chosen]
    largest = float(np.abs(difference).max())
    return f"{largest:.1e}", largest <= ALLOWED  # a NaN is no agreement


def greedy(found: Sequence[int], expected: Expected) -> tuple[str, bool]:
    """Judge a greedy answer: how many tokens are the same, from the first on."""
    other = without_end(found, expected)
    same = first_difference(expected.greedy, other)
    return f"{same} of {len(expected.greedy)}", other == expected.greedy


def ends(found: Sequence[int], expected: Expected) -> tuple[str, bool]:
    """Judge whether an answer ended by itself where ours does."""
    good = without_end(found, expected) == expected.ends
    return "yes" if good else "no", good


def snippet(found: Mapping[str, Any], expected: Expected) -> tuple[str, bool]:
    """Judge what the code of a card printed, if it prints, and the model that it loaded."""
    said = found["printed"].strip()
    _, good = logits(found["logits"], expected)
    if said or not found["silent"]:
        good = good and (said == expected.printed if expected.whole else said.startswith(expected.printed))
    return "as it says" if good else "something else", good


JUDGES: dict[str, Callable[[Any, Expected], tuple[str, bool]]] = {
    "logits": logits,
    "greedy": greedy,
    "ends": ends,
    "snippet": snippet,
}


def without_end(ids: Sequence[int], expected: Expected) -> list[int]:
    """Return an answer without the end token, which some readers hand out and some do not."""
    return list(ids[:-1] if ids and ids[-1] in expected.end_ids else ids)


def first_difference(own: Sequence[int], other: Sequence[int]) -> int:
    """Return the first place where two lists differ; the shorter one's length where it begins the other."""
    pairs = zip(own, other, strict=False)
    return next((at for at, (a, b) in enumerate(pairs) if a != b), min(len(own), len(other)))
