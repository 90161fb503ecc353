"""The lines of the bring-up checklist that need the board's whole mesh. On a board of one device they are skipped."""

from __future__ import annotations

import numpy as np

from common.data.tokens import Batch
from engines.ttml.engine import TTML, open_ttml
from tools.bringup.bench import NATS, SAME_GRADIENT, Bench, difference, first_step
from tools.bringup.reference_llama import batch_of, rows_for
from tools.checklist import CheckEnded, hold

CURVE = 5  # steps
CURVE_NATS = 0.05  # after which bf16 noise has gone through as many updates


def mesh(bench: Bench) -> str:
    if bench.devices == 1:
        raise CheckEnded("skipped", f"{bench.hw.name} has one device")
    with open_ttml(bench.hw, bench.config(whole=True)) as backend:
        return f"mesh {list(backend.mesh_shape)}, {backend.devices} devices"


def rows(bench: Bench) -> str:
    """Check that an array shared out by rows comes back in order, and one put on every device once from each."""
    given = batch_of(rows_for(bench.devices)).labels.astype(np.float32)[:, None, None, :]
    with open_ttml(bench.hw, bench.config(whole=True)) as backend:
        shared = backend.io.new(given, "FLOAT32", backend.io.by_rows)
        on_each = backend.io.new(given, "FLOAT32", None)
        same = np.array_equal(backend.io.read(shared), given)
        copies = np.array_equal(backend.io.read(on_each), np.concatenate([given] * bench.devices))
        part = shared.shape()[0]
    evidence = f"{len(given)} rows, {part} on each of {bench.devices} devices"
    return hold(same and copies and part * bench.devices == len(given), evidence)


def sync(bench: Bench) -> str:
    """Compare gradients with one device's. The engine itself compares the replicas after its first step."""
    batches = batch_of(2 * rows_for(bench.devices)).split(2)
    one, expected = first_step(bench, batches)
    several, found = first_step(bench, batches, whole=True)
    off, apart = difference(found, expected), abs(one.loss - several.loss)
    evidence = f"gradients {off:.2%} apart from one device's at the same batch, losses {apart:.4f} nats"
    return hold(off < SAME_GRADIENT and apart < NATS, evidence)


def replicas(bench: Bench) -> str:
    """Check that replicas stay alike, and that after a step without a sum they differ: else nothing would show."""
    batch = batch_of(rows_for(bench.devices))
    with bench.model(whole=True) as backend:
        for step in (1, 2, 3):
            backend.train_step([batch], 1e-2, step)
        apart = _drift(backend)
        count = len(backend.trained)
        _step_apart(backend, batch)
        alone = _drift(backend)
    if apart:
        raise CheckEnded(
            "fail", f"{len(apart)} of {count} tensors differ after 3 steps, by up to {max(apart.values()):.3g}"
        )
    evidence = f"{count} tensors with the same bits after 3 steps"
    return hold(bool(alone), f"{evidence}; after one more without synchronisation {len(alone)} differ")


def curve(bench: Bench) -> str:
    losses = []
    for whole in (False, True):
        with bench.model(whole=whole) as backend:
            batches = [batch_of(rows_for(bench.devices), seed=step % 2) for step in range(CURVE)]
            losses.append([backend.train_step([b], 3e-3, step).loss for step, b in enumerate(batches, 1)])
    apart = float(np.abs(np.array(losses[0]) - losses[1]).max())
    evidence = f"{CURVE} steps: losses at most {apart:.4f} nats apart, from {losses[0][0]:.3f} to {losses[0][-1]:.3f}"
    return hold(apart < CURVE_NATS, evidence)


def _drift(backend: TTML) -> dict[str, float]:
    """Return how far the devices' copies are apart, for the trained tensors where they are."""
    found = {}
    for name in backend.trained:
        copies = backend.io.read(backend.weights[name]).astype(np.float32).reshape(backend.devices, -1)
        if (copies != copies[:1]).any():
            found[name] = float(np.abs(copies - copies[:1]).max())
    return found


def _step_apart(backend: TTML, batch: Batch) -> None:
    """Take a step in which every device follows the gradient of its own rows."""
    ops, io = backend.ttml.ops, backend.io
    backend.optimizer.zero_grad()
    logits = backend.model(io.new(batch.input_ids[:, None, None, :], "UINT32", io.by_rows, "ROW_MAJOR"), None)
    labels = io.new(batch.labels, "UINT32", io.by_rows, "ROW_MAJOR")
    ops.unary.mean(ops.loss.cross_entropy_loss(logits, labels, ops.ReduceType.NONE)).backward(False)
    backend.context.reset_graph()
    backend.optimizer.step()
