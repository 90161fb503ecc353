"""The `docker` command, the one way to this machine's engine; what goes wrong there becomes one message with a cure."""

from __future__ import annotations

import json
import os
import shutil
import subprocess
import sys
from collections.abc import Callable, Mapping
from pathlib import Path

from common import known_errors
from common.errors import MachineError
from common.hardware import Hardware
from tools.containers.images import Image, Json, NoImage, image_for, images_of, log_of
from tools.containers.progress import watched

ANSWER_SECONDS = 60  # for what an engine does at once even on a busy machine: one that hangs is as good as none


def docker(*arguments: str, seconds: float | None = None) -> str:
    """Return what `docker ARGUMENTS` prints.

    Raises MachineError with what its refusal means, or where it takes more than `seconds`.
    """
    done = _run(arguments, seconds)
    if done.returncode:
        raise explained(done.stderr, f"docker {arguments[0]}")
    return done.stdout


def explained(said: str, doing: str) -> MachineError:
    """Return the error for what Docker `said`: its meaning and cure where they are known, its own last words always."""
    said = " ".join(said.split()).removeprefix("Error response from daemon: ")
    where = f"{doing}: {said[-300:] or 'no reason given'}"
    if known := known_errors.match(said, "docker"):
        return MachineError(known.means, where=where, todo=known.answer)
    return MachineError("the Docker engine refused", where=where, todo="recipe doctor; docker info")


def check_engine() -> str:
    """Return the version of the engine that answers here.

    Raises MachineError: none, no permission, not Docker's, or one whose containers' users are others outside of them.
    """
    info = _info()
    if errors := info.get("ServerErrors"):  # an older command ends with 0 all the same
        raise explained(errors[0], "docker info")
    if "ServerVersion" not in info:
        raise MachineError(
            "the `docker` command of this machine is not Docker's",
            where="docker info: it names no ServerVersion",
            todo="put Docker's own before it on PATH (Podman has one of that name), or --no-container (CONTAINER=0)",
        )
    options = " ".join(info.get("SecurityOptions") or ())
    # User 1000 of a container is then somebody else outside of it, who may not write runs/.
    for name, words in (("rootless", "runs without root"), ("userns", "maps its containers' users to others")):
        if f"name={name}" in options:
            raise MachineError(
                f"this Docker engine {words}: a run's files would not be yours",
                where="docker info: Security Options",
                todo="use the system's ordinary engine (DOCKER_HOST names one), or --no-container",
            )
    return str(info["ServerVersion"])


def disk() -> tuple[Path, float] | None:
    """Return the folder in which the engine keeps its layers, and the free bytes there.

    None where that folder is on another machine, as with Docker Desktop or a DOCKER_HOST elsewhere, and where the
    layers are in containerd's own store, of which `docker info` names no folder.
    """
    info = _info()
    # So Docker's documentation of that store has it (docs.docker.com/engine/storage/containerd).
    if ["driver-type", "io.containerd.snapshotter.v1"] in (info.get("DriverStatus") or []):
        return None
    folder = Path(info.get("DockerRootDir") or "/nowhere")
    return (folder, shutil.disk_usage(folder).free) if folder.is_dir() else None


def inspect_image(reference: str) -> Json | None:
    """Return the engine's description of an image, or None where it does not have it."""
    done = _run(("image", "inspect", reference))
    if "no such image" in done.stderr.lower():
        return None
    if done.returncode:
        raise explained(done.stderr, "docker image inspect")
    described: list[Json] = json.loads(done.stdout)
    return described[0]


def lock_of(described: Json) -> str | None:
    """Return the hash of the pins that an image was built from, its label `recipes.lock`; None: it has none."""
    labels: dict[str, str] = described["Config"]["Labels"] or {}
    return labels.get("recipes.lock")


def find_image(hw: Hardware) -> Image:
    """Return the image that a board's containers start from: one that was built here and that the engine still has,
    else the published one, which the engine need not have yet (`fetch`).

    Raises NoImage where there is neither.
    """
    for image in images_of(hw):
        if image.source == "published" or inspect_image(image.reference) is not None:
            return image
    image = image_for(hw)
    todo = f"make image HW={hw.name}"
    raise NoImage(f"the image of {hw.name} is gone from the Docker engine", where=image.reference, todo=todo)


