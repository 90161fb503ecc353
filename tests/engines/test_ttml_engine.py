"""The ttml backend on the doubles: what it computes, and that it steps into none of ttml's silent traps.

A test of a trap says what to take away for it to fail. The doubles prove nothing about a board.
"""

from __future__ import annotations

import contextlib
import json
import os
import shutil
import signal
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest

pytest.importorskip("torch", reason="the doubles of ttml are torch")

from common.data.tokens import Batch
from common.errors import DataError, MachineError, TrainingError, VerificationError
from common.hardware import get
from common.model.bases import resolve
from common.model.init import uniform
from common.train import checkpoint
from engines.ttml.engine import open_ttml, refuse_without_ttml
from engines.ttml.optimizer import ROUNDS_BY_ITSELF, ROUNDS_BY_SEED
from tests.support.boards import DESCRIPTOR, TIES, board, board_config, machine
from tests.support.engines import config_for, engine, fingerprint, make_batch, state_of
from tools.verify.tiny_base import write_tiny_base

LORA = {"rank": 4, "alpha": 8.0}
# Relative. One rounding to bf16 is up to 2^-9 of the value; ttml rounds logits and nll where the CPU twin does not.
BF16_NOISE = 2 * 2**-9
generations = pytest.mark.parametrize("generation", ["B", "C"], ids=["unfused", "fused"])
# Not all 24 combinations of base, adapter, build with its optimizer, and devices: any two choices meet in one of six.
choices = pytest.mark.parametrize(
    ("base", "lora", "generation", "kind", "devices"),
    [
        ("tied", False, "B", "AdamW", 1),
        ("untied", True, "B", "AdamW", 2),
        ("untied", False, "C", "AdamW", 1),
        ("tied", True, "C", "AdamW", 2),
        ("tied", True, "C", "AdamWFullPrecision", 1),
        ("untied", False, "C", "AdamWFullPrecision", 2),
        ("untied", False, "C", "AdamWFp32Norms", 1),
    ],
    indirect=["base"],
)
one_and_two = pytest.mark.parametrize("devices", [1, 2])


@pytest.fixture(scope="module")
def untied_base(tmp_path_factory):
    return write_tiny_base(tmp_path_factory.mktemp("untied") / "base", tied=False, kv_heads=2, seed=3)


@pytest.fixture(scope="module")
def odd_base(tmp_path_factory):
    """300 ids are no whole number of tiles."""
    return write_tiny_base(tmp_path_factory.mktemp("odd") / "base", vocab_size=300, tied=False, seed=5)


@pytest.fixture
def base(request, tiny_base, untied_base):
    return tiny_base if getattr(request, "param", "tied") == "tied" else untied_base


def lora_for(lora: bool, generation: str, **more: Any) -> dict[str, Any]:
    """The `model_config.lora` that a build of this generation can have."""
    return {"model__lora": {**LORA, "tie_groups": TIES[generation], **more}} if lora else {}


def batches(step: int) -> list[Batch]:
    return make_batch(seed=step % 3).split(2)


def f32(array: np.ndarray) -> np.ndarray:
    return np.asarray(array).astype(np.float32)


# --- the same numbers as the CPU twin -------------------------------------------------------------------------------


@choices
def test_each_of_20_steps_agrees_with_the_cpu_twin_within_bf16_noise(tmp_path, base, lora, generation, devices, kind):
    values = {"training__optimizer__type": kind, **lora_for(lora, generation)}
    cpu, config = config_for(base, training__precision="bf16", **values), board_config(base, **values)
    with engine(cpu) as twin, board(config, tmp_path, devices, generation) as backend:
        expected, found = (
            [each.train_step(batches(step), 3e-3, step).loss for step in range(1, 21)] for each in (twin, backend)
        )
    assert found == pytest.approx(expected, rel=BF16_NOISE)
    assert expected[-1] < expected[0] - 0.05, "it does learn"


MLPS = pytest.mark.parametrize(
    ("generation", "calls"), [("B", False), ("B", True), ("C", False)], ids=["raw weights", "layers", "fused"]
)


@MLPS
def test_adapters_on_the_mlp_train_on_every_build(tmp_path, tiny_base, generation, calls):
    """Take away _call_mlp_layers: on raw weights they get no gradient and stay as they began."""
    config = board_config(tiny_base, **lora_for(True, generation))
    with board(config, tmp_path, 1, generation, calls_mlp_layers=calls) as backend:
        begun = state_of(backend)
        backend.train_step(batches(1), 1e-2, 1)
        backend.train_step(batches(2), 1e-2, 2)
        after = state_of(backend)
    trained = {name for name in begun if name.startswith("model/")}
    assert sum("mlp" in name for name in trained) == 2 * 3 * 2, "A and B of three projections in two blocks"
    assert {name for name in trained if not np.array_equal(begun[name], after[name])} == trained


