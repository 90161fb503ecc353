"""The lines of the bring-up checklist that need one device. Each opens it anew, so that none stands on another's state.

Each catches one way in which a build of ttml, a driver or a backend computes something else and says nothing. Bounds
are of bf16: one rounding is up to 2^-9 of a value, and a forward pass of this model has about 30 in a row.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Any

import ml_dtypes
import numpy as np

from common.data.tokens import Batch
from common.errors import DataError, TrainingError
from common.model import llama
from engines.ttml import hf_map
from engines.ttml.engine import open_ttml
from engines.ttml.optimizer import NO_FP32, takes_fp32
from tools.bringup import numpy_llama, reference_llama
from tools.bringup.bench import (
    BETA1,
    BETA2,
    DECAY,
    NATS,
    ODD_ADAMW,
    SAME_GRADIENT,
    Bench,
    bits_of,
    difference,
    distance,
    fingerprint,
    first_step,
    norm_of,
    snapshot_of,
)
from tools.bringup.reference_llama import ARCHITECTURE, WIDTH, batch_of, rounded, weights_for
from tools.checklist import CheckEnded, hold

Array = np.ndarray[Any, Any]
VOCAB = int(ARCHITECTURE["vocab_size"])
LOGITS_OFF = 0.05  # of the norm: a mistake in layout, scale or order moves them by far more
UNSOUND = 3  # times ln(vocabulary): a loss that shows that something overflowed
BF16_STEP = 2**-7  # of a value, at most: bf16 has 8 significant bits


# --- the device, and the model as ttml has it -----------------------------------------------------------------------


def build(bench: Bench) -> str:
    return "; ".join(f"{name} {version}" for name, version in bench.build.versions().items())


def opens(bench: Bench) -> str:
    with open_ttml(bench.hw, bench.config()):
        return "mesh [1, 1]"


def opens_again(bench: Bench) -> str:
    for _ in range(2):
        with open_ttml(bench.hw, bench.config()):
            pass
    return "opened and closed twice more in this process"


def parameters(bench: Bench) -> str:
    """Build the model: map_parameters raises where a tensor is unknown, misshapen, missing or there twice."""
    with open_ttml(bench.hw, bench.config()) as backend:
        backend.build(ARCHITECTURE)
        bench.linears = hf_map.linears_of(backend.entries)
        return f"{len(backend.entries)} tensors, all mapped; projections {', '.join(bench.linears)}"


def first_loss(bench: Bench) -> str:
    """Measure ttml's own initial weights: logits of a variance of 1/3 cost 1/6 nat above a uniform guess."""
    with open_ttml(bench.hw, bench.config()) as backend:
        backend.build(ARCHITECTURE)
        sums, tokens = backend.eval_nll(batch_of())
    found, uniform = sums.sum() / tokens.sum(), math.log(VOCAB)
    return hold(abs(found - uniform) < 0.5, f"{found:.3f} nats, ln {VOCAB} = {uniform:.3f}")


def labels(bench: Bench) -> str:
    """Give logits that are right about labels[t] at t. A loss that shifted the labels would find them all wrong."""
    given = batch_of(1).labels
    scores = np.where(np.arange(VOCAB) == given[:, None, :, None], 10.0, 0.0).astype(np.float32)
    with open_ttml(bench.hw, bench.config()) as backend:
        ops, io = backend.ttml.ops, backend.io
        logits, labels = io.new(scores, "BFLOAT16", None), io.new(given, "UINT32", None, "ROW_MAJOR")
        nll = io.read(ops.loss.cross_entropy_loss(logits, labels, ops.ReduceType.NONE)).astype(np.float64)
    expected = math.log(1 + (VOCAB - 1) * math.exp(-10))
    return hold(bool(nll.max() < 0.1), f"largest {nll.max():.4f} nats, expected {expected:.4f}; shifted it is above 9")


def weights(bench: Bench) -> str:
    given = weights_for()
    with bench.model() as backend:
        found = {n.removeprefix("model/"): a for n, a in backend.state() if n.startswith("model/")}
    other = [n for n, a in given.items() if bits_of(found[n]) != bits_of(a.astype(ml_dtypes.bfloat16))]
    count = sum(array.size for array in given.values())
    hold(count == llama.parameters(ARCHITECTURE), f"{count} values, the architecture has another number")
    return hold(not other, f"{count} values in {len(given)} tensors; with other bits: {', '.join(other[:5]) or 'none'}")