def present(image: Image) -> Json:
    """Return the engine's description of an image. Raises MachineError where it is gone or another one."""
    described = inspect_image(image.reference)
    todo = f"make image HW={image.target}" if image.source == "local" else f"docker pull {image.reference}"
    if described is None:
        raise MachineError(
            f"the image of {image.target} is gone from the Docker engine", where=image.reference, todo=todo
        )
    known = [described["Id"], *(described["RepoDigests"] or [])]
    if image.reference not in known:
        raise MachineError(
            f"the engine's image of {image.target} is not the locked one: it has {', '.join(known)}",
            where=image.reference,
            todo=f"do not work around it: an image of another digest is another image; {todo}",
        )
    return described


def fetch(image: Image, say: Callable[[str], None]) -> None:
    """Have the image on this engine: a published one is fetched by its digest.

    Raises NoImage where a published one is not to be had, MachineError where the engine's is not the one that the
    lock means.
    """
    if image.source == "published" and inspect_image(image.reference) is None:
        say(f"fetching {image.reference} (once)")
        try:
            docker("pull", "--quiet", image.reference)
        except MachineError as error:
            raise NoImage(
                f"the published image of {image.target} cannot be fetched: {error.what}",
                where=error.where,
                todo=f"{error.todo}; or build it here: make image HW={image.target}",
            ) from error
    pins = lock_of(present(image))
    if pins != image.lock_sha256:
        raise MachineError(
            f"the engine's image of {image.target} is not the locked one: its label recipes.lock is {pins}",
            where=f"{image.reference}, pins {image.lock_sha256[:12]}...",
            todo=f"do not work around it: an image of other pins is another image; make image HW={image.target}",
        )


def bake(target: str, variables: Mapping[str, str], *options: str, context: Path) -> None:
    """Run `docker buildx bake TARGET` in `context`, its steps on this terminal and all of its output in a log.

    Raises MachineError where it fails, with what is known of its last words; KeyboardInterrupt where a signal ended it,
    which leaves the engine the layers of every step that was done.
    """
    docker("buildx", "version")
    command = ["docker", "buildx", "bake", "--progress", "plain", "--file", "docker/docker-bake.hcl", *options, target]
    # SOURCE_DATE_EPOCH of the caller would be taken for the bake file's variable, and make other layers. From buildx
    # 0.20 on, bake asks at the terminal whether a secret outside of the context may be read, as CA_BUNDLE's mostly is.
    environment = {key: value for key, value in os.environ.items() if key != "SOURCE_DATE_EPOCH"}
    environment |= {"BUILDX_BAKE_ENTITLEMENTS_FS": "0", **variables}
    log = log_of(target)
    ended = watched(command, context, environment, log, variables["LOCK_SHA256"])
    if ended.code:
        sys.stderr.write(ended.last_words)
        known = known_errors.match(" ".join(ended.last_words.split()), "build", "docker")
        raise MachineError(
            f"the build of {target} failed: {known.means if known else ended.cause}",
            where=f"{log}: {ended.cause}" if known else str(log),
            todo=f"{known.answer if known else 'mend what it names'}; the same command then goes on with the steps "
            "that are done",
        )


def _info() -> Json:
    """Return what the engine says of itself."""
    info: Json = json.loads(docker("info", "--format", "{{json .}}", seconds=ANSWER_SECONDS))
    return info


def _run(arguments: tuple[str, ...], seconds: float | None = None) -> subprocess.CompletedProcess[str]:
    """Run the command in a session of its own: a Ctrl-C is this process's alone, which decides what it means."""
    command = ["docker", *arguments]
    try:
        return subprocess.run(
            command, capture_output=True, text=True, check=False, timeout=seconds, start_new_session=True
        )
    except FileNotFoundError as error:
        raise MachineError(
            "there is no `docker` command on this machine",
            todo="install Docker Engine and its buildx plugin; on a Debian machine without a registry: ci/engine.sh",
        ) from error
    except subprocess.TimeoutExpired as error:
        raise MachineError(
            "the Docker engine does not answer",
            where=f"docker {arguments[0]}: nothing within {seconds} s",
            todo="restart it (systemctl restart docker), or run on this machine's own Python: --no-container",
        ) from error
