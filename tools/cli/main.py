"""The `recipe` command: parses, calls, and turns every error into one message and its exit code.

Only click is imported here; what a verb needs is imported in the verb.
"""

from __future__ import annotations

import importlib
import logging
import math
import os
import sys
import traceback
from collections.abc import Mapping
from functools import partial
from pathlib import Path
from types import TracebackType
from typing import Any, ClassVar

import click

from common.errors import UsageError, without_secrets
from tools.cli.options import (
    container_option,
    hw_option,
    json_option,
    map_option,
    options_of_config,
    out_option,
    steps_option,
)
from tools.launch.exit_codes import exit_code_of
from tools.progress import bars
from tools.recipes import find_recipe


class Verbs(click.Group):
    """A group whose errors have exit codes, and whose sub-groups are imported when they are used."""

    lazy: ClassVar = {  # name: (where it is, its line in the help)
        "base": ("tools.cli.base:base", "Pin models of the Hub for a recipe, list, check and remove them."),
        "data": ("tools.cli.data:data", "Build, check, look at and convert data sets."),
        "explain": ("tools.cli.runs:explain", "Look in a log, or a run, for what is known to go wrong."),
        "export": ("tools.cli.runs:export", "Write a run's Hugging Face folders, and prove them by reloading."),
        "generate": ("tools.cli.runs:generate", "Talk to a run, or to any Hugging Face Llama folder."),
        "grade": ("tools.cli.runs:grade", "Hold a run against the recorded figures of its training."),
        "image": ("tools.cli.images:image", "Build, verify and publish the images that containers start from."),
        "lock": ("tools.cli.images:lock", "Renew docker/images.lock.json as far as the network allows."),
        "report": ("tools.cli.runs:report", "Write the page of a run, or one over all runs."),
        "repro": ("tools.cli.runs:repro", "Run a run again from its manifest, and compare."),
        "runs": ("tools.cli.runs:runs", "List, show, compare and prune runs."),
        "serve": ("tools.cli.serve:serve", "Serve a run behind OpenAI's API, or test what does."),
        "verify": ("tools.cli.verify:verify", "Prove that a run, data parallel or a board does what it should."),
    }

    def list_commands(self, ctx: click.Context) -> list[str]:
        return sorted([*super().list_commands(ctx), *self.lazy])

    def get_command(self, ctx: click.Context, cmd_name: str) -> click.Command | None:
        if cmd_name not in self.lazy:
            return super().get_command(ctx, cmd_name)
        module, name = self.lazy[cmd_name][0].split(":")
        return getattr(importlib.import_module(module), name)  # type: ignore[no-any-return]

    def format_commands(self, ctx: click.Context, formatter: click.HelpFormatter) -> None:
        """As click's, but without importing the lazy groups for their help lines."""
        del ctx
        rows = [(name, command.get_short_help_str(80)) for name, command in self.commands.items()]
        rows += [(name, line) for name, (_, line) in self.lazy.items()]
        with formatter.section("Commands"):
            formatter.write_dl(sorted(rows))


@click.group(cls=Verbs, context_settings={"help_option_names": ["-h", "--help"]})
@click.option("--debug", is_flag=True, envvar="RECIPES_DEBUG", help="Show a traceback with an error.")
def recipe(debug: bool) -> None:
    """Training recipes for Tenstorrent hardware, and their CPU twin.

    Exit codes: 0 done, 1 our bug, 2 usage or config, 3 data, 4 environment or device, 5 training failed,
    6 a verification did not hold, 75 stopped on request after saving (the same command goes on).
    """
    del debug  # `run` asks the context for it


def main() -> None:
    """The console script: run, print one message on an error, exit with its code."""
    debug = "--debug" in sys.argv[1:] or os.environ.get("RECIPES_DEBUG") == "1"
    sys.excepthook = print_traceback
    logging.setLogRecordFactory(LogRecord)
    sys.exit(exit_code_of(lambda: recipe.main(standalone_mode=False), debug))


class LogRecord(logging.LogRecord):
    """What a library logs, such as an address that it asks in vain: without secrets."""

    def getMessage(self) -> str:
        return without_secrets(super().getMessage())


