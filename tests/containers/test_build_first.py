"""A run that builds its image first, on this machine's engine: to its last checkpoint, and to a Ctrl-C in the build."""

from __future__ import annotations

import os
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest

from common.paths import ROOT
from tests.containers.conftest import docker
from tests.doubles.tiny_recipe import make_tiny_recipe
from tests.support.runs import folders, manifest
from tools.containers.docker import check_engine
from tools.containers.images import Image

SECONDS = 240


@pytest.fixture
def command(tmp_path: Path, tiny_base: Path, cpu_image: Image) -> list[str]:
    """`recipe run` of the tiny recipe in the CPU's container, on a machine that remembers no image."""
    check_engine()
    for path in (tmp_path, tiny_base / "model.safetensors"):  # private ones, and a root caller's run is another user's
        path.chmod(0o755)
    shutil.copy(ROOT / "docker/images.lock.json", tmp_path)
    recipe = make_tiny_recipe(tmp_path / "tiny", tiny_base)
    words = ["run", str(recipe), "--hw", "cpu", "--container", "--out", str(tmp_path / "runs")]
    return [sys.executable, "-m", "tests.support.own_images", str(tmp_path), *words]


def environment(folder: Path, base: str) -> dict[str, str]:
    return os.environ | {"BASE_IMAGE": base, "RECIPES_HOME": str(folder / "home"), "PYTHONPATH": str(ROOT)}


def run(command: list[str], folder: Path, base: str) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        command, cwd=ROOT, env=environment(folder, base), stdin=subprocess.DEVNULL,
        capture_output=True, text=True, check=False, timeout=SECONDS,
    )  # fmt: skip


def test_one_command_builds_and_trains(command: list[str], tmp_path: Path, base_image: str) -> None:
    refused = run(command, tmp_path, base_image)
    assert (refused.returncode, "BUILD=1 (--build)" in refused.stderr) == (4, True), refused.stderr
    done = run([*command, "--build"], tmp_path, base_image)
    assert done.returncode == 0, done.stdout + done.stderr
    assert "[cpu-packages 2/2] RUN" in done.stderr
    assert "exporting to image" in (tmp_path / "build-cpu.log").read_text()
    (folder,) = folders(tmp_path / "runs")
    found = manifest(folder)
    assert (found["exit_reason"], found["image"]["source"]) == ("done", "local")
    assert list(folder.glob("checkpoints/step-*"))


def test_a_ctrl_c_ends_the_build_on_the_engine_too(command: list[str], tmp_path: Path, base_image: str) -> None:
    """On a base of its own, which no cache knows: the packages' step takes a minute, and is never to end."""
    name = f"recipes-other-base:{os.getpid()}"
    (tmp_path / "look").write_text(f"FROM {base_image}\nLABEL of={tmp_path.name}-{os.getpid()}\nRUN date >/when\n")
    docker("build", "--quiet", "--no-cache", "--tag", name, "--file", str(tmp_path / "look"), str(tmp_path))
    screen = tmp_path / "screen"
    try:
        with screen.open("wb") as file:
            values = environment(tmp_path, name)
            process = subprocess.Popen(
                [*command, "--build"], cwd=ROOT, env=values, stdout=file, stderr=subprocess.STDOUT
            )
        deadline = time.monotonic() + SECONDS
        while "[cpu-packages 2/2] RUN" not in screen.read_text():
            assert process.poll() is None, screen.read_text()
            assert time.monotonic() < deadline, screen.read_text()
            time.sleep(0.1)
        process.send_signal(signal.SIGINT)
        assert process.wait(30) == 130
        assert "the build was interrupted; the same command goes on" in screen.read_text()
        assert "CANCELED" in (tmp_path / "build-cpu.log").read_text(), "the engine was told, and has ended it"
        assert not (tmp_path / "images.local.json").exists()
    finally:
        docker("image", "rm", name)
