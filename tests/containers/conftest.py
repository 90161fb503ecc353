"""One cpu image for all tests of this folder, built as a user builds it: `make image HW=cpu BASE_IMAGE=...`.

Two workers share the engine: one has the tests that build, one those of the board, of which a machine has one.
"""

from __future__ import annotations

import fcntl
import os
import subprocess
import sys
from pathlib import Path

import pytest

from common.hardware import get
from tools.containers.build import LOCAL_BASE
from tools.containers.images import Image, image_for

ROOT = Path(__file__).resolve().parents[2]
OF_THE_BOARD = ("test_launch", "test_road")  # an engine's containers are judged by the card that they have


@pytest.hookimpl(tryfirst=True)
def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """Give each half of the tests to one worker, in their order: a file shares what it builds."""
    for item in items:
        half = "board" if item.path.stem in OF_THE_BOARD else "builds"
        item.add_marker(pytest.mark.xdist_group(half))


def recipe(*words: str, folder: Path = ROOT, **environment: str) -> subprocess.CompletedProcess[str]:
    """The `recipe` command of the checkout in `folder`, with these words and these variables beside the caller's."""
    env = os.environ | {"PYTHONPATH": str(folder)} | environment
    command = [sys.executable, "-m", "tools.cli", *words]
    return subprocess.run(command, cwd=folder, env=env, capture_output=True, text=True, check=False)


def docker(*words: str) -> str:
    done = subprocess.run(["docker", *words], capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    return done.stdout.strip()


@pytest.fixture(scope="session")
def base_image() -> str:
    """The base to build on: BASE_IMAGE, else the one that ci/engine.sh makes."""
    if subprocess.run(["docker", "info"], capture_output=True, check=False).returncode:
        pytest.skip("no Docker engine answers (ci/engine.sh starts one on a Debian machine)")
    return os.environ.get("BASE_IMAGE") or LOCAL_BASE


@pytest.fixture(scope="session")
def cpu_image(base_image: str) -> Image:
    with (ROOT / "docker/docker-bake.hcl").open() as file:
        fcntl.flock(file, fcntl.LOCK_EX)  # the other worker then finds each step done
        done = recipe("image", "build", "cpu", "--base-image", base_image)
    assert done.returncode == 0, done.stdout + done.stderr
    return image_for(get("cpu"))
