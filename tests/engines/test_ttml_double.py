# ruff: noqa: E402  what needs torch is imported after the skip
"""The doubles of ttml and ttnn are wrong where the real ones are wrong.

Each test of a trap uses the API as one would who does not know the trap, and falls in. That our engine does not, that
the double's arithmetic is right and that its switches work is shown in test_ttml_engine.py and test_ttml_contract.py.
The facts are public: tt-metal's sources, its issues, and notes of people who trained on boards.
"""

from __future__ import annotations

import contextlib
import importlib
import inspect
import os
import re
import sys
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from typing import Any

import ml_dtypes
import numpy as np
import pytest

torch = pytest.importorskip("torch", reason="the doubles compute with torch")

from tests.doubles import doubles

HIDDEN, FFN, LAYERS, HEADS, KV_HEADS, VOCAB, CONTEXT = 64, 96, 2, 2, 1, 90, 64
SHAPE = {
    "hidden_size": HIDDEN,
    "intermediate_size": FFN,
    "num_hidden_layers": LAYERS,
    "num_attention_heads": HEADS,
    "num_key_value_heads": KV_HEADS,
    "vocab_size": VOCAB,
    "max_position_embeddings": CONTEXT,
}
DESCRIPTOR = "mesh_descriptors {{ name: 'm' arch: BLACKHOLE device_topology {{ dims: [ {} ] }} }}"

generations = pytest.mark.parametrize("generation", ["B", "C"])


@pytest.fixture
def board() -> Iterator[None]:
    """One device, generation B, open."""
    with doubles():
        open_mesh()
        yield


