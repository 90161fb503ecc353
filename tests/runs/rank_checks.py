"""What test_ranks.py asks of three processes in one launch of torchrun. Writes one JSON file."""

from __future__ import annotations

import contextlib
import json
import sys
from pathlib import Path
from typing import Any

import numpy as np

from common.config import Config
from common.data.tokens import Batch
from common.errors import TrainingError
from engines.cpu import ranks
from engines.cpu.engine import follow
from tests.support.engines import config_for, engine, fingerprint, make_batch, mlp_layers, state_of, without_adapter

ROWS = (5, 90, 17, 44, 8, 63)  # two for each rank
LORA = {"rank": 4, "alpha": 8}


def on_three(config: Config) -> Config:
    return config.with_values(**{"device.mesh_shape": (1, 3)})


def silent(batch: Batch, first: int, last: int) -> Batch:
    """The batch with no supervised token in the rows first..last."""
    mask = batch.loss_mask.copy()
    mask[first:last] = 0
    return Batch(batch.input_ids, batch.labels, mask, batch.rows)


def train(backend: Any, steps: int, batches: list[list[Batch]], first: int = 1) -> list[float]:
    return [backend.train_step(batches[step % len(batches)], 1e-2, step).loss for step in range(first, first + steps)]


def beside_one(config: Config, batches: list[list[Batch]]) -> dict[str, Any]:
    """Losses and final state of three processes and of one, and whether the three agreed after every step."""
    with engine(config) as one:
        expected, state = train(one, 4, batches), state_of(one)
    alike = []
    with engine(on_three(config)) as several:
        losses = []
        for step in range(1, 5):
            losses += train(several, 1, batches, step)
            alike.append(len(set(several.replicas())) == 1)
        found = state_of(several)
    apart = max(float(np.abs(found[name] - state[name]).max()) for name in state if name.startswith("model/"))
    return {"losses": losses, "expected": expected, "alike": alike, "apart": apart}


def evaluation(config: Config) -> dict[str, Any]:
    """Eight rows over three ranks, with an adapter and without it."""
    batch, answers = make_batch(), []
    for each in (config, on_three(config)):
        with engine(each) as backend:
            train(backend, 1, [[make_batch(ROWS)]])
            tuned = backend.eval_nll(batch)
            with backend.disable_adapter():
                untuned = backend.eval_nll(batch)
        answers.append([array.tolist() for array in (*tuned, *untuned)])
    return {"one": answers[0], "three": answers[1]}


def not_finite(config: Config) -> dict[str, Any]:
    """A loss that is not finite on one rank alone."""
    batches = [[make_batch(ROWS)]]
    with engine(on_three(config)) as backend:
        train(backend, 1, batches)
        before, nll_sum = backend.replicas(), backend.objective.forward
        backend.objective.forward = lambda batch: nll_sum(batch) * float("inf")
        refused = ""
        with contextlib.suppress(TrainingError):
            try:
                train(backend, 1, batches, 2)
            except TrainingError as error:
                refused = error.what
                raise
        after = backend.replicas()
        backend.objective.forward = nll_sum
        return {"refused": refused, "kept": before == after, "goes on": train(backend, 1, batches, 2)}


def unreached(config: Config) -> str:
    """What is said of adapters of rank 3, which every process ignores in the MLP (see `ignore_rank_3`)."""
    try:
        with engine(on_three(config.with_values(**{"model.lora.rank": 3}))):
            return "no error"
    except TrainingError as error:
        return str(error)


def ignore_rank_3(layers: list[Any]) -> list[Any]:
    return [without_adapter(layer) if len(getattr(layer, "lora_A", ())) == 3 else layer for layer in layers]


def control(config: Config) -> dict[str, Any]:
    with engine(on_three(config)) as backend:
        backend.set_grad_sync(False)
        train(backend, 1, [[make_batch(ROWS)]])
        return {"replicas": len(set(backend.replicas()))}


def resumed(config: Config) -> dict[str, Any]:
    """Four steps, and the last two of them again from the state after two."""
    batches = [[make_batch(ROWS, seed=seed)] for seed in range(4)]
    with engine(on_three(config)) as backend:
        train(backend, 2, batches)
        state = state_of(backend)
        train(backend, 2, batches, 3)
        unbroken = fingerprint(state_of(backend))
    with engine(on_three(config)) as backend:
        backend.load_state(state)
        train(backend, 2, batches, 3)
        return {"unbroken": unbroken, "resumed": fingerprint(state_of(backend))}


def check(base: Path) -> dict[str, Any]:
    full = config_for(base, training__max_grad_norm=0.5)
    lora, batch = config_for(base, model__lora=LORA), make_batch(ROWS)
    return {
        "full": beside_one(full, [[batch], [make_batch(ROWS, seed=1)]]),
        "lora": beside_one(lora, [[batch]]),
        "bf16": beside_one(config_for(base, training__precision="bf16"), [[batch]]),
        "accumulated": beside_one(full, [[batch, make_batch(ROWS, seed=1)]]),
        "silent rank": beside_one(full, [[batch, silent(batch, 2, 4)], [silent(batch, 0, 2)]]),
        "evaluation": evaluation(lora),
        "not finite": not_finite(full),
        "control": control(full),
        "resumed": resumed(full),
        "unreached": unreached(lora),
    }


def main(base: str, out: str) -> None:
    with mlp_layers(ignore_rank_3), ranks.process_group() as found:
        if found.rank:
            follow(found)
            return
        results = check(Path(base))
        found.broadcast_command("end", 0)
    Path(out).write_text(json.dumps(results), encoding="utf-8")


if __name__ == "__main__":
    main(*sys.argv[1:])
