"""`recipe image publish`: an image that was built and proved here, pushed by digest, and what was pushed in the lock.

With attestations (an SBOM and its provenance) the pinned BuildKit builds it a second time, in a builder of its own, and
pushes that build once its layers are the proved ones. Without them the engine pushes the proved image itself.
Tried with Debian's docker-registry on this machine, without attestations; never with them, for want of a registry that
has the pinned BuildKit and SBOM generator.
"""

from __future__ import annotations

import json
import re
import tempfile
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

from common.errors import MachineError, UsageError, VerificationError
from common.files import utc_now, write_json
from common.hardware import Hardware
from common.paths import ROOT
from tools.containers import images, verify
from tools.containers.build import Inputs, build_variables, fill_wheelhouse
from tools.containers.docker import bake, docker, inspect_image, lock_of
from tools.containers.images import Image, Json, local_image, read_lock, target_of

Say = Callable[[str], None]
BUILDER = "recipes-publish"
DIGEST = re.compile(r"sha256:[0-9a-f]{64}")
REPOSITORY = re.compile(r"[a-z0-9.-]+(:\d+)?(/[a-z0-9]+([._-]+[a-z0-9]+)*)+")  # host[:port]/path, without a tag


@dataclass(frozen=True)
class Target:
    """What is to be published: a board's image, where to, and whether that may replace what the lock has."""

    hw: Hardware
    repository: str
    replace: bool = False

    def refuse(self, lock: Json, say: Say) -> None:
        """Raise UsageError for a repository that is none, or for a digest in the lock that is not to be replaced."""
        if not REPOSITORY.fullmatch(self.repository):
            raise UsageError(
                f"no repository: {self.repository!r}",
                where="--to",
                todo="host/path in lower case, without a tag: ghcr.io/owner/recipes-n150, localhost:5000/recipes-n150",
            )
        entry = target_of(lock, self.hw.image)
        if entry["digest"] is None:
            return
        there = f"{entry['repository']}@{entry['digest']}, published on {entry['date']}"
        if not self.replace:
            raise UsageError(
                f"the lock has an image of {self.hw.image} already, perhaps somebody else's: {there}",
                where=str(images.LOCK),
                todo="whoever clones this takes that one; --replace puts yours in its place",
            )
        say(f"replaced in the lock: {there}")


def publish(target: Target, inputs: Inputs, say: Say, *, rebuild: bool = True, attestations: bool = True) -> None:
    """Prove the image of a board that was built here, push it by digest, and record it in the lock.

    `rebuild` has `recipe image verify` build it twice more; the layers must be the image's. Raises UsageError and
    MachineError for what cannot be published, VerificationError for other layers; the lock is then as before, and what
    was pushed has no name.
    """
    lock = read_lock()
    target.refuse(lock, say)
    image = local_image(target.hw)
    if image is None:
        raise MachineError(
            f"no image of {target.hw.name} was built here from the pins of today",
            where=str(images.LOCAL),
            todo=f"make image HW={target.hw.name}",
        )
    verify.verify_contents(target.hw, None, say, image=image)
    proved = inspect_image(image.reference) or {}
    refuse_unknown_commit(image, proved)
    if rebuild:
        compare("two more builds", verify.verify_layers(target.hw, inputs, say), proved)
    digest = push_attested(target, lock, proved, inputs, say) if attestations else push_proved(target, image)
    reference = f"{target.repository}@{digest}"
    compare(reference, pulled(target, digest)["RootFS"]["Layers"], proved)
    say(f"pushed: {reference}, with {'an SBOM and its provenance' if attestations else 'no attestations'}")
    record(target, digest, say, attestations=attestations)


def refuse_unknown_commit(image: Image, proved: Json) -> None:
    """Raise UsageError where an image was built from a checkout with changes of its own: nobody else can have it."""
    commit = (proved["Config"]["Labels"] or {}).get("org.opencontainers.image.revision", "")
    if not re.fullmatch(r"[0-9a-f]{40}", commit):
        raise UsageError(
            f"the image of {image.target} was built from {commit or 'no commit'}, which nobody else can build from",
            where=image.reference,
            todo=f"commit or stash the changes, then make image HW={image.target}",
        )


def compare(what: str, layers: list[str], proved: Json) -> None:
    """Raise VerificationError where layers are not those of the image that was proved."""
    if layers != proved["RootFS"]["Layers"]:
        raise VerificationError(
            f"{what}: other layers than those that were proved\n    {layers}\n    {proved['RootFS']['Layers']}",
            where="docker/Dockerfile",
            todo="nothing is recorded; see what differs: two builders, or two versions of BuildKit",
        )


