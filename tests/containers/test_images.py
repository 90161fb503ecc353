"""The cpu image as the engine builds it, and the plan of every other one."""

from __future__ import annotations

import contextlib
import json
import os
import shutil
import subprocess
import zipfile
from pathlib import Path
from typing import Any

import pytest

from common import hardware
from common.errors import VerificationError
from tests.containers.conftest import ROOT, docker, recipe
from tests.doubles.tiny_recipe import FINE_TUNE
from tools.containers import images, verify
from tools.containers.build import Inputs, build, build_variables
from tools.containers.images import Image

BAKE = ("buildx", "bake", "--file", "docker/docker-bake.hcl")


def inside(image: Image, script: str, *options: str) -> str:
    return docker("run", "--rm", "--network", "none", *options, "--entrypoint", "sh", image.reference, "-c", script)


def test_every_target_plans_from_its_pins_as_the_table_of_boards_says(base_image: str) -> None:
    lock = images.read_lock()
    plans: dict[str, Any] = {}
    for target in lock["targets"]:
        variables = os.environ | build_variables(lock, target, Inputs())
        done = subprocess.run(
            ["docker", *BAKE, "--print", target], cwd=ROOT, env=variables, capture_output=True, check=True
        )
        plans |= json.loads(done.stdout)["target"]
    assert set(plans) == set(lock["targets"])
    may_be_empty = {"MESH_GRAPH_DESCRIPTOR", "OWN_CA"}  # one device; no authorities of one's own
    unset = {name: [key for key, value in plan["args"].items() if value in (None, "")] for name, plan in plans.items()}
    assert {name: keys for name, keys in unset.items() if set(keys) - may_be_empty} == {}
    for board in hardware.table().values():
        plan = plans[board.image]
        assert plan["labels"]["recipes.board"] == board.image
        if not board.is_cpu:
            args = plan["args"]
            assert (args["BOARD"], args["ARCH"]) == (board.name, board.arch)
            assert args["MESH_GRAPH_DESCRIPTOR"] == (board.mesh_graph_descriptor or "")
            assert plan["target"] == ("board-mesh" if board.mesh_graph_descriptor else "board")


def test_it_is_small_and_holds_no_more_than_its_wheels(cpu_image: Image, base_image: str) -> None:
    size, base = (
        int(docker("image", "inspect", "--format", "{{.Size}}", it)) for it in (cpu_image.reference, base_image)
    )
    archives = [zipfile.ZipFile(path) for path in (ROOT / "docker/wheelhouse").glob("*.whl")]
    wheels = sum(entry.file_size for archive in archives for entry in archive.infolist())  # unpacked
    print(f"cpu image: {size} bytes; its base {base}, its wheels unpacked {wheels}, the rest {size - base - wheels}")
    assert wheels > 500e6
    assert size - base - wheels < 200e6
    assert (
        inside(cpu_image, "command -v pip pip3 gcc cc g++ || echo none; ls /opt/venv/bin | grep -c ^pip || true")
        == "none\n0"
    )


def test_nobody_in_it_is_root(cpu_image: Image) -> None:
    assert inside(cpu_image, "id -u; id -g; touch /opt/venv/x 2>/dev/null || echo refused") == "1000\n1000\nrefused"
    assert inside(
        cpu_image, "id -u; python -c 'import torch; print(torch.__version__)'", "--user", "4321:4321"
    ).startswith("4321\n2.")


def test_it_runs_the_checkout_that_is_mounted(cpu_image: Image) -> None:
    mount = ("--mount", f"type=bind,source={ROOT},target=/recipes,readonly")
    shown = docker(
        "run",
        "--rm",
        "--network",
        "none",
        *mount,
        cpu_image.reference,
        "config",
        "show",
        str(FINE_TUNE.relative_to(ROOT)),
        "--hw",
        "cpu",
    )
    assert f"recipe: {FINE_TUNE.name}" in shown
    assert (
        docker("image", "inspect", "--format", "{{json .Config.Entrypoint}}", cpu_image.reference)
        == '["python","-m","tools.cli"]'
    )


def test_its_bytecode_is_valid(cpu_image: Image) -> None:
    """What is imported at every start is not compiled at every start: each .pyc names its source's time."""
    script = (
        "import pathlib, struct\n"
        "named = lambda pyc: struct.unpack('<I', pyc.read_bytes()[8:12])[0]\n"
        "source = lambda pyc: pyc.parent.parent / (pyc.name.partition('.')[0] + '.py')\n"
        "files = list(pathlib.Path('/opt/venv').rglob('*.pyc'))\n"
        "print(len(files), sum(named(pyc) == int(source(pyc).stat().st_mtime) for pyc in files))"
    )
    files, valid = map(int, inside(cpu_image, f'python -c "{script}"').split())
    assert files == valid > 2000


def test_it_holds_what_the_lock_says(cpu_image: Image) -> None:
    done = recipe("image", "verify", "cpu", "--no-rebuild")
    assert (done.returncode, "holds the lock's packages" in done.stdout) == (0, True), done.stderr


def test_a_running_container_is_compared_too(cpu_image: Image, base_image: str) -> None:
    good = docker("run", "--detach", "--rm", "--entrypoint", "sleep", cpu_image.reference, "60")
    other = docker("run", "--detach", "--rm", base_image, "sleep", "60")
    try:
        done = recipe("image", "verify", "cpu", "--no-rebuild", "--container", good)
        assert (done.returncode, f"container {good}" in done.stdout) == (0, True), done.stderr
        done = recipe("image", "verify", "cpu", "--no-rebuild", "--container", other)
        assert (done.returncode, "runs from another image" in done.stderr) == (6, True)
    finally:
        docker("kill", good, other)


