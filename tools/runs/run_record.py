"""What a run left in its folder, read for looking at: whatever can be read is, and what cannot is said in words.

Nothing is imported that trains, and nothing in the folder is changed.
"""

from __future__ import annotations

import fcntl
import json
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any

from common import config as configs
from common.config import Config
from common.errors import RecipeError, UsageError
from common.paths import RECIPES
from common.train import metrics
from common.train.evaluate import HeldOut, from_rows
from common.train.manifest import FORMAT

Record = dict[str, Any]


@dataclass(frozen=True)
class RunRecord:
    """A run as its files tell it. `faults` are sentences about what could not be read."""

    folder: Path
    manifest: Mapping[str, Any]
    steps: list[Record]
    evaluations: list[Record]
    faults: list[str]

    @property
    def name(self) -> str:
        return self.folder.name

    @cached_property
    def state(self) -> str:
        """done, running, stopped, failed, or killed: ended with no time to say how."""
        reason = str(self.manifest.get("exit_reason", "unknown"))
        if reason == "running":
            return "running" if is_locked(self.folder) else "killed"
        return reason.partition(":")[0]

    @property
    def last_step(self) -> int:
        """The last step that was recorded; 0 before the first."""
        return self.steps[-1]["step"] if self.steps else 0

    @property
    def recipe_dir(self) -> Path:
        """The recipe's folder, as far as it is known here."""
        return Path(self.manifest.get("recipe_dir") or RECIPES / str(self.manifest.get("recipe", "")))

    @cached_property
    def config(self) -> Config | None:
        """The resolved config; None, and a fault, where it cannot be read."""
        try:
            return configs.load_resolved(self.folder / "config.resolved.yaml")
        except RecipeError as error:
            self.faults.append(f"config.resolved.yaml: {error.what}")
            return None

    @cached_property
    def answers(self) -> list[Record]:
        """The records of evaluations.jsonl: held-out nll by row, and the answers to the evaluation prompts."""
        return whole_records(self.folder / "evaluations.jsonl", self.faults, "nll", "tokens", "samples")

    @cached_property
    def held_out(self) -> HeldOut | None:
        """The last evaluation by row; None where there is none."""
        return from_rows(self.answers[-1]["nll"], self.answers[-1]["tokens"]) if self.answers else None

    @property
    def evaluation(self) -> Record:
        """The figures of the last evaluation: `step`, `eval_loss`, `eval_loss_se` and, for text, `bits_per_byte`."""
        return self.evaluations[-1] if self.evaluations else {}

    def fact(self, *keys: str) -> Any:
        """A value of the manifest by its keys; None where it has none."""
        value: Any = self.manifest
        for key in keys:
            value = value.get(key) if isinstance(value, Mapping) else None
        return value


def read(folder: Path) -> RunRecord:
    """The run in `folder`. Raises UsageError where no run is there."""
    faults: list[str] = []
    if not is_run(folder):
        raise UsageError("no run there", where=str(folder), todo="give a folder of runs/")
    records = whole_records(folder / "metrics.jsonl", faults)
    return RunRecord(
        folder=folder.resolve(),
        manifest=manifest_of(folder, faults),
        steps=[record for record in records if "loss" in record],
        evaluations=[record for record in records if "eval_loss" in record],
        faults=faults,
    )


def is_run(folder: Path) -> bool:
    return (folder / "manifest.json").is_file() or (folder / "config.resolved.yaml").is_file()


def runs_in(out: Path) -> Iterator[RunRecord]:
    """Every run of a folder of runs, newest first: their names begin with the time of their start."""
    for path in sorted(out.glob("*/manifest.json"), key=lambda path: path.parent.name, reverse=True):
        yield read(path.parent)


def manifest_of(folder: Path, faults: list[str]) -> dict[str, Any]:
    try:
        values = json.loads((folder / "manifest.json").read_text(encoding="utf-8"))
    except (OSError, ValueError) as error:
        faults.append(f"manifest.json cannot be read ({type(error).__name__})")
        return {}
    if not isinstance(values, dict):
        faults.append("manifest.json is no manifest")
        return {}
    if values.get("format") != FORMAT:
        faults.append(f"manifest.json has format {values.get('format')!r}, this version reads {FORMAT}")
    return values


def whole_records(path: Path, faults: list[str], *keys: str) -> list[Record]:
    """The records of a file that have a step and `keys`, in the order of their steps; what is left out is a fault."""
    try:
        records, unreadable = metrics.scan(path)
    except OSError as error:
        faults.append(f"{path.name} cannot be read ({error.strerror})")
        return []
    whole = [record for record in records if is_whole(record, keys)]
    if unreadable == [len(records) + 1]:
        faults.append(f"{path.name}: the last line is cut off, as by a process that was killed; left out")
    elif unreadable:
        faults.append(f"{path.name}: left out, no JSON: lines {few(unreadable)}")
    if len(whole) < len(records):
        faults.append(f"{path.name}: left out, not of the known form: {len(records) - len(whole)} records")
    return sorted(whole, key=lambda record: record["step"])


def is_whole(record: Any, keys: tuple[str, ...]) -> bool:
    return isinstance(record, dict) and type(record.get("step")) is int and all(key in record for key in keys)


def few(numbers: list[int], shown: int = 5) -> str:
    """`3, 4, 5, 6, 7 and 12 more`."""
    rest = len(numbers) - shown
    return ", ".join(map(str, numbers[:shown])) + (f" and {rest} more" if rest > 0 else "")


def is_locked(folder: Path) -> bool:
    """Whether a process holds the run: it is going on."""
    try:
        with (folder / ".lock").open(encoding="utf-8") as lock:
            fcntl.flock(lock, fcntl.LOCK_SH | fcntl.LOCK_NB)
    except BlockingIOError:
        return True
    except OSError:  # no lock file, or one that may not be read
        return False
    return False
