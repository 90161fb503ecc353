"""The names, enums and descriptors of the real ttnn, in an environment of its own; ttml itself is in no wheel.

Nothing is opened and nothing runs on a device: this shows that what the backend asks of ttnn is there, and no more.
"""

from __future__ import annotations

import fcntl
import hashlib
import json
import os
import re
import shutil
import subprocess
import sys
import tempfile
from pathlib import Path
from typing import Any

import pytest

from common.model.bases import home
from tools.doctor.machine import MINIMUM_FIRMWARE

ROOT = Path(__file__).resolve().parents[2]
PYTHONS = ("3.10", "3.12")  # ttnn has no wheel for 3.11
MISMATCH = "DO NOT MATCH THE HASHES"


def interpreter(version: str) -> str:
    """A Python of that version that can make environments; skips the test where there is none."""
    named = [shutil.which(f"python{version}"), sys.executable]
    pyenv = sorted((Path.home() / ".pyenv/versions").glob(f"{version}.*/bin/python"))
    program = "import ensurepip, sys, venv; print('%d.%d' % sys.version_info[:2])"
    for python in [*filter(None, named), *map(str, pyenv)]:  # a shim on the PATH may be there and not run
        found = subprocess.run([python, "-c", program], capture_output=True, text=True, check=False).stdout.strip()
        if found == version:
            return python
    return pytest.skip(f"no Python {version} with venv on the PATH or in ~/.pyenv/versions")


def environment(version: str) -> Path:
    """The Python of an environment that holds exactly requirements/ttnn-<version>.txt; made once, kept in the cache."""
    python = interpreter(version)
    lock = ROOT / f"requirements/ttnn-{version}.txt"
    folder = home() / "ttnn" / f"{version}-{hashlib.sha256(lock.read_bytes()).hexdigest()[:12]}"
    folder.parent.mkdir(parents=True, exist_ok=True)
    with (folder.parent / f"{version}.lock").open("w") as turn:
        fcntl.flock(turn, fcntl.LOCK_EX)  # two test processes at once: the second finds the first one's work
        if not folder.is_dir():
            with tempfile.TemporaryDirectory(dir=folder.parent) as made:
                install(python, lock, Path(made) / "made")
                (Path(made) / "made").rename(folder)
    return folder / "bin/python"


def install(python: str, lock: Path, folder: Path) -> None:
    """Raises AssertionError for a wrong hash; skips the test where the packages cannot be had."""
    subprocess.run([python, "-m", "venv", str(folder)], check=True, capture_output=True)
    command = [str(folder / "bin/python"), "-m", "pip", "install", "--quiet", "--no-input", "--retries", "1"]
    command += ["--no-deps", "--require-hashes", "--only-binary", ":all:", "-r", str(lock)]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    assert MISMATCH not in done.stderr, done.stderr
    if done.returncode:
        said = [line for line in done.stderr.splitlines() if line.startswith("ERROR")] or [done.stderr.strip()[-300:]]
        pytest.skip(f"ttnn could not be installed here (no network?): {said[0]}")


@pytest.fixture(scope="module", params=[pytest.param(version, marks=pytest.mark.slow) for version in PYTHONS])
def found(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> dict[str, Any]:
    """What tests/engines/real_ttnn.py reports."""
    python, folder = environment(request.param), tmp_path_factory.mktemp("ttnn")
    clean = {key: value for key, value in os.environ.items() if not key.startswith(("PYTHON", "TT_"))}
    done = subprocess.run(
        [str(python), "-m", "tests.engines.real_ttnn", str(folder / "report.json")],
        cwd=folder,
        env=clean | {"PYTHONPATH": str(ROOT)},
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.returncode == 0, done.stderr[-2000:]
    return dict(json.loads((folder / "report.json").read_text()))


def test_the_backend_is_imported_beside_the_pinned_ttnn_without_torch(found: dict[str, Any]) -> None:
    pinned = re.search(r"^ttnn==(\S+)$", (ROOT / "requirements/ttnn.in").read_text(), re.MULTILINE)
    assert pinned
    assert found["versions"]["ttnn"] == pinned[1]
    assert found["versions"]["numpy"].startswith("1."), "ttnn wants numpy below 2"
    assert found["torch"] is False


def test_every_name_of_ttnn_that_the_backend_uses_is_there(found: dict[str, Any]) -> None:
    assert found["contract"]
    assert not {name for name, there in found["contract"].items() if there is not True}
    assert found["planted"] is False, "a name that is not there is seen"


def test_the_double_of_ttnn_has_nothing_that_the_real_one_lacks(found: dict[str, Any]) -> None:
    assert {"Tensor", "slice", "add"} <= set(found["doubled"])
    assert not {name for name, there in found["doubled"].items() if not there}
    double = pytest.importorskip("tests.doubles.ttnn", reason="the double needs torch")
    for name, members in found["enums"].items():
        ours = {member.name: member.value for member in getattr(double, name)}
        assert ours.items() <= members.items(), name


def test_the_boards_descriptors_fit_their_meshes(found: dict[str, Any]) -> None:
    assert set(found["boards"].values()) == {"fits", "not in the wheel"}
    assert {name for name, said in found["boards"].items() if said == "fits"} >= {"n300", "p150x2", "p300c"}


def test_every_descriptor_of_the_wheel_is_read_or_refused_for_having_two_meshes(found: dict[str, Any]) -> None:
    read = found["descriptors"]
    known = {"n150": "1x1", "n300": "1x2", "n300_x2": "4x1", "t3k": "2x4", "single_galaxy": "8x4", "p300_x2": "2x2"}
    known |= {"p150_x2": "1x2", "p150_x4": "2x2", "p150_x8": "2x4", "single_bh_galaxy": "8x4"}
    assert {name: read[f"{name}_mesh_graph_descriptor.textproto"] for name in known} == known
    refused = {said for said in read.values() if not re.fullmatch(r"\d+x\d+", said)}
    assert refused == {"it has 2 mesh_descriptors blocks, expected one"}


def test_the_words_of_known_errors_are_those_of_the_libraries(found: dict[str, Any]) -> None:
    assert found["words"]
    assert {id: lacking for id, lacking in found["words"].items() if lacking} == {}


def test_doctor_refuses_the_firmware_that_tt_metal_itself_does_not_want(found: dict[str, Any]) -> None:
    assert found["minimum firmware"] == MINIMUM_FIRMWARE


def test_where_there_is_no_card_the_real_ttnn_s_words_are_explained(found: dict[str, Any]) -> None:
    if found["no card"] == "there may be one":
        pytest.skip("this machine has a /dev/tenstorrent")
    assert "tt-metal finds no Tenstorrent device" in found["no card"]


# --- the skip and the failure, without a network ----------------------------------------------------------------------


@pytest.mark.parametrize(("said", "outcome"), [("ERROR: no such host", "skip"), (f"ERROR: {MISMATCH}", "fail")])
def test_a_missing_network_skips_and_a_wrong_hash_fails(tmp_path: Path, said: str, outcome: str) -> None:
    python = tmp_path / "python"  # stands for the interpreter, and for the one in the environment that it makes
    making = '[ "$2" = venv ] && mkdir -p "$3/bin" && exec cp "$0" "$3/bin/python"'
    python.write_text(f'#!/bin/sh\n{making}\necho "{said}" >&2\nexit 1\n')
    python.chmod(0o755)
    expected = {"skip": pytest.skip.Exception, "fail": AssertionError}[outcome]
    with pytest.raises(expected, match=said.removeprefix("ERROR: ")):
        install(str(python), ROOT / "requirements/ttnn-3.10.txt", tmp_path / "made")
