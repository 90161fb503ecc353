"""python -m ci.matrix: which recipe runs on which board, as the matrix of a workflow, on one line.

There is no list to edit. Boards come from common/hardware.yaml, recipes are found as folders with a config.yaml, and a
recipe belongs on every board that its config resolves for. Needs what a board's host has (requirements/launcher.txt).

    .venv/bin/python -m ci.matrix                             every recipe on every board with chips
    .venv/bin/python -m ci.matrix --board "n150 qb2"          on these boards only
    .venv/bin/python -m ci.matrix --board n150 --rows JSON    what another commit's code printed, held to names and n150
    .venv/bin/python -m ci.matrix --cpu                       every recipe, whole, on a CPU: weekly.yml
"""

from __future__ import annotations

import json
import re
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import click

from ci.command import run
from common import config, hardware
from common.errors import UsageError
from common.hardware import Hardware
from tools.recipes import RECIPES, find_recipe
from tools.results.schema import Measured, load

NAME = re.compile(r"[a-z0-9]+(?:-[a-z0-9]+)*")
Row = dict[str, Any]


def boards(names: list[str]) -> list[Hardware]:
    """The boards of these names, all with chips for none. Raises UsageError for one that is unknown or a CPU."""
    with_chips = [board for board in hardware.table().values() if not board.is_cpu]
    if not names:
        return with_chips
    chosen = {hardware.get(name).name for name in names}
    if strange := chosen - {board.name for board in with_chips}:
        raise UsageError(
            f"no runner has {', '.join(sorted(strange))}",
            where="--board",
            todo=f"boards: {', '.join(board.name for board in with_chips)}",
        )
    return [board for board in with_chips if board.name in chosen]


def recipes(name: str) -> list[Path]:
    """Every recipe's folder, or the one of that name. Raises UsageError where there is none of it."""
    return [find_recipe(name)] if name else [path.parent for path in sorted(RECIPES.glob("*/config.yaml"))]


def on_boards(folders: list[Path], where: list[Hardware]) -> Iterator[Row]:
    """A row for each recipe on each board that its config resolves for; which were left out, and why, on stderr."""
    for board in where:
        for folder in folders:
            try:
                config.load(folder, board)
            except UsageError as error:  # its batch does not divide by the devices, say
                click.echo(f"{folder.name} is left out on {board.name}: {error.what}", err=True)
                continue
            yield {"board": board.name, "recipe": folder.name}


def allowed(line: str, where: list[Hardware]) -> Iterator[Row]:
    """The rows of a matrix that another commit's code made, as a line of JSON: a board of these, and a recipe's name.

    A row chooses a runner, and its words are environment, artifacts and groups of a job. Raises UsageError for others.
    """
    try:
        rows = [(str(row["board"]), str(row["recipe"])) for row in json.loads(line)["include"]]
    except (ValueError, KeyError, TypeError) as error:
        raise UsageError("no matrix of boards and recipes", where="--rows", todo="what ci.matrix prints") from error
    for board, recipe in rows:
        if board not in [known.name for known in where] or not NAME.fullmatch(recipe):
            asked = ", ".join(known.name for known in where)
            raise UsageError(f"{recipe!r} on {board!r} is not for a board", where="--rows", todo=f"recipes on {asked}")
        yield {"board": board, "recipe": recipe}


def on_cpu(folders: list[Path]) -> Iterator[Row]:
    """A row for each recipe, whole: where it was measured on a CPU as it stands, graded where that was to its end."""
    for folder in folders:
        measured = [entry for entry in load(folder).numbers if isinstance(entry, Measured)]
        found = [entry for entry in measured if hardware.get(entry.board).is_cpu and not entry.overrides]
        whole = [entry for entry in found if entry.steps is None]  # a run is never cut short to be graded
        yield {
            "board": (whole or found)[0].board if found else "cpu",
            "recipe": folder.name,
            "grade": "1" if whole else "",
        }


@click.command()
@click.option("--board", "names", multiple=True, help="Boards, with blanks between them; none: all that have chips.")
@click.option("--recipe", default="", help="This recipe only.")
@click.option("--cpu", is_flag=True, help="Recipes on hosted runners instead of boards.")
@click.option("--rows", metavar="JSON", help="Another commit's matrix, to be checked.")
@click.option("--output", metavar="NAME", help="Print it as the output NAME of a workflow's step.")
def main(names: tuple[str, ...], recipe: str, cpu: bool, rows: str | None, output: str | None) -> None:
    """Print the matrix as one line of JSON."""
    where = boards(" ".join(names).split())
    if rows is not None:
        made = allowed(rows, where)
    else:
        folders = recipes(recipe)
        made = on_cpu(folders) if cpu else on_boards(folders, where)
    line = json.dumps({"include": list(made)}, separators=(",", ":"))
    click.echo(f"{output}={line}" if output else line)


if __name__ == "__main__":
    run(main)
