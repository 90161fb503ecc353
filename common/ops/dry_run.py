"""`recipe run --dry-run`: what a run would do here, and what it would lack. Needs no board, engine or network."""

from __future__ import annotations

import importlib.util
import shlex
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

from common import config as configs
from common import hardware, lint, llama, models
from common.backends.base import precision_for, refuse_without_engine
from common.backends.ttml_limits import mesh_of
from common.backends.ttml_mesh import find_descriptor
from common.config import Config
from common.data import corpora
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
    yield (
        f"{start_of(config)}; precision {precision_for(board)[0] if precision == 'auto' else precision}; "
        f"effective batch {config.effective_batch} = {config.training.batch_size} x "
        f"{config.training.gradient_accumulation_steps}; mesh {config.device.mesh_shape}"
    )
    for finding in lint.lint(config, board):
        yield f"{finding.id}: {finding.message}"
    lacking = list(lacks(board, config))
    yield "lacks nothing that can be seen from here" if not lacking else "a real run would lack:"
    yield from (f"  {line}" for line in lacking)


def start_of(config: Config) -> str:
    """What training starts from."""
    shape = config.model.architecture
    if shape is None:
        return f"base {config.model.base}"
    return f"random weights of {config.model.preset or 'a Llama'}, {llama.parameters(shape.model_dump()):,} parameters"


def command_line(name: str, asked: Mapping[str, Any]) -> str:
    """The `recipe run` command of these options, as it can be typed."""
    words = ["recipe", "run", name]
    for option in ("hw", "steps", "stop_at", "resume", "out"):
        if asked.get(option) is not None:
            words += [f"--{option.replace('_', '-')}", str(asked[option])]
    words += ["--accept-changes"] if asked.get("accept_changes") else []
    words += [part for override in asked["overrides"] for part in ("--set", override)]
    return shlex.join(words)


def lacks(board: hardware.Hardware, config: Config) -> Iterator[str]:
    """What a real run needs and this machine does not have."""
    if not board.is_cpu:
        try:
            hardware.choose(board.name)
        except RecipeError as error:
            yield error.what
        if importlib.util.find_spec("ttml") is None:
            yield "ttml, which is built with tt-metal (build_metal.sh --build-tt-train); no package index has it"
        mesh = mesh_of(board, config)
        if mesh != (1, 1):
            try:
                find_descriptor(board, mesh)
            except RecipeError as error:
                yield error.what
    else:
        try:
            refuse_without_engine(board, config)
        except RecipeError as error:
            yield error.what
    base, corpus = config.model.base or "", config.data.corpus or ""
    entry = models.locked().get(base)
    if entry and not models.folder_of(base, entry).is_dir():
        yield f"the base {base}: {entry['download_mb']} MB are downloaded once"
    entry = corpora.locked().get(corpus)
    if entry and not corpora.folder_of(corpus, entry).is_dir():
        yield f"the corpus {corpus}: {entry['download_mb']} MB are downloaded once"