@pytest.fixture
def pair(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    """Two devices, generation B, with the descriptor they need; not open."""
    describe(tmp_path, monkeypatch)
    with doubles(devices=2):
        yield


def describe(folder: Path, monkeypatch: pytest.MonkeyPatch, dims: str = "1, 2", text: str = DESCRIPTOR) -> None:
    (folder / "mesh.textproto").write_text(text.format(dims))
    monkeypatch.setenv("TT_MESH_GRAPH_DESC_PATH", str(folder / "mesh.textproto"))


def open_mesh(shape: tuple[int, int] = (1, 1), names: tuple[str, str] = ("_0", "dp")) -> Any:
    import ttml

    ttml.open_device_mesh(ttml.Mesh(shape, names))
    return context().get_device()


def context() -> Any:
    import ttml

    return ttml.autograd.AutoContext.get_instance()


def build(**changes: Any) -> Any:
    import ttml

    ttml.manual_seed(1)
    return ttml.models.llama.Llama(ttml.models.llama.LlamaConfig(**SHAPE | changes))


def tensor(values: Any, dtype: str = "BFLOAT16", mapper: Any = None) -> Any:
    import ttml
    import ttnn

    array = np.ascontiguousarray(values, np.uint32 if dtype == "UINT32" else np.float32)
    layout = ttnn.Layout.ROW_MAJOR if dtype == "UINT32" else ttnn.Layout.TILE
    return ttml.autograd.Tensor.from_numpy(array, layout, ttnn.DataType[dtype], mapper)


def tokens(rows: int = 2, length: int = 32) -> tuple[Any, Any]:
    """Random ids and labels, [rows, length]; the same at every call."""
    rng = np.random.default_rng(0)
    return rng.integers(0, VOCAB, (rows, length)), rng.integers(0, VOCAB, (rows, length))


def loss_of(model: Any, ids: Any, labels: Any, mapper: Any = None) -> Any:
    import ttml

    logits = model(tensor(ids[:, None, None], "UINT32", mapper), None)
    return ttml.ops.loss.cross_entropy_loss(logits, tensor(labels, "UINT32", mapper))


def backward(model: Any, mapper: Any = None, rows: int = 2) -> None:
    loss_of(model, *tokens(rows), mapper).backward(False)
    context().reset_graph()


def adamw(parameters: Any, **options: Any) -> Any:
    import ttml

    return ttml.optimizers.create_optimizer({"type": "AdamW", "lr": 1e-2} | options, parameters)


def train(model: Any, optimizer: Any, steps: int = 1) -> None:
    for _ in range(steps):
        optimizer.zero_grad()
        backward(model)
        optimizer.step()


def native(value: Any) -> Any:
    """What the tensor holds, on every device: [devices, ...], float32."""
    import ttml

    return value.get_value(ttml.autograd.PreferredPrecision.NATIVE).data.float().numpy().copy()


def native_precision() -> Any:
    import ttml

    return ttml.autograd.PreferredPrecision.NATIVE


def in_native_precision(value: Any) -> Any:
    return value.to_numpy(precision=native_precision())


# --- values -----------------------------------------------------------------------------------------------------


@generations
def test_a_full_read_is_stale_after_an_update(generation: str) -> None:
    """The default read caches an fp32 copy that fused optimizers leave behind (tt-metal 41657); mended in C."""
    with doubles(generation):
        open_mesh()
        model = build()
        weight = model.parameters()["Llama/ln_fc/gamma"]
        before = weight.to_numpy()
        train(model, adamw(model.parameters()))
        after = weight.to_numpy()
        assert np.array_equal(before, after) == (generation == "B")
        assert not np.array_equal(before, in_native_precision(weight).astype(np.float32))


def test_assign_shares_the_buffer(board: None) -> None:
    """A snapshot that was given to a parameter by `assign` is trained along with it."""
    model = build()
    weight = model.parameters()["Llama/fc/weight"]
    best = tensor(in_native_precision(weight))
    saved = native(best)
    weight.assign(best)
    train(model, adamw(model.parameters()))
    assert not np.array_equal(native(best), saved)


def test_assign_narrows_fp32(board: None) -> None:
    import ttnn

    target, source = tensor([1.0]), tensor([1.001], "FLOAT32")
    target.assign(source)
    assert target.get_value().dtype is ttnn.DataType.BFLOAT16
    assert float(in_native_precision(target)[0]) == 1.0


@generations
def test_an_fp32_parameter_trains_on_newer_builds_alone(generation: str) -> None:
    """Else the fused update is written to the bf16 view, while NATIVE is the fp32 tensor, and nobody says so."""
    with doubles(generation):
        open_mesh()
        model = build()
        gamma = model.parameters()["Llama/ln_fc/gamma"]
        gamma.set_value(tensor(np.ones(gamma.shape()), "FLOAT32").get_value(native_precision()))
        optimizer = adamw(model.parameters(), lr=3e-4, weight_decay=0.0)
        train(model, optimizer)
        assert (native(gamma) != 1).any() == (generation == "C"), "by less than a bf16 step"
        moment = optimizer.get_state_dict()["exp_avg"]["Llama/ln_fc/gamma"]
        stored = moment.get_value(native_precision()).dtype.name
        assert stored == {"B": "BFLOAT16", "C": "FLOAT32"}[generation]
        refused = pytest.raises(RuntimeError, match="fp32 parameter Llama/ln_fc/gamma")
        with refused if generation == "C" else contextlib.nullcontext():
            adamw(model.parameters(), type="AdamWFullPrecision")


@generations
def test_dtype_is_that_of_a_view_and_not_of_the_tensor(generation: str) -> None:
    """Who asks for it to learn how a weight is stored is told FLOAT32 of every one; mended in C."""
    with doubles(generation):
        open_mesh()
        assert tensor([1.0]).dtype().name == {"B": "FLOAT32", "C": "BFLOAT16"}[generation]


def test_the_bf16_view_of_fp32_state_is_stale(board: None) -> None:
    """Asking for the shape is enough to make that view, which the fused update of the fp32 buffer leaves behind."""
    model = build()
    optimizer = adamw(model.parameters(), type="AdamWFullPrecision")
    moment = optimizer.get_state_dict()["exp_avg"]["Llama/fc/weight"]
    assert moment.shape() == [1, 1, 96, HIDDEN]
    train(model, optimizer)
    assert not moment.get_value().data.any()
    assert native(moment).any()


def test_from_numpy_reads_the_buffer_and_not_the_strides(board: None) -> None:
    import ttml

    matrix = np.arange(6, dtype=np.float32).reshape(2, 3)
    assert in_native_precision(ttml.autograd.Tensor.from_numpy(matrix.T)).ravel().tolist() == [0, 1, 2, 3, 4, 5]
    assert in_native_precision(ttml.autograd.Tensor.from_numpy(matrix[:, 1:])).ravel().tolist() == [1, 2, 3, 4]


def test_operations_may_take_infinity_for_a_number() -> None:
    """On Tensix most do: who asks whether the loss is finite is told yes, and trains on."""
    with doubles(ordinary_specials=True):
        open_mesh()
        model = build()
        gamma = model.parameters()["Llama/ln_fc/gamma"]
        gamma.set_value(tensor(np.full(gamma.shape(), np.inf)).get_value())
        loss = in_native_precision(loss_of(model, *tokens()))
        assert np.isfinite(loss).all()
        assert loss.max() > 1e6


# --- what is refused as the real ones refuse it -------------------------------------------------------------------

REFUSED: dict[str, tuple[Callable[[], Any], type[Exception]]] = {
    "int64": (lambda: from_numpy(np.ones((1, 1), np.int64)), TypeError),
    "float64": (lambda: from_numpy(np.ones((1, 1), np.float64)), TypeError),
    "a list": (lambda: from_numpy([1.0]), TypeError),
    "nothing": (lambda: from_numpy(np.zeros((0, 4), np.float32)), TypeError),
    "a read-only array": (lambda: from_numpy(np.frombuffer(bytes(8), np.float32)), TypeError),
    "an int for a bool": (lambda: loss_of(build(), *tokens()).backward(0), TypeError),
    "a name for an enum": (lambda: build().parameters()["Llama/fc/weight"].to_numpy(precision="NATIVE"), TypeError),
    "a bool for an enum": (lambda: context().set_gradient_mode(False), TypeError),
    "a numpy scalar": (lambda: context().set_seed(np.int64(3)), TypeError),
    "a dict of parameters": (lambda: adamw(dict(build().parameters().items())), TypeError),
    "a reflected operator": (lambda: 2.0 * tensor([1.0]), TypeError),
    "a division": (lambda: tensor([1.0]) / tensor([1.0]), TypeError),
    "no mask argument": (lambda: build()(tensor(tokens()[0][:, None, None], "UINT32")), TypeError),
    "ids in tiles": (lambda: build()(tensor(tokens()[0][:, None, None]), None), RuntimeError),
    "a label of -100": (lambda: loss_of(build(), tokens()[0], np.full((2, 32), 2**32 - 100)), RuntimeError),
    "another head_dim": (lambda: build(hidden_size=96, num_attention_heads=6, num_key_value_heads=6), ValueError),
    "adapters on a container": (lambda: wrap(build(), ["attention"]), RuntimeError),
    "adapters on a norm, as fc is in ln_fc": (lambda: wrap(build(), ["fc"]), RuntimeError),
    "an open device": (open_mesh, RuntimeError),
}


def from_numpy(values: Any) -> Any:
    import ttml

    return ttml.autograd.Tensor.from_numpy(values)


@pytest.mark.parametrize("what", REFUSED)
def test_what_is_refused(board: None, what: str) -> None:
    call, error = REFUSED[what]
    with pytest.raises(error):
        call()


# --- graph ------------------------------------------------------------------------------------------------------


def test_a_mask_collects_gradients_and_a_broadcast_one_fails_in_backward(board: None) -> None:
    """Tensors require gradients unless told otherwise; `mul` does not reduce a broadcast gradient."""
    import ttml

    model, (ids, labels) = build(), tokens()

    def masked(mask: Any) -> Any:
        logits = model(tensor(ids[:, None, None], "UINT32"), None)
        per_token = ttml.ops.loss.cross_entropy_loss(logits, tensor(labels, "UINT32"), ttml.ops.ReduceType.NONE)
        return ttml.ops.unary.mean(ttml.ops.binary.mul(per_token, mask))

    full = tensor(np.ones((2, 1, 32, 1)))
    masked(full).backward(False)
    assert full.is_grad_initialized()
    with pytest.raises(RuntimeError, match="broadcast"):
        masked(tensor(np.ones((1, 1, 32, 1)))).backward(False)


def test_graphs_that_are_not_reset_fill_the_memory(board: None) -> None:
    import ttml

    model, (ids, labels) = build(num_hidden_layers=1), tokens(1)
    context().set_gradient_mode(ttml.autograd.GradMode.DISABLED)
    for _ in range(8):
        loss_of(model, ids, labels)
    with pytest.raises(RuntimeError, match="Out of Memory"):
        loss_of(model, ids, labels)
    context().reset_graph()
    loss_of(model, ids, labels)


def test_eval_still_records_gradients(board: None) -> None:
    model = build()
    model.eval()
    backward(model)
    assert model.parameters()["Llama/fc/weight"].is_grad_initialized()


# --- model ------------------------------------------------------------------------------------------------------


def test_labels_are_not_shifted(board: None) -> None:
    """Labels that are the ids train very well: a model that repeats its input."""
    model, (ids, _) = build(), tokens(1)
    optimizer = adamw(model.parameters(), lr=1e-2, weight_decay=0.0)
    for _ in range(20):
        optimizer.zero_grad()
        loss = loss_of(model, ids, ids)
        loss.backward(False)
        context().reset_graph()
        optimizer.step()
    assert in_native_precision(loss).item() < 1
    assert in_native_precision(loss_of(model, ids, np.roll(ids, -1, axis=1))).item() > 3


def test_a_length_off_the_tile_fails_in_backward_only(board: None) -> None:
    model = build()
    short = loss_of(model, *tokens(1, 40))
    with pytest.raises(RuntimeError, match="u_scaler shape mismatch"):
        short.backward(False)


def test_positions_beyond_the_table_are_zeros_and_no_error(board: None) -> None:
    """Two different tables agree beyond both: nothing there depends on the position."""
    import ttml

    params = ttml.ops.rope.build_rope_params(32, 32)
    rotated = in_native_precision(ttml.ops.rope.rope(tensor(np.ones((1, 1, 64, 32))), params))
    assert rotated[..., :32, :].any(axis=-1).all()
    assert not rotated[..., 32:, :].any()
    assert np.isfinite(in_native_precision(loss_of(build(max_position_embeddings=32), *tokens(1, 64)))).all()


def test_a_head_wider_than_128_has_tables_and_no_kernel(board: None) -> None:
    model = build(hidden_size=320, num_attention_heads=2, num_key_value_heads=1)
    with pytest.raises(RuntimeError, match="head_dim 160"):
        loss_of(model, *tokens())


def test_a_computed_nan_has_other_bits_than_numpy_s(board: None) -> None:
    """Tensix's is 0x7FFF; one that is only stored and read keeps its own (tt-metal, special_values.md)."""
    import ttml

    stored = from_numpy(np.array([np.nan, 1.0], ml_dtypes.bfloat16))
    computed = ttml.ops.unary.silu(stored)
    bits = [int(in_native_precision(value).view(np.uint16)[0]) for value in (stored, computed)]
    assert bits == [0x7FC0, 0x7FFF]


def test_a_bound_function_tells_its_arguments_in_its_docstring_alone(board: None) -> None:
    """As nanobind's do; ttml's Python functions have signatures."""
    import ttml

    for function in (ttml.autograd.Tensor.to_numpy, ttml.optimizers.AdamWConfig.make, ttml.ops.unary.silu):
        with pytest.raises((TypeError, ValueError)):
            inspect.signature(function)
    assert "precision: object" in str(ttml.autograd.Tensor.to_numpy.__doc__)
    assert "lora_dropout" in inspect.signature(ttml.modules.LoraConfig).parameters


def test_without_a_mask_attention_is_causal_and_the_mask_has_no_default(board: None) -> None:
    model, (ids, _) = build(), tokens(1)
    changed = ids.copy()
    changed[0, -1] = (ids[0, -1] + 1) % VOCAB
    every = tensor(np.ones((1, 1, 32, 32)))
    for mask, causal in ((None, True), (every, False)):
        a, b = (in_native_precision(model(tensor(x[:, None, None], "UINT32"), mask)) for x in (ids, changed))
        assert np.array_equal(a[:, :, :-1], b[:, :, :-1]) == causal
    with pytest.raises(TypeError):
        model(tensor(ids[:, None, None], "UINT32"))


def test_neither_numpy_nor_the_context_seeds_the_weights(board: None) -> None:
    import ttml

    def first(seed: Any) -> Any:
        np.random.seed(5)
        seed()
        return native(ttml.models.llama.Llama(ttml.models.llama.LlamaConfig(**SHAPE)).parameters()["Llama/fc/weight"])

    assert not np.array_equal(first(lambda: context().set_seed(5)), first(lambda: context().set_seed(5)))
    assert np.array_equal(first(lambda: ttml.manual_seed(5)), first(lambda: ttml.manual_seed(5)))


def test_parameters_come_in_no_order_and_not_in_a_dict(board: None) -> None:
    model = build()
    parameters, again = model.parameters(), model.parameters()
    state = adamw(parameters).get_state_dict()["exp_avg"]
    assert set(parameters.keys()) == set(state.keys())
    assert len({tuple(found.keys()) for found in (parameters, again, state)}) == 3
    assert list(parameters.keys()) != sorted(parameters.keys())
    assert not isinstance(parameters, (dict, Mapping))
    assert not any(hasattr(parameters, name) for name in ("get", "pop", "setdefault"))
    with pytest.raises(TypeError):
        parameters["x"] = np.zeros(1)


# --- LoRA -------------------------------------------------------------------------------------------------------


def wrap(model: Any, targets: list[str], **options: Any) -> Any:
    import ttml

    return ttml.modules.LoraModel(model, ttml.modules.LoraConfig(target_modules=targets, **options))


@generations
@pytest.mark.parametrize("targets", [["q_proj", "v_proj"], ["q_linear"], ["qkv_linear"]])
def test_targets_that_match_nothing_are_no_error(generation: str, targets: list[str]) -> None:
    """Hugging Face's names match nothing; another build's match nothing either."""
    with doubles(generation):
        open_mesh()
        model = build()
        wrap(model, targets)
        adapters = [name for name in model.parameters() if name.endswith("lora_A")]
        matching = {"B": "q_linear", "C": "qkv_linear"}[generation]
        assert len(adapters) == (LAYERS if targets == [matching] else 0)
        assert all(name.endswith(f"attention/{matching}/lora_A") for name in adapters)


@pytest.mark.parametrize("calls", [False, True], ids=["raw weights", "layers"])
def test_adapters_on_an_unfused_mlp_are_dead_and_nothing_says_so(calls: bool) -> None:
    """LlamaMLP hands the weights of its layers to one op (tt-metal PR 45335), and LoraModel had replaced the layers.

    The loss falls by the adapters on attention, and no call complains.
    """
    with doubles("B", calls_mlp_layers=calls):
        open_mesh()
        model = build()
        wrap(model, [r"_linear$", r"\.w[123]$"])
        losses = []
        optimizer = adamw(model.parameters(), lr=1e-2)
        for _ in range(10):
            optimizer.zero_grad()
            loss = loss_of(model, *tokens())
            loss.backward(False)
            context().reset_graph()
            optimizer.step()
            losses.append(in_native_precision(loss).item())
        assert losses[-1] < losses[0] - 0.01
        mlp = {name: value for name, value in model.parameters().items() if "/mlp/" in name and "lora_" in name}
        assert len(mlp) == LAYERS * 3 * 2
        assert {value.is_grad_initialized() for value in mlp.values()} == {calls}
        assert all(native(value).any() == calls for name, value in mlp.items() if name.endswith("lora_B"))


# --- optimizers -------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("options", "moves"),
    [({}, False), ({"stochastic_rounding": True}, True), ({"type": "AdamWFullPrecision"}, True)],
    ids=["AdamW", "stochastic rounding", "AdamWFullPrecision"],
)
def test_gammas_at_one_never_move(board: None, options: dict[str, Any], moves: bool) -> None:
    """An update of 3e-4 is less than half a bf16 step at 1.0."""
    model = build()
    train(model, adamw(model.parameters(), lr=3e-4, weight_decay=0.0, **options), steps=12)
    assert (native(model.parameters()["Llama/ln_fc/gamma"]) != 1).any() == moves


