"""python -m ci.layers: what an image adds to its base, to be compared between two builders.

    .venv/bin/python -m ci.layers show             layers=["sha256:...", ...] of the cpu image that was built here
    FIRST=... SECOND=... .venv/bin/python -m ci.layers compare      code 6 where two such lists differ

A layer is named by the hash of its uncompressed tar, so two names are equal where every byte is. The base's own layers
are left out: builders that make their base themselves have two of them.
"""

from __future__ import annotations

import json

import click

from ci.command import run
from common.errors import MachineError, UsageError, VerificationError
from tools.containers.docker import inspect_image
from tools.containers.images import read_local


def added(target: str) -> list[str]:
    """The layers of the image built here for `target`, without its base's. Raises MachineError where there is none."""
    built = read_local().get(target)
    image = built and inspect_image(built["id"])
    base = built and inspect_image(built["base"])
    if not image or not base:
        raise MachineError(
            f"{target} was not built on this machine, or its base is gone", todo=f"make image HW={target}"
        )
    layers: list[str] = image["RootFS"]["Layers"]
    return layers[len(base["RootFS"]["Layers"]) :]


def compare(first: str, second: str) -> list[str]:
    """The layers that both builders made. Raises UsageError for no list, VerificationError where they differ."""
    lists: list[list[str]] = []
    for name, text in (("FIRST", first), ("SECOND", second)):
        try:
            lists.append(json.loads(text))
        except json.JSONDecodeError:
            raise UsageError(f"not a list of layers: {text!r}", where=name) from None
        if not lists[-1]:
            raise UsageError("no layers: nothing was compared", where=name)
    if lists[0] != lists[1]:
        raise VerificationError(
            f"two builders made other layers\n    {' '.join(lists[0])}\n    {' '.join(lists[1])}",
            where="docker/Dockerfile",
            todo="what differs was made from the machine, the time, the path, or the order of something",
        )
    return lists[0]


@click.command()
@click.argument("what", type=click.Choice(["show", "compare"]))
@click.option("--first", envvar="FIRST", default="")
@click.option("--second", envvar="SECOND", default="")
def main(what: str, first: str, second: str) -> None:
    """Show what the cpu image adds to its base, or compare two such lists."""
    if what == "show":
        click.echo(f"layers={json.dumps(added('cpu'))}")
    else:
        click.echo(f"two builders made the same layers: {' '.join(compare(first, second))}")


if __name__ == "__main__":
    run(main)
