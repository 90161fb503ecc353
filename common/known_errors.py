"""The table of known errors, known_errors.yaml: from the text of an error to what it means and what to do."""

from __future__ import annotations

import functools
import re
from dataclasses import dataclass
from pathlib import Path

TABLE = Path(__file__).with_name("known_errors.yaml")
IN_A_LOG = ("ttml", "log")  # a run's log holds the device library's words; Docker's never reach it


@dataclass(frozen=True)
class KnownError:
    """One row of the table, which explains the fields; either `text` or `state` is set."""

    id: str
    where: str
    means: str
    answer: str
    text: str | None = None
    state: str | None = None
    sample: str | None = None
    image: bool = False


@functools.cache
def table() -> tuple[KnownError, ...]:
    """Return every row, in order: of those that match, the first counts."""
    import yaml  # here: a run that never fails reads no table

    tree = yaml.safe_load(TABLE.read_text(encoding="utf-8"))
    return tuple(KnownError(**row) for row in tree["errors"])


def match(text: str, *where: str) -> KnownError | None:
    """Return the first row whose pattern is in `text`, or None.

    `where` asks the rows of these sources alone ("ttml", "docker"); without it, `text` is a line of a run's log.
    """
    asked = where or IN_A_LOG
    rows = (row for row in table() if row.where in asked and row.text)
    return next((row for row in rows if re.search(str(row.text), text, re.IGNORECASE)), None)