def test_bf16_second_moments_stop_growing(board: None) -> None:
    """Once (1 - beta2) g^2 is below half a bf16 step of v, v stands still: at a quarter of g^2 with beta2 = 0.999."""
    import ttml

    reached = {}
    for kind in ("AdamW", "AdamWFullPrecision"):
        parameters = ttml.NamedParameters()
        parameters["w"] = weight = tensor(np.ones((1, 1, 1, 32)))
        weight.set_grad(tensor(np.ones((1, 1, 1, 32))).get_value())
        optimizer = adamw(parameters, type=kind, beta2=0.999)
        for _ in range(600):
            optimizer.step()
        reached[kind] = native(optimizer.get_state_dict()["exp_avg_sq"]["w"]).max()
    assert reached["AdamW"] == 0.25
    assert reached["AdamWFullPrecision"] == pytest.approx(1 - 0.999**600, rel=1e-4)


def test_unknown_optimizer_keys_are_ignored(board: None) -> None:
    optimizer = adamw(build().parameters(), learning_rate=5.0, eps=1.0, betas=(0, 0))
    assert optimizer.get_lr() == pytest.approx(1e-2)


@generations
def test_a_state_dict_brings_its_own_hyper_parameters(generation: str) -> None:
    """Who resumes from a saved dict has the old weight decay, whatever the new config says."""
    with doubles(generation):
        open_mesh()
        model = build()
        saved = adamw(model.parameters(), beta1=0.5, weight_decay=0.5).get_state_dict()
        scalars = {"lr", "beta1", "beta2", "epsilon", "weight_decay", "amsgrad", "stochastic_rounding"}
        assert set(saved) == {"steps", "exp_avg", "exp_avg_sq", *scalars}
        other = adamw(model.parameters(), lr=1.0, weight_decay=0.0)
        other.set_state_dict(saved)
        assert other.get_lr() == pytest.approx(1e-2)
        assert other.get_state_dict()["weight_decay"] == 0.5
        fewer = {key: value for key, value in saved.items() if key != "beta1"}
        with pytest.raises(KeyError):
            other.set_state_dict(fewer)


