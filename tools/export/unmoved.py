"""Did training move every parameter? One that is bit for bit where it started was frozen, by design or by rounding."""

from __future__ import annotations

import numpy as np

from common.train.checkpoint import read_tensors
from common.train.console import Console
from common.train.manifest import Manifest
from tools.export.hf_folder import stored
from tools.runs.trained import TrainedRun

NAMED = 5  # tensors that the line names; the manifest has all


def report_unmoved(run: TrainedRun, manifest: Manifest, console: Console) -> None:
    """Say which trained tensors of a run never moved, and put them into its manifest."""
    found, count = unmoved(run)
    if found:
        more = f" and {len(found) - NAMED} more" if len(found) > NAMED else ""
        console.warn(f"never moved, of {count} trained tensors: {', '.join(found[:NAMED])}{more}")
    else:
        console.say(f"every one of {count} trained tensors moved")
    manifest.never_moved = found
    manifest.save(run.folder)


def unmoved(run: TrainedRun) -> tuple[list[str], int]:
    """Return the names of trained tensors that equal their value before training, and how many were looked at.

    Of an adapter, B is looked at, which starts at zero.
    """
    now, start = read_tensors(run.checkpoint.folder), run.base.weights()
    names = [name.removeprefix("model/") for name in now if name.startswith("model/")]
    names = [name for name in names if not name.endswith("lora_A.weight")]
    still = []
    for name in names:
        value = now[f"model/{name}"]
        before = np.zeros_like(value) if name.endswith("lora_B.weight") else start[name]
        if np.array_equal(value, stored(before, run.config.training.precision)):
            still.append(name)
    return still, len(names)
