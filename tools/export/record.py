"""export.json: of what an export is, and whether its files are as they were. No numpy: a board's host has none."""

from __future__ import annotations

import functools
import json
from pathlib import Path
from typing import Any

from common.errors import MachineError, UsageError, VerificationError
from common.files import inside, sha256_file

FORMAT = 1
# Of what the files of an export say. 2 are read alike by transformers 4 and 5, and a model from random weights names an
# end token. An older export is served, checked and graded as before; `recipe export` makes it anew.
WRITER = 2
KINDS = {"verified": bool, "step": int, "sha256": dict}


def read_record(folder: Path) -> dict[str, Any] | None:
    """Return export.json, or None where there is no readable one. Raises MachineError for an unknown format."""
    try:
        record = json.loads((folder / "export.json").read_text(encoding="utf-8"))
    except (OSError, ValueError, RecursionError):
        return None
    if not isinstance(record, dict):
        return None
    if record.get("format") != FORMAT:
        raise MachineError(
            f"export.json has format {record.get('format')!r}, this version reads {FORMAT}", where=str(folder)
        )
    return record if all(type(record.get(key)) is kind for key, kind in KINDS.items()) else None


def damaged(folder: Path, record: dict[str, Any]) -> str:
    """Return which file is not as export.json has it; empty when all are."""
    for name, sha256 in record["sha256"].items():
        path = functools.reduce(inside, name.split("/"), folder)  # merged/README.md
        if not path.is_file() or sha256_file(path) != sha256:
            return f"{name} is {'damaged' if path.is_file() else 'missing'}"
    return ""


def verified(run: Path) -> dict[str, Any]:
    """Return export.json of a run's export that is verified, and whose files are as they were then.

    Raises UsageError where there is no export, VerificationError where it is not good.
    """
    folder, todo = run / "export", f"recipe export {run}"
    record = read_record(folder)
    if record is None:
        raise UsageError("the run has no export", where=str(run), todo=todo)
    if not record["verified"]:
        raise VerificationError(f"the export is {record['status']}: {record['reason']}", where=str(folder), todo=todo)
    if fault := damaged(folder, record):
        raise VerificationError(f"the export is not as it was verified: {fault}", where=str(folder), todo=todo)
    return record