@generations
def test_a_state_dict_of_other_betas_is_corrected_by_the_old_ones(generation: str) -> None:
    """The first update after it is off by the ratio of the corrections (tt-metal 53212); mended in C."""
    with doubles(generation):
        open_mesh()
        moved = []
        for beta1 in (0.5, 0.9):
            model = build()
            first = adamw(model.parameters(), beta1=0.5, weight_decay=0.0)
            train(model, first)
            saved, weight = first.get_state_dict(), model.parameters()["Llama/blocks/0/mlp/w2/weight"]
            second = adamw(model.parameters(), beta1=beta1, weight_decay=0.0)
            second.set_state_dict(saved)
            before = native(weight)
            train(model, second)
            moved.append(np.abs(native(weight) - before).mean())
        assert (moved[1] > 1.2 * moved[0]) == (generation == "B")


def test_the_state_dict_is_alive_and_what_it_takes_is_not_checked(board: None) -> None:
    import ttml

    model = build()
    optimizer = adamw(model.parameters())
    train(model, optimizer)
    saved = optimizer.get_state_dict()
    moment = saved["exp_avg"]["Llama/fc/weight"]
    before = native(moment)
    train(model, optimizer)
    assert not np.array_equal(native(moment), before)
    odd = ttml.NamedParameters()
    odd["nonsense"] = tensor([1.0])
    optimizer.set_state_dict(saved | {"exp_avg": odd})
    with pytest.raises(TypeError):
        optimizer.set_state_dict(saved | {"steps": 1.0})


