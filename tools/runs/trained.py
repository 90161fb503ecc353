"""A run's result opened again: its base, its tokenizer, its tokens, and the engine with its model."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from common import hardware
from common.data import build
from common.data.chat import ChatTokenizer
from common.data.tokens import TokenDataset, TokenSplit
from common.engine import Backend
from common.errors import DataError, MachineError, UsageError
from common.model import bases
from common.model.weights import Weights
from common.train import checkpoint
from common.train.checkpoint import Checkpoint, read_tensors
from common.train.evaluate import evaluated_rows
from engines.registry import engine_for
from tools.data.fetch import base_of
from tools.recipes import load_dataset
from tools.runs.folder import RunFolder, Say, read_run, run_of


@dataclass(frozen=True, kw_only=True)
class TrainedRun(RunFolder):
    """A run with what its result stands on: everything that is done to it afterwards starts from this."""

    base: bases.Base
    tokenizer: ChatTokenizer
    checkpoint: Checkpoint

    @property
    def step(self) -> int:
        return self.checkpoint.step

    def dataset(self) -> TokenDataset:
        """Return the tokens this run was trained and evaluated on. Raises DataError where they cannot be had."""
        facts = self.manifest.data
        try:
            dataset = TokenDataset.open(bases.home() / "tokens" / facts.source_key[:16])
        except DataError:
            dataset = self._build_again()
        if dataset.tokens_sha256 != facts.tokens_sha256:
            raise DataError(
                f"the data changed since this run: its tokens had sha256 {facts.tokens_sha256[:12]}..., "
                f"now {dataset.tokens_sha256[:12]}...",
                where=str(self.recipe_dir),
                todo="bring back the rows of that time",
            )
        return dataset

    def _build_again(self) -> TokenDataset:
        try:
            recipe = self.recipe_dir
        except UsageError as error:
            raise DataError(error.what, where=str(self.folder), todo="bring back the recipe of the run") from None
        parts = build.read_splits(load_dataset(recipe)[0], self.config, recipe)
        return build.build(self.config, parts, self.tokenizer, self.base.folder, bases.home())

    def held_out_split(self) -> TokenSplit:
        """Return the rows that this run evaluates."""
        return evaluated_rows(self.dataset(), self.config.eval)


def read(path: Path, say: Say) -> TrainedRun:
    """Return the run in the folder `path`, at its result, or at the checkpoint that `path` is.

    Raises UsageError when it is no run, MachineError when its checkpoints or its base are damaged or changed.
    """
    at = path.resolve()
    folder = run_of(at)
    run = read_run(folder)
    found = run.result(say) if folder == at else checkpoint.verify(at)
    base = find_base(run, say)
    tokenizer = ChatTokenizer.load(base.folder)
    if tokenizer.sha256 != run.manifest.tokenizer_sha256:
        raise MachineError("the base's tokenizer or chat template changed since this run", where=str(base.folder))
    return TrainedRun(run.folder, base=base, tokenizer=tokenizer, checkpoint=found)


def find_base(run: RunFolder, say: Say) -> bases.Base:
    """Return what a run started from. Raises MachineError if its weights are others now."""
    model, was = run.config.model, run.manifest.base
    if model.init == "random":
        base = bases.random_base(model, run.config.training.seed, run.folder / "tokenizer")
    else:
        recipe = run.known_recipe_dir
        name = model.base if model.base in bases.locked(recipe) else was.origin
        base = base_of(name, say, recipe)
    if base.identity != was.identity:
        raise MachineError(
            "the base model's weights changed since this run",
            where=str(base.folder),
            todo="put back the weights it was trained from",
        )
    return base


@contextlib.contextmanager
def engine(run: TrainedRun, *, trained: bool = True) -> Iterator[Backend]:
    """Open the CPU engine with the run's model, or, unless `trained`, with its base; for evaluation and generation."""
    # Wherever it was trained: one process, without what the CPU engine refuses, and nothing compiled for a few calls.
    quiet: dict[str, Any] = {"device.compile": "never", "training.optimizer.stochastic_rounding": False}
    quiet |= {"device.mesh_shape": (1, 1), "device.enable_ddp": False}
    if not trained:
        quiet["model.lora"] = None
    config = run.config.with_values(**quiet)
    cpu = hardware.get("cpu")
    with engine_for(cpu).open_backend(cpu, config) as backend:
        backend.build(run.base.architecture)
        if trained and not config.model.lora:
            # All weights are in the checkpoint; the optimizer's moments, twice as large, stay on the disk.
            backend.load(Weights([run.checkpoint.folder / "model.safetensors"]))
        else:
            backend.load(run.base.weights())
        if trained and config.model.lora:
            backend.load_state(read_tensors(run.checkpoint.folder))
        yield backend
