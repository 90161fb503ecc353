"""`recipe image` and `recipe lock`: the pinned images."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any, TypeVar

import click

F = TypeVar("F", bound=Callable[..., Any])
FOLDER = click.Path(path_type=Path, exists=True, file_okay=False)
FILE = click.Path(path_type=Path, exists=True, dir_okay=False)
CA_BUNDLE = click.option("--ca-bundle", envvar="CA_BUNDLE", type=FILE, help="A private network's certificates, PEM.")


def options_of_build(function: F) -> F:
    """The board, and what a builder may bring instead of what the network has."""
    for option in (
        CA_BUNDLE,
        click.option(
            "--wheelhouse", envvar="WHEELHOUSE", type=FOLDER, help="Take the wheels from here; download none."
        ),
        click.option(
            "--base-image", envvar="BASE_IMAGE", help="Build on this one: image@sha256:..., or a local image."
        ),
        click.argument("hw", envvar="HW", metavar="BOARD", default="cpu"),
    ):
        function = option(function)
    return function


@click.group()
def image() -> None:
    """Build, verify and publish the images that containers start from."""


@image.command()
@options_of_build
@click.option("--no-cache", is_flag=True, help="Every step again.")
def build(hw: str, no_cache: bool, **inputs: Any) -> None:
    """Build a board's image with docker buildx, from the pins of docker/images.lock.json."""
    from common import hardware
    from tools.containers.build import Inputs, build_and_record
    from tools.containers.images import read_lock

    build_and_record(hardware.get(hw).image, read_lock(), Inputs(**inputs), click.echo, no_cache=no_cache)


@image.command()
@options_of_build
@click.option("--rebuild/--no-rebuild", default=True, help="Build twice and compare the layers: minutes.")
@click.option("--container", metavar="NAME", help="Compare this running container with the lock, too.")
def verify(hw: str, rebuild: bool, container: str | None, **inputs: Any) -> None:
    """Prove that a board's image holds what the lock says and can be made again. Exit code 6 where it does not."""
    from common import hardware
    from tools.containers.build import Inputs
    from tools.containers.verify import verify_contents, verify_layers

    board = hardware.get(hw)
    verify_contents(board, container, click.echo)
    if rebuild:
        verify_layers(board, Inputs(**inputs), click.echo)


@image.command()
@options_of_build
@click.option(
    "--to", "repository", required=True, type=str.lower, metavar="REPOSITORY", help="host/path, without a tag."
)
@click.option("--rebuild/--no-rebuild", default=True, help="First build it twice more and compare the layers.")
@click.option("--attestations/--no-attestations", default=True, help="An SBOM and its provenance; recorded.")
@click.option("--replace", is_flag=True, help="Put it in the place of a digest that the lock has already.")
@click.option("--pushed", metavar="DIGEST", help="It was pushed elsewhere: only pull and record it.")
def publish(
    hw: str, repository: str, rebuild: bool, attestations: bool, replace: bool, pushed: str | None, **inputs: Any
) -> None:
    """Push a board's image by digest, once it is proved, and record it in docker/images.lock.json."""
    from common import hardware
    from tools.containers import publish as publishing
    from tools.containers.build import Inputs

    target = publishing.Target(hardware.get(hw), repository, replace)
    if pushed is not None:
        return publishing.record_pushed(target, pushed, click.echo, attestations=attestations)
    return publishing.publish(target, Inputs(**inputs), click.echo, rebuild=rebuild, attestations=attestations)


@click.command()
@click.option("--upgrade", is_flag=True, envvar="UPGRADE", help="Also read again what is known: a tag may have moved.")
@CA_BUNDLE
def lock(upgrade: bool, ca_bundle: Path | None) -> None:
    """Renew docker/images.lock.json as far as the network allows; refuse pins that do not belong together."""
    from tools.containers.lock import renew

    renew(click.echo, upgrade=upgrade, ca=ca_bundle)
