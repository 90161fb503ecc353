"""Did training move every parameter? One that is bit for bit where it started was frozen, by design or by rounding."""

from __future__ import annotations

import numpy as np

from common.train.checkpoint import Tensors
from common.train.run import Run
from tools.export.hf_folder import stored
from tools.runs import trained
from tools.runs.trained import TrainedRun

NAMED = 5  # tensors that the line names; the manifest has all


def report_unmoved(run: Run) -> list[str]:
    """Say which trained tensors of a run that is still open never moved, and put them into its manifest."""
    found, count = unmoved(trained.of_run(run))
    if found:
        more = f" and {len(found) - NAMED} more" if len(found) > NAMED else ""
        run.console.warn(f"never moved, of {count} trained tensors: {', '.join(found[:NAMED])}{more}")
    else:
        run.console.say(f"every one of {count} trained tensors moved")
    run.manifest.never_moved = found
    run.manifest.save(run.folder)
    return found


def unmoved(run: TrainedRun) -> tuple[list[str], int]:
    """Names of trained tensors that equal their value before training, and how many were looked at.

    Of an adapter, B is looked at, which starts at zero.
    """
    now, start = Tensors(run.checkpoint.folder), run.base.weights()
    names = [name.removeprefix("model/") for name in now if name.startswith("model/")]
    names = [name for name in names if not name.endswith("lora_A.weight")]
    still = []
    for name in names:
        value = now[f"model/{name}"]
        before = np.zeros_like(value) if name.endswith("lora_B.weight") else start[name]
        if np.array_equal(value, stored(before, run.config.training.precision)):
            still.append(name)
    return still, len(names)