def print_traceback(kind: type[BaseException], error: BaseException, trace: TracebackType | None) -> None:
    """Print what came through to the interpreter: with --debug, to be reported, so without secrets."""
    click.echo(without_secrets("".join(traceback.format_exception(kind, error, trace))), err=True, nl=False)


@recipe.command()
@click.argument("name")
@options_of_config
@click.option("--steps", type=click.IntRange(min=1), help="Optimizer steps of the run, and so the schedule's horizon.")
@click.option("--stop-at", type=click.IntRange(min=1), help="Save and end after this step with code 75.")
@click.option("--resume", default="auto", show_default=True, metavar="auto|never|PATH", help="Where to start from.")
@click.option(
    "--accept-changes",
    is_flag=True,
    help="With --resume PATH: go on with another training or data; recorded.",
)
@container_option
@click.option("--build", is_flag=True, help="Build the image first where there is none, without asking.")
@click.option("--dry-run", is_flag=True, help="Print what would run, and what it lacks here; run nothing.")
@out_option
@click.option(
    "--world", type=click.IntRange(min=1), help="Devices, or CPU processes of all hosts: the mesh [1, WORLD]."
)
@click.option("--nnodes", type=click.IntRange(min=1), default=1, help="Hosts that share the CPU processes.")
@click.option("--rdzv-endpoint", metavar="HOST:PORT", help="Where the hosts meet; HOST is one of them.")
@click.option("--rdzv-timeout", type=click.IntRange(min=1), default=300, help="Seconds to wait for the other hosts.")
@click.option("--launch", "resolved", envvar="RECIPES_LAUNCH", hidden=True, help="The Launch to run here, as JSON.")
@click.pass_context
def run(
    ctx: click.Context,
    /,
    name: str,
    container: bool | None,
    build: bool,
    dry_run: bool,
    nnodes: int,
    rdzv_endpoint: str | None,
    rdzv_timeout: int,
    resolved: str | None,
    **asked: Any,
) -> int:
    """Train a recipe: data if stale, train, evaluate, export, report. A board's runs go into its image by default."""
    from common.train.launch import Hosts, Launch

    if resolved:
        from tools.launch.run import run_here

        return run_here(Launch.from_json(resolved))
    from tools.launch.resolve import resolve

    launch = resolve(
        find_recipe(name),
        command=sys.argv,
        debug=ctx.find_root().params["debug"],
        hosts=Hosts(nnodes, rdzv_endpoint, rdzv_timeout),
        require_present=not dry_run,
        **asked,
    )
    if dry_run:
        from tools.launch.dry_run import describe

        for line in describe(launch, container):
            click.echo(line)
        return 0
    from tools.launch.run import run as run_launch

    return run_launch(launch, container, build)


@recipe.command()
@click.argument("name")
@click.option("--from", "parent", required=True, metavar="RECIPE", help="The recipe to copy.")
@click.option("--data", type=click.Path(path_type=Path), help="Your rows or text; without: the recipe's own stay.")
@map_option
@click.option("--format", "format_", default="auto", show_default=True, help="Of the data, as `data convert` takes it.")
def new(name: str, parent: str, data: Path | None, pairs: tuple[str, ...], format_: str) -> None:
    """Make a recipe for your own data: the folder recipes/NAME, checked before it is there. Downloads nothing."""
    from tools.data.convert import parse_map
    from tools.scaffold.new import Own
    from tools.scaffold.new import new as make

    if data is None and (pairs or format_ != "auto"):
        raise UsageError("--map and --format say how to read data of your own", todo="add --data FILE")
    said: list[str] = []
    with bars() as watch:
        make(name, parent, None if data is None else Own(data, parse_map(pairs), format_), said.append, watch)
    click.echo("\n".join(said))


@recipe.group()
def config() -> None:
    """Look at a recipe's config."""


