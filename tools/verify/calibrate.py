"""`recipe verify calibrate`: each line of `recipe verify run` fails where its defect is planted.

A check that cannot fail proves nothing. A tiny run is trained here, found sound, and then spoilt in one way after the
other; for every way, the line that is there for it must fail.
"""

from __future__ import annotations

import dataclasses
import json
import subprocess
import sys
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from common.data.tokens import Batch
from common.errors import VerificationError
from common.files import write_atomic, write_json
from common.model.llama import EMBEDDING
from common.paths import ROOT
from common.train import checkpoint, metrics
from engines.ttml.hf_map import to_pairs
from tools.checklist import Result
from tools.verify.run import LINES, verify
from tools.verify.specimen import Specimen, edit_tensors, newest_checkpoint, rehash, specimen
from tools.verify.tiny_base import HEADS

FORMAT = 1  # of the JSON


@dataclass(frozen=True)
class Defect:
    """`plant` returns a run that has it; the line `caught_by` must fail on that run."""

    says: str
    caught_by: str
    plant: Callable[[Specimen], Path]


@dataclass(frozen=True)
class DefectResult:
    """Whether a planted defect was caught, by which line, with the line's evidence."""

    defect: str
    line: str
    caught: bool
    evidence: str


# --- on the way to the engine -----------------------------------------------------------------------------------------


def labels_shifted_twice(made: Specimen) -> Path:
    """Train with labels one token too far on."""

    def spoil(batch: Batch) -> Batch:
        labels = np.ascontiguousarray(np.roll(batch.labels, -1, axis=1))
        return Batch(batch.input_ids, labels, batch.loss_mask, batch.rows)

    return made.again(spoil)


def mask_all_ones(made: Specimen) -> Path:
    """Train on every position, padding too."""
    return made.again(lambda b: Batch(b.input_ids, b.labels, np.ones_like(b.loss_mask), b.rows))


def leak(made: Specimen) -> Path:
    """Train on rows whose prompts are held out, too."""
    return made.again(lambda batch: batch, "data_config.source=leaky.jsonl")


# --- in the tensors ---------------------------------------------------------------------------------------------------


def in_export(change: Callable[[dict[str, Any]], None]) -> Callable[[Specimen], Path]:
    """Return a planter of defects in the exported weights, whose hash is then that of the damaged file."""

    def plant(made: Specimen) -> Path:
        run = made.copy()
        edit_tensors(run / "export" / "merged" / "model.safetensors", change)
        return run

    return plant


def swap_rope_rows(tensors: dict[str, Any]) -> None:
    """Put the rows of the queries in the order of an engine that turns neighbors; keys stay as they are."""
    for name in [name for name in tensors if "q_proj" in name]:
        tensors[name] = np.ascontiguousarray(to_pairs(tensors[name], HEADS))


def swap_keys_and_values(tensors: dict[str, Any]) -> None:
    """Give each layer's keys the weights of its values, and the other way round."""
    for name in [name for name in tensors if "k_proj" in name]:
        other = name.replace("k_proj", "v_proj")
        tensors[name], tensors[other] = tensors[other], tensors[name]


def change_embedding(tensors: dict[str, Any]) -> None:
    """Change one weight of the embedding, which adapters leave alone, by one bit."""
    # The least change there is, of one weight: a check of frozen weights by a tolerance would miss it.
    tensors[EMBEDDING][7, 7] = np.nextafter(tensors[EMBEDDING][7, 7], 1, dtype=tensors[EMBEDDING].dtype)


def stale_checkpoint(made: Specimen) -> Path:
    """Give the last checkpoint the weights of an earlier one, under hashes that agree."""
    run = made.copy()
    last = newest_checkpoint(run) / "adapter_model.safetensors"
    older = checkpoint.folder_of(run / "checkpoints", checkpoint.steps_saved(run / "checkpoints")[-1])
    last.write_bytes((older / last.name).read_bytes())
    rehash(last)
    return run


def adapter_that_never_moved(made: Specimen) -> Path:
    """Set one B of the last checkpoint back to the zeros it began with."""

    def change(tensors: dict[str, Any]) -> None:
        name = next(name for name in tensors if name.endswith("lora_B.weight"))
        tensors[name] = np.zeros_like(tensors[name])

    run = made.copy()
    edit_tensors(newest_checkpoint(run) / "adapter_model.safetensors", change)
    return run


def damaged_file(made: Specimen) -> Path:
    """Add a byte to a file of the last checkpoint, whose hash stays that of before."""
    run = made.copy()
    with (newest_checkpoint(run) / "optimizer.safetensors").open("ab") as file:
        file.write(b"\0")
    return run


# --- in the records ---------------------------------------------------------------------------------------------------


