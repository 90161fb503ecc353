"""Our side of the comparison: the recipe's training loop, timed from one step's end to the next one's."""

from __future__ import annotations

import argparse
import contextlib
import importlib.metadata
import json
import resource
import time
from collections import Counter
from collections.abc import Iterator
from pathlib import Path
from typing import Any
from unittest import mock

from bench.floor import gflop, products_of, seconds
from common.data.tokens import Batch
from common.train.plan import make_plan
from engines.registry import engine_for
from tools.launch.resolve import resolve
from tools.recipes import load_dataset


@contextlib.contextmanager
def watched_precision(backend: Any, evidence: dict[str, Any]) -> Iterator[None]:
    """Note, within, the dtypes in and out of the first layer's q_proj, and how many threads compute."""
    import torch

    from engines.cpu import blocks

    projection, forward = backend.model.model.layers[0].self_attn.q_proj, blocks.Linears.forward

    def noted(linears: Any, x: Any, layers: slice) -> Any:
        found = forward(linears, x, layers)
        evidence.setdefault("q_proj_in", str(x.dtype))
        evidence.setdefault("q_proj_out", str(found[0].dtype))
        evidence["autocast"], evidence["threads"] = torch.is_autocast_enabled("cpu"), torch.get_num_threads()
        return found

    with mock.patch.object(blocks.Linears, "forward", noted):
        yield
    evidence["weights"] = str(projection.weight.dtype)
    if hasattr(projection, "lora_A"):
        evidence["adapters"] = str(projection.lora_A.dtype)


def clocks() -> tuple[float, float]:
    """Return seconds of the wall and of this process's own work (all threads)."""
    return time.perf_counter(), time.process_time()


def floor_of(backend: Any, micro_batches: list[Batch]) -> dict[str, float]:
    """Return the arithmetic of a step's matrix products, in 1e9 operations, and how long they take by themselves."""
    import torch

    products = sum((products_of(backend, batch) for batch in micro_batches), Counter())
    dtype = torch.bfloat16 if backend.mixed else backend.model.dtype
    return {"gflop": gflop(products), "seconds": seconds(products, dtype)}


def measure(job: dict[str, Any]) -> dict[str, Any]:
    """Train the job's steps; return, per step, its seconds, rows, tokens and loss."""
    launch = resolve(Path(job["recipe"]), hw="cpu", overrides=tuple(job["set"]), steps=job["steps"])
    plan = make_plan(launch, *load_dataset(launch.recipe_dir), lambda _: None, lambda _: None)
    if plan.dataset.tokens_sha256 != job["tokens_sha256"]:
        raise SystemExit("the token files changed while the bench ran")
    config, rows = plan.config, plan.dataset.train
    steps, evidence = [], {}  # type: list[dict[str, float]], dict[str, Any]
    backend: Any
    with engine_for(plan.hw).open_backend(plan.hw, config) as backend:
        backend.build(plan.base.architecture)
        backend.load(plan.base.weights())
        before = clocks()
        for step in range(1, job["steps"] + 1):
            batch = rows.batch(step, config.training.seed, config.training.batch_size)
            micro_batches = batch.split(config.accumulation)
            # In the first step, which does not count.
            with watched_precision(backend, evidence) if step == 1 else contextlib.nullcontext():
                stats = backend.train_step(micro_batches, config.training.learning_rate, step)
            now = clocks()
            tokens = sum(len(rows.row(int(row)).ids) for row in batch.rows)
            taken = {"seconds": now[0] - before[0], "cpu_seconds": now[1] - before[1]}
            steps.append({**taken, "rows": len(batch.rows), "tokens": tokens, "loss": stats.loss})
            before = now
        trained = sum(p.numel() for p in backend.trained.values())
        evidence |= {"compiled": backend.info.compiled, "first_loss": steps[0]["loss"], "trained_parameters": trained}
        peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1024  # Linux counts in KiB
        floor = floor_of(backend, micro_batches)
    packages = ("torch", "transformers", "tokenizers", "numpy", "peft")
    return {
        "steps": steps,
        "peak_rss_mb": peak,
        "floor": floor,
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
