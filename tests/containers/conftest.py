"""One cpu image for all tests of this folder, built as a user builds it: `make image HW=cpu BASE_IMAGE=...`.

Two workers share the engine, a file of tests each.
"""

from __future__ import annotations

import contextlib
import fcntl
import os
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

from common.hardware import get
from tools.containers.build import LOCAL_BASE
from tools.containers.images import Image, image_for

ROOT = Path(__file__).resolve().parents[2]


def recipe(*words: str, folder: Path = ROOT, **environment: str) -> subprocess.CompletedProcess[str]:
    """The `recipe` command of the checkout in `folder`, with these words and these variables beside the caller's."""
    env = os.environ | {"PYTHONPATH": str(folder)} | environment
    command = [sys.executable, "-m", "tools.cli", *words]
    return subprocess.run(command, cwd=folder, env=env, capture_output=True, text=True, check=False)


def docker(*words: str) -> str:
    done = subprocess.run(["docker", *words], capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    return done.stdout.strip()


@contextlib.contextmanager
def alone(name: str) -> Iterator[None]:
    """Have what this file of the checkout stands for, while the other worker waits for it."""
    with (ROOT / name).open() as file:
        fcntl.flock(file, fcntl.LOCK_EX)
        yield


@pytest.fixture
def the_only_board() -> Iterator[None]:
    """A machine has one n150, and who has it is judged by the engine's containers, whichever test has started them."""
    with alone("common/hardware.yaml"):
        yield


@pytest.fixture(scope="session")
def base_image() -> str:
    """The base to build on: BASE_IMAGE, else the one that ci/engine.sh makes."""
    if subprocess.run(["docker", "info"], capture_output=True, check=False).returncode:
        pytest.skip("no Docker engine answers (ci/engine.sh starts one on a Debian machine)")
    return os.environ.get("BASE_IMAGE") or LOCAL_BASE


@pytest.fixture(scope="session")
def cpu_image(base_image: str) -> Image:
    with alone("docker/docker-bake.hcl"):  # the other worker then finds each step done
        done = recipe("image", "build", "cpu", "--base-image", base_image)
    assert done.returncode == 0, done.stdout + done.stderr
    return image_for(get("cpu"))
