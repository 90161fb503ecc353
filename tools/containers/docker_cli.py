"""The `docker` command, for what the SDK cannot do: buildx. Its failures become one message each."""

from __future__ import annotations

import json
import os
import shutil
import subprocess
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from common.errors import MachineError

INSTALL = "install Docker Engine and its buildx plugin; on a Debian machine without a registry: ci/engine.sh"


def docker(*arguments: str) -> str:
    """What `docker ARGUMENTS` prints. Raises MachineError with the engine's words where it fails."""
    try:
        done = subprocess.run(["docker", *arguments], capture_output=True, text=True, check=False)
    except FileNotFoundError as error:
        raise MachineError("there is no `docker` command on this machine", todo=INSTALL) from error
    if done.returncode:
        raise MachineError(_reason(done.stderr), where=f"docker {' '.join(arguments[:3])}", todo=_cure(done.stderr))
    return done.stdout


def inspect_image(reference: str) -> dict[str, Any] | None:
    """The engine's description of an image, or None where it does not have it."""
    try:
        described: list[dict[str, Any]] = json.loads(docker("image", "inspect", reference))
    except MachineError as error:
        if "no such image" in error.what.lower():
            return None
        raise
    return described[0]


def bake(target: str, variables: Mapping[str, str], *options: str, context: Path) -> None:
    """Run `docker buildx bake TARGET` in `context`, its progress on this terminal. Raises MachineError if it fails."""
    docker("buildx", "version")
    command = ["docker", "buildx", "bake", "--file", "docker/docker-bake.hcl", *options, target]
    # SOURCE_DATE_EPOCH of the caller would be taken for the bake file's variable, and make other layers.
    environment = {key: value for key, value in os.environ.items() if key != "SOURCE_DATE_EPOCH"}
    if subprocess.run(command, cwd=context, env={**environment, **variables}, check=False).returncode:
        room = shutil.disk_usage("/").free // 2**30
        raise MachineError(
            f"the build of {target} failed; the step and its last words are above",
            where="docker/Dockerfile",
            todo=f"mend what it names and run the same command again ({room} GiB are free on /; a build takes 6)",
        )


def _reason(stderr: str) -> str:
    lines = [line for line in stderr.strip().splitlines() if line.strip()]
    return (
        lines[-1].removeprefix("ERROR: ").removeprefix("Error response from daemon: ") if lines else "no reason given"
    )


def _cure(stderr: str) -> str:
    if "permission denied" in stderr:
        return "ask for membership of the group that owns Docker's socket (usually `docker`), then log in again"
    if "buildx" in stderr:
        return "install Docker's buildx plugin; on a Debian machine without a registry: ci/engine.sh"
    if "connect to the Docker daemon" in stderr or "daemon running" in stderr:
        return "start the engine (systemctl start docker); on a Debian machine without a registry: ci/engine.sh"
    return "see what the engine says about it"
