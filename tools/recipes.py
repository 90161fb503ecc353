"""The recipes there are, by name or by folder, and what the dataset.py of one has."""

from __future__ import annotations

import difflib
from pathlib import Path

from common import recipe
from common.errors import DataError, UsageError
from common.paths import ROOT
from common.recipe import Prompts, Splits

RECIPES = ROOT / "recipes"


def find_recipe(name: str) -> Path:
    """Return the folder of a recipe, by its name or path. Raises UsageError naming the nearest one."""
    for folder in (RECIPES / name, Path(name)):
        if (folder / "config.yaml").is_file():
            return folder.resolve()
    known = [folder.name for folder in folders()]
    near = difflib.get_close_matches(name, known, n=1)
    hint = f"did you mean {near[0]}? " if near else ""
    raise UsageError(
        f"no recipe called {name!r}",
        todo=f"{hint}choose from {', '.join(known)}, or give a folder with a config.yaml",
    )


def folders() -> list[Path]:
    """Return the folders of the recipes that are here, by name."""
    return sorted(path.parent for path in RECIPES.glob("*/config.yaml"))


def load_dataset(folder: Path) -> tuple[Splits, Prompts]:
    """Return `splits` and `prompts` of the recipe's dataset.py. Raises DataError where one is missing."""
    module = recipe.load(folder, "dataset")
    for name in ("splits", "prompts"):
        if not hasattr(module, name):
            raise DataError(f"no function {name}(config, recipe_dir)", where=str(folder / "dataset.py"))
    return module.splits, module.prompts