@MLPS
def test_adapters_on_the_mlp_count_in_what_is_evaluated(tmp_path, tiny_base, generation, calls):
    """A checkpoint with live ones, here of the CPU twin, is never evaluated or continued without them."""
    values = lora_for(True, generation, target_modules=["gate_proj", "up_proj", "down_proj"])
    if generation == "B":
        values["model__lora"]["tie_groups"] = []
    with engine(config_for(tiny_base, training__precision="bf16", **values)) as twin:
        for step in (1, 2, 3):
            twin.train_step(batches(step), 3e-2, step)
        state, expected = state_of(twin), twin.eval_nll(make_batch())[0]
    with board(board_config(tiny_base, **values), tmp_path, 1, generation, calls_mlp_layers=calls) as backend:
        backend.load_state(state)
        found = backend.eval_nll(make_batch())[0]
        with backend.disable_adapter():
            without = backend.eval_nll(make_batch())[0]
    assert found == pytest.approx(expected, rel=BF16_NOISE)
    assert without.sum() > 1.02 * found.sum()


@MLPS
def test_recomputed_blocks_are_the_same_bits_with_adapters_and_dropout(tmp_path, tiny_base, generation, calls):
    ends = []
    for again in (False, True):
        values = lora_for(True, generation, dropout=0.2) | {"model__gradient_checkpointing": again}
        with board(board_config(tiny_base, **values), tmp_path, 1, generation, calls_mlp_layers=calls) as backend:
            for step in (1, 2):
                backend.train_step(batches(step), 1e-2, step)
            ends.append(fingerprint(state_of(backend)))
    assert ends[0] == ends[1]


@generations
def test_a_padded_vocabulary_is_cut_again(tmp_path, odd_base, generation):
    batch = make_batch(vocab=290)
    with engine(config_for(odd_base, training__precision="bf16")) as twin:
        expected, tokens = twin.eval_nll(batch)
    with board(board_config(odd_base), tmp_path, 1, generation) as backend:
        found, counted = backend.eval_nll(batch)
        backend.train_step([batch], 1e-2, 1)
        assert {n: a.shape for n, a in backend.state() if "model/" in n}["model/lm_head.weight"] == (300, 64)
    assert found == pytest.approx(expected, rel=BF16_NOISE)
    assert counted.tolist() == tokens.tolist()
    assert found.dtype == counted.dtype == np.float64


def test_one_batch_of_8_is_4_times_2_accumulated(tmp_path, tiny_base):
    """Take away `/ supervised` from the factor in _backward: each micro-batch is then normalised by itself."""
    found = []
    for parts in (1, 4):
        with board(board_config(tiny_base), tmp_path) as backend:
            stats = backend.train_step(make_batch().split(parts), 1e-2, 1)
            found.append((stats, f32(state_of(backend)["optimizer/exp_avg/model.norm.weight"])))
    (whole, moment), (cut, moment_cut) = found
    assert whole.loss == pytest.approx(cut.loss, rel=BF16_NOISE)
    assert whole.grad_norm == pytest.approx(cut.grad_norm, rel=2 * BF16_NOISE)
    assert (whole.tokens, whole.supervised_tokens) == (cut.tokens, cut.supervised_tokens) == (328, 222)
    assert np.abs(moment - moment_cut).max() < 0.03 * np.abs(moment).max()


def test_the_gradient_norm_is_the_cpu_twin_s_and_of_before_clipping(tmp_path, tiny_base):
    for limit in (0.0, 0.01):
        with engine(config_for(tiny_base, training__precision="bf16", training__max_grad_norm=limit)) as twin:
            expected = twin.train_step(batches(1), 1e-2, 1).grad_norm
        with board(board_config(tiny_base, training__max_grad_norm=limit), tmp_path, 2) as backend:
            norm = backend.train_step(batches(1), 1e-2, 1).grad_norm
            moment = f32(state_of(backend)["optimizer/exp_avg/model.embed_tokens.weight"])
        assert norm == pytest.approx(expected, rel=4 * BF16_NOISE)  # of bf16 gradients, and itself in bf16
        assert (np.abs(moment).max() < 1e-3) == (limit > 0), "clipped or not"


def test_what_is_not_supervised_has_no_effect(tmp_path, tiny_base):
    """Take away `* mask` in _backward."""
    batch = make_batch()
    other = Batch(batch.input_ids, np.where(batch.loss_mask > 0, batch.labels, 7), batch.loss_mask, batch.rows)
    losses = []
    for given in (batch, other):
        with board(board_config(tiny_base), tmp_path) as backend:
            losses.append((backend.train_step([given], 1e-2, 1).loss, fingerprint(state_of(backend))))
    assert losses[0] == losses[1]


def test_rows_that_do_not_fill_the_devices_are_evaluated_all_the_same(tmp_path, tiny_base):
    """Take away fill_rows in eval_nll."""
    batch = make_batch(lengths=(50, 20, 70))
    with board(board_config(tiny_base), tmp_path, 2) as backend:
        found, tokens = backend.eval_nll(batch)
    with board(board_config(tiny_base), tmp_path) as backend:
        assert np.array_equal(backend.eval_nll(batch)[0], found)
    assert len(found) == len(tokens) == 3


