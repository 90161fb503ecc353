"""A fork trains a model of the Hub that its own lock pins, and refuses any other; the Hub is one on this machine."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest

from common.model import bases
from tests.doubles.hub import Hub, files_of, serve_hub
from tests.doubles.tiny_recipe import FINE_TUNE
from tests.support.hub_files import in_shards
from tests.support.runs import folders, log, manifest
from tools import recipes
from tools.edit_yaml import set_key
from tools.scaffold.new import Own, new

ROOT = Path(__file__).resolve().parents[2]
CSV = ROOT / "docs/fork/workshop.csv"
REPO = "someone/tiny-llama"
SHARD = "model-00002-of-00002.safetensors"

pytest.importorskip("torch", reason="the CPU engine is torch")
Recipe = Callable[..., subprocess.CompletedProcess[str]]


@pytest.fixture
def hub() -> Iterator[Hub]:
    with serve_hub() as found:
        yield found


@pytest.fixture
def fork(tmp_path, monkeypatch) -> Path:
    """A fork of the tiny recipe with rows of a CSV, whose config names a model of the Hub."""
    (tmp_path / "recipes").mkdir()
    monkeypatch.setattr(recipes, "RECIPES", tmp_path / "recipes")
    made = new("bicycles", str(FINE_TUNE), Own(CSV, {}, "auto"), lambda _: None)
    config = made / "config.yaml"
    config.write_text(set_key(config.read_text(), "model_config.base", REPO))
    return made


@pytest.fixture
def recipe(hub, tmp_path) -> Recipe:
    """Run `recipe WORDS` on a machine that has its own home and Hub cache in `at`."""

    def run(*words: str | Path, at: str = "machine") -> subprocess.CompletedProcess[str]:
        kept = {name: os.environ[name] for name in ("PATH", "HOME") if name in os.environ}
        own = {"RECIPES_HOME": tmp_path / at, "HF_HOME": tmp_path / at / "hf", "HF_ENDPOINT": hub.address}
        return subprocess.run(
            [sys.executable, "-m", "tools.cli", *map(str, words)],
            env={**kept, "OMP_NUM_THREADS": "1", **{name: str(value) for name, value in own.items()}},
            cwd=ROOT,
            capture_output=True,
            text=True,
            check=False,
            timeout=300,
        )

    return run


def test_a_fork_pins_a_model_in_shards_and_trains_it_and_nothing_else(hub, fork, recipe, tmp_path, tiny_base):
    words = ["run", fork, "--hw", "cpu", "--no-container", "--steps", "2", "--out", tmp_path / "runs"]
    words += ["--set", "device_config.threads=1", "--set", "eval_config.max_new_tokens=2"]

    unpinned = recipe(*words)
    assert unpinned.returncode == 2
    assert f"no base model called '{REPO}'" in unpinned.stderr
    assert f"recipe base add {REPO} --recipe {fork.name}" in unpinned.stderr
    assert not hub.asked

    commit = hub.push(REPO, in_shards(files_of(tiny_base)), card={"license": "apache-2.0"})
    hub.push(REPO, {"config.json": b"{}"}, branch="later")
    added = recipe("base", "add", REPO, "--recipe", fork)
    assert added.returncode == 0, added.stderr

    ran = recipe(*words)
    assert ran.returncode == 0, ran.stderr
    [run] = folders(tmp_path / "runs")
    values, entry = manifest(run), bases.locked(fork)[REPO]
    assert (values["exit_reason"], values["base"]["name"], values["base"]["licence"]) == ("done", REPO, "apache-2.0")
    assert values["base"]["identity"] == bases.identity_of(entry)
    assert values["export"]["status"] == "verified", values["export"]
    assert f"{entry['parameters']:,} parameters" in log(run)
    adapter = json.loads((run / "export/adapter/adapter_config.json").read_text())
    assert (adapter["base_model_name_or_path"], adapter["revision"]) == (REPO, commit)

    changed = bytearray(hub.repositories[REPO].commits[commit][SHARD])
    changed[-1] ^= 1
    hub.repositories[REPO].commits[commit][SHARD] = bytes(changed)
    refused = recipe(*words, at="another-machine")
    assert refused.returncode == 4
    assert f"{SHARD} is not the pinned file" in refused.stderr
    assert not list((tmp_path / "another-machine/bases").iterdir()), "nothing of it is kept as a base"
    assert folders(tmp_path / "runs") == [run]
    assert recipe("base", "check", "--recipe", fork).returncode == 6
