"""Options that several verbs take: one name and one help text each."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any, TypeVar

import click

from common.paths import ROOT

F = TypeVar("F", bound=Callable[..., Any])

RUN = click.Path(path_type=Path, exists=True, file_okay=False)
json_option = click.option("--json", "as_json", is_flag=True, help="For machines.")
hw_option = click.option("--hw", envvar="HW", metavar="BOARD", help="Board, or cpu; unset: the one found here.")
set_option = click.option("--set", "overrides", multiple=True, metavar="A.B=C", help="Override one key; repeatable.")
container_option = click.option(
    "--container/--no-container", default=None, help="In the pinned image (a board's default), or on this Python."
)
steps_option = click.option("--steps", type=click.IntRange(min=1), help="As for `run`.")
map_option = click.option(
    "--map",
    "pairs",
    metavar="NAME=COLUMN",
    multiple=True,
    help="Column of prompt, response, system, messages or tools.",
)
out_option = click.option(
    "--out", type=click.Path(path_type=Path, file_okay=False), default=ROOT / "runs", help="Folder of runs."
)


def options_of_config(function: F) -> F:
    """Add --hw and --set, as every verb that resolves a config takes them."""
    return hw_option(set_option(function))