def causality(bench: Bench) -> str:
    ids = np.tile(batch_of(1).input_ids, (2, 1))
    ids[1, -1] = (ids[1, -1] + 1) % reference_llama.TOKENS
    with bench.model() as backend:
        logits = backend.model(backend.io.new(ids[:, None, None, :], "UINT32", None, "ROW_MAJOR"), None)
        first, second = backend.io.read(logits).astype(np.float64)
        backend.context.reset_graph()
    moved = np.abs(first - second)[0].max(axis=1) / np.abs(first).max()
    evidence = f"another last token moves the logits there by {moved[-1]:.1%}, before it by {moved[:-1].max():.2%}"
    return hold(bool(moved[:-1].max() <= BF16_STEP < moved[-1]), evidence)


def forward(bench: Bench, architecture: Mapping[str, Any] = ARCHITECTURE, width: int = WIDTH) -> str:
    """Compare logits after rows of several lengths with numpy's, and with what plain mistakes would give."""
    ids, lengths = batch_of(4, width=width).input_ids, np.array([width, width * 5 // 8, 7, 1])
    stored = rounded(weights_for(architecture))

    def reference(given: Mapping[str, Array], shape: Mapping[str, Any]) -> Array:
        logits: Array = numpy_llama.logits(given, shape, ids)[np.arange(4), lengths - 1]
        return logits

    with bench.model(architecture=architecture) as backend:
        found = backend.next_token_logits(ids, lengths)[0].astype(np.float64)
    expected = reference(stored, architecture)
    turned = {
        name: hf_map.to_pairs(array, 1) if name.endswith(("q_proj.weight", "k_proj.weight")) else array
        for name, array in stored.items()
    }
    plain = {**architecture, "rope_scaling": None}
    wrong = {"q and k rows in another order": distance(reference(turned, architecture), expected)}
    if architecture.get("rope_scaling"):
        wrong["no scaling"] = distance(reference(stored, plain), expected)
    off = distance(found, expected)
    mistakes = ", ".join(f"{what} {size:.0%}" for what, size in wrong.items())
    return hold(off < LOGITS_OFF, f"logits {off:.2%} off numpy's ({mistakes})")


def padded_vocabulary(bench: Bench) -> str:
    return f"{forward(bench, reference_llama.PADDED_VOCABULARY)}; {loss(bench, reference_llama.PADDED_VOCABULARY)}"


def loss(bench: Bench, architecture: Mapping[str, Any] = ARCHITECTURE) -> str:
    batch, stored = batch_of(), rounded(weights_for(architecture))
    with bench.model(architecture=architecture) as backend:
        sums, tokens = backend.eval_nll(batch)
    expected = (numpy_llama.nll(stored, architecture, batch) * batch.loss_mask).sum(axis=1)
    off = float(np.abs((sums - expected).sum() / tokens.sum()))
    same = bool((tokens == batch.loss_mask.sum(axis=1)).all())
    return hold(same and off < NATS, f"{sums.sum() / tokens.sum():.4f} nats, {off:.4f} off numpy's")


# --- a step ---------------------------------------------------------------------------------------------------------


def reads(bench: Bench) -> str:
    """Check that a weight reads otherwise after a large step. ttml's default view may be a copy from before it."""
    with bench.model() as backend:
        name = next(name for name in backend.weights if name.endswith("blocks/1/mlp/w2/weight"))
        tensor = backend.weights[name]
        before, default = backend.io.read(tensor).copy(), np.array(tensor.to_numpy(), np.float32)
        backend.train_step([batch_of()], 0.1, 1)
        moved = np.abs(backend.io.read(tensor).astype(np.float32) - before.astype(np.float32)).max()
        stale = np.array_equal(np.array(tensor.to_numpy(), np.float32), default)
    said = "stale: it must never be used" if stale else "current"
    return hold(moved > 0.01, f"read as stored, it moved by {moved:.3g}; to_numpy's default view is {said}")


def accumulation(bench: Bench) -> str:
    (whole, one), (cut, four) = (first_step(bench, batch_of().split(parts)) for parts in (1, 4))
    off, apart = difference(four, one), abs(whole.loss - cut.loss)
    evidence = f"gradients {off:.2%} apart, losses {apart:.4f} nats"
    return hold(off < SAME_GRADIENT and apart < NATS, evidence)


def recompute(bench: Bench) -> str:
    plain = first_step(bench, [batch_of()])[1]
    again = first_step(bench, [batch_of()], model__gradient_checkpointing=True)[1]
    off = difference(again, plain)
    return hold(off < SAME_GRADIENT, f"gradients {off:.2%} apart")


def clipping(bench: Bench) -> str:
    free, found = first_step(bench, [batch_of()])
    limit = free.grad_norm / 4
    clipped, short = first_step(bench, [batch_of()], training__max_grad_norm=limit)
    pairs = ((free.grad_norm, norm_of(found)), (clipped.grad_norm, free.grad_norm), (norm_of(short), limit))
    off = np.max([abs(one / other - 1) for one, other in pairs])
    evidence = f"norm {free.grad_norm:.4f}, of the gradients {norm_of(found):.4f}, clipped to {limit:.4f}: "
    return hold(bool(off < 0.02), f"{evidence}{norm_of(short):.4f}")


def update(bench: Bench, kind: str) -> str:
    """Compare two steps of AdamW (Loshchilov and Hutter, 2019) with numpy, from the moments after each.

    An update is computed on the fp32 master where there is one, else on the weight, which may be one bf16 step off; and
    by 2 % of the update.
    """
    rate = 0.05
    offs, squares = [], []
    with bench.model(training__optimizer__type=kind, **ODD_ADAMW) as backend:
        before = snapshot_of(backend)
        for step in (1, 2):
            backend.train_step([batch_of(seed=step)], rate, step)
            now = snapshot_of(backend)
            for name in weights_for():
                slot = "optimizer/master" if f"optimizer/master/{name}" in now else "model"
                m, v = now[f"optimizer/exp_avg/{name}"], now[f"optimizer/exp_avg_sq/{name}"]
                expected, moved = adamw(before[f"{slot}/{name}"], m, v, rate, step)
                room = 0.02 * np.abs(moved) + (BF16_STEP if slot == "model" else 1e-5) * np.abs(expected) + 1e-12
                offs.append((np.abs(now[f"{slot}/{name}"] - expected) / room).max())
                visible = np.abs(now[f"model/{name}"] - now[f"{slot}/{name}"])
                offs.append((visible / (BF16_STEP * np.abs(expected) + 1e-12)).max())
                if step == 1:
                    squared = (1 - BETA2) * (m / (1 - BETA1)) ** 2
                    squares.append(np.abs(v - squared).max() / squared.max())
            before = now
    worst, square = float(np.max(offs)), float(np.max(squares))
    evidence = f"weights off by at most {worst:.2f} of what rounding allows, second moments by {square:.2%}"
    return hold(worst <= 1 and square < 0.03, evidence)


def update_of_gains(bench: Bench) -> str:
    kind = "AdamWFp32Norms"
    with open_ttml(bench.hw, bench.config()) as backend:
        if not takes_fp32(backend.ttml, backend.io, bench.config(training__optimizer__type=kind).training):
            raise CheckEnded("skipped", NO_FP32)
    return update(bench, kind)


def adamw(weight: Array, m: Array, v: Array, rate: float, step: int) -> tuple[Array, Array]:
    """Return the weight after its update, and the gradient's part of it; the decay of the weight is apart from that."""
    moved = rate * (m / (1 - BETA1**step)) / (np.sqrt(v / (1 - BETA2**step)) + 1e-8)
    return weight * (1 - rate * DECAY) - moved, moved


def rounding(bench: Bench) -> str:
    """Train gains of 1 with updates of 3e-4: a bf16 step below 1 is 0.004, so rounding to nearest never leaves 1."""
    given = {n: np.ones_like(a) if a.ndim == 1 else a for n, a in weights_for().items()}
    moved, repeated = {}, False
    for stochastic in (False, True):
        options: dict[str, Any] = {
            "training__optimizer__stochastic_rounding": stochastic,
            "training__optimizer__weight_decay": 0.0,
        }
        with bench.model(weights=given, **options) as backend:
            start = dict(backend.state())
            ends = []
            for _ in range(2 if stochastic else 1):
                for step in range(1, 5):
                    backend.train_step([batch_of(seed=step)], 3e-4, step)
                ends.append(dict(backend.state()))
                backend.load_state(start)
            gains = [a for n, a in ends[0].items() if n.startswith("model/") and a.ndim == 1]
            moved[stochastic] = float(np.mean([(gain != 1).mean() for gain in gains]))
            repeated = fingerprint(ends[0]) == fingerprint(ends[-1])
    evidence = f"{moved[True]:.0%} of the gains moved in 4 steps, without it {moved[False]:.0%}"
    again = "the same seed rounds the same way" if repeated else "the same seed rounds another way each time"
    return hold(moved[True] > 0, f"{evidence}; {again}")


def row_length(bench: Bench) -> str:
    batch = batch_of()
    with bench.model() as backend:
        before = fingerprint(dict(backend.state()))
        for width in (WIDTH + 16, ARCHITECTURE["max_position_embeddings"] + WIDTH):
            wider = ((0, 0), (0, width - WIDTH))
            ids, labels = np.pad(batch.input_ids, wider), np.pad(batch.labels, wider)
            try:
                backend.train_step([Batch(ids, labels, np.pad(batch.loss_mask, wider), batch.rows)], 1e-2, 1)
            except DataError:
                continue
            raise CheckEnded("fail", f"rows of {width} tokens were trained on")
        hold(fingerprint(dict(backend.state())) == before, "a refused row changed the weights")
    return "rows of 48 tokens, and beyond the positions, are refused"


# --- state ----------------------------------------------------------------------------------------------------------


def repeats(bench: Bench) -> str:
    with bench.model() as backend:
        start, ends = dict(backend.state()), []
        for _ in range(2):
            backend.load_state(start)
            backend.train_step([batch_of()], 1e-2, 1)
            ends.append(fingerprint(dict(backend.state())))
    return hold(ends[0] == ends[1], f"two times the same step: bits {ends[0][:8]} and {ends[1][:8]}")


def checkpoint(bench: Bench) -> str:
    with bench.model(**ODD_ADAMW) as backend:
        backend.train_step([batch_of()], 1e-2, 1)
        saved = dict(backend.state())
        expected = backend.train_step([batch_of(seed=2)], 1e-2, 2).loss, fingerprint(dict(backend.state()))
    with bench.model(**ODD_ADAMW) as backend:
        backend.load_state(saved)
        hold(fingerprint(dict(backend.state())) == fingerprint(saved), "what was restored has other bits")
        found = backend.train_step([batch_of(seed=2)], 1e-2, 2).loss, fingerprint(dict(backend.state()))
    evidence = f"on a device opened anew the next loss is {found[0]}, without a break {expected[0]}"
    return hold(found == expected, f"{evidence}; bits {found[1][:8]} and {expected[1][:8]}")


def not_finite(bench: Bench) -> str:
    """Train on gains that are no numbers. Tensix takes NaN for a number in most operations, and has other bits for it.

    So a step over them is either refused or has a loss that no sound model has; and what a refusal leaves is compared
    with what was read back after loading, not with what was loaded.
    """
    with bench.model() as backend:
        good = dict(backend.state())
        backend.train_step([batch_of()], 1e-2, 1)
        expected = fingerprint(dict(backend.state()))
        name = f"model/{llama.FINAL_NORM}"
        backend.load_state({**good, name: np.full_like(good[name], np.nan)})
        bad = fingerprint(dict(backend.state()))
        try:
            loss = backend.train_step([batch_of()], 1e-2, 1).loss
        except TrainingError as error:
            evidence = error.what
            hold(fingerprint(dict(backend.state())) == bad, "the refused step changed the state")
        else:
            evidence = hold(loss > UNSOUND * math.log(VOCAB), f"weights that are no numbers: loss {loss:.4g} nats")
        backend.load_state(good)
        backend.train_step([batch_of()], 1e-2, 1)
        hold(fingerprint(dict(backend.state())) == expected, "after it the next step on sound weights has other bits")
    return evidence


def interrupt(bench: Bench) -> str:
    batch = batch_of()
    expected = first_step(bench, batch.split(2))[0].loss
    try:
        first_step(bench, BrokenOff(batch.split(2)))
    except KeyboardInterrupt:
        found = first_step(bench, batch.split(2))[0].loss
        return hold(found == expected, f"closed and opened again; the step's loss is {found}, before it {expected}")
    raise CheckEnded("fail", "the interrupt was lost")


class BrokenOff(list[Batch]):
    """Micro-batches of which a step, which first counts them, is interrupted after the first gradient."""

    def __init__(self, batches: Sequence[Batch]) -> None:
        super().__init__(batches)
        self.passes = 0

    def __iter__(self) -> Iterator[Batch]:
        self.passes += 1
        for batch in super().__iter__():
            yield batch
            if self.passes > 1:
                raise KeyboardInterrupt


# --- LoRA -----------------------------------------------------------------------------------------------------------


def lora(bench: Bench) -> str:
    ids, lengths, rank = batch_of(1).input_ids, np.array([WIDTH]), 8
    shapes, layers = llama.shapes(ARCHITECTURE), ARCHITECTURE["num_hidden_layers"]
    with bench.model() as backend:
        base = backend.next_token_logits(ids, lengths)[0]
    with bench.model(model__lora={"rank": rank}) as backend:
        start = distance(backend.next_token_logits(ids, lengths)[0], base)
        hold(start < BF16_STEP, f"before training an adapter changes the logits by {start:.2%}")
        adapters = sum(name.endswith("/lora_A") for name in backend.trained)
        count = sum(math.prod(entry.shape) for entry in backend.trained.values())
        sizes = [
            [shapes[f"{hf_map.module_of(0, name)}.weight"] for name in hf_map.LINEARS[linear]]
            for linear in bench.linears
        ]
        wanted = layers * sum(rank * (group[0][1] + sum(rows for rows, _ in group)) for group in sizes)
        evidence = f"{adapters} adapters of {layers * len(bench.linears)}, {count} trained values of {wanted}"
        hold((adapters, count) == (layers * len(bench.linears), wanted), evidence)
        frozen = [name for name in backend.weights if name not in backend.trained]
        before = {name: bits_of(backend.io.read(backend.weights[name])) for name in frozen}
        backend.train_step([batch_of()], 1e-2, 1)
        moved = [name for name in frozen if bits_of(backend.io.read(backend.weights[name])) != before[name]]
        hold(not moved, f"frozen and yet trained: {', '.join(moved[:5])}")
        still = [n for n, a in backend.state() if n.startswith("model/") and ".lora_B" in n and not np.any(a)]
        hold(not still, f"never moved: {', '.join(still[:5])}")
    return evidence


def lora_merged(bench: Bench) -> str:
    """Check that trained adapters are W + alpha / rank B A of the base: order of rows, scale, one A for a group."""
    batch, rank, alpha = batch_of(4), 8, 16.0
    lengths = np.full(4, WIDTH)
    merged, base = rounded(weights_for()), rounded(weights_for())
    with bench.model(model__lora={"rank": rank, "alpha": alpha}) as backend:
        backend.train_step([batch], 0.2, 1)
        found = backend.next_token_logits(batch.input_ids, lengths)[0].astype(np.float64)
        trained = {n.removeprefix(f"model/{llama.PREFIX}"): a for n, a in snapshot_of(backend).items()}
    for name in [name for name in trained if name.endswith(".lora_A.weight")]:
        module = name.removesuffix(".lora_A.weight")
        merged[f"{module}.weight"] += alpha / rank * trained[f"{module}.lora_B.weight"] @ trained[name]
    expected, untuned = (numpy_llama.logits(w, ARCHITECTURE, batch.input_ids)[:, -1] for w in (merged, base))
    off, moved = distance(found, expected), distance(untuned, expected)
    return hold(
        off < LOGITS_OFF < moved, f"logits {off:.2%} off numpy's with merged weights (without them {moved:.0%})"
    )


def seeds(bench: Bench) -> str:
    """Check that dropout draws from the step's number: the same one draws the same, another one something else."""
    with bench.model(model__lora={"rank": 8, "dropout": 0.5}) as backend:
        start, ends = dict(backend.state()), []
        for step in (1, 1, 2):
            backend.load_state(start)
            backend.train_step([batch_of()], 1e-2, step)
            after = {n: a for n, a in backend.state() if n != "optimizer/step"}
            ends.append(fingerprint(after))
    evidence = f"step 1: bits {ends[0][:8]}, again {ends[1][:8]}; step 2: {ends[2][:8]}"
    return hold(ends[0] == ends[1] != ends[2], evidence)


# --- what no small model can tell -----------------------------------------------------------------------------------


def cannot(reason: str) -> Callable[[Bench], str]:
    def check(_bench: Bench) -> str:
        raise CheckEnded("not checkable", reason)

    return check
