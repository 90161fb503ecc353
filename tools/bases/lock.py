"""A recipe's own lock of base models: what is pinned there, what names it, and how it is changed.

The file is the user's, too: its comments stay, it is replaced whole, and what was written into it while the Hub was
asked is kept.
"""

from __future__ import annotations

import contextlib
import fcntl
import os
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from typing import Any

from common.config.layers import read_file, shown
from common.errors import MachineError, UsageError
from common.files import disk_errors, write_atomic
from common.model import bases
from tools.edit_yaml import remove_key, set_key

HEAD = """\
# Base models of the Hub that this recipe pins, written by `recipe base add`; common/models.lock.yaml has those of
# every recipe. `architecture` is what `recipe plan` reckons with before the base is here.
format: 1
"""
NEEDED = ("source", "repo", "revision", "files", "origin", "licence", "parameters", "download_mb")


def whole(recipe: Path) -> dict[str, dict[str, Any]]:
    """Return what a recipe's own lock pins, by name. Raises MachineError for a pin that lacks something, too."""
    found = bases.own(recipe)
    for name, pin in found.items():
        if lacking := [key for key in NEEDED if key not in pin]:
            raise MachineError(
                f"the pin of {name} has no {', '.join(lacking)}",
                where=shown(recipe / bases.OWN_LOCK),
                todo=f"recipe base add {name} --recipe {recipe.name} --replace",
            )
    return found


def named_by(recipe: Path, name: str) -> list[str]:
    """Return the files of a recipe whose `model_config.base` is `name`: its config, presets and boards' overlays."""
    layers = [recipe / "config.yaml", *sorted(recipe.glob("presets/*.yaml")), *sorted(recipe.glob("hw/*.yaml"))]
    return [str(path.relative_to(recipe)) for path in layers if read_file(path).get("model_config.base") == name]


def put(recipe: Path, name: str, entry: Mapping[str, Any], replace: bool) -> bool:
    """Write a pin into a recipe's lock; return whether that changed it.

    Raises UsageError where the name is pinned at another commit and not to be replaced.
    """
    before = bases.own(recipe).get(name)

    def change(text: str) -> str:
        there = bases.own(recipe).get(name)
        if there and there.get("revision") == entry["revision"] and not replace:
            return text
        if there and not replace:
            raise UsageError(
                f"{name} is pinned at another commit: {str(there.get('revision'))[:12]}, and "
                f"{str(entry['revision'])[:12]} was asked for",
                where=shown(recipe / bases.OWN_LOCK),
                todo="add --replace to train the new one from now on; runs of the old one will not resume on it",
            )
        return set_key(text or HEAD, ("bases", name), dict(entry))

    _change(recipe, change)
    return bases.own(recipe).get(name) != before


def take_out(recipe: Path, name: str) -> dict[str, Any]:
    """Remove a pin from a recipe's lock, and the lock with its last one; return the pin.

    Raises UsageError where it has none of that name, or where the recipe names it.
    """
    found = dict[str, Any]()

    def change(text: str) -> str:
        pins = bases.own(recipe)
        if name not in pins:
            everywhere = " (common/models.lock.yaml pins it for every recipe)" if name in bases.locked() else ""
            raise UsageError(
                f"{recipe.name} does not pin {name}{everywhere}",
                where=shown(recipe / bases.OWN_LOCK),
                todo=f"name one of {', '.join(pins)}" if pins else "recipe base list shows what is pinned where",
            )
        if layers := named_by(recipe, name):
            raise UsageError(
                f"{recipe.name} trains {name}",
                where=", ".join(shown(recipe / layer) for layer in layers),
                todo="set model_config.base there to another base first",
            )
        found.update(pins[name])
        return remove_key(text, ("bases", name)) if len(pins) > 1 else ""

    _change(recipe, change)
    return found


def _change(recipe: Path, change: Callable[[str], str]) -> None:
    """Replace the text of a recipe's lock by what `change` makes of it as it stands now; "" removes the file."""
    path = recipe / bases.OWN_LOCK
    with disk_errors("change the lock", path), _alone(recipe):
        before = path.read_text(encoding="utf-8") if path.is_file() else ""
        after = change(before)
        if not after:
            path.unlink()
        elif after != before:
            write_atomic(path, after)


@contextlib.contextmanager
def _alone(folder: Path) -> Iterator[None]:
    """Keep every other process of ours from changing the lock in the block: two at once would lose one's pin."""
    descriptor = os.open(folder, os.O_RDONLY)
    try:
        fcntl.flock(descriptor, fcntl.LOCK_EX)
        yield
    finally:
        os.close(descriptor)