@config.command()
@click.argument("name")
@options_of_config
@steps_option
def show(name: str, hw: str | None, overrides: tuple[str, ...], steps: int | None) -> None:
    """Print the config with all layers merged, for a board that need not be here."""
    from common import config as configs
    from tools.launch import lint
    from tools.machine import detect

    board = detect.choose(hw, require_present=False).hardware
    resolved = configs.load(find_recipe(name), board, overrides, steps)
    click.echo(resolved.to_yaml(), nl=False)
    if shape := resolved.model.architecture:
        counts = parameters_by_component(shape.model_dump())
        parts = " + ".join(f"{name} {count:,}" for name, count in counts.items() if count)
        click.echo(f"# {sum(counts.values()):,} parameters = {parts}")
    for line in lint.lint(resolved, board):
        click.echo(f"# {line}", err=True)


def parameters_by_component(architecture: Mapping[str, Any]) -> dict[str, int]:
    """Return how many parameters each part of a Llama has, in the order of the forward pass."""
    from common.model import llama

    counts = dict.fromkeys(("embedding", "attention", "feed-forward", "norms", "output head"), 0)
    for name, shape in llama.shapes(architecture).items():
        if name in (llama.EMBEDDING, llama.HEAD):
            part = "embedding" if name == llama.EMBEDDING else "output head"
        elif "norm" in name:
            part = "norms"
        else:
            part = "attention" if ".self_attn." in name else "feed-forward"
        counts[part] += math.prod(shape)
    return counts


@config.command()
def schema() -> None:
    """Print the JSON schema of config.yaml, presets and overlays, for editors: of a layer, so nothing is required."""
    import json

    from common.config import Config

    schema = Config.model_json_schema(by_alias=True)
    for name in ("recipe", "hw"):
        del schema["properties"][name]
    for part in (schema, *schema["$defs"].values()):
        part.pop("required", None)
    head = {"$schema": "https://json-schema.org/draft/2020-12/schema"}
    click.echo(json.dumps({**head, **schema, "title": "Recipe configuration"}, indent=1))


@recipe.command()
@click.argument("run", required=False)
@click.option("--hw", metavar="BOARD", help="The run on this board.")
@click.option("--now", is_flag=True, help="Kill it: nothing more is saved, and a board may need a reset.")
def stop(run: str | None, hw: str | None, now: bool) -> None:
    """End a run on this machine, after it has saved a checkpoint: RUN is its name, needed where several go on."""
    from tools.launch.stop import stop as end

    end(run, hw, now, click.echo)


@recipe.command()
@click.option("--ttml", is_flag=True, help="Instead: every name of ttml and ttnn that training relies on.")
@hw_option
@click.option("--device/--no-device", default=True, help="With --ttml: open one device to see a model's parameters.")
@container_option
@json_option
def doctor(ttml: bool, hw: str | None, device: bool, container: bool | None, as_json: bool) -> int:
    """Look for what is wrong with this machine; change nothing."""
    if ttml:
        return look_at_ttml(hw, device, container, as_json)
    from tools.doctor.machine import print_diagnosis

    print_diagnosis(hw, container, as_json, click.echo)
    return 0


def look_at_ttml(hw: str | None, device: bool, container: bool | None, as_json: bool) -> int:
    """Print what `recipe doctor --ttml` finds, in the board's image or here; return the exit code."""
    from tools.containers import launcher
    from tools.machine.detect import choose_board

    board = choose_board(hw, require_present=device)
    if launcher.wanted(container, board.hardware):
        words = ["doctor", "--ttml", "--hw", board.hardware.name]
        words += ["--json"] * as_json + ["--no-device"] * (not device)
        nodes = board.nodes if device else ()
        return launcher.run_words(words, board.hardware, nodes, partial(click.echo, err=True))
    from tools.doctor.ttml import print_ttml  # needs numpy, which a board's host, a launcher alone, lacks

    print_ttml(board.hardware, board.reason, device=device, as_json=as_json, say=click.echo)
    return 0


@recipe.command()
@click.argument("name")
@options_of_config
@steps_option
@json_option
def plan(name: str, hw: str | None, overrides: tuple[str, ...], steps: int | None, as_json: bool) -> None:
    """Say what a run would need: memory by component, batches, padding, disk and time. Downloads nothing."""
    from tools.plan.estimate import print_outlook

    print_outlook(find_recipe(name), hw, overrides, steps, as_json, click.echo)
