"""Which keys of a config a run reads, and which of those that a recipe sets nobody does."""

from __future__ import annotations

import contextlib
import json
import sys
import typing
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any
from unittest import mock

from pydantic import BaseModel

from common import hardware
from common.config import Config
from common.config.layers import dotted, flatten
from common.config.schema import Architecture, Section
from tests.recipes.contracts import layers, resolved

# They look at a key to judge it or to show it, which is no effect of the key.
JUDGES = (
    "common.config",
    "tools.launch.lint",
    "tools.report",
    "tools.report.facts",
    "tools.export.before_after",
    "pydantic",
)
# Replaced by --steps in a test; and those that choose what the schema and the layers make of the others.
NOT_ASKED = ("training_config.max_steps", "training_config.num_epochs", "model_config.preset", "model_config.init")


def places(section: type[BaseModel] = Config, prefix: str = "") -> Iterator[tuple[type[BaseModel], str]]:
    """Every section of a config with the dotted prefix of its keys."""
    yield section, prefix
    for name, info in section.model_fields.items():
        for kind in (info.annotation, *typing.get_args(info.annotation)):
            if isinstance(kind, type) and issubclass(kind, BaseModel):
                yield from places(kind, f"{prefix}{info.alias or name}.")


@contextlib.contextmanager
def recorded() -> Iterator[set[str]]:
    """The keys that are read from here to the end of the block, dotted; filled as it goes."""
    seen: set[str] = set()
    plain, prefixes = Section.__getattribute__, dict(places())

    def look(self: Section, name: str) -> Any:
        prefix = prefixes.get(type(self))
        if prefix and not sys._getframe(1).f_globals.get("__name__", "").startswith(JUDGES):
            if name == "model_dump" and type(self) is Architecture:  # a model's shape is handed over whole
                seen.update(f"{prefix}{key}" for key in Architecture.model_fields)
            seen.add(f"{prefix}{name}")
        return plain(self, name)

    with mock.patch.object(Section, "__getattribute__", look):
        yield seen


def set_by(recipe: Path) -> dict[str, str]:
    """Every key that a layer of the recipe sets, with the place of one that does."""
    found: dict[str, str] = {}
    for _, layer in layers(recipe):
        found |= {dotted(key): layer.where[key] for key, _value in flatten(layer.tree)}
    return found


def unread(recipe: Path, seen: set[str], small: Sequence[str]) -> dict[str, str]:
    """What the recipe sets and a run with the overrides `small` did not read; not what those replaced."""
    replaced = {*NOT_ASKED, *(override.partition("=")[0] for override in small)}
    return {
        key: place
        for key, place in set_by(recipe).items()
        if key not in seen and not any(key == name or key.startswith(f"{name}.") for name in replaced)
    }


def of_other_boards(recipe: Path, small: Sequence[str]) -> list[tuple[str, ...]]:
    """Overrides that give a run on a CPU the settings of each board that has others; not what `small` replaces."""
    replaced = {*NOT_ASKED, *(override.partition("=")[0] for override in small)}
    keys = [key for key in set_by(recipe) if key not in replaced and not key.startswith("device_config.")]
    boards = {board.name for board in hardware.table().values() if not board.is_cpu}
    found = []
    for board, config in resolved(recipe):
        values = {dotted(key): value for key, value in flatten(config.dump())}
        if board in boards:
            kept = {key: values[key] for key in keys if key in values and "batch_size" not in key}
            found.append(tuple(f"{key}={json.dumps(value)}" for key, value in kept.items()))
    return list(dict.fromkeys(found))
