"""Where recipes are, and where they keep what is fetched and made."""

from __future__ import annotations

import difflib
import os
from pathlib import Path

from common.errors import UsageError

ROOT = Path(__file__).resolve().parents[1]
RECIPES = ROOT / "recipes"


def home() -> Path:
    """Where bases, corpora, token files and compiled kernels live: `RECIPES_HOME`, else ~/.cache/recipes."""
    return Path(os.environ.get("RECIPES_HOME") or Path.home() / ".cache" / "recipes").expanduser().absolute()


def find_recipe(name: str) -> Path:
    """The folder of a recipe, by its name under recipes/ or by path. Raises UsageError naming the nearest one."""
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
