"""The figures of a run, as its folder has them: what is graded, recorded and compared.

A board's host has no numpy: what needs it is imported where it is used, and grading a board's run does not.
"""

from __future__ import annotations

import hashlib
import json
import statistics
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from common import config as configs
from common.config import Config
from common.errors import MachineError, UsageError
from common.train import metrics
from common.train.manifest import FORMAT

if TYPE_CHECKING:
    from common.train.evaluate import HeldOut

WARM_UP = 5  # steps whose speed does not count: compilation, caches, the first touch of memory
HISTORY = ("step", "loss", "lr", "grad_norm", "tokens", "supervised_tokens")  # of a step's record: all but its seconds


@dataclass(frozen=True)
class RunFigures:
    """A run's folder, config and manifest, and its records.

    `steps` and `scores` are metrics.jsonl's records of updates and of evaluations, by step; `evaluations` are those of
    evaluations.jsonl, with every held-out row.
    """

    folder: Path
    config: Config
    manifest: Mapping[str, Any]
    steps: Mapping[int, Mapping[str, Any]]
    scores: Mapping[int, Mapping[str, Any]]
    evaluations: Sequence[Mapping[str, Any]]

    @property
    def last_step(self) -> int:
        return max(self.steps)

    @property
    def losses(self) -> dict[int, float]:
        """Training loss by step, nats a token."""
        return {step: record["loss"] for step, record in self.steps.items()}

    def held_out(self, step: int) -> HeldOut | None:
        """The held-out rows as evaluated after `step`."""
        from common.train.evaluate import from_rows

        found = [record for record in self.evaluations if record["step"] == step]
        return from_rows(found[-1]["nll"], found[-1]["tokens"]) if found else None

    @property
    def tokens_per_second(self) -> float | None:
        """The median of the steps after warm-up: what other programs do for a moment does not move it."""
        rates = [record["tokens"] / record["seconds"] for step, record in self.steps.items() if step > WARM_UP]
        return statistics.median(rates) if rates else None

    @property
    def image(self) -> str | None:
        """Digest or id of the image that the run was in; None for the machine's own Python."""
        image = self.manifest.get("image")
        return str(image["reference"]) if image else None

    @property
    def environment(self) -> dict[str, Any]:
        """What fixes a CPU run's bits besides its config and data; None where the manifest does not say."""
        engine = self.manifest.get("backend", {})
        return {
            "lock_sha256": self.manifest.get("lock_sha256"),
            "cpu_class": self.manifest.get("cpu_class"),
            "threads": engine.get("threads"),
            "world": engine.get("world"),
            "compiled": engine.get("compiled"),
        }

    @property
    def history_sha256(self) -> str:
        """Over the records of every step and evaluation at full precision, their seconds and answers left out."""
        steps = [[record[key] for key in HISTORY] for record in self.steps.values()]
        evaluations = [[record["step"], record["nll"], record["tokens"]] for record in self.evaluations]
        return hashlib.sha256(json.dumps([steps, evaluations]).encode()).hexdigest()

    @property
    def weights_sha256(self) -> str:
        """Of the weights file in the last checkpoint that verifies. Raises MachineError where there is none."""
        from common.train import checkpoint

        skipped: list[str] = []
        found = checkpoint.newest(self.folder / "checkpoints", skipped)
        if found is None:
            raise MachineError("the run has no checkpoint that verifies", where=str(self.folder))
        hashes = found.state["sha256"]
        return str(hashes.get("adapter_model.safetensors") or hashes["model.safetensors"])


def read(folder: Path) -> RunFigures:
    """The figures of the run in `folder`. Raises UsageError where there is none, or it has no step yet."""
    folder = folder.resolve()
    try:
        manifest = json.loads((folder / "manifest.json").read_text(encoding="utf-8"))
        config = configs.load_resolved(folder / "config.resolved.yaml")
    except OSError:
        raise UsageError("no run there", where=str(folder), todo="give a folder of runs/") from None
    except ValueError as error:
        raise MachineError(f"manifest.json is not JSON: {error}", where=str(folder)) from None
    if manifest.get("format") != FORMAT:
        raise MachineError(
            f"manifest.json has format {manifest.get('format')!r}, this version reads {FORMAT}", where=str(folder)
        )
    records = metrics.read(folder / "metrics.jsonl")
    steps = {record["step"]: record for record in records if "loss" in record}
    scores = {record["step"]: record for record in records if "eval_loss" in record}
    if not steps:
        raise UsageError("the run has no step yet: there is nothing to look at", where=str(folder))
    return RunFigures(folder, config, manifest, steps, scores, metrics.read(folder / "evaluations.jsonl"))
