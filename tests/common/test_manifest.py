"""manifest.json: written whole, read as it was written, refused by what is wrong with it."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from common.engine import BackendInfo
from common.errors import MachineError
from common.train.manifest import BaseFacts, DataFacts, Manifest, Resumption


@pytest.fixture
def written(tmp_path) -> dict:
    """A young run's manifest, as JSON."""
    manifest = Manifest(
        run="a-run",
        recipe="tiny",
        command=["recipe", "run", "tiny"],
        overrides=[],
        start="2026-01-01T00:00:00Z",
        end=None,
        exit_reason="running",
        hw="cpu",
        seed=1,
        steps=6,
        config_digest="c" * 64,
        base=BaseFacts(name="tiny", identity="b" * 64, origin="/tiny", licence="unknown"),
        data=DataFacts(tokens_sha256="a" * 64, length=32, rows={"train": 9}, tokens={"train": 99}),
        tokenizer_sha256="d" * 64,
    )
    manifest.save(tmp_path)
    return json.loads((tmp_path / "manifest.json").read_text())


def rewrite(folder: Path, values: object) -> None:
    (folder / "manifest.json").write_text(json.dumps(values))


def test_what_was_never_set_is_not_in_the_file(written):
    assert written["format"] == 1
    assert written["end"] is None
    assert not {"trained", "ended_early", "backend", "image"} & set(written)


def test_it_grows_and_keeps_what_a_later_version_wrote(written, tmp_path):
    rewrite(tmp_path, {**written, "later": {"key": 1}, "data": {**written["data"], "later": 2}})
    manifest = Manifest.load(tmp_path)
    manifest.backend = BackendInfo("torch-cpu", "cpu", "fp32", 1, 2, False, {"torch": "2"}, "as told", ("a note",))
    event = Resumption(at="2026", step=3, command=[], overrides=[], config_digest="", notes=["one"], git_dirty=False)
    manifest.resumed = [*manifest.resumed, event]
    manifest.save(tmp_path)
    again = Manifest.load(tmp_path)
    assert again == manifest
    values = json.loads((tmp_path / "manifest.json").read_text())
    assert values["backend"]["versions"] == {"torch": "2"}
    assert values["backend"]["notes"] == ["a note"]
    assert values["resumed"][0]["git_dirty"] is False
    assert (values["later"], values["data"]["later"]) == ({"key": 1}, 2)


@pytest.mark.parametrize(
    ("change", "says"),
    [
        ({"format": 2}, r"manifest\.json has format 2, this version reads 1"),
        ({"steps": "many"}, r"manifest\.json: steps: .*integer"),
        ({"data": {"length": 32}}, r"manifest\.json: data\.tokens_sha256: Field required"),
    ],
)
def test_what_is_wrong_with_it_is_named(written, tmp_path, change, says):
    rewrite(tmp_path, {**written, **change})
    with pytest.raises(MachineError, match=says):
        Manifest.load(tmp_path)


@pytest.mark.parametrize("text", ["", "{", "[1]"])
def test_what_is_no_manifest_is_refused(tmp_path, text):
    (tmp_path / "manifest.json").write_text(text)
    with pytest.raises(MachineError, match=r"manifest\.json (cannot be read|holds no JSON object)"):
        Manifest.load(tmp_path)
