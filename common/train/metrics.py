"""metrics.jsonl: the truth of a run, one object per optimizer step and one per evaluation, floats at full precision."""

from __future__ import annotations

import json
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

from common.errors import MachineError
from common.files import disk_errors, named, sync, write_atomic


class JsonLines:
    """An append-only file of JSON objects, each with a `step`."""

    def __init__(self, path: Path) -> None:
        self.path = path
        self.file = path.open("a", encoding="utf-8")

    def write(self, record: Mapping[str, Any]) -> None:
        """Append one record; whoever reads the file sees it at once. Raises MachineError for a full disk."""
        with disk_errors("write a record", self.path):
            self.file.write(json.dumps(record, ensure_ascii=False) + "\n")
            self.file.flush()

    def sync(self) -> None:
        """Flush the file to the disk, not only to the kernel; done before a checkpoint that relies on it."""
        sync(self.path)

    def close(self) -> None:
        with named(self.path):
            self.file.close()


def read(path: Path, until: float = float("inf")) -> list[dict[str, Any]]:
    """Return the records of a file that `JsonLines` wrote, up to step `until`, but for what a crash left behind them.

    Raises MachineError for any other line that is not JSON.
    """
    records, unreadable = scan(path)
    records = [record for record in records if record["step"] <= until]
    # A killed process leaves a part of one line, a power cut anything behind the step that was synced last.
    if unreadable and unreadable[0] <= len(records):
        raise MachineError(f"line {unreadable[0]} is not JSON", where=str(path), todo="restore the file")
    return records


def scan(path: Path) -> tuple[list[dict[str, Any]], list[int]]:
    """Return the records that can be read, and the numbers, from 1, of lines that cannot. No file: no records."""
    records, unreadable = [], []
    # Bytes: a crash may cut a character in two, and str.splitlines would also cut at U+2028, which JSON may hold.
    for number, line in enumerate(path.read_bytes().splitlines() if path.is_file() else [], 1):
        try:
            records.append(json.loads(line))
        except (ValueError, RecursionError):
            unreadable.append(number)
    return records, unreadable


def cut_back(path: Path, step: int, target: Path, keep: Callable[[Any], bool] = bool) -> list[dict[str, Any]]:
    """Write the records up to the `step` of a checkpoint, all or those to `keep`, to `target`; return them."""
    records = [record for record in read(path, step) if keep(record)]
    write_atomic(target, "".join(json.dumps(record, ensure_ascii=False) + "\n" for record in records))
    return records
