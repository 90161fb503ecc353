"""make docs EXPORTS="runs/a runs/b": what other software made of the exports of these runs, for docs/exports.md."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

from ci.shown import put
from common.errors import UsageError
from tools.export.readers.table import READERS
from tools.export.reading import table
from tools.export.record import read_record
from tools.runs.folder import RunFolder, read_run

BEGIN = '<!-- made by `make docs EXPORTS="runs/..."`: do not edit -->'
END = "<!-- end of what the exports' readers say -->"
PAGE = "docs/exports.md"


def show(folders: Sequence[Path], root: Path) -> Path:
    """Put a table for each run into docs/exports.md of the repository `root`; return that page.

    Raises UsageError for a run whose export no reader was asked of, or one asked by code that is no commit.
    """
    runs = [(read_run(folder, strict=True), rows_of(folder)) for folder in folders]
    commits = {str(row.get("commit") or "") for _, rows in runs for row in rows}
    if "" in commits:
        what = "the page shows what readers were asked by a commit, from a clean tree"
        raise UsageError(what, where=", ".join(map(str, folders)), todo="commit, then: recipe export RUN --readers")
    dates = sorted({row["date"] for _, rows in runs for row in rows})
    when = dates[0] if len(dates) == 1 else f"{dates[0]} to {dates[-1]}"
    about = f"Asked at {' and '.join(sorted(commit[:7] for commit in commits))}, {when}."
    put(root / PAGE, BEGIN, END, "\n\n".join([about, *(part for run, rows in runs for part in block(run, rows))]))
    return root / PAGE


def rows_of(folder: Path) -> list[dict[str, Any]]:
    """Return what readers found in a run's export, in the order of READERS. Raises UsageError where none was asked."""
    found = (read_record(folder / "export") or {}).get("readers", {})
    rows = [found[reader.name] for reader in READERS if reader.name in found]
    if not rows:
        raise UsageError("no reader was asked of this export", where=str(folder), todo="recipe export RUN --readers")
    return rows


def block(run: RunFolder, rows: Sequence[dict[str, Any]]) -> list[str]:
    """Return what a run is, its table, and which readers of what it has were not asked."""
    config, manifest = run.config, run.manifest
    model = config.model.preset or manifest.base.name
    changes = f", {' '.join(f'`{change}`' for change in manifest.overrides)}" if manifest.overrides else ""
    about = f"**`{manifest.recipe}` on `{config.hw}`**: `{model}`, {run.last_step} steps{changes}."
    kinds = {"merged", "gguf", *(["adapter"] if config.model.lora else [])}
    asked = [row["reader"] for row in rows]
    missing = [f"`{one.name}`" for one in READERS if one.opens in kinds and one.name not in asked]
    return [about, "\n".join(table(rows)), *([f"Not asked: {', '.join(missing)}."] if missing else [])]