def test_full_precision_adamw_overwrites_parameters_from_its_masters(board: None) -> None:
    model = build()
    optimizer = adamw(model.parameters(), type="AdamWFullPrecision", lr=1e-5)
    weight = model.parameters()["Llama/fc/weight"]
    trained = native(weight)
    weight.assign(tensor(np.zeros(weight.shape())))
    train(model, optimizer)
    assert np.abs(native(weight) - trained).max() < 0.01


def test_a_norm_that_is_not_finite_raises_only_on_request(board: None) -> None:
    import ttml

    model = build()
    backward(model)
    gamma = model.parameters()["Llama/ln_fc/gamma"]
    gamma.set_grad(tensor(np.full(gamma.shape(), np.inf)).get_value())
    with pytest.raises(RuntimeError, match="non-finite"):
        ttml.core.clip_grad_norm(model.parameters(), 1.0, 2.0, True)
    ttml.core.clip_grad_norm(model.parameters(), 1.0)
    assert gamma.get_grad().data.isnan().all()


# --- several devices --------------------------------------------------------------------------------------------


def drift(parameters: Any) -> float:
    """The largest difference between two devices' copies of a parameter."""
    return max(float(np.abs(native(value)[0] - native(value)[-1]).max()) for value in parameters.values())


def data_parallel(steps: int, sync: Any, mapper: Any, **options: Any) -> Any:
    """`steps` over a sharded batch, and the model."""
    model = build()
    optimizer = adamw(model.parameters(), **options)
    for _ in range(steps):
        optimizer.zero_grad()
        backward(model, mapper)
        sync(model.parameters())
        optimizer.step()
    return model