def in_metrics(change: Callable[[list[dict[str, Any]]], None]) -> Callable[[Specimen], Path]:
    def plant(made: Specimen) -> Path:
        run = made.copy()
        records = metrics.read(run / "metrics.jsonl")
        change(records)
        write_atomic(run / "metrics.jsonl", "".join(json.dumps(record) + "\n" for record in records))
        return run

    return plant


def step_done_twice(records: list[dict[str, Any]]) -> None:
    """Leave the records as a resumption would that did not cut them back to the checkpoint."""
    at = next(n for n, record in enumerate(records) if record["step"] == 3 and "loss" in record)
    records.insert(at, records[at])


def summed_loss(records: list[dict[str, Any]]) -> None:
    """Write each step's loss as a sum over its tokens in place of the mean."""
    for record in records:
        if "loss" in record:
            record["loss"] *= record["supervised_tokens"]


def replicas_that_differ(made: Specimen) -> Path:
    """Write the hashes of two different devices into the manifest."""
    run = made.copy()
    manifest = json.loads((run / "manifest.json").read_text(encoding="utf-8"))
    manifest["backend"]["world"], manifest["replicas"] = 2, ["0" * 64, "1" * 64]
    write_json(run / "manifest.json", manifest)
    return run


DEFECTS: Sequence[Defect] = (
    Defect("RoPE rows swapped", "export", in_export(swap_rope_rows)),
    Defect("K and V swapped", "export", in_export(swap_keys_and_values)),
    Defect("labels shifted twice", "replay", labels_shifted_twice),
    Defect("mask all ones", "replay", mask_all_ones),
    Defect("stale checkpoint", "score", stale_checkpoint),
    Defect("a file that was damaged", "files", damaged_file),
    Defect("a step on record twice", "history", in_metrics(step_done_twice)),
    Defect("a loss that is a sum", "first-loss", in_metrics(summed_loss)),
    Defect("an adapter that never moved", "moved", adapter_that_never_moved),
    Defect("a frozen weight that changed by one bit", "frozen", in_export(change_embedding)),
    Defect("two devices with different weights", "replicas", replicas_that_differ),
    Defect("held-out prompts that are trained on", "leakage", leak),
)


def calibrate(defects: Sequence[Defect] = DEFECTS) -> Iterator[DefectResult]:
    """Plant each defect and look. Raises VerificationError where the run that has none is not found sound."""
    with specimen() as made:
        if unsound := [result for result in verify(made.sound) if result.verdict == "fail"]:
            raise VerificationError(
                f"the run without a defect fails {unsound[0].id}: {unsound[0].evidence}",
                where="recipe verify calibrate",
                todo="this machine or engine computes something else: do not train here, and report it",
            )
        for defect in defects:
            result = look(defect.plant(made), defect.caught_by)
            yield DefectResult(defect.says, defect.caught_by, result.verdict == "fail", result.evidence)
        yield sync_off(made)


def sync_off(made: Specimen) -> DefectResult:
    """Run two processes that do not sum their gradients, which the control of `verify ddp` must notice."""
    words = ["verify", "ddp", "--hw", "cpu-x2", "--recipe", str(made.root / "specimen"), "--steps", "2", "--json"]
    command = [sys.executable, "-m", "tools.cli", *words]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, check=False)
    try:
        lines = {line["id"]: line for line in json.loads(done.stdout)["lines"]}
    except ValueError:
        return DefectResult("sync off", "verify ddp", False, f"it did not run: {done.stderr.strip()[-300:]}")
    return DefectResult("sync off", "verify ddp", lines["control"]["verdict"] == "pass", lines["control"]["evidence"])


def look(run: Path, line: str) -> Result:
    """Return the verdict of one line alone."""
    alone = [dataclasses.replace(one, needs=()) for one in LINES if one.id == line]
    return verify(run, alone)[0]


def print_calibration(as_json: bool, say: Callable[[str], None]) -> None:
    """Print each defect as it is looked at, or all as one JSON object. Raises VerificationError if one is missed."""
    found = []
    for finding in calibrate():
        found.append(finding)
        if not as_json:
            say(f"{'caught' if finding.caught else 'MISSED'}  {finding.defect}, by {finding.line}: {finding.evidence}")
    if as_json:
        say(json.dumps({"format": FORMAT, "defects": [dataclasses.asdict(finding) for finding in found]}, indent=1))
    if missed := [finding.defect for finding in found if not finding.caught]:
        raise VerificationError(
            f"{len(missed)} of {len(found)} planted defects were not caught: {', '.join(missed)}",
            where="recipe verify calibrate",
            todo="do not rely on recipe verify run here, and report this",
        )
