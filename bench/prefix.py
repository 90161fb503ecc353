"""What it saves to compute once what the rows of a batch begin with, and how near a step is to its matrix products.

    .venv/bin/python -m bench.prefix [--set training_config.precision=fp32]

The same steps with beginnings shared and with each row by itself, in turns in one process, on the recipe's own rows and
on rows that begin with a long system prompt (made up: 300 of 400 tokens), `--rows` of them a step: of 8, sharing leaves
1,100 of 3,200 tokens to compute, of 16 it leaves 1,900 of 6,400. Writes results/prefix.json.
"""

from __future__ import annotations

import argparse
import functools
import json
import statistics
import time
from collections.abc import Callable
from typing import Any
from unittest import mock

import numpy as np
import torch

from bench import floor
from bench.throughput import BENCH, machine
from common.data.order import random_words
from common.data.tokens import Arrays, Batch, TokenSplit
from common.train.plan import make_plan
from engines.cpu import ragged
from engines.cpu.ragged import Layout
from engines.registry import engine_for
from tools.data.fetch import fetch_pinned
from tools.launch.resolve import resolve
from tools.recipes import find_recipe, load_dataset

WARM_UP = 1  # steps of each kind: kernels, the first touch of memory
SIDES = {"shared": True, "each row by itself": False}


def with_system_prompt(rows: int, vocabulary: int, prompt: int = 300, own: int = 100) -> TokenSplit:
    """Return rows that begin with the same `prompt` tokens and go on with `own` others, half of these supervised."""
    ids = (random_words(rows * (prompt + own), 1) % np.uint64(vocabulary)).astype(np.uint32).reshape(rows, -1)
    ids[:, :prompt] = ids[0, :prompt]
    mask = np.zeros_like(ids, np.uint8)
    mask[:, prompt + own // 2 :] = 1
    ends = np.arange(1, rows + 1, dtype=np.int64) * ids.shape[1]
    return TokenSplit(Arrays(ids.ravel(), mask.ravel(), ends - ids.shape[1], ends), -(-ids.shape[1] // 32) * 32)


def laid_out(real: Callable[..., Layout], shares: bool, batch: Batch, share: bool = True) -> Layout:
    """Return the layout that `real` makes of a batch, with beginnings shared if `shares` and the engine says so."""
    return real(batch, share=share and shares)


def measure(backend: Any, batches: list[Batch], rate: float) -> dict[str, Any]:
    """Return rows/s of both sides, tokens computed of those there are, and the step over its matrix products."""
    taken: dict[str, list[float]] = {side: [] for side in SIDES}
    losses: dict[str, list[float]] = {side: [] for side in SIDES}
    for step, batch in enumerate(batches, 1):
        for side, share in SIDES.items():
            with mock.patch.object(ragged, "lay_out", functools.partial(laid_out, ragged.lay_out, share)):
                started = time.perf_counter()
                losses[side].append(backend.train_step([batch], rate, step).loss)
                taken[side].append(time.perf_counter() - started)
    medians = {side: statistics.median(seconds[WARM_UP:]) for side, seconds in taken.items()}
    products = floor.products_of(backend, batches[-1])
    dtype = torch.bfloat16 if backend.mixed else torch.float32
    least = floor.seconds(products, dtype)
    return {
        "rows_per_second": {side: len(batches[0].rows) / seconds for side, seconds in medians.items()},
        "shared_over_alone": medians["each row by itself"] / medians["shared"],
        "tokens": int(batches[-1].lengths().sum()),
        "computed": len(ragged.lay_out(batches[-1]).ids),
        "gflop": floor.gflop(products),
        "floor_seconds": least,
        "floor_gflops": floor.gflop(products) / least,
        "step_over_floor": medians["shared"] / least,
        "seconds": taken,
        "losses": losses,
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--recipe", default="tinyllama-finetune")
    parser.add_argument("--steps", type=int, default=4, help="steps measured of each kind")
    parser.add_argument("--rows", type=int, default=16, help="rows of a step with the long system prompt")
    parser.add_argument("--set", action="append", default=[], metavar="KEY=VALUE", help="as for recipe run")
    given = parser.parse_args()
    launch = resolve(find_recipe(given.recipe), hw="cpu", overrides=tuple(given.set), steps=given.steps + WARM_UP)
    fetch_pinned(launch.config, launch.recipe_dir, print)
    plan = make_plan(launch, *load_dataset(launch.recipe_dir), lambda _line: None, lambda _line: None)
    training = plan.config.training
    made_up = with_system_prompt(20 * given.rows, plan.base.architecture["vocab_size"])
    sets = {
        "the recipe's rows": (plan.dataset.train, training.batch_size),
        "a system prompt of 300 in 400 tokens": (made_up, given.rows),
    }
    results: dict[str, Any] = {}
    with engine_for(plan.hw).open_backend(plan.hw, plan.config) as backend:
        backend.build(plan.base.architecture)
        backend.load(plan.base.weights())
        for name, (split, rows) in sets.items():
            batches = [split.batch(step, training.seed, rows) for step in range(1, given.steps + WARM_UP + 1)]
            found = results[name] = measure(backend, batches, training.learning_rate)
            rates = found["rows_per_second"]
            print(
                f"{name}, {rows} a step: {rates['shared']:.2f} rows/s shared, {rates['each row by itself']:.2f} "
                f"each by itself: "
                f"{found['shared_over_alone']:.2f} times; {found['computed']} tokens computed for {found['tokens']}; "
                f"the step is {found['step_over_floor']:.2f} times its matrix products ({found['gflop']:.0f} GFLOP at "
                f"{found['floor_gflops']:.0f} GFLOPS)",
                flush=True,
            )
        info = backend.info
    result = {
        "format": 1,
        "utc": time.strftime("%Y-%m-%dT%H:%M:%SZ", time.gmtime()),
        "machine": machine(),
        "precision": training.precision,
        "threads": info.threads,
        "rows_per_step": {name: rows for name, (_, rows) in sets.items()},
        "versions": dict(info.versions),
        "sets": results,
    }
    path = BENCH / "results" / "prefix.json"
    known = json.loads(path.read_text(encoding="utf-8")) if path.is_file() else {}
    path.write_text(json.dumps(known | {training.precision: result}, indent=1) + "\n", encoding="utf-8")


if __name__ == "__main__":
    main()
