"""Folders of runs as a run writes them, without training: what the pages and the commands about runs are tested on."""

from __future__ import annotations

import fcntl
import functools
import json
import math
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from common import config as configs
from common import hardware
from common.config import Config
from tests.doubles.tiny_recipe import FROM_SCRATCH as RECIPE

HELD_OUT = {"sha256": "e" * 64, "documents": ["a play"], "characters": 900}


@functools.cache
def config(*overrides: str) -> Config:
    values = {"training.precision": "fp32"}
    return configs.load(RECIPE, hardware.get("cpu"), overrides, 40).with_values(**values)


def write_run(
    out: Path,
    name: str = "20260101T000000Z-from_scratch-cpu-0000",
    *,
    steps: int = 40,
    every: int = 10,
    better: float = 0.0,
    overrides: Sequence[str] = (),
    checkpoints: Sequence[int] = (),
    **manifest: Any,
) -> Path:
    """A run of `steps` steps, evaluated `every` so many, its held-out loss lower by `better`. Returns its folder."""
    folder = out / name
    (folder / "checkpoints").mkdir(parents=True)
    facts = {
        "format": 1,
        "run": name,
        "recipe": RECIPE.name,
        "recipe_dir": str(RECIPE),
        "command": ["recipe", "run", RECIPE.name],
        "overrides": list(overrides),
        "start": "2026-01-01T00:00:00Z",
        "end": "2026-01-01T00:01:00Z",
        "exit_reason": "done",
        "hw": "cpu",
        "seed": 1,
        "steps": steps,
        "data": {
            "tokens_sha256": "a" * 64,
            "length": 128,
            "rows": {"train": 640, "held_out": 16},
            "tokens": {"train": 82560, "held_out": 2064},
            "supervised_share": 1.0,
            "rows_cut": 0,
            "corpus": {"held_out": HELD_OUT},
        },
        "tokenizer_sha256": "b" * 64,
        **manifest,
    }
    (folder / "manifest.json").write_text(json.dumps(facts), encoding="utf-8")
    (folder / "config.resolved.yaml").write_text(config(*overrides).to_yaml(), encoding="utf-8")
    (folder / "train.log").write_text("2026-01-01T00:00:00Z the first line\n2026-01-01T00:00:01Z the last line\n")
    entries = [evaluation(step, better if step else 0.0) for step in range(0, steps + 1, every)]
    records: list[dict[str, Any]] = []
    for step in range(steps + 1):
        records += [training(step)] if step else []
        records += [figures(entry) for entry in entries if entry["step"] == step]
    write_lines(folder / "metrics.jsonl", records)
    write_lines(folder / "evaluations.jsonl", entries)
    for step in checkpoints:
        write_checkpoint(folder, step)
    return folder


def training(step: int) -> dict[str, Any]:
    loss = 3.0 + 4.0 * math.exp(-step / 20) + 0.05 * math.sin(step)
    return {
        "step": step,
        "loss": loss,
        "lr": 1e-3 * (1 - step / 4000),
        "grad_norm": 1 / step,
        "tokens": 4096,
        "supervised_tokens": 4096,
        "seconds": 0.5,
    }


def evaluation(step: int, better: float) -> dict[str, Any]:
    """16 rows of 100 tokens; a run that is `better` is so on every row, by a little more or less."""
    loss = 3.1 + 4.0 * math.exp(-step / 20)
    nll = [100 * (loss + 0.3 * math.sin(row) - better * (1 + 0.1 * math.cos(row))) for row in range(16)]
    samples = [{"prompt": prompt, "answer": f"{prompt} at {step}", "tokens": 5} for prompt in ("ACT I.", "Romeo")]
    return {"step": step, "nll": nll, "tokens": [100.0] * 16, "samples": samples}


def figures(entry: dict[str, Any]) -> dict[str, Any]:
    loss = sum(entry["nll"]) / sum(entry["tokens"])
    bits = loss / math.log(2) / 2
    found = {"step": entry["step"], "eval_loss": loss, "eval_loss_se": 0.05, "eval_tokens": 1600}
    return {**found, "bits_per_byte": bits, "bits_per_byte_se": 0.02}


def write_checkpoint(folder: Path, step: int) -> Path:
    """A checkpoint that verifies, of no tensors."""
    found = folder / "checkpoints" / f"step-{step:08d}"
    found.mkdir()
    state = {"format": 1, "step": step, "training_digest": "c" * 64, "tokens_sha256": "a" * 64, "sha256": {}}
    (found / "state.json").write_text(json.dumps(state), encoding="utf-8")
    return found


def write_lines(path: Path, records: Sequence[dict[str, Any]]) -> None:
    path.write_text("".join(json.dumps(record) + "\n" for record in records), encoding="utf-8")


@contextmanager
def held(folder: Path) -> Iterator[None]:
    """As a process that is training holds its run."""
    with (folder / ".lock").open("a") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)
        yield
