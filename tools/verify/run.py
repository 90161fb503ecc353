"""`recipe verify run`: does what a run left hold together? Each line is a way in which training goes wrong silently.

`recipe verify calibrate` (calibrate.py) plants a defect for each line that a CPU can judge and sees it fail.
"""

from __future__ import annotations

import dataclasses
import functools
import math
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np

from common.data import build
from common.data.order import rows_of_step
from common.data.tokens import TokenDataset
from common.errors import DataError, UsageError, VerificationError
from common.files import sha256_file
from common.model.weights import Weights
from common.recipe import call
from common.train import metrics
from common.train.checkpoint import read_tensors
from common.train.evaluate import evaluated_rows, held_out
from common.train.first_loss import check_first_loss
from common.train.schedule import learning_rate
from tools.checklist import CheckEnded, ChecklistLine, Result, failed, go_through, hold, silent, to_json
from tools.data.checks import leaks
from tools.export import check
from tools.export.hf_folder import adapters_of, merged_shapes, stored
from tools.export.record import damaged, read_record
from tools.export.unmoved import unmoved
from tools.recipes import load_dataset
from tools.runs import trained
from tools.runs.folder import RunFolder, at_step, read_run
from tools.runs.trained import TrainedRun

if TYPE_CHECKING:
    import torch

# Nats a token between the recorded loss of step 1 and plain transformers' in fp32: the precision of the step. On the
# run of `recipe verify calibrate` on a CPU it was 5e-8 in fp32, 4e-4 in bf16-mixed, 2e-4 in bf16, and 0.018 with labels
# that are shifted twice: on so small a model that is seen in fp32 alone.
STEP_OFF = {"fp32": 1e-3, "bf16-mixed": 0.02, "bf16": 0.05}
# Between a held-out loss and the same again, by what computed it first. There the CPU gave the same bits again, and the
# weights of three steps earlier 0.11.
SCORE_OFF = {"fp32": 1e-3, "bf16": 0.02}


class Case:
    """A run to look at, read once, at its newest checkpoint."""

    def __init__(self, folder: Path) -> None:
        self.left: RunFolder = read_run(folder, strict=True)
        self.folder = self.left.folder

    @functools.cached_property
    def run(self) -> TrainedRun:
        found = trained.read(self.folder, lambda _line: None)
        return dataclasses.replace(found, checkpoint=found.newest_checkpoint(lambda _line: None))

    @property
    def precision(self) -> str:
        return self.run.config.training.precision


def checkpoints(case: Case) -> str:
    """Check that every file of the newest checkpoint has its hash, and that the metrics are those of the run's end."""
    skipped: list[str] = []
    found = case.left.newest_checkpoint(skipped.append)
    hold(not skipped, "; ".join(skipped))
    recorded = case.left.manifest.metrics_sha256
    same = recorded in (None, sha256_file(case.folder / "metrics.jsonl"))
    hold(same, "metrics.jsonl is not the file that the run closed")
    return f"{found.folder.name}: {len(found.state['sha256'])} files as they were written"


def history(case: Case) -> str:
    """Check that steps 1, 2, 3, ... are there once each, at the schedule's learning rate, across every resumption."""
    steps = [record["step"] for record in metrics.read(case.folder / "metrics.jsonl") if "loss" in record]
    odd = next((n for n, step in enumerate(steps, 1) if step != n), None)
    hold(odd is None, f"record {odd} is of step {steps[(odd or 1) - 1]}")
    training = case.left.config.training
    other = [r["step"] for r in case.left.steps if r["lr"] != learning_rate(r["step"], training)]
    resumed = [event.step for event in case.left.manifest.resumed]
    accepted = any("accepted" in note for event in case.left.manifest.resumed for note in event.notes)
    hold(not other or accepted, f"the learning rate of step {(other or [0])[0]} is not the schedule's")
    return f"steps 1 to {steps[-1]}, each once" + (f"; resumed after {', '.join(map(str, resumed))}" if resumed else "")


def first_loss(case: Case) -> str:
    """Check that a model that knows nothing scores ln(vocabulary), and a pretrained one no worse."""
    loss, run = case.left.losses[1], case.run
    if run.base.initial:
        try:
            return check_first_loss(loss, run.base.initial, run.dataset().train.arrays.ids)
        except VerificationError as error:
            raise CheckEnded("fail", error.what) from None
    guess = math.log(run.base.architecture["vocab_size"])
    return hold(loss <= guess + 0.5, f"{loss:.4f} nats at step 1; guessing costs ln(vocabulary) = {guess:.2f}")


