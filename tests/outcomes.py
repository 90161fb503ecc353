"""What two runs must agree on, bit for bit."""

from __future__ import annotations

import hashlib
import json
from pathlib import Path
from typing import Any

from common.train import checkpoint, metrics
from common.train.checkpoint import Tensors


def outcome(folder: Path) -> dict[str, Any]:
    """Every number of a run but the seconds, every answer, and the sha256 of every tensor it saved last."""
    records = metrics.read(folder / "metrics.jsonl")
    for record in records:
        record.pop("seconds", None)
    skipped: list[str] = []
    last = checkpoint.newest(folder / "checkpoints", skipped)
    assert last is not None, skipped
    tensors = Tensors(last.folder)
    return {
        "metrics": records,
        "evaluations": metrics.read(folder / "evaluations.jsonl"),
        "step": last.step,
        "tensors": {name: hashlib.sha256(tensors[name].tobytes()).hexdigest() for name in tensors},
    }


def manifest(folder: Path) -> dict[str, Any]:
    values: dict[str, Any] = json.loads((folder / "manifest.json").read_text(encoding="utf-8"))
    return values


def log(folder: Path) -> str:
    return (folder / "train.log").read_text(encoding="utf-8")


def folders(out: Path) -> list[Path]:
    """The run folders in `out`, oldest first by their manifests' files."""
    return sorted((path.parent for path in out.glob("*/manifest.json")), key=lambda path: path.name)
