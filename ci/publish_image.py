"""Publishes an image that was built and verified here, and writes what was published into the lock. For images.yml.

    .venv/bin/python -m ci.publish_image push TARGET      builds again with SBOM and provenance, pushes by digest, and
                                                          compares the layers with those of `recipe image build`
    .venv/bin/python -m ci.publish_image record TARGET    docker/images.lock.json gets repository, digest and date

The pushed image is the one that was proved: its layers must be the local build's, or code 6 and nothing is recorded.
A digest that nothing names is no release: what failed here is left to the registry's own clean-up.
Never run against a registry by us: none was in reach. The commands are those of the documents of buildx.
"""

from __future__ import annotations

import datetime
import functools
import json
import re
import tempfile
from pathlib import Path

import click

from ci.command import run
from common.errors import MachineError, UsageError, VerificationError
from common.files import write_json
from common.paths import ROOT
from tools.containers.build import Inputs, build_variables, fill_wheelhouse
from tools.containers.docker import bake, docker, inspect_image
from tools.containers.images import LOCK, Json, read_lock, target_of

BUILDER = "recipes-publish"


def tool(lock: Json, name: str) -> str:
    """A tool of building by digest. Raises MachineError where the lock has none."""
    pin = lock["tools"][name]
    if pin["digest"] is None:
        raise MachineError(f"{name} has no digest: {pin['reason']}", where=str(LOCK), todo="recipe lock")
    return f"{pin['image']}@{pin['digest']}"


def options(target: str, repository: str, generator: str) -> list[str]:
    """What the bake command gets: no tag, a push by digest, an SBOM by the pinned generator, full provenance."""
    settings = (
        "tags=",
        f"output=type=image,name={repository},push=true,push-by-digest=true,name-canonical=true,oci-mediatypes=true",
        f"attest=type=sbom,generator={generator}",
        "attest=type=provenance,mode=max",
    )
    return ["--builder", BUILDER, *(word for setting in settings for word in ("--set", f"{target}.{setting}"))]


@click.group()
def main() -> None:
    """Push an image, or record what was pushed."""


TARGET = click.argument("target", envvar="TARGET")
REPOSITORY = click.option(
    "--repository", envvar="REPOSITORY", required=True, type=str.lower,
    help="ghcr.io/owner/name, without a tag; made lower case, as registries want it.",
)  # fmt: skip


@main.command()
@TARGET
@REPOSITORY
def push(target: str, repository: str) -> None:
    """Push by digest, and print `digest=...` as a workflow's output.

    Raises MachineError for an unknown pin, VerificationError for other layers.
    """
    lock = read_lock()
    variables = build_variables(lock, target, Inputs())
    buildkit, generator = tool(lock, "buildkit"), tool(lock, "sbom_generator")
    proved = inspect_image(f"recipes-{target}:local")
    if proved is None:
        raise MachineError(
            f"{target} was not built here", todo=f"make image HW={target}; make image-verify HW={target}"
        )
    fill_wheelhouse(lock, target, None, ROOT / "docker" / "wheelhouse", functools.partial(click.echo, err=True))
    docker("buildx", "create", "--name", BUILDER, "--driver", "docker-container", "--driver-opt", f"image={buildkit}")
    try:
        with tempfile.TemporaryDirectory() as folder:
            said = Path(folder) / "metadata.json"
            words = [*options(target, repository, generator), "--metadata-file", str(said)]
            bake(target, variables, *words, context=ROOT)
            digest: str = json.loads(said.read_text("utf-8"))[target]["containerimage.digest"]
    finally:
        docker("buildx", "rm", BUILDER)
    same_layers(f"{repository}@{digest}", proved)
    click.echo(f"digest={digest}")


def same_layers(reference: str, proved: Json) -> None:
    """Raise VerificationError where what the registry has is not made of the layers that were proved."""
    docker("pull", "--quiet", reference)
    pushed = inspect_image(reference)
    found = pushed["RootFS"]["Layers"] if pushed else []
    if found != proved["RootFS"]["Layers"]:
        raise VerificationError(
            f"what was pushed has other layers than what was verified\n    {found}\n    {proved['RootFS']['Layers']}",
            where=reference,
            todo="publish nothing; see what differs: two builders, or two versions of BuildKit",
        )


@main.command()
@TARGET
@REPOSITORY
@click.option("--digest", envvar="DIGEST", required=True)
def record(target: str, repository: str, digest: str) -> None:
    """Write repository, digest and today's date into the lock. Raises UsageError for a digest that is none."""
    if not re.fullmatch(r"sha256:[0-9a-f]{64}", digest):
        raise UsageError(f"not a digest: {digest!r}", where="--digest / DIGEST")
    lock = read_lock()
    entry = target_of(lock, target)
    date = datetime.datetime.now(datetime.timezone.utc).date().isoformat()
    lock["targets"][target] = {"pins": entry["pins"], "repository": repository, "digest": digest, "date": date}
    write_json(LOCK, lock)


if __name__ == "__main__":
    run(main)