@one_and_two
def test_next_token_logits_are_those_of_each_row_alone(tmp_path, tiny_base, devices):
    rng, lengths = np.random.default_rng(1), np.array([3, 40, 31])
    rows = [list(rng.integers(6, 300, length)) for length in lengths]
    fresh = np.zeros((3, 40), np.int64)
    for at, row in enumerate(rows):
        fresh[at, : len(row)] = row
    cache: Any = None
    with (
        engine(config_for(tiny_base, training__precision="bf16")) as twin,
        board(board_config(tiny_base), tmp_path, devices) as backend,
    ):
        for _ in range(4):
            logits, cache = backend.next_token_logits(fresh, lengths, cache)
            alone = [twin.next_token_logits(np.array([row]), np.array([len(row)]))[0][0] for row in rows]
            assert logits.dtype == np.float32
            assert np.abs(logits - np.stack(alone)).max() < 0.02
            assert cache["width"] == 128, "40 + 64 new tokens, in whole tiles"
            fresh = rng.integers(6, 300, (3, 1))
            rows = [[*row, int(new)] for row, new in zip(rows, fresh[:, 0], strict=True)]


def test_without_the_adapter_it_is_the_base_and_only_within(tmp_path, tiny_base):
    ids, lengths = np.array([[7, 8, 9]]), np.array([3])
    with board(board_config(tiny_base, **lora_for(True, "B")), tmp_path) as backend:
        base = backend.next_token_logits(ids, lengths)[0]
        backend.train_step([make_batch()], 5e-2, 1)
        before, tuned = fingerprint(state_of(backend)), backend.next_token_logits(ids, lengths)[0]
        with backend.disable_adapter():
            assert np.array_equal(backend.next_token_logits(ids, lengths)[0], base)
        with contextlib.suppress(KeyError), backend.disable_adapter():
            raise KeyError
        assert np.array_equal(backend.next_token_logits(ids, lengths)[0], tuned)
        assert fingerprint(state_of(backend)) == before
    assert np.abs(tuned - base).max() > 1e-3


def test_llama_3_rope_is_the_cpu_twin_s(tmp_path, tiny_base):
    base = tmp_path / "llama3"
    shutil.copytree(tiny_base, base)
    config = json.loads((base / "config.json").read_text())
    scaling = {"rope_type": "llama3", "factor": 8.0, "low_freq_factor": 1.0, "high_freq_factor": 4.0}
    config |= {"rope_theta": 500000.0, "rope_scaling": {**scaling, "original_max_position_embeddings": 64}}
    (base / "config.json").write_text(json.dumps(config))
    found = []
    for folder in (base, tiny_base):
        with engine(config_for(folder, training__precision="bf16")) as twin:
            expected = twin.next_token_logits(make_batch().input_ids[1:2, :90], np.array([90]))[0]
        with board(board_config(folder), tmp_path) as backend:
            logits = backend.next_token_logits(make_batch().input_ids[1:2, :90], np.array([90]))[0]
        assert np.abs(logits - expected).max() < 0.02
        found.append(logits)
    assert np.abs(found[0] - found[1]).max() > 0.04, "and it makes a difference"


# --- silent traps: what ttml does wrong without saying so -----------------------------------------------------------


@generations
def test_weights_are_read_as_they_are_and_not_from_a_stale_view(tmp_path, tiny_base, generation):
    """Put PreferredPrecision.FULL for NATIVE in Tensors: every read after the first gives the first weights."""
    seen = set()
    with board(board_config(tiny_base), tmp_path, 1, generation) as backend:
        for step in (1, 2, 3):
            seen.add(f32(state_of(backend)["model/model.layers.0.mlp.down_proj.weight"]).tobytes())
            backend.train_step([make_batch()], 1e-2, step)
    assert len(seen) == 3


@pytest.mark.parametrize(("width", "what"), [(90, "half a tile"), (288, "more than the positions")])
def test_lengths_that_ttml_takes_in_silence_are_refused(tmp_path, tiny_base, width, what):
    """Take away the check in _logits: evaluation then goes on, with wrong numbers."""
    with board(board_config(tiny_base), tmp_path) as backend:
        batch = make_batch(width=width, lengths=(60,) * 8)
        for call in (lambda: backend.eval_nll(batch), lambda: backend.train_step([batch], 1e-3, 1)):
            with pytest.raises(DataError, match=f"rows of {width} tokens"):
                call()


def test_replicas_stay_replicas_and_train_as_one_device(tmp_path, tiny_base):
    """Name the mesh's axes ("_0", "_1") in open: sync_gradients then does nothing, and the losses look normal."""
    with board(board_config(tiny_base), tmp_path) as backend:
        alone = [backend.train_step(batches(step), 1e-2, step).loss for step in (1, 2, 3)]
    with board(board_config(tiny_base), tmp_path, 2) as backend:
        losses = [backend.train_step(batches(step), 1e-2, step).loss for step in (1, 2, 3)]
        for name in backend.trained:
            first, second = np.split(backend.io.read(backend.weights[name]), 2)
            assert np.array_equal(first, second), name
        assert any("the same bits on 2 devices after step 1" in note for note in backend.info.notes)
    assert losses == pytest.approx(alone, rel=BF16_NOISE)


