"""The lock of the images, what may be written beside it, and what is said where an image cannot be had. No engine."""

from __future__ import annotations

import copy
import hashlib
import json
import re
import shutil
from pathlib import Path
from typing import Any

import pytest

from common import hardware
from common.errors import MachineError, UsageError
from tests.support.image_lock import unexplained
from tools.containers import build, images, verify
from tools.containers.build import Inputs
from tools.containers.docker import docker, present
from tools.containers.images import Image, NoImage

ROOT = Path(__file__).resolve().parents[2]
LOCK = images.read_lock()
DIGEST = "sha256:" + "a" * 64
BAKE = (ROOT / "docker/docker-bake.hcl").read_text()

# --- pins -----------------------------------------------------------------------------------------------------------


def forget(lock: Any, *places: str) -> Any:
    """Return a copy of a lock where these pins ("ttml.base.digest") are null, with a reason."""
    lock = copy.deepcopy(lock)
    for place in places:
        pins, name, key = place.split(".")
        lock["pins"][pins][name] |= {key: None, "built": False, "reason": "nobody read it"}
    return lock


NULLS = ("ttml.base.digest", "ttml.apt_snapshot.timestamp", "ttml.tt_metal.commit")


@pytest.mark.parametrize("target", LOCK["targets"])
def test_every_target_can_be_planned_from_its_pins(target: str) -> None:
    assert images.unknown_pins(LOCK, target) == []
    variables = build.build_variables(LOCK, target, Inputs())
    assert set(variables) <= set(re.findall(r'^variable "(\w+)"', BAKE, re.MULTILINE))
    assert [name for name, value in variables.items() if not value] == ["CA_BUNDLE"]
    assert re.fullmatch(r"[\w.:-]+@sha256:[0-9a-f]{64}", variables[build.base_variable(target)])


def test_each_pin_names_its_source() -> None:
    pins = [*LOCK["tools"].values(), *(pin for group in LOCK["pins"].values() for pin in group.values())]
    sourceless = [pin for pin in pins if not pin.get("source")]
    assert all(name.startswith("requirements/") for pin in sourceless for name in pin), (
        "those are files of this checkout"
    )


def test_the_source_of_a_digest_is_one_that_a_reader_can_open() -> None:
    """A registry's answer to `recipe lock`, or a file of a public repository at a commit that has the digest."""
    opened = re.compile(r"read by `recipe lock` on |github\.com/[\w.-]+/[\w.-]+ \S+ at [0-9a-f]{40}\b")
    named = [pin for group in LOCK["pins"].values() for pin in group.values()] + [*LOCK["tools"].values()]
    assert [pin["image"] for pin in named if "image" in pin and not opened.search(pin["source"])] == []


def test_an_image_stays_of_its_pins_when_a_source_is_reworded() -> None:
    lock = copy.deepcopy(LOCK)
    lock["pins"]["ttml"]["base"] |= {"source": "another page", "built": True}
    assert images.pins_sha256(lock, "n150") == images.pins_sha256(LOCK, "n150")
    lock["pins"]["ttml"]["openmpi"]["deb_sha256"] = "b" * 64
    assert images.pins_sha256(lock, "n150") != images.pins_sha256(LOCK, "n150")


def test_a_null_stands_beside_built_false_and_its_reason() -> None:
    assert list(unexplained(LOCK)) == []
    planted = forget(LOCK, *NULLS)
    assert list(unexplained(planted)) == []
    del planted["pins"]["ttml"]["tt_metal"]["built"]
    planted["targets"]["cpu"]["reason"] = ""
    planted["pins"]["ttml"]["sfpi"]["deb_sha256"] = None
    assert set(unexplained(planted)) == {
        "lock.pins.ttml.tt_metal.commit",
        "lock.pins.ttml.sfpi.deb_sha256",
        *(f"lock.targets.cpu.{key}" for key in ("repository", "digest", "date")),
    }