def replay(case: Case) -> str:
    """Compute step 1 by plain transformers: the same rows, their own mask and labels, the weights before training."""
    need_transformers()
    run, record = case.run, at_step(case.left.steps, 1)
    if record is None or case.left.manifest.parent:
        raise CheckEnded("not checkable", "step 1 was another run's")
    train = dataset_of(case).train
    rows = rows_of_step(1, run.config.training.seed, run.config.training.batch_size, len(train))
    found = check.plain_nll(untrained(run), train, rows.tolist())
    count, expected = record["supervised_tokens"], int(found.tokens.sum())
    hold(count == expected, f"step 1 counted {count} supervised tokens, its rows have {expected}")
    allowed, far = STEP_OFF[case.precision], abs(found.loss - record["loss"])
    evidence = f"{record['loss']:.5f} nats at step 1, plain transformers {found.loss:.5f}: {far:.1e} apart"
    return hold(far <= allowed, f"{evidence}, {allowed:g} allowed")


def score(case: Case) -> str:
    """Check that the newest checkpoint scores on the held-out rows what the run wrote down for its step."""
    need_transformers()
    run = case.run
    rows = case.left.held_out(run.step)
    if rows is None:
        raise CheckEnded("not checkable", f"the run did not evaluate step {run.step}")
    split = evaluated_rows(dataset_of(case), run.config.eval)
    with trained.engine(run) as backend:
        again = held_out(backend, split)
    allowed, far = SCORE_OFF[run.evaluated_in], abs(again.loss - rows.loss)
    evidence = f"{run.checkpoint.folder.name} scores {again.loss:.5f}, the run wrote {rows.loss:.5f}: {far:.1e} apart"
    return hold(far <= allowed, f"{evidence}, {allowed:g} allowed")


def moved(case: Case) -> str:
    """Check that training moved every tensor that it trains."""
    still, count = unmoved(case.run)
    return hold(not still, f"{len(still)} of {count} trained tensors never moved: {', '.join(still[:5]) or 'none'}")


def frozen(case: Case) -> str:
    """Check that what adapters do not touch is the base's, bit for bit, in the export."""
    run, file = case.run, case.folder / "export" / "merged" / "model.safetensors"
    if run.config.model.lora is None:
        raise CheckEnded("not checkable", "all weights are trained: nothing is frozen")
    strange = [
        name for name in read_tensors(run.checkpoint.folder) if name.startswith("model/") and ".lora_" not in name
    ]
    hold(not strange, f"the checkpoint of adapters holds other weights: {', '.join(strange[:5])}")
    if not file.is_file():
        raise CheckEnded("not checkable", "no export to look at")
    base, merged, adapted = run.base.weights(), Weights([file]), adapters_of(run)
    names = [name for name in merged_shapes(run) if name.removesuffix(".weight") not in adapted]
    other = [
        name
        for name in names
        if not np.array_equal(merged[name], stored(base[name], case.precision).astype(merged[name].dtype))
    ]
    return hold(not other, f"of {len(names)} frozen tensors {len(other)} differ from the base: {', '.join(other[:5])}")


def replicas(case: Case) -> str:
    """Check that every device held the same weights when training ended, as the manifest has their hashes."""
    manifest, engine = case.left.manifest, case.left.backend
    if engine.world == 1:
        raise CheckEnded("not checkable", "one device")
    if notes := [note for note in engine.notes if note.startswith("replicas: not checkable")]:
        raise CheckEnded("not checkable", notes[0])
    if not (hashes := manifest.replicas):
        raise CheckEnded("not checkable", "the run did not reach its end, where devices are compared")
    return hold(len(set(hashes)) == 1, f"{len(hashes)} devices hold {len(set(hashes))} different sets of weights")


def exported(case: Case) -> str:
    """Check that the export computes what the run computed, asked of plain transformers and PEFT."""
    need_transformers()
    folder = case.folder / "export"
    record = read_record(folder)
    if record is None:
        raise CheckEnded("not checkable", "the run has no export")
    hold(not (damage := damaged(folder, record)), damage)
    run = trained.read(case.folder / "checkpoints" / f"step-{record['step']:08d}", lambda _line: None)
    outcome = check.check(folder, run, record["dtype"])
    if outcome.status == "unverified":
        raise CheckEnded("not checkable", outcome.reason)
    return hold(outcome.status == "verified", outcome.reason or outcome.line())