def test_replicas_that_drift_are_found_after_the_first_step(tmp_path, tiny_base):
    """Take away _compare_replicas: nothing else shows that gradients are not summed."""
    with board(board_config(tiny_base), tmp_path, 2) as backend:
        backend.ttml.sync_gradients = lambda *_, **__: None
        with pytest.raises(VerificationError, match="different weights after step 1") as caught:
            backend.train_step(batches(1), 1e-2, 1)
    assert caught.value.code == 6


@generations
def test_stochastic_rounding_reaches_the_optimizer_and_norms_move(tmp_path, tiny_base, generation):
    """Take away values["stochastic_rounding"]: norms of 1.0 then never move, and nothing says so."""
    moved = {}
    for rounding in (False, True):
        config = board_config(tiny_base, training__optimizer__stochastic_rounding=rounding)
        with board(config, tmp_path, 2, generation) as backend:
            for step in range(1, 7):
                backend.train_step(batches(step), 1e-3, step)
            moved[rounding] = (f32(state_of(backend)["model/model.norm.weight"]) != 1).any()
            notes = "; ".join(backend.info.notes)
        assert ("norms stay at 1" in notes) == (not rounding), "it is said"
        assert ("not checkable" in notes) == rounding
    assert moved == {False: False, True: True}


@pytest.mark.parametrize("base", ["tied", "untied"], indirect=True)
def test_embeddings_are_tied_where_the_base_ties_them(tmp_path, base):
    """Take away weight_tying in build: the Python Llama's default is untied, the C++ one's tied."""
    weights = resolve(str(base)).weights()
    with board(board_config(base), tmp_path) as backend:
        assert backend.load(weights) == sum(array.size for array in weights.values())
        backend.train_step([make_batch()], 1e-2, 1)
        state = state_of(backend)
    for group in ("model/", "optimizer/exp_avg/", "optimizer/exp_avg_sq/"):
        assert {n.removeprefix(group) for n in state if n.startswith(group)} == set(weights)


@one_and_two
def test_shapes_stay_those_of_one_replica(tmp_path, tiny_base, devices):
    """Return read() from read_first: after a step with two devices the library calls replicas shards of a tensor twice
    as large.
    """
    expected = {f"model/{n}": a.shape for n, a in resolve(str(tiny_base)).weights().items()}
    with board(board_config(tiny_base), tmp_path, devices) as backend:
        for step in (1, 2):
            backend.train_step(batches(step), 1e-2, step)
            assert {n: a.shape for n, a in backend.state() if n.startswith("model/")} == expected


def test_constants_reach_the_optimizer(tmp_path, tiny_base):
    """Make it by create_optimizer with a misspelt key (eps): it trains with the default, in silence."""
    decay = {"training__optimizer__weight_decay": 0.0}
    config = board_config(tiny_base, training__optimizer__epsilon=1e9, **decay)
    with board(config, tmp_path) as backend:
        before = fingerprint({n: a for n, a in backend.state() if n.startswith("model/")})
        backend.train_step([make_batch()], 1.0, 1)
        assert fingerprint({n: a for n, a in backend.state() if n.startswith("model/")}) == before, "over epsilon"
    config = board_config(tiny_base, training__optimizer__weight_decay=0.75, training__optimizer__epsilon=1e9)
    with board(config, tmp_path) as backend:
        backend.train_step([make_batch()], 1.0, 1)
        assert (f32(state_of(backend)["model/model.norm.weight"]) == 0.25).all(), "weight decay, on all parameters"
    betas = {"training__optimizer__beta1": 0.5, "training__optimizer__beta2": 0.75}
    with board(board_config(tiny_base, **betas), tmp_path) as backend:
        backend.train_step([make_batch()], 1e-3, 1)
        first, second = (f32(state_of(backend)[f"optimizer/{m}/model.norm.weight"]) for m in ("exp_avg", "exp_avg_sq"))
    assert first**2 / second == pytest.approx(0.5**2 / 0.25, rel=4 * BF16_NOISE)


def test_an_adapter_that_matches_nothing_is_an_error(tmp_path, tiny_base):
    """Take away the count in _add_lora: training then goes on with nothing to train."""
    with machine(tmp_path) as name:
        config = board_config(tiny_base, **lora_for(True, "B"))
        base = resolve(str(tiny_base))
        with open_ttml(get(name), config) as backend:
            backend.build(base.architecture)
            lora_config = backend.ttml.modules.LoraConfig
            backend.ttml.modules.LoraConfig = lambda **k: lora_config(**{**k, "target_modules": ["q_proj"]})
            with pytest.raises(MachineError, match="adapters on 0 layers, 12 were asked for"):
                backend.load(base.weights())


@generations
def test_only_adapters_are_trained_and_they_start_as_the_cpu_twin_s(tmp_path, tiny_base, generation):
    """Take away io.put in _add_lora: A then comes from numpy's global generator, which no config seeds."""
    ours = lora_for(True, generation)
    with engine(config_for(tiny_base, training__precision="bf16", **ours)) as twin:
        expected = {n: a for n, a in twin.state() if n.startswith("model/")}
    with board(board_config(tiny_base, **ours), tmp_path, 1, generation) as backend:
        assert all("lora_" in name for name in backend.trained)
        found = {n: a for n, a in backend.state() if n.startswith("model/")}
        assert fingerprint(found) == fingerprint(expected)
        frozen = {n: backend.io.read(w).tobytes() for n, w in backend.weights.items() if n not in backend.trained}
        backend.train_step([make_batch()], 1e-2, 1)
        assert frozen == {n: backend.io.read(backend.weights[n]).tobytes() for n in frozen}


