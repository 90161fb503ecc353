"""The table of known failures, signatures.yaml: from a line of a log to what it means and what to do."""

from __future__ import annotations

import functools
import re
from dataclasses import dataclass
from pathlib import Path

TABLE = Path(__file__).with_name("signatures.yaml")


@dataclass(frozen=True)
class Signature:
    """One row of the table, which explains the fields; either `text` or `state` is set."""

    id: str
    means: str
    answer: str
    text: str | None = None
    state: str | None = None
    sample: str | None = None


@functools.cache
def table() -> tuple[Signature, ...]:
    """Every row, in order: of those that match, the first counts."""
    import yaml

    tree = yaml.safe_load(TABLE.read_text(encoding="utf-8"))
    return tuple(Signature(**row) for row in tree["signatures"])


def match(line: str) -> Signature | None:
    """The first row whose text is in the line."""
    return next((row for row in table() if row.text and re.search(row.text, line)), None)
