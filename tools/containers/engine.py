"""The Docker engine of this machine: asked through its SDK, and its errors as one message with a cure each."""

from __future__ import annotations

import contextlib
import re
from collections.abc import Iterator
from typing import TYPE_CHECKING, Any

from common.errors import MachineError
from tools.containers.images import Image

if TYPE_CHECKING:
    from docker.client import DockerClient

# What an engine says, as a pattern; what that means; what to do.
SAYINGS = (
    (
        r"no space left on device",
        "the disk of the Docker engine is full",
        "make room where `docker info` says Docker Root Dir; `docker system df` shows what takes it",
    ),
    (
        r"gathering device information|not a device node",
        "a device node of the board cannot be given to a container",
        "is the driver loaded, and is it a node and no plain file? `recipe doctor` looks",
    ),
    (
        r"setting rlimit",
        "this engine may not lift the limit of locked memory, which a board's DMA needs",
        "give the engine's service LimitMEMLOCK=infinity, or CAP_SYS_RESOURCE where it runs in a container itself",
    ),
    (r"docker-init", "this engine has no docker-init", "install it with the engine (Debian: the package tini)"),
    (
        r"bind source path does not exist",
        "a folder that the container needs is not on the engine's machine",
        "the engine must be this machine's own: unset DOCKER_HOST",
    ),
    (
        r"manifest verification failed|does not match (?:the )?digest|manifest unknown",
        "the registry has no image of the locked digest",
        "do not work around it: report it; an image of another digest is another image",
    ),
    (
        r"unauthorized|denied: |forbidden",
        "the registry refuses to give the image",
        "log in with `docker login`, or build it here: make image",
    ),
    (
        r"no such host|i/o timeout|network is unreachable|connection refused|TLS handshake",
        "the registry cannot be reached",
        "check network and proxy of the Docker engine, or build the image here: make image",
    ),
)
NO_ENGINE = "start Docker (systemctl start docker), or run on this machine's own Python: --no-container (CONTAINER=0)"
NO_RIGHTS = "let an administrator add you to the group docker, log in anew; that group is as good as root here"


def connect() -> DockerClient:
    """The engine that answers on this machine. Raises MachineError: none, no permission, or not one for this."""
    try:
        from docker.client import DockerClient
    except ImportError as error:
        raise MachineError(
            f"the Python package {error.name} is not in this environment",
            where="import docker",
            todo="make setup, which installs it; LAUNCHER=1 for a host that only launches containers",
        ) from error
    with explained("asking the Docker engine"):
        client: DockerClient = DockerClient.from_env()
        _refuse_other_users(client.info())
        return client


def _refuse_other_users(info: dict[str, Any]) -> None:
    """Raise MachineError where user 1000 of a container is somebody else outside of it, who may not write runs/."""
    options = " ".join(info.get("SecurityOptions") or ())
    for name, words in (("rootless", "runs without root"), ("userns", "maps its containers' users to others")):
        if f"name={name}" in options:
            raise MachineError(
                f"this Docker engine {words}: a run's files would not be yours",
                where="docker info: Security Options",
                todo="use the system's ordinary engine (DOCKER_HOST names one), or --no-container",
            )


@contextlib.contextmanager
def explained(doing: str) -> Iterator[None]:
    """Turn what the SDK and its transport raise into one MachineError."""
    import docker.errors
    import requests
    import urllib3

    try:
        yield
    except (
        docker.errors.DockerException,
        requests.RequestException,
        urllib3.exceptions.HTTPError,
        ConnectionError,
    ) as error:
        raise _explanation(error, doing) from error


def _explanation(error: Exception, doing: str) -> MachineError:
    said = " ".join(str(getattr(error, "explanation", None) or error).split())
    where = f"{doing}: {said[:300]}"
    for pattern, what, todo in SAYINGS if hasattr(error, "explanation") else ():
        if re.search(pattern, said, re.IGNORECASE):
            return MachineError(what, where=where, todo=todo)
    if hasattr(error, "explanation"):
        return MachineError("the Docker engine refused", where=where, todo="recipe doctor; docker info")
    if "PermissionError" in said:
        return MachineError("no permission on the Docker engine's socket", where=where, todo=NO_RIGHTS)
    return MachineError("no Docker engine answers here", where=where, todo=NO_ENGINE)


def fetch(client: DockerClient, image: Image, say: Any) -> None:
    """Have the image on this engine: a published one is fetched by its digest.

    Raises MachineError where it is not to be had, or is not the one that the lock means.
    """
    import docker.errors

    with explained("fetching the image"):
        try:
            found = client.images.get(image.reference)
        except docker.errors.ImageNotFound:
            if image.source == "local":
                raise MachineError(
                    f"the image built here for {image.target} is gone from the Docker engine",
                    where=image.reference,
                    todo="make image, with the same HW",
                ) from None
            say(f"fetching {image.reference} (once)")
            for part in client.api.pull(image.reference, stream=True, decode=True):
                if "error" in part:  # what goes wrong on the way comes in the stream, and raises nothing
                    raise docker.errors.APIError(part["error"], explanation=part["error"]) from None
            found = client.images.get(image.reference)
    known = [found.id, *(found.attrs.get("RepoDigests") or ())]
    pins = found.labels.get("recipes.lock")
    if image.reference not in known or pins != image.lock_sha256:
        has = f"it has {', '.join(known)}" if image.reference not in known else f"its label recipes.lock is {pins}"
        raise MachineError(
            f"the engine's image is not the locked one: {has}",
            where=f"{image.reference}, pins {image.lock_sha256[:12]}...",
            todo="do not work around it: an image of another digest or of other pins is another image; make image",
        )
