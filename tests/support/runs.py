"""Train a tiny recipe in this process, and read what its run left: what two runs must agree on, bit for bit."""

from __future__ import annotations

import hashlib
import json
import os
from pathlib import Path
from typing import Any
from unittest import mock

from common import recipe
from common.train import checkpoint, metrics
from common.train.checkpoint import read_tensors
from tools.launch.after_run import after_run
from tools.launch.resolve import resolve


def run_tiny(
    recipe_dir: Path,
    out: Path,
    *overrides: str,
    steps: int | None = None,
    stop_at: int | None = None,
    resume: str = "never",
    accept_changes: bool = False,
    export: bool = True,
) -> Path:
    """Run the recipe here, in this process, as `recipe run --hw cpu` would; return the run's folder.

    `export=False` leaves out the export and the card. Errors, `Stopped` among them, come through. Token files go
    to RECIPES_HOME, or to `out`/home where that is not set.
    """
    launch = resolve(
        recipe_dir,
        hw="cpu",
        overrides=overrides,
        steps=steps,
        stop_at=stop_at,
        resume=resume,
        accept_changes=accept_changes,
        out=out,
        command=("recipe", "run", recipe_dir.name),
    )
    script = recipe.load(recipe_dir, "train")
    with mock.patch.dict(os.environ, {"RECIPES_HOME": os.environ.get("RECIPES_HOME", str(out / "home"))}):
        script.train(launch)
        after_run(newest_run(out), script.AFTER_RUN if export else ())
    return newest_run(out)


def newest_run(out: Path) -> Path:
    """The run folder in `out` that was written to last."""
    return max(out.glob("*/manifest.json"), key=lambda path: path.stat().st_mtime_ns).parent


def outcome(folder: Path) -> dict[str, Any]:
    """Every number of a run but the seconds, every answer, and the sha256 of every tensor it saved last."""
    records = metrics.read(folder / "metrics.jsonl")
    for record in records:
        record.pop("seconds", None)
    skipped: list[str] = []
    last = checkpoint.newest(folder / "checkpoints", skipped.append)
    assert last is not None, skipped
    tensors = read_tensors(last.folder)
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
