"""A recipe's own code: its folder as one Python package, whatever the folder is called, and faults in it by line."""

from __future__ import annotations

import importlib
import sys
import traceback
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from types import ModuleType
from typing import TYPE_CHECKING, Any, TypeVar

from common.errors import DataError, RecipeError, UsageError

if TYPE_CHECKING:
    from common.config import Config

# What a recipe's dataset.py has: splits(config, recipe_dir), the rows (or a corpus' texts) to train on and to hold out;
# prompts(config, recipe_dir), the evaluation prompts.
Splits = Callable[["Config", Path], Mapping[str, Sequence[Any]]]
Prompts = Callable[["Config", Path], Sequence[str]]
PACKAGE = "this_recipe"  # recipe folders have hyphens, so none is a package by its own name
T = TypeVar("T")


def load(folder: Path, script: str) -> ModuleType:
    """Import train.py or dataset.py (`script`, without the suffix) of the recipe in `folder`, anew at each call.

    Raises UsageError for a recipe without train.py, DataError for one without dataset.py, and for a fault with its
    file and line.
    """
    if not (folder / f"{script}.py").is_file():
        missing = UsageError if script == "train" else DataError
        raise missing(f"the recipe has no {script}.py", where=str(folder))
    for name in [name for name in sys.modules if name.partition(".")[0] == PACKAGE]:
        del sys.modules[name]
    package = ModuleType(PACKAGE)
    package.__path__ = [str(folder)]
    sys.modules[PACKAGE] = package
    importlib.invalidate_caches()
    # No bytecode: Python would take a stale one for a script that was edited within a second to the same size.
    before, sys.dont_write_bytecode = sys.dont_write_bytecode, True
    try:
        return _guarded(lambda: importlib.import_module(f"{PACKAGE}.{script}"), folder)
    finally:
        sys.dont_write_bytecode = before


def call(function: Callable[[Config, Path], T], config: Config, folder: Path) -> T:
    """Return what a function of the recipe's dataset.py gives. Raises DataError with file and line for its fault."""
    return _guarded(lambda: function(config, folder), folder)


def _guarded(run: Callable[[], T], folder: Path) -> T:
    try:
        return run()
    except RecipeError:
        raise
    except Exception as error:
        frames = traceback.extract_tb(error.__traceback__)
        own = [f"{frame.filename}:{frame.lineno}" for frame in frames if Path(frame.filename).parent == folder]
        if isinstance(error, SyntaxError) and error.filename:
            own.append(f"{error.filename}:{error.lineno}")
        elif isinstance(error, ModuleNotFoundError) and Path(frames[-1].filename).parent != folder:
            raise  # a package that common needs is not installed: no fault of the recipe
        if not own:
            raise
        raise DataError(f"{type(error).__name__}: {error}", where=own[-1]) from error
