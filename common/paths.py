"""Where recipes are, and where they keep what is fetched and made."""

from __future__ import annotations

import difflib
import os
import secrets
import time
from pathlib import Path

from common.errors import UsageError

ROOT = Path(__file__).resolve().parents[1]
RECIPES = ROOT / "recipes"


def home() -> Path:
    """Where bases, corpora, token files and compiled kernels live: `RECIPES_HOME`, else ~/.cache/recipes."""
    return Path(os.environ.get("RECIPES_HOME") or Path.home() / ".cache" / "recipes").expanduser().absolute()


def run_name(recipe: str, hw: str) -> str:
    """Return a name for a new run's folder: <utc>-<recipe>-<hw>-<id>. Names sort by the start of their runs."""
    return f"{time.strftime('%Y%m%dT%H%M%SZ', time.gmtime())}-{recipe}-{hw}-{secrets.token_hex(2)}"


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