def test_initial_values_do_not_depend_on_the_library_s_generators(tmp_path, tiny_base):
    prints = set()
    for seed in (1, 2):
        np.random.seed(seed)
        with board(board_config(tiny_base, **lora_for(True, "B")), tmp_path) as backend:
            prints.add(fingerprint(state_of(backend)))
            a = f32(state_of(backend)["model/base_model.model.model.layers.0.self_attn.v_proj.lora_A.weight"])
    assert len(prints) == 1
    drawn = uniform(0, "model.layers.0.self_attn.k_proj+v_proj.lora_A", (4, 64), 64**-0.5)
    assert np.abs(a - drawn).max() < 2**-8


def test_arrays_of_any_strides_and_read_only_are_copied_right(tmp_path, tiny_base):
    """Put np.asarray for np.array in Tensors.new: ttml reads the raw buffer and ignores strides."""
    batch = make_batch()
    turned = np.asfortranarray
    other = Batch(turned(batch.input_ids), turned(batch.labels), turned(batch.loss_mask), batch.rows)
    for array in (other.input_ids, other.labels, other.loss_mask):
        array.flags.writeable = False
    with board(board_config(tiny_base), tmp_path) as backend:
        assert np.array_equal(backend.eval_nll(other)[0], backend.eval_nll(batch)[0])


def test_the_graph_is_dropped_after_every_pass(tmp_path, tiny_base):
    """Take away reset_graph in _backward or in _evaluating: the device fills up after some passes."""
    with board(board_config(tiny_base), tmp_path) as backend:
        for _ in range(10):
            backend.eval_nll(make_batch())
        for step in range(1, 4):
            backend.train_step(make_batch().split(8), 1e-3, step)
            backend.next_token_logits(np.array([[7, 8, 9]]), np.array([3]))


def test_evaluation_leaves_no_trace_and_has_no_dropout(tmp_path, tiny_base):
    """Take away model.eval() in _evaluating, or model.train() in train_step."""
    config = board_config(tiny_base, **lora_for(True, "B", dropout=0.5))
    ends = []
    for looks in (0, 2):
        with board(config, tmp_path) as backend:
            backend.train_step([make_batch()], 5e-2, 1)
            found = {backend.eval_nll(make_batch())[0].tobytes() for _ in range(looks)}
            assert len(found) == min(looks, 1)
            loss = backend.train_step([make_batch()], 5e-2, 2).loss
            ends.append((loss, fingerprint(state_of(backend))))
    assert ends[0] == ends[1]


def test_dropout_is_a_function_of_the_step_and_not_of_history(tmp_path, tiny_base):
    """Take away set_seed in train_step."""
    config = board_config(tiny_base, **lora_for(True, "B", dropout=0.5))
    with board(config, tmp_path) as backend:
        backend.train_step([make_batch(seed=9)], 5e-2, 1)
        state = state_of(backend)
        loss = backend.train_step([make_batch()], 5e-2, 2).loss
    for step, same in ((2, True), (3, False)):
        with board(config, tmp_path) as backend:
            backend.load_state(state)
            assert (backend.train_step([make_batch()], 5e-2, step).loss == loss) is same


@pytest.mark.parametrize("where", ["loss", "norm"])
def test_a_step_that_is_not_finite_is_refused_and_leaves_no_trace(tmp_path, tiny_base, where):
    """Take away _refuse_not_finite, or its zero_grad."""
    with board(board_config(tiny_base), tmp_path) as backend:
        backend.train_step([make_batch()], 1e-2, 1)
        before = fingerprint(state_of(backend))
        core, mean = backend.ttml.core, backend.ttml.ops.unary.mean
        clip = core.clip_grad_norm
        if where == "loss":
            backend.ttml.ops.unary.mean = lambda nll: mean(nll * float("inf"))
            backend.ttml.ops.loss, loss = SimpleNamespace(cross_entropy_loss=None), backend.ttml.ops.loss
            backend.ttml.ops.loss.cross_entropy_loss = lambda *a: loss.cross_entropy_loss(*a) * float("inf")
        else:
            core.clip_grad_norm = lambda *a: clip(*a) * float("inf")
        with pytest.raises(TrainingError, match="step 2 is not finite") as caught:
            backend.train_step(batches(2), 1e-2, 2)
        assert caught.value.code == 5
        assert fingerprint(state_of(backend)) == before
        core.clip_grad_norm, backend.ttml.ops.unary.mean = clip, mean
        if where == "loss":
            backend.ttml.ops.loss = loss
        backend.train_step(batches(2), 1e-2, 2)
        after = fingerprint(state_of(backend))
    with board(board_config(tiny_base), tmp_path) as backend:
        backend.train_step([make_batch()], 1e-2, 1)
        backend.train_step(batches(2), 1e-2, 2)
        assert fingerprint(state_of(backend)) == after, "no gradient was left over"


