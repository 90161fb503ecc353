"""What `make docs EXPORTS=...` puts into docs/exports.md of runs."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

from ci import opened
from common.errors import UsageError
from tests.support.run_folders import write_run
from tools.export.readers.table import READERS
from tools.export.record import FORMAT

COMMIT = "0123abc" + "d" * 33
BASE = {"name": "none", "identity": "seed", "origin": "random", "licence": "none"}


@pytest.fixture
def root(tmp_path: Path) -> Path:
    """A repository's page with the place for tables."""
    (tmp_path / "root/docs").mkdir(parents=True)
    page = f"# Before\n\n{opened.BEGIN}\nan old table\n{opened.END}\n\n# After\n"
    (tmp_path / "root" / opened.PAGE).write_text(page)
    return tmp_path / "root"


def write_read(out: Path, *names: str, overrides: tuple[str, ...] = (), **changed: Any) -> Path:
    """A run whose export the named readers opened, the last one first."""
    folder = write_run(out, overrides=overrides, config_digest="c" * 64, base=BASE)
    rows = {
        one.name: {
            "reader": one.name,
            "version": one.version,
            "opens": one.opens,
            "verdict": "agrees",
            "reason": "",
            "cells": {"ids": "24 of 24"},
            "date": "2026-01-01",
            "commit": COMMIT,
            **changed,
        }
        for one in reversed(READERS)
        if one.name in names
    }
    (folder / "export").mkdir()
    facts = {"verified": True, "status": "verified", "reason": "", "step": 40, "checkpoint": {}, "sha256": {}}
    (folder / "export/export.json").write_text(json.dumps({"format": FORMAT, **facts, "readers": rows}))
    return folder


def test_a_run_has_its_table_and_what_was_not_asked_is_named(root: Path, tmp_path: Path) -> None:
    folder = write_read(tmp_path / "a", "transformers-5", "vllm", overrides=("training_config.seed=7",))
    other = write_read(tmp_path / "b", *(one.name for one in READERS), verdict="differs", reason="chat template")
    page = opened.show([folder, other], root).read_text()

    assert page.startswith("# Before\n\n")
    assert page.endswith("\n\n# After\n")
    assert "an old table" not in page
    assert "Asked at 0123abc, 2026-01-01." in page
    first, second = page.split("**`from_scratch` on `cpu`**: ")[1:]
    assert "40 steps, `training_config.seed=7`." in first
    versions = {one.name: one.version for one in READERS}
    assert first.index(f"| {versions['transformers-5']} | 24 of 24 |") < first.index(f"| {versions['vllm']} |")
    assert "Not asked: `llama.cpp`, `transformers-4.57`," in first
    assert "peft" not in first, "a run that trained all weights has no adapter"
    assert "| differs: chat template |" in second
    assert "Not asked" not in second


def test_rows_name_their_commits_and_those_of_none_are_refused(root: Path, tmp_path: Path) -> None:
    first, second = (write_read(tmp_path / name, "vllm", commit=name * 40) for name in "ab")
    assert "Asked at aaaaaaa and bbbbbbb, 2026-01-01." in opened.show([second, first], root).read_text()
    refused([first, write_read(tmp_path / "c", "vllm", commit=None)], root, "from a clean tree")


def test_an_export_that_nobody_opened_is_refused(root: Path, tmp_path: Path) -> None:
    refused([write_read(tmp_path / "a")], root, "no reader was asked")
    refused([write_run(tmp_path / "b", config_digest="c" * 64, base=BASE)], root, "no reader was asked")


def refused(folders: list[Path], root: Path, words: str) -> None:
    """Nothing is written where a run is refused."""
    before = (root / opened.PAGE).read_bytes()
    with pytest.raises(UsageError, match=words):
        opened.show(folders, root)
    assert (root / opened.PAGE).read_bytes() == before
