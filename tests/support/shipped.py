"""The recipes of recipes/, found and never named, so that any of them can be deleted and any be added."""

from __future__ import annotations

from pathlib import Path

from tools.recipes import RECIPES
from tools.results.schema import DoubleOnly, load

FOLDERS = sorted(path.parent for path in RECIPES.glob("*/config.yaml"))


def that_name(test: str) -> list[tuple[Path, str]]:
    """(recipe, board) of every `double only` entry in a results.yaml that names this file as its test."""
    found = [(folder, entry) for folder in FOLDERS for entry in load(folder).entries]
    return [(folder, entry.board) for folder, entry in found if isinstance(entry, DoubleOnly) and entry.test == test]