def test_an_overflow_that_arrives_as_a_huge_loss_is_refused_as_well(tmp_path, tiny_base):
    """Take `loss <= most` out of _refuse_not_finite: the step goes through."""
    with board(board_config(tiny_base), tmp_path, ordinary_specials=True) as backend:
        backend.train_step([make_batch()], 1e-2, 1)
        gains = backend.weights["Llama/ln_fc/gamma"]
        backend.io.put(gains, np.full_like(backend.io.read(gains), np.inf))
        before = fingerprint(state_of(backend))
        with pytest.raises(TrainingError, match=r"step 2 has overflowed: loss [\d.e+]+ nats") as caught:
            backend.train_step(batches(2), 1e-2, 2)
        assert "recipe verify board" in str(caught.value.todo)
        assert fingerprint(state_of(backend)) == before


@pytest.mark.parametrize("devices", [1, 2])
def test_a_step_waits_for_the_devices_once_and_reads_no_parameter(tmp_path, tiny_base, devices):
    """Read anything between the micro-batches (a loss, as SFTTrainer does), or a weight anywhere."""
    events: list[tuple[str, int]] = []
    shapes: set[tuple[int, ...]] = set()
    with board(board_config(tiny_base), tmp_path, devices) as backend:
        backend.train_step(batches(1), 1e-3, 1)  # the first one also compares the replicas
        tensor, optimizer = backend.ttml.autograd.Tensor, type(backend.optimizer)
        for owner, name in ((tensor, "to_numpy"), (tensor, "backward"), (optimizer, "step")):
            setattr(owner, name, logged(events, name, getattr(owner, name)))
        new = backend.io.new

        def noted(array: np.ndarray, *rest: Any) -> Any:
            shapes.add(array.shape)
            return new(array, *rest)

        backend.io.new = noted
        for step in (2, 3):
            events.clear()
            backend.train_step(batches(step), 1e-3, step)
            names = [name for name, _ in events]
            assert names == ["backward", "backward", "to_numpy", "to_numpy", "to_numpy", "step"]
            weights = {id(weight) for weight in backend.weights.values()}
            assert not {owner for name, owner in events if name == "to_numpy"} & weights
    assert shapes == {(4, 1, 1, 96), (4, 96), (4, 1, 96, 1)}, "the same at every step"


def logged(events: list, name: str, method: Any) -> Any:
    def call(self, *args: Any, **kwargs: Any) -> Any:
        events.append((name, id(self)))
        return method(self, *args, **kwargs)

    return call


@pytest.mark.parametrize("without", [[], ["close_device_mesh"]], ids=["", "early B"])
def test_the_devices_are_closed_on_every_exit(tmp_path, tiny_base, without):
    """Take away close in open_ttml: opening again raises, and on a board the next process hangs."""
    config = board_config(tiny_base)
    with machine(tmp_path, without=without) as name:
        for trouble in (None, KeyError, KeyboardInterrupt, SystemExit):
            with contextlib.suppress(KeyError, KeyboardInterrupt, SystemExit), open_ttml(get(name), config) as backend:
                backend.build(resolve(str(tiny_base)).architecture)
                if trouble:
                    raise trouble
            assert backend.context._device is None
            backend.close()


@pytest.mark.parametrize(
    ("generation", "without"), [("B", ["close_device_mesh"]), ("B", []), ("C", [])], ids=["early B", "B", "C"]
)
def test_one_device_several_and_one_again_open_in_one_process(tmp_path, tiny_base, generation, without):
    """Leave out disable_fabric in close: on early builds the last of them hangs."""
    with machine(tmp_path, 2, generation, without=without) as name:
        for mesh in ((1, 1), (1, 2), (1, 1)):
            config = board_config(tiny_base, hw=name, device__mesh_shape=mesh)
            with open_ttml(get(name), config) as backend:
                assert backend.devices == mesh[1]


@pytest.mark.parametrize("generation", ["B", "C"])
def test_a_found_descriptor_is_named_before_the_first_touch_or_once_more(tmp_path, tiny_base, generation):
    """The board's own file, which nobody named. Take away `reset` in prepare_environment: C fails as B must."""
    folder = tmp_path / "tt_metal/fabric/mesh_graph_descriptors"
    folder.mkdir(parents=True)
    (folder / "n300_mesh_graph_descriptor.textproto").write_text(DESCRIPTOR.format(devices=2))
    one, two = (board_config(tiny_base, hw="n300", device__mesh_shape=(1, n)) for n in (1, 2))
    for first, late in ((two, False), (one, True)):
        with machine(tmp_path, 2, generation) as name:
            del os.environ["TT_MESH_GRAPH_DESC_PATH"]
            os.environ["TT_METAL_RUNTIME_ROOT"] = str(tmp_path)
            refuse_without_ttml(get(name), first)
            with open_ttml(get(name), one):
                pass
            refused = pytest.raises(MachineError, match="Fabric Router Sync: Timeout")
            with refused if late and generation == "B" else contextlib.nullcontext(), open_ttml(get(name), two):
                pass


