"""Defects that a torture must find: `make torture FAULT=no-fsync` has to end red."""

from __future__ import annotations

import contextlib
import json
import os
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from typing import Any

from common.files import sync, sync_all
from common.train import checkpoint as checkpoints
from common.train import manifest as manifests

checkpoint: Any = checkpoints  # whose names are replaced here
manifest: Any = manifests


def no_fsync() -> None:
    """Have nothing synced."""
    os.fsync = lambda _descriptor: None  # type: ignore[assignment]


def rename_before_fsync() -> None:
    """Have a checkpoint get its name before its files are synced."""

    @contextlib.contextmanager
    def named_first(folder: Path) -> Iterator[Path]:
        made = folder.with_name(f".{folder.name}")
        made.mkdir(parents=True)
        yield made
        made.rename(folder)
        sync(folder.parent)
        sync_all(folder)

    checkpoint.made_whole = named_first


def manifest_in_place() -> None:
    """Have the manifest overwritten where it lies."""
    manifest.write_json = lambda path, value: path.write_text(json.dumps(value), encoding="utf-8")


def checkpoint_in_place() -> None:
    """Have a checkpoint written under its name from the first byte."""

    def save(checkpoints: Path, step: int, tensors: Any, config: Any, facts: Mapping[str, Any]) -> Path:
        folder: Path = checkpoint.folder_of(checkpoints, step)
        folder.mkdir(parents=True, exist_ok=True)
        checkpoint.write_tensors(folder, tensors, config)
        hashes = {file.name: checkpoint.sha256_file(file) for file in sorted(folder.iterdir())}
        checkpoint.write_json(folder / "state.json", {"format": 1, "step": step, **facts, "sha256": hashes})
        return folder

    checkpoint.save = save


FAULTS: dict[str, Callable[[], None]] = {
    "no-fsync": no_fsync,
    "rename-before-fsync": rename_before_fsync,
    "manifest-in-place": manifest_in_place,
    "checkpoint-in-place": checkpoint_in_place,
}