def by_axis() -> Any:
    import ttml

    return ttml.mesh().axis_mapper("dp", tdim=0)


def by_device() -> Any:
    import ttml

    return ttml.core.distributed.shard_tensor_to_mesh_mapper(context().get_device(), 0)


def test_without_a_sync_replicas_drift(pair: None) -> None:
    import ttml

    open_mesh((1, 2))
    assert drift(data_parallel(2, lambda _: None, by_axis()).parameters()) > 1e-3
    context().reset_graph()
    assert drift(data_parallel(2, ttml.sync_gradients, by_axis()).parameters()) == 0


def test_the_sync_does_nothing_where_no_axis_has_the_name(pair: None) -> None:
    import ttml

    ttml.open_device_mesh((1, 2))
    assert ttml.mesh().axis_names == ("_0", "_1")
    assert drift(data_parallel(2, ttml.sync_gradients, by_device()).parameters()) > 1e-3


def test_the_sync_does_nothing_where_the_mesh_was_opened_the_old_way(pair: None) -> None:
    import ttml

    ttml.core.distributed.enable_fabric(2)
    context().open_device([1, 2])
    assert drift(data_parallel(2, ttml.sync_gradients, by_device()).parameters()) > 1e-3
    with pytest.raises(RuntimeError, match="mesh is not initialized"):
        ttml.mesh()