def test_a_signal_closes_the_devices(tmp_path, tiny_base):
    """Take away unwinding_signals: the process ends at once, with the devices open."""
    before = signal.getsignal(signal.SIGTERM)
    with machine(tmp_path) as name:
        with pytest.raises(SystemExit) as caught, open_ttml(get(name), board_config(tiny_base)) as backend:
            os.kill(os.getpid(), signal.SIGTERM)
        assert caught.value.code == 128 + signal.SIGTERM
        assert backend.context._device is None
    assert signal.getsignal(signal.SIGTERM) == before


# --- state ----------------------------------------------------------------------------------------------------------


@choices
def test_a_run_goes_on_in_a_new_process_bit_for_bit(tmp_path, base, generation, kind, lora, devices):
    """Leave `steps` unset in restore, or let put use assign, which makes fp32 masters bf16."""
    options = {"training__optimizer__beta1": 0.5, "training__optimizer__beta2": 0.6, "training__optimizer__type": kind}
    config = board_config(base, **options, **lora_for(lora, generation))
    with board(config, tmp_path, devices, generation) as backend:
        for step in (1, 2):
            backend.train_step(batches(step), 1e-2, step)
        saved = state_of(backend)
        backend.train_step(batches(3), 1e-2, 3)
        after = fingerprint(state_of(backend))
    with board(config, tmp_path, devices, generation) as backend:
        backend.load_state(saved)
        assert fingerprint(state_of(backend)) == fingerprint(saved)
        backend.train_step(batches(3), 1e-2, 3)
        assert fingerprint(state_of(backend)) == after
    masters = {n.removeprefix("optimizer/master/"): a for n, a in saved.items() if "/master/" in n}
    gains = {n.removeprefix("model/") for n, a in saved.items() if n.startswith("model/") and a.ndim == 1}
    for name, array in ((n, a) for n, a in saved.items() if n != "optimizer/step"):
        precise = name.rpartition("/")[2] in masters and not name.startswith("model/")
        assert array.dtype.name == ("float32" if precise else "bfloat16"), name
    assert (
        set(masters) >= gains if kind == "AdamWFullPrecision" else set(masters) == (gains if "Norms" in kind else set())
    )


def test_gains_of_norms_move_in_fp32_where_the_build_can_and_are_refused_where_not(tmp_path, tiny_base):
    """Steps of 1e-4, twenty times too small for bf16. Leave widen out of _make_optimizer: the gains stay at 1."""
    weights = {n: np.ones_like(a) if a.ndim == 1 else a for n, a in resolve(str(tiny_base)).weights().items()}
    moved = {}
    for kind in ("AdamW", "AdamWFp32Norms"):
        with board(board_config(tiny_base, training__optimizer__type=kind), tmp_path, 2, "C") as backend:
            backend.load(weights)
            for step in (1, 2, 3):
                backend.train_step(batches(step), 1e-4, step)
            state = state_of(backend)
        gain = state.get("optimizer/master/model.norm.weight", state["model/model.norm.weight"])
        moved[kind] = float(np.abs(f32(gain) - 1).max())
    assert moved["AdamW"] == 0
    assert 1e-4 < moved["AdamWFp32Norms"] < 1e-3
    refused = pytest.raises(MachineError, match="takes bf16 weights alone")
    config = board_config(tiny_base, training__optimizer__type="AdamWFp32Norms")
    with refused, board(config, tmp_path, 1, "B"):
        pass
    with board(config.with_values(**{"model.lora": {**LORA, "tie_groups": TIES["B"]}}), tmp_path, 1, "B") as backend:
        backend.train_step(batches(1), 1e-3, 1)


@generations
def test_a_resumed_run_has_the_hyper_parameters_of_its_config(tmp_path, tiny_base, generation):
    """Give set_state_dict what a checkpoint had, and not the optimizer's own dict: the old weight decay comes back."""
    values = {"training__optimizer__weight_decay": 0.5, "training__optimizer__beta1": 0.5}
    with board(board_config(tiny_base, **values), tmp_path, 1, generation) as backend:
        backend.train_step(batches(1), 1e-2, 1)
        saved = state_of(backend)
    with board(board_config(tiny_base, training__optimizer__weight_decay=0.0), tmp_path, 1, generation) as backend:
        backend.load_state(saved)
        found = backend.optimizer.get_state_dict()
        assert (found["weight_decay"], found["steps"]) == (0.0, 1)
        assert found["beta1"] == pytest.approx(0.9)


@generations
def test_a_run_says_whether_its_rounding_follows_the_seed_and_goes_on_so(tmp_path, tiny_base, generation):
    """Take away set_seed in train_step. A build of generation B draws on the device: there it is only said."""
    config = board_config(tiny_base, training__optimizer__stochastic_rounding=True)
    with board(config, tmp_path, 2, generation) as backend:
        backend.train_step(batches(1), 1e-3, 1)
        saved = state_of(backend)
        backend.train_step(batches(2), 1e-3, 2)
        after = fingerprint(state_of(backend))
    with board(config, tmp_path, 2, generation) as backend:
        backend.load_state(saved)
        backend.train_step(batches(2), 1e-3, 2)
        assert (fingerprint(state_of(backend)) == after) == (generation == "C")
        said = [note for note in backend.info.notes if note.startswith("stochastic rounding")]
    assert said == [{"B": ROUNDS_BY_ITSELF, "C": ROUNDS_BY_SEED}[generation]]


