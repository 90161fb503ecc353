"""export/gguf/: a verified export as GGUF files, each with its proof in export.json and its Modelfile beside it."""

from __future__ import annotations

import os
from pathlib import Path
from typing import Any

from common.errors import VerificationError
from common.files import disk_errors, sha256_file, sync, write_atomic, write_json
from common.train.manifest import Manifest
from tools.export.export import alone_with, check_export, export, read_exported
from tools.export.gguf.file import write_gguf
from tools.export.gguf.modelfile import modelfile
from tools.export.gguf.proof import Proof, context_of, prove, questions_of
from tools.export.gguf.vocabulary import vocabulary_of
from tools.export.readers.environment import Say
from tools.export.record import damaged, read_record
from tools.runs import trained
from tools.runs.trained import TrainedRun

FAILED = ".failed"
TO_DO = "do not use it; run it again, and if it fails again report it with export.json"


def export_gguf(run_folder: Path, kind: str, say: Say) -> Path:
    """Export a run, unless that was done, and write the export as a GGUF file of `kind`; return its path.

    Raises VerificationError where the export is not verified, or the file holds something else.
    """
    with alone_with(run_folder):
        run = trained.read(run_folder, say)
        folder = export(run, Manifest.load(run_folder), say)
        record = read_record(folder)
        assert record is not None, "it was exported, or raised"
        if not record["verified"]:
            raise VerificationError(f"the export is {record['status']}: {record['reason']}", where=str(folder))
        return make(folder, record, run, kind, say)


def check_all(run_folder: Path, say: Say) -> None:
    """Verify an export again, then each of its GGUF files.

    Raises VerificationError, after all were looked at, where one is damaged, fails, or cannot be read here.
    """
    check_export(run_folder, say)
    with alone_with(run_folder):
        run, record = read_exported(run_folder, lambda _: None)
        check_again(run.folder / "export", record, run, say)


def make(export: Path, record: dict[str, Any], run: TrainedRun, kind: str, say: Say) -> Path:
    """Write the export in `export` as a GGUF file of `kind`, prove it, record it in export.json, and return its path.

    One that was proven and is as it was is kept. One that fails is not kept under its name: VerificationError.
    """
    name = f"{run.config.recipe}-step-{run.step}-{kind}"
    folder = export / "gguf"
    path = folder / f"{name}.gguf"
    known = record.setdefault("gguf", {}).get(path.name)
    if known and known["verdict"] in ("equal", "parted") and not damaged(folder, known):
        say(f"{path.name} kept: it is as it was when it was proven")
        return path
    temporary = folder / f".tmp-{os.getpid()}.gguf"
    with disk_errors("write the GGUF file", run.folder):
        folder.mkdir(exist_ok=True)
        for left in folder.glob(".tmp-*"):  # of one that was killed; this process holds the run's lock
            left.unlink()
        try:
            write_gguf(temporary, export / "merged", kind, name)
            proof = prove(temporary, export / "merged", kind, questions_of(run), say)
            place = path.with_name(path.name + FAILED) if proof.verdict == "failed" else path
            temporary.chmod(0o644)
            sync(temporary)
            temporary.replace(place)
            files = [place]
            if proof.verdict != "failed":
                files += write_modelfile(place, export / "merged", run, say)
        finally:
            temporary.unlink(missing_ok=True)
        sync(folder)
    record["gguf"][path.name] = {
        "type": kind,
        **vars(proof),
        "sha256": {file.name: sha256_file(file) for file in files},
    }
    write_json(export / "export.json", record)
    tell(path, proof, say)
    return path


def tell(path: Path, proof: Proof, say: Say) -> None:
    """Say what the proof found. Raises VerificationError where it failed."""
    say(f"{path.name} {proof.line()}")
    if proof.verdict == "failed":
        where = str(path.with_name(path.name + FAILED))
        raise VerificationError(f"the GGUF file is not good: {proof.reason}", where=where, todo=TO_DO)
    if proof.verdict == "not tried":
        say(f"nothing is known of it before it was: recipe export {path.parents[2]} --check")


def write_modelfile(path: Path, merged: Path, run: TrainedRun, say: Say) -> list[Path]:
    """Write the Modelfile of a GGUF file beside it; return it, or nothing for a chat template of no known family."""
    context = context_of(merged)
    unknown = vocabulary_of(merged).model == "llama" and not run.tokenizer.eos_ids
    text = modelfile(path.name, run.tokenizer, run.config.eval, context, run.config.data.system_prompt, unknown)
    if text is None:
        say("no Modelfile: its chat template is none that is known here in Ollama's language")
        return []
    beside = path.with_suffix(".Modelfile")
    write_atomic(beside, text)
    return [beside]


def check_again(export: Path, record: dict[str, Any], run: TrainedRun, say: Say) -> None:
    """Prove the GGUF files of an export again, as they lie on the disk, and put the outcome into export.json."""
    faults = []
    for name, known in record.get("gguf", {}).items():
        folder = export / "gguf"
        if known["verdict"] == "failed":
            continue  # it is not there under its name
        found = damaged(folder, known)
        path = folder / name
        proof = (
            Proof("failed", found) if found else prove(path, export / "merged", known["type"], questions_of(run), say)
        )
        known |= vars(proof)
        say(f"{name} {proof.line()}")
        if proof.verdict == "failed":
            if path.is_file():
                path.replace(path.with_name(name + FAILED))
            faults.append(f"{name} is not good: {proof.reason}")
        elif proof.verdict == "not tried":
            faults.append(f"{name} could not be read: {proof.reason}")
    write_json(export / "export.json", record)
    if faults:
        raise VerificationError("; ".join(faults), where=str(export / "gguf"), todo=TO_DO)