def test_hashes_and_commits_have_their_form() -> None:
    text = json.dumps(LOCK)
    for key, value in re.findall(r'"(\w*(?:sha256|digest|commit|\.txt))": "([^"]*)"', text):
        form = {"commit": r"[0-9a-f]{40}", "digest": r"sha256:[0-9a-f]{64}"}.get(key, r"[0-9a-f]{64}")
        assert re.fullmatch(form, value), key


def test_the_lock_pins_the_requirements_of_today() -> None:
    for pins in LOCK["pins"].values():
        for name, sha256 in images.requirements_of(pins).items():
            assert hashlib.sha256((ROOT / name).read_bytes()).hexdigest() == sha256, f"{name}: recipe lock"


def test_the_wheel_of_ttnn_is_the_one_that_the_names_are_checked_against() -> None:
    ttnn = LOCK["pins"]["ttml"]["ttnn"]
    for python in ("3.10", "3.12"):
        text = (ROOT / f"requirements/ttnn-{python}.txt").read_text()
        block = re.search(rf"^ttnn=={ttnn['version']} (?:.*\\\n)*.*\n", text, re.MULTILINE)
        assert block
        assert ttnn[f"cp{python.replace('.', '')}_sha256"] in block[0]
    assert LOCK["pins"]["ttml"]["tt_metal"]["tag"] == f"v{ttnn['version']}"


def test_every_board_has_a_target_with_the_facts_of_the_table() -> None:
    assert set(LOCK["targets"]) == {board.image for board in hardware.table().values()}
    rows = re.findall(r'\{ name = "([\w-]+)", arch = "(\w+)", descriptor = "(\w*)" \}', BAKE)
    assert {name: (arch, descriptor) for name, arch, descriptor in rows} == {
        board.name: (board.arch, board.mesh_graph_descriptor or "")
        for board in hardware.table().values()
        if not board.is_cpu
    }


# --- nothing is taken from outside without a digest, a commit or a hash ---------------------------------------------


def unpinned(text: str) -> list[str]:
    """Images and actions named without a digest or a 40-hex commit; stages and given bases aside."""
    stages = set(re.findall(r"^FROM \S+ AS (\S+)", text, re.MULTILINE)) | {"scratch", "${CPU_BASE}", "${TTML_BASE}"}
    named = re.findall(r"^FROM (\S+)", text, re.MULTILINE)
    named += re.findall(r"(?:--from=|,from=)([^\s,]+)", text)
    named += re.findall(r"^#\s*syntax=(\S+)", text, re.MULTILINE)
    named += re.findall(r"^\s*(?:-\s*)?(?:container|image|uses):\s*['\"]?([^\s'\"#]+)", text, re.MULTILINE)
    pinned = re.compile(r"^\./|@sha256:[0-9a-f]{64}$|@[0-9a-f]{40}$")
    return [name for name in named if name not in stages and not pinned.search(name)]


def unhashed(text: str) -> list[str]:
    """Steps of a Dockerfile that take something from outside without a hash or a commit to hold it to."""
    found = []
    for step in re.split(r"\n(?=[A-Z]+ )", re.sub(r"^#.*\n", "", text, flags=re.MULTILINE)):
        downloads = len(re.findall(r"\b(?:curl|wget) (?:-|http)", step))
        lacking = (
            downloads > len(re.findall(r"\b(?:sha256sum|sha512sum) -c", step)),
            re.search(r"\bgit clone\b", step) and not re.search(r'rev-parse HEAD\)" = "\$\{\w+COMMIT:\?\}"', step),
            re.search(r"pip\"? (?:install|download)", step) and "--require-hashes" not in step,
            re.search(r"^ADD\b", step),
            re.search(
                r"\bapt(?:-get)?\b.* install\b", step
            ),  # docker/apt-install.sh: from the snapshot, with its checks
            re.search(r"\|\s*(?:ba)?sh\b", step),
        )
        if any(lacking):
            found.append(step.splitlines()[0])
    return found