@choices
def test_a_checkpoint_passes_between_the_engines_both_ways(tmp_path, base, lora, generation, kind, devices):
    """Through the files. Take the order of rows away from moments alone (heads=0 in under_optimizer) and this fails."""
    values = {"training__optimizer__type": kind, **lora_for(lora, generation)}
    cpu, config = config_for(base, training__precision="bf16", **values), board_config(base, **values)
    facts = {"training_digest": "", "tokens_sha256": ""}

    def through_files(backend: Any, step: int) -> Any:
        return checkpoint.read_tensors(checkpoint.save(tmp_path / "checkpoints", step, backend.state(), config, facts))

    with engine(cpu) as twin, board(config, tmp_path, devices, generation) as backend:
        twin.train_step(batches(1), 1e-2, 1)
        first = through_files(twin, 1)
        backend.load_state(first)
        assert fingerprint(state_of(backend)) == fingerprint(dict(first)), "every bit, under the same names"
        losses = [engine.train_step(batches(2), 1e-2, 2).loss for engine in (twin, backend)]
        assert losses[1] == pytest.approx(losses[0], rel=BF16_NOISE)
        second = through_files(backend, 2)
        for name, expected in ((n, f32(a)) for n, a in twin.state() if "/exp_avg/" in n):
            assert np.abs(f32(second[name]) - expected).max() < 0.1 * np.abs(expected).max(), name
        twin.load_state(second)
        assert fingerprint(state_of(twin)) == fingerprint(dict(second))
        losses = [engine.train_step(batches(3), 1e-2, 3).loss for engine in (twin, backend)]
        assert losses[1] == pytest.approx(losses[0], rel=BF16_NOISE)
        assert not [note for note in backend.info.notes if "in the checkpoint" in note]


def test_another_precision_is_converted_and_said(tmp_path, tiny_base):
    with engine(config_for(tiny_base)) as twin:
        twin.train_step(batches(1), 1e-2, 1)
        state = state_of(twin)
    for kind, said in (
        ("AdamW", {"model", "optimizer/exp_avg", "optimizer/exp_avg_sq"}),
        ("AdamWFullPrecision", {"model"}),
    ):
        with board(board_config(tiny_base, training__optimizer__type=kind), tmp_path) as backend:
            backend.load_state(state)
            notes = [note for note in backend.info.notes if "float32 in the checkpoint, bfloat16 here" in note]
            assert {note.split(":")[0] for note in notes} == said
            found = state_of(backend)
        if kind == "AdamWFullPrecision":
            master = "optimizer/master/model.norm.weight"
            assert np.array_equal(found[master], state["model/model.norm.weight"]), "masters begin from fp32 weights"


def test_what_else_an_optimizer_keeps_has_its_own_slot(tmp_path, tiny_base):
    with board(board_config(tiny_base), tmp_path) as backend:
        backend.train_step(batches(1), 1e-2, 1)
        plain, live = state_of(backend), type(backend.optimizer).get_state_dict

        def with_more(self: Any) -> dict[str, Any]:
            return {**live(self), "max_exp_avg_sq": live(self)["exp_avg"]}

        type(backend.optimizer).get_state_dict = with_more
        more = state_of(backend)
        assert set(more) - set(plain) == {n.replace("exp_avg/", "max_exp_avg_sq/") for n in plain if "exp_avg/" in n}
        backend.load_state(more)
        backend.load_state(plain)
        assert any("max_exp_avg_sq: not in the checkpoint, begun anew" in note for note in backend.info.notes)


def test_a_state_of_another_model_is_refused(tmp_path, tiny_base):
    with board(board_config(tiny_base, **lora_for(True, "C")), tmp_path, 1, "C") as backend:
        state = state_of(backend)
        with pytest.raises(MachineError, match="tensor names differ"):
            backend.load_state({k: v for k, v in state.items() if "layers.1" not in k})
        name = next(k for k in state if "lora_B" in k)
        with pytest.raises(MachineError, match="expected"):
            backend.load_state({**state, name: np.zeros((1, 4), np.float32)})
        own = "model/base_model.model.model.layers.0.self_attn.k_proj.lora_A.weight"
        with pytest.raises(MachineError, match="another tying of A") as caught:
            backend.load_state({**state, own: state[own] * 2})
    assert caught.value.code == 4


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda w: w.pop("model.norm.weight"), r"model.norm.weight is missing"),
        (lambda w: w.update(surplus=np.zeros(3, np.float32)), "surplus is unknown"),
        (lambda w: w.update({"model.norm.weight": np.ones(63, np.float32)}), r"is \(63,\), expected \(64,\)"),
    ],
    ids=["missing", "unknown", "misshapen"],
)
def test_weights_that_do_not_fit_are_named(tmp_path, tiny_base, change, message):
    weights = dict(resolve(str(tiny_base)).weights())
    change(weights)
    with board(board_config(tiny_base), tmp_path) as backend, pytest.raises(MachineError, match=message):
        backend.load(weights)