def pulled(target: Target, digest: str) -> Json:
    """Pull what was pushed, as whoever clones this will; return the engine's description of it.

    Raises UsageError for a digest that is none, MachineError where it is not to be had, VerificationError where it was
    built from other pins than those of today, by which the lock would record it.
    """
    if not DIGEST.fullmatch(digest):
        raise UsageError(f"not a digest: {digest!r}", where="--pushed")
    reference = f"{target.repository}@{digest}"
    docker("pull", "--quiet", reference)
    described = inspect_image(reference) or {}
    pins = images.pins_sha256(read_lock(), target.hw.image)
    if (labelled := lock_of(described)) != pins:
        raise VerificationError(
            f"what was pushed was built from the pins {labelled}, today's are {pins}",
            where=reference,
            todo="nothing is recorded: check out the commit that it was built from, or build and push it from this one",
        )
    return described


# --- two ways to a registry -----------------------------------------------------------------------------------------


def push_attested(target: Target, lock: Json, proved: Json, inputs: Inputs, say: Say) -> str:
    """Build with the pinned BuildKit, compare, then push that build with SBOM and provenance; return its digest."""
    name = target.hw.image
    variables = build_variables(lock, name, inputs)
    buildkit, generator = tool(lock, "buildkit"), tool(lock, "sbom_generator")
    fill_wheelhouse(lock, name, inputs.wheelhouse, ROOT / "docker" / "wheelhouse", say)
    docker("buildx", "create", "--name", BUILDER, "--driver", "docker-container", "--driver-opt", f"image={buildkit}")
    try:
        own = ["--builder", BUILDER]
        bake(name, variables, *own, "--load", "--set", f"{name}.tags=recipes-{name}:publish", context=ROOT)
        built = inspect_image(f"recipes-{name}:publish") or {}
        docker("image", "rm", f"recipes-{name}:publish")
        compare("the pinned BuildKit", built["RootFS"]["Layers"], proved)
        with tempfile.TemporaryDirectory() as folder:
            said = Path(folder) / "metadata.json"
            pushing = [*own, *push_options(name, target.repository, generator), "--metadata-file", str(said)]
            bake(name, variables, *pushing, context=ROOT)
            digest: str = json.loads(said.read_text("utf-8"))[name]["containerimage.digest"]
    finally:
        docker("buildx", "rm", BUILDER)
    return digest


def tool(lock: Json, name: str) -> str:
    """Return a tool of building by digest. Raises MachineError where the lock has none."""
    pin = lock["tools"][name]
    if pin["digest"] is None:
        todo = "recipe lock reads it; --no-attestations does without"
        raise MachineError(f"{name} has no digest: {pin['reason']}", where=str(images.LOCK), todo=todo)
    return f"{pin['image']}@{pin['digest']}"


def push_options(name: str, repository: str, generator: str) -> list[str]:
    """Return what the pushing bake gets: no tag, a push by digest, an SBOM by the pinned generator, full provenance."""
    settings = (
        "tags=",
        f"output=type=image,name={repository},push=true,push-by-digest=true,name-canonical=true,oci-mediatypes=true",
        f"attest=type=sbom,generator={generator}",
        "attest=type=provenance,mode=max",
    )
    return [word for setting in settings for word in ("--set", f"{name}.{setting}")]


def push_proved(target: Target, image: Image) -> str:
    """Push the proved image itself; return its digest. `docker push` wants a tag: it is the pins' hash."""
    name = f"{target.repository}:pins-{image.lock_sha256[:12]}"
    docker("tag", image.reference, name)
    try:
        said = docker("push", name)
    finally:
        docker("image", "rm", name)
    found = DIGEST.search(said.rpartition("digest: ")[2])
    if not found:
        raise MachineError(
            "docker push named no digest", where=name, todo="docker push it by hand, and read what it says"
        )
    return found[0]


# --- the lock -------------------------------------------------------------------------------------------------------


def record(target: Target, digest: str, say: Say, *, attestations: bool) -> None:
    """Write into the lock what was pushed: repository, digest, date, pins, and whether it has attestations."""
    lock = read_lock()
    name = target.hw.image
    lock["targets"][name] = {
        "pins": target_of(lock, name)["pins"],
        "repository": target.repository,
        "digest": digest,
        "date": utc_now()[:10],
        "lock_sha256": images.pins_sha256(lock, name),
        "attestations": attestations,
    }
    write_json(images.LOCK, lock)
    say(f"{images.LOCK}: {name} is {target.repository}@{digest}; commit it, and whoever clones this pulls that image")


def record_pushed(target: Target, digest: str, say: Say, *, attestations: bool) -> None:
    """Record what was pushed elsewhere, as a workflow's other job did. Raises as `publish` and `pulled` do."""
    target.refuse(read_lock(), say)
    pulled(target, digest)
    record(target, digest, say, attestations=attestations)
