"""A run that was trained, read from its folder: config, base, tokens, newest checkpoint, evaluations, engine."""

from __future__ import annotations

import contextlib
import json
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from common import config as configs
from common import hardware, models
from common.backends.base import Backend, open_backend, read_weights
from common.config import Config
from common.data import build
from common.data.text import ChatTokenizer
from common.data.tokens import TokenDataset
from common.errors import DataError, MachineError, UsageError
from common.train import checkpoint, metrics, resume
from common.train.checkpoint import Checkpoint, Tensors
from common.train.manifest import ROOT
from common.train.run import Run

Say = Callable[[str], None]


@dataclass(frozen=True)
class TrainedRun:
    """What a run left: everything that is done to it afterwards starts from this."""

    folder: Path
    config: Config
    manifest: Mapping[str, Any]
    base: models.Base
    tokenizer: ChatTokenizer
    checkpoint: Checkpoint
    open_dataset: TokenDataset | None = field(default=None, repr=False)

    @property
    def step(self) -> int:
        return self.checkpoint.step

    @property
    def recipe_dir(self) -> Path:
        """The recipe's folder, as far as it is known here."""
        return Path(self.manifest.get("recipe_dir") or ROOT / "recipes" / self.config.recipe)

    def dataset(self) -> TokenDataset:
        """The tokens this run was trained and evaluated on. Raises DataError when they cannot be had any more."""
        if self.open_dataset is not None:
            return self.open_dataset
        facts = self.manifest["data"]
        folder = models.home() / "tokens" / facts["source_key"][:16]
        try:
            dataset = TokenDataset.open(folder)
        except DataError:
            dataset = build.build(self.config, self.recipe_dir, self.tokenizer, models.home())
        if dataset.tokens_sha256 != facts["tokens_sha256"]:
            raise DataError(
                f"the data changed since this run: its tokens had sha256 {facts['tokens_sha256'][:12]}..., "
                f"now {dataset.tokens_sha256[:12]}...",
                where=str(self.recipe_dir),
                todo="bring back the rows of that time",
            )
        return dataset

    def evaluations(self) -> list[dict[str, Any]]:
        """The records of evaluations.jsonl, oldest first; step 0 is the untrained model."""
        return metrics.read(self.folder / "evaluations.jsonl")

    def evaluation(self, step: int) -> dict[str, Any] | None:
        """The record of one step."""
        return next((record for record in self.evaluations() if record["step"] == step), None)


def of_run(run: Run) -> TrainedRun:
    """A run that is still open, by what it saved last."""
    found = newest(run.folder, run.console.say)
    plan = run.plan
    assert plan.base is not None
    values = run.manifest.values
    return TrainedRun(run.folder, run.config, values, plan.base, plan.tokenizer, found, run.dataset)


def read(path: Path, say: Say) -> TrainedRun:
    """The run in the folder `path`, at its newest verified checkpoint, or at the checkpoint that `path` is.

    Raises UsageError when it is no run, MachineError when its checkpoints or its base are damaged or changed.
    """
    at = path.resolve()
    folder = at.parent.parent if (at / "state.json").is_file() else at
    refuse_other_folders(folder)
    found = checkpoint.verify(at) if folder != at else newest(folder, say)
    config = configs.load_resolved(folder / "config.resolved.yaml")
    try:
        manifest = json.loads((folder / "manifest.json").read_text(encoding="utf-8"))
    except (OSError, ValueError) as error:
        raise MachineError(f"manifest.json cannot be read ({type(error).__name__})", where=str(folder)) from error
    base = find_base(config, manifest, say)
    tokenizer = ChatTokenizer.load(base.folder)
    if tokenizer.sha256 != manifest["tokenizer_sha256"]:
        raise MachineError("the base's tokenizer or chat template changed since this run", where=str(base.folder))
    return TrainedRun(folder, config, manifest, base, tokenizer, found)


def is_run(folder: Path) -> bool:
    return (folder / "config.resolved.yaml").is_file()


def refuse_other_folders(folder: Path) -> None:
    if not is_run(folder):
        raise UsageError("no run there", where=str(folder), todo="give a folder of runs/")


def newest(folder: Path, say: Say) -> Checkpoint:
    """The newest checkpoint that verifies; says what it passed over."""
    found = resume.newest(folder, say)
    if found is None:
        raise MachineError("the run has no checkpoint that verifies", where=str(folder), todo="train it again")
    return found


def find_base(config: Config, manifest: Mapping[str, Any], say: Say) -> models.Base:
    """The base the run started from. Raises MachineError if its weights are others now."""
    name = config.model.base or ""
    known = name if name in models.locked() else manifest["base"]["origin"]
    base = models.resolve(known, say=say)
    if base.identity != manifest["base"]["identity"]:
        raise MachineError(
            "the base model's weights changed since this run",
            where=str(base.folder),
            todo="put back the weights it was trained from",
        )
    return base


@contextlib.contextmanager
def engine(run: TrainedRun, *, trained: bool = True) -> Iterator[Backend]:
    """The CPU engine with the run's model, or, unless `trained`, with its base; for evaluation and generation."""
    quiet = {"device.compile": "never", "training.optimizer.stochastic_rounding": False}
    if not trained:
        quiet["model.lora"] = None
    config = run.config.with_values(**quiet)
    with open_backend(hardware.get("cpu"), config) as backend:
        backend.build(run.base.architecture)
        if trained and not config.model.lora:
            # All weights are in the checkpoint; the optimizer's moments, twice as large, stay on the disk.
            backend.load(read_weights([run.checkpoint.folder / "model.safetensors"]))
        else:
            backend.load(read_weights(run.base.weight_files()))
        if trained and config.model.lora:
            backend.load_state(Tensors(run.checkpoint.folder))
        yield backend