def leakage(case: Case) -> str:
    """Check that no held-out or evaluation prompt was trained on."""
    run = case.run
    dataset_of(case)  # the rows of now are those of the run
    try:
        splits, prompts = load_dataset(run.recipe_dir)
        rows = build.read_splits(splits, run.config, run.recipe_dir)
        asked = call(prompts, run.config, run.recipe_dir)
    except (DataError, UsageError) as error:
        raise CheckEnded("not checkable", f"the recipe cannot be read here: {error.what}") from None
    if run.config.data.corpus:
        train, kept = ({document.text for document in part} for part in rows.values())
        return hold(not train & kept, f"{len(train & kept)} of {len(kept)} held-out texts are trained on")
    found = [finding for finding in leaks(rows["train"], rows["held_out"], asked) if finding.is_error]
    says = "; ".join(f"{finding.message} ({len(finding.where)}: {finding.where[0]})" for finding in found)
    return hold(
        not found, says or f"none of {len(rows['held_out'])} held-out rows is among {len(rows['train'])} trained"
    )


def dataset_of(case: Case) -> TokenDataset:
    """Return the run's tokens. Raises CheckEnded where they are not here."""
    try:
        return case.run.dataset()
    except DataError as error:
        raise CheckEnded("not checkable", f"the run's data is not here: {error.what}") from None


def need_transformers() -> None:
    """Raise CheckEnded, not checkable, where torch, transformers or peft is not installed."""
    if missing := check.missing_packages():
        raise CheckEnded("not checkable", f"no {missing} here")


def untrained(run: TrainedRun) -> torch.nn.Module:
    """Return the model before its first update, as plain transformers have it, in fp32."""
    import torch
    import transformers

    half = run.config.training.precision == "bf16"
    if run.base.initial is None:
        return check.load_plain(run.base.folder, half)
    model: torch.nn.Module = transformers.LlamaForCausalLM(transformers.LlamaConfig.from_dict(run.base.architecture))
    weights = run.base.weights()
    tensors = {name: torch.from_numpy(stored(weights[name], "fp32")) for name in weights}
    model.load_state_dict(tensors, strict=False)  # a tied head is in no file; the next line makes it the embedding
    model.tie_weights()  # type: ignore[operator]
    return (model.bfloat16().float() if half else model).eval()


LINES: Sequence[ChecklistLine] = (
    ChecklistLine("files", "what was saved is whole", checkpoints),
    ChecklistLine("history", "every step is on record once, at its learning rate", history),
    ChecklistLine("first-loss", "training began where it must", first_loss),
    ChecklistLine("replay", "step 1 is what plain transformers compute", replay, ("files",)),
    ChecklistLine("score", "the newest checkpoint is the model that was evaluated", score, ("files",)),
    ChecklistLine("moved", "training moved every trained tensor", moved, ("files",)),
    ChecklistLine("frozen", "and nothing else", frozen, ("files",)),
    ChecklistLine("replicas", "all devices hold the same weights", replicas),
    ChecklistLine("export", "the export computes what the run computed", exported, ("files",)),
    ChecklistLine("leakage", "nothing that is measured was trained on", leakage, ("files",)),
)


def verify(
    folder: Path, lines: Sequence[ChecklistLine] | None = None, say: Callable[[str], None] = silent
) -> list[Result]:
    """Check the run in `folder` by `lines`, or all of them. Raises UsageError where there is no run."""
    return go_through(LINES if lines is None else lines, Case(folder), say)


def print_verification(folder: Path, as_json: bool, say: Callable[[str], None]) -> None:
    """Print each line as it ends, or all as one JSON object. Raises VerificationError if one fails."""
    results = verify(folder, say=silent if as_json else say)
    if as_json:
        say(to_json(results, run=folder.resolve().name))
    if bad := failed(results):
        raise VerificationError(
            f"{len(bad)} of {len(results)} lines failed: {', '.join(bad)}",
            where=str(folder),
            todo="do not trust this run's numbers or its export before that is understood",
        )
