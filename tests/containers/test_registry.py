"""The stand-in registry is one for the engine: what is pushed to it comes back by its digest."""

from __future__ import annotations

from pathlib import Path

from tests.containers.conftest import docker
from tests.doubles.upstream.registry import Registry
from tools.containers.registry import find


def test_what_is_pushed_is_pulled_by_the_digest_that_the_registry_tells(base_image: str, tmp_path: Path) -> None:
    with Registry(tmp_path) as registry:
        name = f"{registry.host}/team/base:1"
        identity = docker("image", "inspect", "--format", "{{.Id}}", base_image)
        docker("tag", base_image, name)
        docker("push", "--quiet", name)
        docker("image", "rm", name)
        registry.token = True
        by_digest = f"{registry.host}/team/base@{find(name).digest}"
        docker("pull", "--quiet", by_digest)
        assert docker("image", "inspect", "--format", "{{.Id}}", by_digest) == identity
        docker("image", "rm", by_digest)