def test_every_image_and_action_is_pinned() -> None:
    files = [ROOT / "docker/Dockerfile", *(ROOT / ".github").rglob("*.y*ml")]
    assert {str(file): unpinned(file.read_text()) for file in files if unpinned(file.read_text())} == {}


@pytest.mark.parametrize(
    "line",
    [
        "FROM ubuntu:22.04",
        "FROM ubuntu:22.04@sha256:abc AS base",
        "COPY --from=python:3.11 /a /b",
        "RUN --mount=type=bind,from=alpine,target=/a true",
        "# syntax=docker/dockerfile:1",
        "    uses: actions/checkout@v5",
        "  - uses: actions/checkout@08c6903",
        "    container: ubuntu:22.04",
    ],
)
def test_what_is_not_pinned_is_seen(line: str) -> None:
    assert len(unpinned(line)) == 1


def test_what_is_pinned_passes() -> None:
    text = f"FROM ubuntu@{DIGEST} AS base\nFROM base AS other\nCOPY --from=base /a /b\n"
    assert unpinned(text + f"    uses: actions/checkout@{'0' * 40}\n    uses: ./ci/own\n") == []


def test_every_download_of_the_dockerfile_has_a_hash() -> None:
    assert unhashed((ROOT / "docker/Dockerfile").read_text()) == []


@pytest.mark.parametrize(
    "step",
    [
        'RUN curl -fsSL -o a.deb "https://example.org/a.deb"; \\\n    dpkg -i a.deb',
        "RUN curl -o a x; echo h a | sha256sum -c -; curl -o b y",
        "RUN git clone --branch v1 https://example.org/a.git .",
        "RUN /opt/venv/bin/pip install torch",
        "ADD https://example.org/a.tar /a",
        "RUN apt-get update && apt-get install -y ca-certificates",
        "RUN wget -qO- https://example.org/setup | sh",
    ],
)
def test_a_download_without_a_hash_is_seen(step: str) -> None:
    assert unhashed(f"FROM a\n{step}\nUSER 1000\n") == [step.splitlines()[0]]


def test_no_image_runs_as_root_and_no_base_has_a_default() -> None:
    text = (ROOT / "docker/Dockerfile").read_text()
    for name in ("cpu", "runtime-ttml"):
        stage = re.search(rf"^FROM \S+ AS {name}\n(.*?)(?=^FROM |\Z)", text, re.MULTILINE | re.DOTALL)
        assert stage
        assert re.findall(r"^USER (.*)", stage[1], re.MULTILINE) == ["1000:1000"]
    assert dict(re.findall(r'^variable "(\w+_BASE)" \{ default = "(.*?)" \}', BAKE, re.MULTILINE)) == {
        "CPU_BASE": "",
        "TTML_BASE": "",
    }


# --- which image ----------------------------------------------------------------------------------------------------


