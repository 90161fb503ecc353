"""python -m ci.layers: what the cpu image that was built here adds to its base, to be compared between two builders.

A layer is named by the hash of its uncompressed tar, so two names are equal where every byte is. The base's own layers
are left out: builders that make their base themselves have two of them. ci/same-layers.sh compares.
"""

from __future__ import annotations

import json

import click

from ci.command import run
from common.errors import MachineError
from tools.containers.docker import inspect_image
from tools.containers.images import read_local


def main() -> None:
    """Print `layers=["sha256:...", ...]`, an output of a workflow. Raises MachineError where there is no image."""
    built = read_local().get("cpu")
    image = built and inspect_image(built["id"])
    base = built and inspect_image(built["base"])
    if not image or not base:
        raise MachineError("cpu was not built on this machine, or its base is gone", todo="make image HW=cpu")
    click.echo(f"layers={json.dumps(image['RootFS']['Layers'][len(base['RootFS']['Layers']) :])}")


if __name__ == "__main__":
    run(main)
