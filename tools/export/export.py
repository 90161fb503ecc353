"""export/: what a run learned, as Hugging Face folders, and the proof that they hold what the run had.

export/merged/       a plain Llama that transformers load; the adapter is merged in
export/adapter/      LoRA runs: the adapter that PEFT loads
export/gguf/         on demand, the merged model once more for llama.cpp and Ollama (tools/export/gguf)
export/export.json   step, dtype, sha256 of each file, and what the checks measured
"""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

from common.errors import UsageError, VerificationError
from common.files import clear, disk_errors, made_whole, sha256_file, sync_all, try_lock, write_json
from common.train.checkpoint import set_aside
from common.train.manifest import ExportFacts, Manifest
from tools.export.check import ExportCheck, check
from tools.export.hf_folder import export_dtype, write_adapter, write_merged
from tools.export.model_card import adapter_card, merged_card
from tools.export.record import FORMAT, WRITER, damaged, read_record
from tools.runs import trained
from tools.runs.folder import read_run
from tools.runs.trained import TrainedRun

Say = Callable[[str], None]
TO_DO = "do not use this export; run it again, and if it fails again report it with export.json"


def export_folder(run_folder: Path, say: Say) -> Path:
    """Export the result of a finished or killed run; return runs/<run>/export.

    Raises VerificationError when the export does not compute what the run computed.
    """
    with alone_with(run_folder):
        run = trained.read(run_folder, say)
        return export(run, Manifest.load(run.folder), say)


@contextlib.contextmanager
def alone_with(run_folder: Path) -> Iterator[None]:
    """Keep a run's lock within. Raises UsageError while the run is going, or for a folder that is no run."""
    read_run(run_folder)
    lock = try_lock(run_folder)
    if lock is None:
        raise UsageError("the run is still going; it exports by itself at its end", where=str(run_folder))
    with lock:
        yield


def check_export(run_folder: Path, say: Say) -> Path:
    """Verify an export again, as it lies on the disk, and record the outcome; return its folder.

    Raises VerificationError if a file is damaged, if the check fails or if it cannot be made here.
    """
    with alone_with(run_folder):
        run, record = read_exported(run_folder, say)
        folder = run.folder / "export"
        damage = damaged(folder, record)
        outcome = ExportCheck("failed", damage) if damage else check(folder, run, record["dtype"])
        record |= outcome.record()
        write_json(folder / "export.json", record)
        record_in(Manifest.load(run.folder), run.folder, record)
        say(f"export {outcome.line()}")
        if outcome.status != "verified":
            raise VerificationError(f"the export is {outcome.status}: {outcome.reason}", where=str(folder), todo=TO_DO)
        return folder


def read_exported(run_folder: Path, say: Say) -> tuple[TrainedRun, dict[str, Any]]:
    """Return a run at the step that its export is of, and export.json. Raises UsageError where there is no export."""
    run = trained.read(run_folder, say)
    folder = run.folder / "export"
    record = read_record(folder)
    if record is None:
        raise UsageError("there is no export", where=str(folder), todo="make one: recipe export RUN")
    if record["checkpoint"] != dict(run.checkpoint.state["sha256"]):
        say(f"the export is of step {record['step']}, the run's newest checkpoint of step {run.step}")
        run = trained.read(folder.parent / "checkpoints" / f"step-{record['step']:08d}", say)
    return run, record


def export(run: TrainedRun, manifest: Manifest, say: Say) -> Path:
    """Write, check and put in place the export of `run`; keep one that verifies as this checkpoint's."""
    folder, dtype = run.folder / "export", export_dtype(run)
    existing = read_record(folder)
    if existing and is_of(existing, run, dtype) and not damaged(folder, existing):
        say(f"export of step {run.step} kept: every file is as it was when it was verified")
        record_in(manifest, run.folder, existing)
        return folder
    for left in run.folder.glob(".*export-*"):  # of an export that was killed; this process holds the run's lock
        clear(left)
    with disk_errors("write the export", run.folder), made_whole(folder) as made:
        outcome, record = write(made, run, dtype)
        sync_all(made)  # now: once the old export is set aside, nothing is left to fail but a rename
        set_aside(folder)
    record_in(manifest, run.folder, record)
    say(f"export of step {run.step} ({dtype}) {outcome.line()}")
    if outcome.status == "failed":
        raise VerificationError(f"the export is not good: {outcome.reason}", where=str(folder), todo=TO_DO)
    return folder


def write(folder: Path, run: TrainedRun, dtype: str) -> tuple[ExportCheck, dict[str, Any]]:
    """Fill `folder`; return what the check found, and export.json's content."""
    write_merged(folder / "merged", run, dtype)
    if run.config.model.lora:
        write_adapter(folder / "adapter", run)
    outcome = check(folder, run, dtype)
    (folder / "merged" / "README.md").write_text(merged_card(folder / "merged", run, dtype, outcome), encoding="utf-8")
    if run.config.model.lora:
        (folder / "adapter" / "README.md").write_text(adapter_card(run, outcome), encoding="utf-8")
    files = sorted(path for path in folder.rglob("*") if path.is_file())
    record = {
        "format": FORMAT,
        "writer": WRITER,
        "run": run.folder.name,
        "step": run.step,
        "checkpoint": dict(run.checkpoint.state["sha256"]),
        "dtype": dtype,
        **outcome.record(),
        "sha256": {str(path.relative_to(folder)): sha256_file(path) for path in files},
    }
    for path in files:
        path.chmod(0o644)  # whatever the umask was: an export is to be handed on
    write_json(folder / "export.json", record)
    return outcome, record


def record_in(manifest: Manifest, run_folder: Path, record: dict[str, Any]) -> None:
    """Write into a run's manifest what export.json says of its export."""
    facts = {key: record[key] for key in ("status", "reason", "step", "dtype")}
    manifest.export = ExportFacts(**facts, difference=record["check"]["difference"])
    manifest.save(run_folder)


def is_of(record: dict[str, Any], run: TrainedRun, dtype: str) -> bool:
    """Return whether a record is that of a verified export of this checkpoint in this dtype, as it is written now."""
    if not record["verified"] or record["dtype"] != dtype or record.get("writer") != WRITER:
        return False
    return dict(record["checkpoint"]) == dict(run.checkpoint.state["sha256"])