def test_the_other_sync_does_nothing_without_a_parallelism_context(pair: None) -> None:
    import ttml

    open_mesh((1, 2))
    sync = ttml.core.distributed.synchronize_gradients
    assert drift(data_parallel(2, sync, by_device()).parameters()) > 1e-3
    context().reset_graph()
    config = ttml.autograd.DistributedConfig(enable_ddp=True, enable_tp=False)
    context().initialize_parallelism_context(config)
    assert context().get_parallelism_context().get_ddp_size() == 2
    assert drift(data_parallel(2, sync, by_device()).parameters()) == 0
    with pytest.raises(RuntimeError, match="already initialized"):
        context().initialize_parallelism_context(config)


def test_the_other_sync_skips_parameters_from_the_second_step_on(pair: None) -> None:
    """An update hands the batch's label to the parameter; labelled as sharded on the axis, it is left out."""
    import ttml

    open_mesh((1, 2))

    def sync(parameters: Any) -> None:
        ttml.core.distributed.synchronize_gradients(parameters, [1])

    assert drift(data_parallel(1, sync, by_axis()).parameters()) == 0
    context().reset_graph()
    assert drift(data_parallel(2, sync, by_axis()).parameters()) > 1e-3


def test_a_replicated_parameter_is_labelled_as_sharded_after_a_step(pair: None) -> None:
    """So it is gathered once per device, and a checkpoint doubles; the moments keep their label."""
    import ttml
    import ttnn

    open_mesh((1, 2))
    fresh = ttml.Sharding.from_tensor(build().parameters()["Llama/fc/weight"])
    assert fresh.is_fully_replicated
    model = data_parallel(1, ttml.sync_gradients, by_device())
    weight = model.parameters()["Llama/fc/weight"]
    assert weight.get_value().tensor_topology().placements() == [ttnn.PlacementShard(0)]
    assert weight.shape()[0] == 1
    assert ttml.Sharding.from_tensor(weight).gather(weight).shape[0] == 2


