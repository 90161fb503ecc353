"""Whose data it is: the line of a card that names its licence."""

from __future__ import annotations

import re
from collections.abc import Sequence
from pathlib import Path

CARDS = ("README.md", "DATASET_CARD.md", "LICENSE", "LICENSE.md")
STUB = "TO FILL IN"  # a licence line with these words in it names none yet
LICENCE_LINE = re.compile(r"\W*(?:data )?licen[cs]e\b", re.IGNORECASE)


def licence_of(folders: Sequence[Path]) -> str | None:
    """Return what names a licence in the cards of these folders: the name of a LICENSE file, or a line "License: ...".

    None where nothing does, "" where there is no folder to look in.
    """
    if not folders:
        return ""
    for card in (folder / name for folder in folders for name in CARDS):
        if not card.is_file():
            continue
        if card.stem == "LICENSE":
            return card.name
        lines = card.read_text(encoding="utf-8", errors="replace").splitlines()
        named = next((line for line in lines if LICENCE_LINE.match(line) and STUB not in line), None)
        if named is not None:
            return named
    return None
