"""One cpu image for all tests of this folder, built as a user builds it: `make image HW=cpu BASE_IMAGE=...`."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest

from common.hardware import get
from tools.containers.build import LOCAL_BASE
from tools.containers.images import Image, image_for

ROOT = Path(__file__).resolve().parents[2]


def recipe(*words: str, **environment: str) -> subprocess.CompletedProcess[str]:
    """The `recipe` command with these words, and these variables beside the caller's."""
    command = [sys.executable, "-m", "tools.cli", *words]
    return subprocess.run(command, cwd=ROOT, env=os.environ | environment, capture_output=True, text=True, check=False)


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
    done = recipe("image", "build", "cpu", "--base-image", base_image)
    assert done.returncode == 0, done.stdout + done.stderr
    return image_for(get("cpu"))
