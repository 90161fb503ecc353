"""The recipes there are, by name or by folder."""

from __future__ import annotations

import difflib
from pathlib import Path

from common.errors import UsageError
from common.paths import ROOT

RECIPES = ROOT / "recipes"


def find_recipe(name: str) -> Path:
    """Return the folder of a recipe, by its name or path. Raises UsageError naming the nearest one."""
    for folder in (RECIPES / name, Path(name)):
        if (folder / "config.yaml").is_file():
            return folder.resolve()
    known = sorted(path.parent.name for path in RECIPES.glob("*/config.yaml"))
    near = difflib.get_close_matches(name, known, n=1)
    hint = f"did you mean {near[0]}? " if near else ""
    raise UsageError(
        f"no recipe called {name!r}",
        todo=f"{hint}choose from {', '.join(known)}, or give a folder with a config.yaml",
    )
