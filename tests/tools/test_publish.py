"""What may be published, what the pinned BuildKit is asked for, and what the lock then says. No engine, no registry."""

from __future__ import annotations

import copy
import json
import re
from pathlib import Path
from typing import Any

import pytest

from common import hardware
from common.errors import MachineError, UsageError, VerificationError
from tools.containers import images, publish, verify
from tools.containers.build import Inputs
from tools.containers.publish import Target

DIGEST, ID = "sha256:" + "a" * 64, "sha256:" + "b" * 64
COMMIT = "0123456789abcdef" * 2 + "01234567"
LABEL = "org.opencontainers.image.revision"
CPU = hardware.get("cpu")
OURS = Target(CPU, "registry.example/ours")


@pytest.fixture
def lock(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A lock of the test's own in which nothing is published, and an image of the CPU that was built by its pins."""
    written = images.read_lock()
    monkeypatch.setattr(images, "LOCK", tmp_path / "images.lock.json")
    monkeypatch.setattr(images, "LOCAL", tmp_path / "images.local.json")
    images.LOCK.write_text(json.dumps(written))
    images.record_local("cpu", {"id": ID, "lock_sha256": images.pins_sha256(written, "cpu"), "created": "today"})
    return images.LOCK


@pytest.fixture
def engine(lock: Path, monkeypatch: pytest.MonkeyPatch) -> dict[str, Any]:
    """What `docker` was told, as `said`, and what it answers of the proved, the rebuilt and the pushed image."""
    pins = images.pins_sha256(images.read_lock(), "cpu")
    described = {"Config": {"Labels": {LABEL: COMMIT, "recipes.lock": pins}}, "RootFS": {"Layers": ["base", "ours"]}}
    found: dict[str, Any] = {name: copy.deepcopy(described) for name in ("proved", "built", "pushed")}
    found["said"] = []

    def inspect(name: str) -> Any:
        return found["pushed" if "@" in name else "proved" if name == ID else "built"]

    def docker(*words: str) -> str:
        found["said"].append(" ".join(words))
        return f"pins-1: digest: {DIGEST} size: 1"

    def bake(target: str, _variables: Any, *words: str, context: Path) -> None:
        found["said"].append("bake " + " ".join(words))
        if "--metadata-file" in words:
            Path(words[-1]).write_text(json.dumps({target: {"containerimage.digest": DIGEST}}))

    for name, double in (("inspect_image", inspect), ("docker", docker), ("bake", bake)):
        monkeypatch.setattr(publish, name, double)
    monkeypatch.setattr(publish, "fill_wheelhouse", lambda *_: [])
    monkeypatch.setattr(verify, "verify_contents", lambda *_, **__: None)
    return found


def entry() -> dict[str, Any]:
    return dict(images.target_of(images.read_lock(), "cpu"))


def go(target: Target = OURS, **how: Any) -> list[str]:
    said: list[str] = []
    publish.publish(target, Inputs(), said.append, rebuild=False, **how)
    return said


def test_the_pinned_buildkit_pushes_by_digest_with_an_sbom_and_its_provenance(engine: dict[str, Any]) -> None:
    go()
    lock = images.read_lock()
    (created,) = (line for line in engine["said"] if line.startswith("buildx create"))
    assert created.endswith(f"image=moby/buildkit:buildx-stable-1@{lock['tools']['buildkit']['digest']}")
    first, second = (line for line in engine["said"] if line.startswith("bake "))
    assert ("--load" in first, "push=true" in first) == (True, False), "compared before anything is pushed"
    assert "cpu.output=type=image,name=registry.example/ours,push=true,push-by-digest=true" in second
    scanner = f"docker/buildkit-syft-scanner:stable-1@{lock['tools']['sbom_generator']['digest']}"
    assert f"cpu.attest=type=sbom,generator={scanner}" in second
    assert "cpu.attest=type=provenance,mode=max" in second
    assert engine["said"].index(f"buildx rm {publish.BUILDER}") > engine["said"].index(second)
    found = entry()
    assert re.fullmatch(r"\d{4}-\d\d-\d\d", found.pop("date"))
    pins = images.pins_sha256(lock, "cpu")
    of = {"repository": OURS.repository, "digest": DIGEST, "lock_sha256": pins, "attestations": True}
    assert found == {"pins": "cpu", **of}


@pytest.mark.parametrize(("which", "pushes"), [("built", False), ("pushed", True)])
def test_other_layers_than_the_proved_ones_are_not_recorded(
    engine: dict[str, Any], lock: Path, which: str, pushes: bool
) -> None:
    before = lock.read_bytes()
    engine[which]["RootFS"]["Layers"] = ["base", "others"]
    with pytest.raises(VerificationError, match="other layers than those that were proved"):
        go()
    assert any("push=true" in line for line in engine["said"]) is pushes
    assert f"buildx rm {publish.BUILDER}" in engine["said"]
    assert lock.read_bytes() == before


def test_without_attestations_the_engine_pushes_the_proved_image_and_the_lock_says_so(engine: dict[str, Any]) -> None:
    said = go(attestations=False)
    assert not [line for line in engine["said"] if line.startswith(("bake", "buildx"))]
    assert (entry()["digest"], entry()["attestations"]) == (DIGEST, False)
    assert f"pushed: {OURS.repository}@{DIGEST}, with no attestations" in said


def test_what_is_published_is_not_replaced_unasked(engine: dict[str, Any]) -> None:
    go()
    theirs = f"{OURS.repository}@{DIGEST}"
    mine = Target(CPU, "registry.example/mine")
    with pytest.raises(UsageError, match=f"perhaps somebody else's: {theirs}, published on 2(?s:.*)--replace"):
        go(mine)
    with pytest.raises(UsageError, match="perhaps somebody else's"):
        publish.record_pushed(mine, DIGEST, print, attestations=True)
    assert entry()["repository"] == OURS.repository
    assert any(f"replaced in the lock: {theirs}" in line for line in go(Target(CPU, "registry.example/mine", True)))
    assert entry()["repository"] == "registry.example/mine"


def test_an_image_that_was_not_built_here_or_from_changes_is_refused(engine: dict[str, Any]) -> None:
    engine["proved"]["Config"]["Labels"][LABEL] = f"{COMMIT}-dirty"
    with pytest.raises(UsageError, match="which nobody else can build from"):
        go()
    images.LOCAL.unlink()
    with pytest.raises(MachineError, match="no image of cpu was built here from the pins of today"):
        go()
    assert engine["said"] == []


@pytest.mark.parametrize("name", ["ours", "registry.example/ours:v1", f"registry.example/ours@{DIGEST}", "a b/c", ""])
def test_a_repository_that_is_none_is_refused(engine: dict[str, Any], name: str) -> None:
    with pytest.raises(UsageError, match="no repository"):
        go(Target(CPU, name))


def test_a_tool_without_a_digest_is_not_used(engine: dict[str, Any], lock: Path) -> None:
    written = images.read_lock()
    written["tools"]["buildkit"] |= {"digest": None, "reason": "nobody read it"}
    lock.write_text(json.dumps(written))
    with pytest.raises(MachineError, match=r"buildkit has no digest: nobody read it(?s:.*)--no-attestations"):
        go()


def test_what_a_workflow_pushed_is_recorded_by_another_job(engine: dict[str, Any]) -> None:
    with pytest.raises(UsageError, match="not a digest"):
        publish.record_pushed(OURS, "", print, attestations=True)
    publish.record_pushed(OURS, DIGEST, print, attestations=True)
    images.LOCAL.unlink()
    assert images.image_for(CPU).reference == f"{OURS.repository}@{DIGEST}"
    assert engine["said"] == [f"pull --quiet {OURS.repository}@{DIGEST}"]


@pytest.mark.parametrize("labels", [{"recipes.lock": "0" * 64}, {}, None])
def test_an_image_of_other_pins_is_not_recorded_as_one_of_today(
    engine: dict[str, Any], lock: Path, labels: dict[str, str] | None
) -> None:
    before = lock.read_bytes()
    engine["pushed"]["Config"]["Labels"] = labels
    with pytest.raises(VerificationError, match=r"what was pushed was built from the pins (0{64}|None), today's are "):
        publish.record_pushed(OURS, DIGEST, print, attestations=True)
    assert lock.read_bytes() == before
