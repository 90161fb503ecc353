from __future__ import annotations

import hashlib
import json
import shutil
from pathlib import Path

import pytest

from common.errors import MachineError, UsageError
from common.model import bases
from common.model.weights import Weights
from tools.verify.tiny_base import write_tiny_base


def test_a_local_folder_is_known_by_its_weights(tiny_base, tmp_path):
    base = bases.resolve(str(tiny_base))
    assert (base.folder, base.origin, base.parameters) == (tiny_base, str(tiny_base), None)
    assert base.architecture["hidden_size"] == 64
    assert isinstance(base.weights(), Weights)
    other = bases.resolve(str(write_tiny_base(tmp_path / "other", seed=1)))
    assert other.identity != base.identity
    moved = shutil.copytree(tiny_base, tmp_path / "moved")
    assert bases.resolve(str(moved)).identity == base.identity


def test_a_folder_may_be_relative_to_the_recipe(tiny_base, tmp_path):
    shutil.copytree(tiny_base, tmp_path / "recipe" / "base")
    assert bases.resolve("base", recipe_dir=tmp_path / "recipe").folder == tmp_path / "recipe" / "base"


def test_an_unknown_base_is_a_usage_error_that_lists_the_known(tmp_path):
    with pytest.raises(UsageError, match="no base model called 'gpt-9'") as caught:
        bases.resolve("gpt-9", recipe_dir=tmp_path)
    assert all(name in str(caught.value) for name in bases.locked())


@pytest.mark.parametrize(
    ("base", "pinned"), [("owner/name", "owner/name"), ("/gone", "OWNER/NAME"), ("./gone", "OWNER/NAME")]
)
def test_a_folder_that_is_gone_is_not_taken_for_a_model_of_the_hub(base, pinned):
    with pytest.raises(UsageError, match=f"recipe base add {pinned} --recipe"):
        bases.find(base)


def test_a_folder_without_weights_is_refused(tiny_base, tmp_path):
    folder = shutil.copytree(tiny_base, tmp_path / "base")
    (folder / "model.safetensors").unlink()
    with pytest.raises(MachineError, match="holds no weights"):
        bases.resolve(str(folder))


def test_another_family_is_refused(tiny_base, tmp_path):
    folder = shutil.copytree(tiny_base, tmp_path / "base")
    config = json.loads((folder / "config.json").read_text())
    (folder / "config.json").write_text(json.dumps({**config, "model_type": "mistral"}))
    with pytest.raises(MachineError, match="mistral"):
        assert bases.resolve(str(folder)).architecture


@pytest.mark.parametrize("text", ["{", "[]", ""])
def test_a_broken_config_is_one_message(tiny_base, tmp_path, text):
    folder = shutil.copytree(tiny_base, tmp_path / "base")
    (folder / "config.json").write_text(text)
    with pytest.raises(MachineError, match=r"config.json"):
        assert bases.resolve(str(folder)).architecture


def test_the_lock_pins_every_base(monkeypatch, tmp_path):
    for name, entry in bases.locked().items():
        assert entry["licence"], name
        assert entry["parameters"] > 10**8
        pins = [entry["sha256"], entry["member_sha256"]] if entry["source"] == "wheel" else [entry["revision"]]
        assert all(len(pin) in (40, 64) for pin in pins)
    (tmp_path / "lock.yaml").write_text("format: 2\nbases: {}\n")
    monkeypatch.setattr(bases, "LOCK", tmp_path / "lock.yaml")
    with pytest.raises(MachineError, match="format 2"):
        bases.locked()


def test_a_pinned_base_that_was_not_fetched_is_refused_with_the_command_that_does(tmp_path, monkeypatch):
    monkeypatch.setenv("RECIPES_HOME", str(tmp_path))
    with pytest.raises(MachineError, match=r"tinyllama-1\.1b-chat is not on this machine") as caught:
        bases.resolve("tinyllama-1.1b-chat", recipe_dir=tmp_path / "mine")
    assert caught.value.todo == "fetch it: recipe data build mine"


def pin_in(recipe: Path, text: str) -> None:
    recipe.mkdir()
    (recipe / "models.lock.yaml").write_text(text)


FILES = "{b.safetensors: '22', config.json: null, a.safetensors: '11'}"
ENTRY = f"{{source: hub, revision: 'abc', files: {FILES}, download_mb: 1}}"


def test_a_recipe_has_pins_of_its_own_beside_those_of_every_recipe(tmp_path, monkeypatch):
    monkeypatch.setenv("RECIPES_HOME", str(tmp_path))
    pin_in(tmp_path / "mine", f"format: 1\nbases:\n  owner/name: {ENTRY}\n  tinyllama-1.1b-chat: {ENTRY}\n")
    mine = bases.locked(tmp_path / "mine")
    assert set(mine) == {*bases.locked(), "owner/name"}
    assert mine["tinyllama-1.1b-chat"] == bases.locked()["tinyllama-1.1b-chat"], "no recipe changes what others train"
    with pytest.raises(MachineError, match="owner/name is not on this machine"):
        bases.resolve("owner/name", recipe_dir=tmp_path / "mine")
    with pytest.raises(UsageError) as caught:
        bases.resolve("owner/name", recipe_dir=tmp_path / "other")
    assert "recipe base add owner/name --recipe other" in (caught.value.todo or "")


def test_weights_of_several_files_are_known_by_all_of_them(tmp_path):
    pin_in(tmp_path / "mine", f"format: 1\nbases:\n  owner/name: {ENTRY}\n")
    entry = bases.locked(tmp_path / "mine")["owner/name"]
    assert bases.identity_of(entry) == hashlib.sha256(b"1122").hexdigest()
    folder = bases.folder_of("owner/name", entry)
    assert folder.parent.name == "bases"
    assert folder != bases.folder_of("owner/name", {**entry, "revision": "abd"}), "its tokenizer may be another"


@pytest.mark.parametrize("text", ["<<<<<<< ours\nformat: 1\n", "", "format: 1\n", "format: 1\nbases: {a/b: 3}\n"])
def test_a_lock_that_cannot_be_read_is_one_message(tmp_path, text):
    pin_in(tmp_path / "mine", text)
    with pytest.raises(MachineError, match=r"models.lock.yaml cannot be read") as caught:
        bases.locked(tmp_path / "mine")
    assert caught.value.where == str(tmp_path / "mine" / "models.lock.yaml")
