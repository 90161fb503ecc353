"""What a registry has is built on by the digest that the lock pins. The registry is a stand-in, the engine is real."""

from __future__ import annotations

import copy
import json
import shutil
from pathlib import Path

import pytest

from common.errors import MachineError
from tests.containers.conftest import ROOT, docker
from tests.doubles.upstream.registry import Registry
from tools.containers.build import Inputs, build, build_variables
from tools.containers.images import read_lock
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
        docker("pull", "--quiet", by_digest)  # by itself the engine's builder leaves a base in its own cache
        assert docker("image", "inspect", "--format", "{{.Id}}", by_digest) == identity
        docker("image", "rm", by_digest)


def test_a_base_that_is_pinned_needs_none_that_is_given(base_image: str, tmp_path: Path) -> None:
    """`make image HW=cpu` without BASE_IMAGE, where a registry is in reach: the builder fetches the lock's base."""
    context = tmp_path / "checkout"
    (context / "docker").mkdir(parents=True)
    shutil.copy(ROOT / "docker/docker-bake.hcl", context / "docker")
    (context / "docker/Dockerfile").write_text("ARG CPU_BASE\nFROM ${CPU_BASE} AS cpu\nRUN touch /here\n")
    with Registry(tmp_path / "registry") as registry:
        name = f"{registry.host}/team/python:1"
        docker("tag", base_image, name)
        docker("push", "--quiet", name)
        docker("image", "rm", name)
        lock = copy.deepcopy(read_lock())
        lock["pins"]["cpu"]["base"] |= {"image": name, "digest": find(name).digest}
        built = build("cpu", build_variables(lock, "cpu", Inputs()), context=context, tag="pinned")
        docker("image", "rm", "recipes-cpu:pinned")
        lock["pins"]["cpu"]["base"]["digest"] = "sha256:" + "0" * 64
        with pytest.raises(MachineError, match="the build of cpu failed"):
            build("cpu", build_variables(lock, "cpu", Inputs()), context=context, tag="pinned")
    layers = json.loads(docker("image", "inspect", "--format", "{{json .RootFS.Layers}}", base_image))
    assert built["RootFS"]["Layers"][: len(layers)] == layers
