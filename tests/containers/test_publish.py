"""Published to a registry on this machine, and pulled from there by digest: what `--no-attestations` does, for real.

The image is a tiny one with no package of any lock, so that a test takes seconds.
"""

from __future__ import annotations

import json
import urllib.request
from collections.abc import Iterator
from pathlib import Path

import pytest

from common import hardware
from common.errors import MachineError, VerificationError
from tests.containers.conftest import docker
from tests.support.registry import NoRegistry, running
from tools.containers import docker as engine
from tools.containers import images, publish, verify
from tools.containers.build import Inputs
from tools.containers.images import NoImage
from tools.containers.publish import Target

CPU = hardware.get("cpu")
NAME = "recipes-published:test"
TINY = """FROM {base}
RUN ln -sf "$(command -v python3)" /usr/local/bin/python; echo {word} >/word
LABEL recipes.lock={pins} org.opencontainers.image.revision={commit}
USER 1000:1000
"""


@pytest.fixture(scope="session")
def registry(tmp_path_factory: pytest.TempPathFactory) -> Iterator[str]:
    try:
        with running(tmp_path_factory.mktemp("registry")) as address:
            yield address
    except NoRegistry as error:
        pytest.skip(str(error))


@pytest.fixture
def built(base_image: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[str]:
    """A tiny image, recorded as this checkout's own of the CPU, by a lock whose image has no packages; its id."""
    lock = images.read_lock()
    lock["pins"]["cpu"]["python"] = {}
    monkeypatch.setattr(images, "LOCK", tmp_path / "images.lock.json")
    monkeypatch.setattr(images, "LOCAL", tmp_path / "images.local.json")
    images.LOCK.write_text(json.dumps(lock))
    pins = images.pins_sha256(lock, "cpu")
    (tmp_path / "look").write_text(TINY.format(base=base_image, pins=pins, commit="1" * 40, word=tmp_path.name))
    docker("build", "--quiet", "--tag", NAME, "--file", str(tmp_path / "look"), str(tmp_path))
    id = docker("image", "inspect", "--format", "{{.Id}}", NAME)
    images.record_local("cpu", {"id": id, "lock_sha256": pins, "created": "today"})
    yield id
    docker("image", "rm", "--force", id)


def repositories(registry: str) -> list[str]:
    with urllib.request.urlopen(f"http://{registry}/v2/_catalog", timeout=10) as answer:
        return list(json.load(answer)["repositories"])


def go(registry: str, name: str, *, rebuild: bool = False) -> None:
    target = Target(CPU, f"{registry}/{name}")
    publish.publish(target, Inputs(), print, rebuild=rebuild, attestations=False)


def test_what_is_published_is_pulled_by_its_digest_on_another_machine(registry: str, built: str) -> None:
    layers = json.loads(docker("image", "inspect", "--format", "{{json .RootFS.Layers}}", built))
    go(registry, "good")
    docker("image", "rm", "--force", built)  # as on a machine that never built it
    images.LOCAL.unlink()
    image = images.image_for(CPU)
    assert (image.source, image.reference.partition("@")[0]) == ("published", f"{registry}/good")
    said: list[str] = []
    engine.fetch(image, said.append)
    assert said == [f"fetching {image.reference} (once)"]
    assert json.loads(docker("image", "inspect", "--format", "{{json .RootFS.Layers}}", image.reference)) == layers


def test_layers_that_a_second_build_has_not_are_never_pushed(
    registry: str, built: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    before = images.LOCK.read_bytes()
    monkeypatch.setattr(verify, "verify_layers", lambda *_: ["sha256:another"])
    with pytest.raises(VerificationError, match="two more builds: other layers"):
        go(registry, "differs", rebuild=True)
    assert "differs" not in repositories(registry)
    assert images.LOCK.read_bytes() == before


def test_a_digest_that_the_registry_has_not_is_one_message(registry: str, built: str) -> None:
    go(registry, "gone")
    lock = images.read_lock()
    lock["targets"]["cpu"]["digest"] = "sha256:" + "0" * 64
    images.LOCK.write_text(json.dumps(lock))
    images.LOCAL.unlink()
    with pytest.raises(NoImage, match="the registry has no image of the locked digest"):
        engine.fetch(engine.find_image(CPU), print)


def test_a_registry_that_does_not_answer_is_one_message(built: str) -> None:
    before = images.LOCK.read_bytes()
    with pytest.raises(MachineError, match="the registry cannot be reached"):
        go("localhost:1", "nobody")
    assert images.LOCK.read_bytes() == before
