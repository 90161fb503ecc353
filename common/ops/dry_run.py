"""`recipe run --dry-run`: what a run would do here, and what it would lack. Needs no board, engine or network."""

from __future__ import annotations

import shlex
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

from common import config as configs
from common import hardware, lint, models
from common.backends.base import precision_for
from common.errors import RecipeError


def describe(recipe_dir: Path, name: str, asked: Mapping[str, Any]) -> Iterator[str]:
    """The lines of a dry run of recipe `name` with the options `asked`, by their names in `Launch`.

    Raises UsageError for a config that a real run would refuse as well.
    """
    choice = hardware.choose(asked["hw"], require_present=False)
    board = choice.hardware
    config = configs.load(recipe_dir, board, asked["overrides"], asked["steps"])
    precision = config.training.precision
    yield f"{config.recipe} on {choice.reason}"
    yield f"would run: {command_line(name, {**asked, 'hw': board.name})}"
    yield f"device nodes: {', '.join(board.device_nodes) or 'none needed'}"
    yield f"image: {board.image} <not built>"
    yield (
        f"base {config.model.base}; precision {precision_for(board)[0] if precision == 'auto' else precision}; "
        f"effective batch {config.effective_batch} = {config.training.batch_size} x "
        f"{config.training.gradient_accumulation_steps}; mesh {config.device.mesh_shape}"
    )
    for finding in lint.lint(config, board):
        yield f"{finding.id}: {finding.message}"
    lacking = list(lacks(board, config.model.base))
    yield "lacks nothing that can be seen from here" if not lacking else "a real run would lack:"
    yield from (f"  {line}" for line in lacking)


def command_line(name: str, asked: Mapping[str, Any]) -> str:
    """The `recipe run` command of these options, as it can be typed."""
    words = ["recipe", "run", name]
    for option in ("hw", "steps", "stop_at", "resume", "out"):
        if asked.get(option) is not None:
            words += [f"--{option.replace('_', '-')}", str(asked[option])]
    words += ["--accept-changes"] if asked.get("accept_changes") else []
    words += [part for override in asked["overrides"] for part in ("--set", override)]
    return shlex.join(words)


def lacks(board: hardware.Hardware, base: str | None) -> Iterator[str]:
    """What a real run needs and this machine does not have."""
    if not board.is_cpu:
        try:
            hardware.choose(board.name)
        except RecipeError as error:
            yield error.what
        yield f"an engine for {board.name}: this version trains on cpu only"
    entry = models.locked().get(base or "")
    if entry and not models.folder_of(base or "", entry).is_dir():
        yield f"the base {base}: {entry['download_mb']} MB are downloaded once"