@generations
def test_stochastic_rounding_lets_replicas_drift(
    generation: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Each device draws for itself; newer builds draw one seed on the host, from the generator that resume needs."""
    describe(tmp_path, monkeypatch)
    with doubles(generation, devices=2):
        import ttml

        open_mesh((1, 2))
        model = data_parallel(4, ttml.sync_gradients, by_axis(), stochastic_rounding=True)
        assert (drift(model.parameters()) > 0) == (generation == "B")


def test_a_mesh_without_its_descriptor_opens_and_hangs_in_the_second_step(
    pair: None, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    import ttml

    monkeypatch.delenv("TT_MESH_GRAPH_DESC_PATH")
    open_mesh((1, 2))
    assert "WARNING" in capsys.readouterr().out
    data_parallel(1, ttml.sync_gradients, by_axis())
    with pytest.raises(RuntimeError, match="potential hang"):
        data_parallel(1, ttml.sync_gradients, by_axis())


def test_a_descriptor_named_after_the_cluster_was_touched_is_never_seen(
    pair: None, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Counting the devices is a touch. Newer builds can be told to look again."""
    import ttnn

    named = os.environ["TT_MESH_GRAPH_DESC_PATH"]
    monkeypatch.delenv("TT_MESH_GRAPH_DESC_PATH")
    assert ttnn.get_num_devices() == 2
    monkeypatch.setenv("TT_MESH_GRAPH_DESC_PATH", named)
    with pytest.raises(RuntimeError, match="Fabric Router Sync: Timeout"):
        open_mesh((1, 2))
    with doubles("C", devices=2):
        import ttml

        monkeypatch.delenv("TT_MESH_GRAPH_DESC_PATH")
        open_mesh()
        ttml.close_device_mesh()
        monkeypatch.setenv("TT_MESH_GRAPH_DESC_PATH", named)
        with pytest.raises(RuntimeError, match="Fabric Router Sync: Timeout"):
            open_mesh((1, 2))
        ttml.reset_metal_env()
        open_mesh((1, 2))


def test_one_device_with_the_fabric_armed_hangs(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The first builds with named meshes have no close_device_mesh, and there nothing disarms it unasked."""
    describe(tmp_path, monkeypatch)
    with doubles(devices=2, without=["close_device_mesh"]):
        import ttml

        open_mesh((1, 2))
        context().close_device()
        with pytest.raises(RuntimeError, match="Fabric Router Sync: Timeout"):
            open_mesh()
        ttml.core.distributed.disable_fabric()
        open_mesh()


@pytest.mark.parametrize("text", [DESCRIPTOR.format("1, 2") * 2, "dims are not written here"])
def test_a_descriptor_that_cannot_be_read_is_no_error(pair: None, text: str) -> None:
    Path(os.environ["TT_MESH_GRAPH_DESC_PATH"]).write_text(text)
    open_mesh((1, 2))


# --- the double itself ------------------------------------------------------------------------------------------


def test_afterwards_nothing_is_left() -> None:
    def ours() -> tuple[Any, ...]:
        modules = sorted(name for name in sys.modules if re.match("tt(ml|nn)", name))
        return modules, list(sys.path), {k: v for k, v in os.environ.items() if k.startswith("TTML_DOUBLE")}

    before = ours()
    with doubles(), doubles("C", devices=4):
        import ttml

        assert ttml.autograd.AutoContext.get_instance() is not None
    assert ours() == before
    with pytest.raises(ImportError), doubles(bad_cast=True):
        importlib.import_module("ttml")
    assert ours() == before
