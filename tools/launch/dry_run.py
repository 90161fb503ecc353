"""`recipe run --dry-run`: what a run would do here, and what it would lack. Needs no board, engine or network."""

from __future__ import annotations

import importlib.util
import shlex
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

from common import config as configs
from common import hardware
from common.config import Config
from common.data import corpora
from common.errors import MachineError, RecipeError
from common.model import bases, llama
from common.paths import run_name, run_words
from common.train.plan import batch_equation
from engines.registry import precision_for, refuse_without_engine
from engines.ttml.mesh import find_descriptor
from tools.containers import launcher
from tools.containers.docker import check_engine
from tools.containers.images import Image, image_for
from tools.containers.spec import Run, arguments_of, spec_of
from tools.plan import lint


def describe(recipe_dir: Path, name: str, asked: Mapping[str, Any], container: bool | None) -> Iterator[str]:
    """The lines of a dry run of recipe `name` with the options `asked`, by their names in `Launch`.

    Raises UsageError for a config that a real run would refuse as well.
    """
    choice = hardware.choose(asked["hw"], require_present=False)
    board, nodes = choice.hardware, choice.nodes or choice.hardware.device_nodes
    config = configs.load(recipe_dir, board, asked["overrides"], asked["steps"])
    precision = config.training.precision
    yield f"{config.recipe} on {choice.reason}"
    yield f"would run: {shlex.join(['recipe', *run_words(name, {**asked, 'hw': board.name})])}"
    image, contained = image_of(board), launcher.wanted(container, board.name)
    if contained:
        run = Run(run_name(config.recipe, board.name), recipe_dir, config, board, nodes, asked, image)
        yield f"in the container: {shlex.join(['docker', 'run', '--rm', *arguments_of(spec_of(run))])}"
    yield f"device nodes: {', '.join(nodes) or 'none needed'}"
    yield (
        f"{start_of(config)}; precision {precision_for(board)[0] if precision == 'auto' else precision}; "
        f"{batch_equation(config)}; mesh {config.device.mesh_shape}"
    )
    for finding in lint.lint(config, board):
        yield f"{finding.id}: {finding.message}"
    lacking = list(lacks_contained(board) if contained else lacks(board, config)) + list(lacks_downloads(config))
    yield "lacks nothing that can be seen from here" if not lacking else "a real run would lack:"
    yield from (f"  {line}" for line in lacking)


def start_of(config: Config) -> str:
    """What training starts from."""
    shape = config.model.architecture
    if shape is None:
        return f"base {config.model.base}"
    return f"random weights of {config.model.preset or 'a Llama'}, {llama.parameters(shape.model_dump()):,} parameters"


def image_of(board: hardware.Hardware) -> Image | None:
    """The board's image, if there is one."""
    try:
        return image_for(board)
    except MachineError:
        return None


def lacks_contained(board: hardware.Hardware) -> Iterator[str]:
    """What a run in a container needs and this machine does not have."""
    for needed in (lambda: hardware.choose(board.name), lambda: image_for(board), check_engine):
        try:
            needed()
        except MachineError as error:
            yield error.what


def lacks(board: hardware.Hardware, config: Config) -> Iterator[str]:
    """What a run on this machine's own Python needs and this machine does not have."""
    if not board.is_cpu:
        from engines.ttml.limits import mesh_of

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


def lacks_downloads(config: Config) -> Iterator[str]:
    """What a run would fetch first."""
    base, corpus = config.model.base or "", config.data.corpus or ""
    entry = bases.locked().get(base)
    if entry and not bases.folder_of(base, entry).is_dir():
        yield f"the base {base}: {entry['download_mb']} MB are downloaded once"
    entry = corpora.locked().get(corpus)
    if entry and not corpora.folder_of(corpus, entry).is_dir():
        yield f"the corpus {corpus}: {entry['download_mb']} MB are downloaded once"
