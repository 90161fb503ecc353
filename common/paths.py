"""Where recipes are, where they keep what is fetched and made, and the options of every verb that takes one."""

from __future__ import annotations

import difflib
import os
import secrets
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any, TypeVar

import click

from common.errors import UsageError

ROOT = Path(__file__).resolve().parents[1]
RECIPES = ROOT / "recipes"
F = TypeVar("F", bound=Callable[..., Any])


def home() -> Path:
    """Where bases, corpora, token files and compiled kernels live: `RECIPES_HOME`, else ~/.cache/recipes."""
    return Path(os.environ.get("RECIPES_HOME") or Path.home() / ".cache" / "recipes").expanduser().absolute()


def options_of_config(function: F) -> F:
    """--hw and --set, as every verb that resolves a config takes them."""
    hw = click.option("--hw", envvar="HW", metavar="BOARD", help="Board, or cpu; unset: the one found here.")
    override = click.option("--set", "overrides", multiple=True, metavar="A.B=C", help="Override one key; repeatable.")
    return hw(override(function))


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
