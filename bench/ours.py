"""Our side of the comparison: the recipe's training loop, timed from one step's end to the next one's."""

from __future__ import annotations

import argparse
import importlib.metadata
import json
import resource
import time
from pathlib import Path
from typing import Any

from common.engine import Backend
from common.train.plan import make_plan
from engines.registry import engine_for
from tools.launch.resolve import resolve
from tools.recipes import load_dataset


def watch_precision(backend: Any, evidence: dict[str, Any]) -> Any:
    """Return a hook that notes, at each forward pass, the dtypes in and out of the first layer's q_proj."""
    import torch

    projection = backend.model.model.layers[0].self_attn.q_proj

    def note(_module: Any, inputs: Any, output: Any) -> None:
        evidence.update(
            autocast=torch.is_autocast_enabled("cpu"),
            q_proj_in=str(inputs[0].dtype),
            q_proj_out=str(output.dtype),
            weights=str(projection.weight.dtype),
            adapters=str(projection.lora_A.dtype),
            threads=torch.get_num_threads(),
        )

    return projection.register_forward_hook(note)


def clocks() -> tuple[float, float]:
    """Return seconds of the wall and of this process's own work (all threads)."""
    return time.perf_counter(), time.process_time()


def measure(job: dict[str, Any]) -> dict[str, Any]:
    """Train the job's steps; return, per step, its seconds, rows, tokens and loss."""
    launch = resolve(Path(job["recipe"]), hw="cpu", overrides=tuple(job["set"]), steps=job["steps"])
    plan = make_plan(launch, *load_dataset(launch.recipe_dir), lambda _: None, lambda _: None)
    if plan.dataset.tokens_sha256 != job["tokens_sha256"]:
        raise SystemExit("the token files changed while the bench ran")
    config, rows = plan.config, plan.dataset.train
    steps, evidence = [], {}  # type: list[dict[str, float]], dict[str, Any]
    backend: Backend
    with engine_for(plan.hw).open_backend(plan.hw, config) as backend:
        backend.build(plan.base.architecture)
        backend.load(plan.base.weights())
        watch = watch_precision(backend, evidence)
        before = clocks()
        for step in range(1, job["steps"] + 1):
            batch = rows.batch(step, config.training.seed, config.training.batch_size)
            micro_batches = batch.split(config.accumulation)
            stats = backend.train_step(micro_batches, config.training.learning_rate, step)
            now = clocks()
            tokens = sum(len(rows.row(int(row)).ids) for row in batch.rows)
            taken = {"seconds": now[0] - before[0], "cpu_seconds": now[1] - before[1]}
            steps.append({**taken, "rows": len(batch.rows), "tokens": tokens, "loss": stats.loss})
            before = now
            watch.remove()  # after the first step, which does not count; removing again is harmless
        evidence |= {"compiled": backend.info.compiled, "first_loss": steps[0]["loss"]}
    packages = ("torch", "transformers", "tokenizers", "numpy", "peft")
    return {
        "steps": steps,
        "peak_rss_mb": resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1024,  # Linux counts in KiB
        "versions": {name: importlib.metadata.version(name) for name in packages},
        "evidence": evidence,
    }


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--job", type=Path, required=True)
    parser.add_argument("--out", type=Path, required=True)
    arguments = parser.parse_args()
    measured = measure(json.loads(arguments.job.read_text(encoding="utf-8")))
    arguments.out.write_text(json.dumps(measured), encoding="utf-8")
