"""A run that was trained, read from its folder: config, base, tokens, newest checkpoint, evaluations, engine."""

from __future__ import annotations

import contextlib
import json
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from common import config as configs
from common import hardware
from common.config import Config
from common.data import build
from common.data.chat import ChatTokenizer
from common.data.tokens import TokenDataset, TokenSplit
from common.engine import Backend
from common.errors import DataError, MachineError, UsageError
from common.model import bases
from common.model.weights import Weights
from common.paths import ROOT
from common.recipe import load_dataset
from common.train import checkpoint, metrics, resume
from common.train.checkpoint import Checkpoint, Tensors
from common.train.evaluate import evaluated_rows, from_rows
from engines.registry import open_backend, refuse_without_engine

Say = Callable[[str], None]


@dataclass(frozen=True)
class TrainedRun:
    """What a run left: everything that is done to it afterwards starts from this."""

    folder: Path
    config: Config
    manifest: Mapping[str, Any]
    base: bases.Base
    tokenizer: ChatTokenizer
    checkpoint: Checkpoint

    @property
    def step(self) -> int:
        return self.checkpoint.step

    @property
    def recipe_dir(self) -> Path:
        """The recipe's folder, as far as it is known here."""
        return Path(self.manifest.get("recipe_dir") or ROOT / "recipes" / self.config.recipe)

    def dataset(self) -> TokenDataset:
        """The tokens this run was trained and evaluated on. Raises DataError when they cannot be had any more."""
        facts = self.manifest["data"]
        folder = bases.home() / "tokens" / facts["source_key"][:16]
        try:
            dataset = TokenDataset.open(folder)
        except DataError:
            parts = build.read_splits(load_dataset(self.recipe_dir)[0], self.config, self.recipe_dir)
            dataset = build.build(self.config, parts, self.tokenizer, self.base.folder, bases.home())
        if dataset.tokens_sha256 != facts["tokens_sha256"]:
            raise DataError(
                f"the data changed since this run: its tokens had sha256 {facts['tokens_sha256'][:12]}..., "
                f"now {dataset.tokens_sha256[:12]}...",
                where=str(self.recipe_dir),
                todo="bring back the rows of that time",
            )
        return dataset

    def held_out(self) -> TokenSplit:
        """The rows that this run evaluates."""
        return evaluated_rows(self.dataset(), self.config.eval)

    @property
    def evaluated_in(self) -> str:
        """What the run's held-out losses were computed in: fp32 on a CPU, bf16 on a board."""
        return "bf16" if self.manifest.get("backend", {}).get("backend") == "ttml" else "fp32"

    def evaluations(self) -> list[dict[str, Any]]:
        """The records of evaluations.jsonl, oldest first; step 0 is the untrained model."""
        return metrics.read(self.folder / "evaluations.jsonl")

    def evaluation(self, step: int) -> dict[str, Any] | None:
        """The record of one step."""
        return next((record for record in self.evaluations() if record["step"] == step), None)


def read(path: Path, say: Say) -> TrainedRun:
    """The run in the folder `path`, at its result (see `result`), or at the checkpoint that `path` is.

    Raises UsageError when it is no run, MachineError when its checkpoints or its base are damaged or changed.
    """
    at = path.resolve()
    folder = at.parent.parent if (at / "state.json").is_file() else at
    refuse_other_folders(folder)
    config = configs.load_resolved(folder / "config.resolved.yaml")
    found = checkpoint.verify(at) if folder != at else result(folder, config, say)
    try:
        manifest = json.loads((folder / "manifest.json").read_text(encoding="utf-8"))
    except (OSError, ValueError) as error:
        raise MachineError(f"manifest.json cannot be read ({type(error).__name__})", where=str(folder)) from error
    base = find_base(config, manifest, folder, say)
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


def result(folder: Path, config: Config, say: Say) -> Checkpoint:
    """The checkpoint that stands for the run: the newest that verifies; with keep_best, the best evaluated one."""
    found = newest(folder, say)
    if not config.checkpoint.keep_best:
        return found
    losses = {
        record["step"]: from_rows(record["nll"], record["tokens"]).loss
        for record in metrics.read(folder / "evaluations.jsonl")
        if 0 < record["step"] <= found.step
    }
    for step in sorted(losses, key=lambda step: (losses[step], step)):
        with contextlib.suppress(MachineError):  # not the best at the time, and pruned; or damaged
            return checkpoint.verify(checkpoint.folder_of(folder / "checkpoints", step))
    return found


def find_base(config: Config, manifest: Mapping[str, Any], folder: Path, say: Say) -> bases.Base:
    """What the run in `folder` started from. Raises MachineError if its weights are others now."""
    name = config.model.base or ""
    if config.model.init == "random":
        base = bases.random_base(config.model, config.training.seed, folder / "tokenizer")
    else:
        base = bases.resolve(name if name in bases.locked() else manifest["base"]["origin"], say=say)
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
    quiet: dict[str, Any] = {"device.compile": "never", "training.optimizer.stochastic_rounding": False}
    quiet |= {"device.mesh_shape": (1, 1), "device.enable_ddp": False}
    if not trained:
        quiet["model.lora"] = None
    config = run.config.with_values(**quiet)
    refuse_without_engine(hardware.get("cpu"), config)
    with open_backend(hardware.get("cpu"), config) as backend:
        backend.build(run.base.architecture)
        if trained and not config.model.lora:
            # All weights are in the checkpoint; the optimizer's moments, twice as large, stay on the disk.
            backend.load(Weights([run.checkpoint.folder / "model.safetensors"]))
        else:
            backend.load(run.base.weights())
        if trained and config.model.lora:
            backend.load_state(Tensors(run.checkpoint.folder))
        yield backend
