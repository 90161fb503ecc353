"""python -m ci.pull_image BOARD: fetches a board's image by digest, so that no training waits for a download."""

from __future__ import annotations

import click

from ci.command import run
from common import hardware
from tools.containers.docker import fetch, find_image


@click.command()
@click.argument("board", envvar="HW")
def main(board: str) -> None:
    """Code 4 where no image is published (docker/images.lock.json says why) and none was built on this machine."""
    image = find_image(hardware.get(board))
    fetch(image, click.echo)
    click.echo(f"{board}: the {image}")


if __name__ == "__main__":
    run(main)