def test_the_context_is_what_the_allow_list_names(base_image: str, tmp_path: Path) -> None:
    clone = tmp_path / "clone"
    subprocess.run(["git", "clone", "--quiet", str(ROOT), str(clone)], check=True)
    shutil.copy(ROOT / ".dockerignore", clone)
    for name in (".env", "runs/secret.txt", "requirements/secret.in", "docker/images.local.json", "id_rsa"):
        (clone / name).parent.mkdir(exist_ok=True)
        (clone / name).write_text("secret")
    (clone / "look").write_text(f"FROM {base_image}\nCOPY . /context\n")
    docker("build", "--quiet", "--tag", "recipes-context:test", "--file", str(clone / "look"), str(clone))
    seen = docker(
        "run", "--rm", "recipes-context:test", "sh", "-c", "cd /context && find . -type f -o -type l"
    ).splitlines()
    docker("image", "rm", "recipes-context:test")
    assert "./requirements/cpu-3.11.txt" in seen
    allowed = ("./docker/apt-install.sh", "./docker/mgd/", "./docker/wheelhouse/", "./requirements/")
    strangers = [path for path in seen if not path.startswith(allowed)]
    assert (strangers, [path for path in seen if "secret" in path]) == ([], [])


@pytest.fixture(scope="module")
def all_wheels(cpu_image: Image, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The wheels that the image was built from."""
    folder = tmp_path_factory.mktemp("wheels") / "all"
    shutil.copytree(ROOT / "docker/wheelhouse", folder, ignore=shutil.ignore_patterns(".gitignore"))
    return folder


@pytest.mark.parametrize("fault", ["missing", "changed"])
def test_a_wheel_that_is_not_the_locked_one_ends_the_build(
    fault: str, all_wheels: Path, base_image: str, tmp_path: Path
) -> None:
    clone = tmp_path / "clone"
    subprocess.run(["git", "clone", "--quiet", str(ROOT), str(clone)], check=True)
    wheels = clone / "docker/wheelhouse"
    shutil.copytree(all_wheels, wheels, copy_function=os.link, dirs_exist_ok=True)
    victim = next(wheels.glob("annotated_doc-*.whl"))
    content = victim.read_bytes()
    victim.unlink()
    if fault == "changed":
        victim.write_bytes(content + b"one byte more")
    words = ("image", "build", "cpu", "--base-image", base_image, "--wheelhouse", str(wheels))
    done = recipe(*words, folder=clone)
    assert (done.returncode, "annotated-doc" in done.stderr, "the build of cpu failed" in done.stderr) == (
        4,
        True,
        True,
    )
    assert ("DO NOT MATCH THE HASHES" in done.stderr) is (fault == "changed")


def test_a_build_elsewhere_has_the_same_layers(
    cpu_image: Image, all_wheels: Path, base_image: str, tmp_path: Path
) -> None:
    """Once more without a cache, from a clone at another path, after the image's own build."""
    clone = tmp_path / "at/another/path"
    subprocess.run(["git", "clone", "--quiet", str(ROOT), str(clone)], check=True)
    shutil.copytree(all_wheels, clone / "docker/wheelhouse", dirs_exist_ok=True)
    variables = build_variables(images.read_lock(), "cpu", Inputs(base_image=base_image))
    again = build("cpu", variables, context=clone, no_cache=True, tag="again")
    docker("image", "rm", "recipes-cpu:again")
    assert again["RootFS"]["Layers"] == json.loads(
        docker("image", "inspect", "--format", "{{json .RootFS.Layers}}", cpu_image.reference)
    )


TINY = """\
ARG CPU_BASE
FROM ${CPU_BASE} AS made
ARG SOURCE_DATE_EPOCH
RUN mkdir -p /out/recipes; STEP; find /out -exec touch --date "@$SOURCE_DATE_EPOCH" {} +
FROM ${CPU_BASE} AS cpu
COPY --from=made /out/ /
"""


@pytest.mark.parametrize(("step", "same"), [("echo a >/out/recipes/a", True), ("date +%N >/out/recipes/a", False)])
def test_verify_tells_layers_that_are_the_same_from_others(
    step: str, same: bool, base_image: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "docker/wheelhouse").mkdir(parents=True)
    (tmp_path / "docker/wheelhouse/.gitignore").write_text("")
    shutil.copy(ROOT / "docker/docker-bake.hcl", tmp_path / "docker")
    (tmp_path / "docker/Dockerfile").write_text(TINY.replace("STEP", step))
    git = ["git", "-C", str(tmp_path), "-c", "user.name=a", "-c", "user.email=a@b.c"]
    for words in (["init", "--quiet"], ["add", "--all"], ["commit", "--quiet", "--message", "one"]):
        subprocess.run([*git, *words], check=True)
    monkeypatch.setattr(verify, "ROOT", tmp_path)
    monkeypatch.setattr(verify, "fill_wheelhouse", lambda *_: [])
    lines: list[str] = []
    with contextlib.nullcontext() if same else pytest.raises(VerificationError, match="different layers"):
        verify.verify_layers(hardware.get("cpu"), Inputs(base_image=base_image), lines.append)
    assert ("the same 2 layers" in lines[-1]) is same


@pytest.mark.slow  # four minutes on two busy cores
def test_two_builds_have_the_same_layers(cpu_image: Image, base_image: str) -> None:
    done = recipe("image", "verify", "cpu", "--base-image", base_image)
    assert (done.returncode, "the same 3 layers" in done.stdout) == (0, True), done.stderr
