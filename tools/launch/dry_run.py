"""`recipe run --dry-run`: what a run would do here, and what it would lack. Needs no board, engine or network."""

from __future__ import annotations

import importlib.util
import shlex
from collections.abc import Callable, Iterator
from dataclasses import replace
from pathlib import Path

from common.config import Config
from common.errors import MachineError, RecipeError
from common.hardware import Hardware
from common.model import bases, llama
from common.train.launch import Launch
from engines.registry import engine_for
from engines.ttml.mesh import find_descriptor
from tools.containers import launcher, offer
from tools.containers.docker import check_engine
from tools.containers.images import Image, image_for
from tools.containers.spec import NOT_BUILT, arguments_of, errand_of, spec_of
from tools.data.fetch import missing
from tools.doctor.machine import refuse_unready
from tools.machine import detect


def describe(launch: Launch, container: bool | None) -> Iterator[str]:
    """Yield the lines of a dry run of `launch`, whose board need not be here."""
    config, board = launch.config, launch.hw
    precision: str = config.training.precision
    if precision == "auto":
        precision = engine_for(board).precision_for(board)[0]
    yield f"{config.recipe} on {launch.reason}"
    yield f"would run: {shlex.join(['recipe', *(word for word in launch.command[1:] if word != '--dry-run')])}"
    here = replace(launch, nodes=launch.nodes or board.device_nodes)
    if contained := launcher.wanted(container, board):
        spec = spec_of(errand_of(launcher.with_image(here, image_of(board))))
        words = ["docker", "run", "--rm", *arguments_of(spec)]
        yield f"in the container: {shlex.join(words)}"
        if spec.image == NOT_BUILT:
            yield "its image would be built first: asked at a terminal, else by BUILD=1 (--build)"
            yield from (f"  {line}" for line in offer.outlook(board))
    yield f"device nodes: {', '.join(here.nodes) or 'none needed'}"
    yield f"{start_of(config)}; precision {precision}; {config.batch_equation}; mesh {config.device.mesh_shape}"
    yield from launch.warnings
    lacking = [*lacks(board, config, launch.recipe_dir, contained), *missing(config, launch.recipe_dir)]
    yield "lacks nothing that can be seen from here" if not lacking else "a real run would lack:"
    yield from (f"  {line}" for line in lacking)


def start_of(config: Config) -> str:
    """What training starts from."""
    shape = config.model.architecture
    if shape is None:
        return f"base {config.model.base}"
    return f"random weights of {config.model.preset or 'a Llama'}, {llama.parameters(shape.model_dump()):,} parameters"


def image_of(board: Hardware) -> Image | None:
    """The board's image, if there is one."""
    try:
        return image_for(board)
    except MachineError:
        return None


def lacks(board: Hardware, config: Config, recipe_dir: Path, contained: bool) -> Iterator[str]:
    """What a run needs and this machine does not have: in a container, or on this machine's own Python."""
    needs: list[Callable[[], object]]
    if contained:
        nodes = detect.choose(board.name, require_present=False).nodes
        needs = [lambda: refuse_unready(board, nodes), lambda: image_for(board), check_engine]
    elif board.is_cpu:
        needs = [lambda: engine_for(board).refuse_launch(board, config)]
    else:
        mesh = config.device.mesh_shape or board.mesh_shape
        needs = [lambda: detect.choose(board.name)]
        needs += [lambda: find_descriptor(board, mesh)] if mesh != (1, 1) else []
        if importlib.util.find_spec("ttml") is None:
            yield "ttml, which is built with tt-metal (build_metal.sh --build-tt-train); no package index has it"
    if base := config.model.base:
        needs.append(lambda: bases.find(base, recipe_dir))
    for need in needs:
        try:
            need()
        except RecipeError as error:
            yield error.what