@pytest.fixture
def place(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A folder with a lock of its own, and nothing built."""
    monkeypatch.setattr(images, "LOCK", tmp_path / "images.lock.json")
    monkeypatch.setattr(images, "LOCAL", tmp_path / "images.local.json")
    shutil.copy(ROOT / "docker/images.lock.json", tmp_path)
    return tmp_path


def write(place: Path, lock: Any) -> None:
    (place / "images.lock.json").write_text(json.dumps(lock))


def record(lock_sha256: str) -> None:
    images.record_local("cpu", {"id": DIGEST, "lock_sha256": lock_sha256, "created": "2026-11-22T00:00:00Z"})


def test_without_a_build_there_is_no_image(place: Path) -> None:
    with pytest.raises(MachineError, match=r"no image for cpu-x2.*\n.*\n.*make image HW=cpu-x2"):
        images.image_for(hardware.get("cpu-x2"))


def test_a_local_build_is_taken_until_a_pin_changes(place: Path) -> None:
    pins = images.pins_sha256(LOCK, "cpu")
    record(pins)
    assert images.image_for(hardware.get("cpu")) == Image("cpu", DIGEST, "local", pins)
    changed = copy.deepcopy(LOCK)
    changed["pins"]["cpu"]["python"]["requirements/cpu-3.11.txt"] = "b" * 64
    write(place, changed)
    with pytest.raises(MachineError, match="from other pins than today's"):
        images.image_for(hardware.get("cpu"))


def test_a_published_image_is_named_by_repository_and_digest(place: Path) -> None:
    changed = copy.deepcopy(LOCK)
    of = {"repository": "example.org/recipes/cpu", "digest": DIGEST, "date": "2026-11-30"}
    changed["targets"]["cpu"] |= {**of, "lock_sha256": images.pins_sha256(LOCK, "cpu")}
    write(place, changed)
    image = images.image_for(hardware.get("cpu"))
    assert (image.reference, image.source) == (f"example.org/recipes/cpu@{DIGEST}", "published")
    record(images.pins_sha256(LOCK, "cpu"))
    assert images.image_for(hardware.get("cpu")).source == "local", "what was built here asks no registry"
    (place / "images.local.json").unlink()
    changed["targets"]["cpu"]["lock_sha256"] = "0" * 64
    write(place, changed)
    with pytest.raises(NoImage, match="published on 2026-11-30 from other pins"):
        images.image_for(hardware.get("cpu"))


def test_a_target_that_the_lock_does_not_have_is_named(place: Path) -> None:
    changed = copy.deepcopy(LOCK)
    del changed["targets"]["n150"]
    write(place, changed)
    with pytest.raises(MachineError, match="'n150' is not in the lock"):
        images.image_for(hardware.get("n150"))


def test_another_format_is_refused_by_name(place: Path) -> None:
    write(place, {**LOCK, "format": 2})
    with pytest.raises(MachineError, match="format 2; this version reads 1"):
        images.image_for(hardware.get("cpu"))


# --- building -------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("board", ["n150", "galaxy"])
def test_a_build_names_every_pin_that_is_not_known(board: str) -> None:
    with pytest.raises(MachineError) as error:
        build.build_variables(forget(LOCK, *NULLS), board, Inputs())
    assert re.findall(r"^    (\S+): ", str(error.value), re.MULTILINE) == [null.removeprefix("ttml.") for null in NULLS]


def test_a_base_that_is_given_replaces_the_locked_one_and_no_other_pin() -> None:
    base = f"example.org/python@{DIGEST}"
    assert build.build_variables(LOCK, "cpu", Inputs(base_image=base))["CPU_BASE"] == base
    lock = forget(LOCK, "cpu.base.digest", *NULLS)
    assert build.build_variables(lock, "cpu", Inputs(base_image=base))["CPU_BASE"] == base
    with pytest.raises(MachineError, match=r"base\.digest(?s:.*)BASE_IMAGE="):
        build.build_variables(lock, "cpu", Inputs())
    with pytest.raises(MachineError, match=r"known\n    apt_snapshot.timestamp") as error:
        build.build_variables(lock, "n150", Inputs(base_image=base))
    assert "BASE_IMAGE" not in str(error.value), "a base would not help"


def test_requirements_that_the_lock_does_not_know_are_refused() -> None:
    lock = copy.deepcopy(LOCK)
    lock["pins"]["cpu"]["python"]["requirements/cpu-3.11.txt"] = "b" * 64
    with pytest.raises(MachineError, match=r"cpu-3.11.txt has changed(?s:.*)recipe lock"):
        build.build_variables(lock, "cpu", Inputs(base_image=f"a@{DIGEST}"))


def test_a_folder_without_wheels_is_refused(tmp_path: Path) -> None:
    with pytest.raises(UsageError, match="no wheels in the folder"):
        build.fill_wheelhouse(LOCK, "cpu", tmp_path, tmp_path / "into", print)


def test_the_wheels_of_a_user_stay_where_they_are(tmp_path: Path) -> None:
    given, into = tmp_path / "given", tmp_path / "into"
    for folder, name in ((given, "new.whl"), (into, "old.whl")):
        folder.mkdir()
        (folder / name).write_text(name)
    both = [into / "new.whl", into / "old.whl"]
    assert build.fill_wheelhouse(LOCK, "cpu", given, into, print) == both, "the build takes those with a hash"
    assert build.fill_wheelhouse(LOCK, "cpu", into, into, print) == both
    assert (given / "new.whl").read_text() == (into / "new.whl").read_text() == "new.whl"


# --- the docker command ---------------------------------------------------------------------------------------------


@pytest.fixture
def command(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """The only folder on PATH: empty until a test writes a `docker` or a `git` into it."""
    folder = tmp_path / "bin"
    folder.mkdir()
    monkeypatch.setenv("PATH", str(folder))
    return folder


def script(folder: Path, name: str, body: str) -> None:
    (folder / name).write_text(f"#!/bin/sh\n{body}\n")
    (folder / name).chmod(0o755)


def test_no_docker_is_one_message(command: Path) -> None:
    with pytest.raises(MachineError, match=r"no `docker` command(?s:.*)ci/engine.sh"):
        docker("info")


def test_a_base_by_tag_alone_is_refused(command: Path) -> None:
    script(command, "docker", "echo 'Error: No such image: python:3.11' >&2; exit 1")
    with pytest.raises(UsageError, match="neither an image of this engine nor named by digest"):
        build.build_variables(LOCK, "cpu", Inputs(base_image="python:3.11"))


# --- verifying ------------------------------------------------------------------------------------------------------

LOCKED = dict(verify.LOCKED.findall((ROOT / "requirements/cpu-3.11.txt").read_text()))
GOOD: dict[str, Any] = {"Config": {"Labels": {"recipes.lock": "pins"}, "User": "1000:1000"}, "RepoDigests": []}
IMAGE = Image("cpu", DIGEST, "local", "pins")


@pytest.mark.parametrize(
    ("config", "installed", "wrong"),
    [
        ({}, {}, []),
        ({"Labels": {"recipes.lock": "others"}}, {}, ["built from the pins others"]),
        ({"Labels": None}, {}, ["built from the pins None"]),
        ({"User": ""}, {}, ["runs as root"]),
        ({"User": "0:1000"}, {}, ["runs as root"]),
        ({}, {"torch": "2.12.0"}, ["torch is 2.12.0"]),
        ({}, {"torch": None}, ["torch is missing"]),
        ({}, {"pip": "23.0"}, ["pip 23.0 is not in the lock"]),
    ],
)
def test_what_differs_from_the_lock_is_said(config: Any, installed: Any, wrong: list[str]) -> None:
    described = GOOD | {"Config": GOOD["Config"] | config}
    found = {name: version for name, version in (LOCKED | installed).items() if version}
    said = list(verify.differences(IMAGE, described, LOCK["pins"]["cpu"], found))
    assert len(said) == len(wrong)
    assert all(part in line for part, line in zip(wrong, said, strict=True))


@pytest.mark.parametrize(
    ("source", "answer", "message"),
    [
        ("local", None, "make image HW=cpu"),
        ("published", None, "docker pull"),
        ("published", [{"Id": "sha256:1", "RepoDigests": [f"a@sha256:{'b' * 64}"]}], "not the locked one"),
    ],
)
def test_an_image_that_is_gone_or_another_one_is_said(command: Path, source: Any, answer: Any, message: str) -> None:
    body = f"echo '{json.dumps(answer)}'" if answer else "echo 'Error: No such image: a' >&2; exit 1"
    script(command, "docker", body)
    with pytest.raises(MachineError, match=rf"(?s){message}"):
        present(Image("cpu", f"a@{DIGEST}", source, "pins"))
