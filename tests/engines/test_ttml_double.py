# ruff: noqa: E402  what needs torch is imported after the skip
"""The doubles of ttml and ttnn are wrong where the real ones are wrong.

Each test of a trap uses the API as one would who does not know the trap, and falls in. That our backend does not is
shown elsewhere. The facts are public: tt-metal's sources, its issues, and notes of people who trained on boards.
"""

from __future__ import annotations

import importlib
import os
import re
import subprocess
import sys
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

import ml_dtypes
import numpy as np
import pytest

torch = pytest.importorskip("torch", reason="the doubles compute with torch")

from tests.doubles import doubles, environment
from tests.tiny import random_llama

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


def in_native_precision(value: Any) -> Any:
    import ttml

    return value.to_numpy(precision=ttml.autograd.PreferredPrecision.NATIVE)


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


def test_full_precision_adamw_leaves_no_stale_read(board: None) -> None:
    """It replaces the parameter's value, which drops the cached views."""
    model = build()
    weight = model.parameters()["Llama/ln_fc/gamma"]
    before = weight.to_numpy()
    train(model, adamw(model.parameters(), type="AdamWFullPrecision"))
    assert not np.array_equal(before, weight.to_numpy())


def test_dtype_is_that_of_the_full_view(board: None) -> None:
    import ttml
    import ttnn

    weight = build().parameters()["Llama/fc/weight"]
    assert weight.dtype() is ttnn.DataType.FLOAT32
    assert weight.get_value(ttml.autograd.PreferredPrecision.NATIVE).dtype is ttnn.DataType.BFLOAT16
    assert (weight.to_numpy().dtype, in_native_precision(weight).dtype) == (np.float32, ml_dtypes.bfloat16)


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


def test_an_fp32_parameter_never_trains(board: None) -> None:
    """The fused update is written to the bf16 view, while NATIVE is the fp32 tensor; in-place initialisers make one."""
    import ttml

    model = build()
    gamma = ttml.init.zeros_(model.parameters()["Llama/ln_fc/gamma"])
    train(model, adamw(model.parameters()))
    assert not native(gamma).any()
    assert gamma.get_value().data.any()


def test_the_bf16_view_of_fp32_state_is_stale(board: None) -> None:
    """Asking for the shape is enough to make that view, which the fused update of the fp32 buffer leaves behind."""
    model = build()
    optimizer = adamw(model.parameters(), type="AdamWFullPrecision")
    moment = optimizer.get_state_dict()["exp_avg"]["Llama/fc/weight"]
    assert moment.shape() == [1, 1, 96, HIDDEN]
    train(model, optimizer)
    assert not moment.get_value().data.any()
    assert native(moment).any()


def test_values_survive_the_way_there_and_back(board: None) -> None:
    import ttml
    import ttnn

    values = np.arange(6, dtype=np.uint32).reshape(1, 6) * 2**29
    assert np.array_equal(in_native_precision(tensor(values, "UINT32")), values)
    halves = np.linspace(-1, 1, 6).astype(ml_dtypes.bfloat16)
    back = ttml.autograd.Tensor.from_numpy(halves).to_numpy(ttnn.DataType.BFLOAT16)
    assert back.tobytes() == halves.tobytes()


def test_from_numpy_reads_the_buffer_and_not_the_strides(board: None) -> None:
    import ttml

    matrix = np.arange(6, dtype=np.float32).reshape(2, 3)
    assert in_native_precision(ttml.autograd.Tensor.from_numpy(matrix.T)).ravel().tolist() == [0, 1, 2, 3, 4, 5]
    assert in_native_precision(ttml.autograd.Tensor.from_numpy(matrix[:, 1:])).ravel().tolist() == [1, 2, 3, 4]


@pytest.mark.parametrize("dtype", [np.int64, np.float64, np.float16, np.bool_, np.int16])
def test_from_numpy_refuses_other_dtypes(board: None, dtype: Any) -> None:
    import ttml

    with pytest.raises(TypeError):
        ttml.autograd.Tensor.from_numpy(np.ones((1, 1), dtype))


def test_from_numpy_refuses_lists_empty_and_read_only_arrays(board: None) -> None:
    import ttml

    for bad in ([1.0], np.zeros((0, 4), np.float32), np.frombuffer(bytes(8), np.float32)):
        with pytest.raises(TypeError):
            ttml.autograd.Tensor.from_numpy(bad)


def test_bindings_convert_nothing(board: None) -> None:
    """Bools take only bools, enums only members, integers no numpy scalars, and the keyword is `epsilon`."""
    import ttml

    model, optimizers = build(), ttml.optimizers
    for call in (
        lambda: loss_of(model, *tokens()).backward(0),
        lambda: loss_of(model, *tokens()).backward(),
        lambda: model.parameters()["Llama/fc/weight"].to_numpy(precision="NATIVE"),
        lambda: context().set_gradient_mode(False),
        lambda: context().set_seed(np.int64(3)),
        lambda: optimizers.AdamWConfig.make(1e-3, 0.9, 0.999, eps=1e-8, weight_decay=0.0),
        lambda: optimizers.AdamWConfig.make(1e-3, 0.9, 0.999, 1e-8, 0.0, stochastic_rounding=1),
        lambda: adamw(dict(model.parameters().items())),
        lambda: ttml.core.clip_grad_norm(dict(model.parameters().items()), 1.0),
    ):
        with pytest.raises(TypeError):
            call()


def test_operators_are_few(board: None) -> None:
    """Division is bound under Python 2's name; nothing is reflected; only `*` takes a float."""
    a = tensor([[[[3.0]]]])
    for use in (lambda: a / a, lambda: 2.0 * a, lambda: a + 1.0, lambda: a - 1.0):
        with pytest.raises(TypeError):
            use()
    assert in_native_precision(a * 2.0 + a).item() == 9
    assert in_native_precision(a.__div__(a) - a).item() == -2


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


def test_backward_needs_a_graph(board: None) -> None:
    """After a reset, or without gradients, there is nothing to go back through."""
    from ttml.common.utils import no_grad

    model = build()
    loss = loss_of(model, *tokens())
    context().reset_graph()
    with pytest.raises(RuntimeError, match="no associated gradient function"):
        loss.backward(False)
    with no_grad():
        loss = loss_of(model, *tokens())
    with pytest.raises(RuntimeError, match="no associated gradient function"):
        loss.backward(False)


def test_eval_still_records_gradients(board: None) -> None:
    model = build()
    model.eval()
    backward(model)
    assert model.parameters()["Llama/fc/weight"].is_grad_initialized()


def test_gradients_accumulate_in_bf16_until_zeroed(board: None) -> None:
    model = build()
    optimizer, weight = adamw(model.parameters()), model.parameters()["Llama/fc/weight"]
    backward(model)
    once = weight.get_grad().data.clone()
    backward(model)
    assert once.dtype is torch.bfloat16
    assert torch.equal(weight.get_grad().data, once + once)
    optimizer.zero_grad()
    assert weight.is_grad_initialized()
    assert not weight.get_grad().data.any()


# --- model ------------------------------------------------------------------------------------------------------


def unpermute(rows: Any, heads: int) -> Any:
    """Halves of a head, as Hugging Face keeps them, to the neighbours that ttml rotates."""
    return rows.reshape(heads, 2, -1, rows.shape[-1]).swapaxes(1, 2).reshape(rows.shape)


def hf_weights(*, tied: bool = False) -> dict[str, Any]:
    sizes = {"head_dim": HIDDEN // HEADS, "tie_word_embeddings": tied}
    weights = random_llama(SHAPE | sizes, seed=3)
    return {name: array.astype(ml_dtypes.bfloat16).astype(np.float32) for name, array in weights.items()}


def give_hf_weights(model: Any, hf: Mapping[str, Any], *, permuted: bool = True) -> None:
    """Written out once more, so that it checks the double and not our map."""
    mine = model.parameters()

    def put(name: str, array: Any) -> None:
        rows = array if array.ndim == 2 else array[None]
        padded = np.zeros((-(-len(rows) // 32) * 32 if len(rows) > 1 else 1, rows.shape[1]), np.float32)
        padded[: len(rows)] = rows
        mine[name].assign(tensor(padded[None, None]))

    embedding = hf["model.embed_tokens.weight"]
    put("Llama/fc/weight", hf.get("lm_head.weight", embedding))
    if "lm_head.weight" in hf:
        put("Llama/tok_emb/weight", embedding)
    put("Llama/ln_fc/gamma", hf["model.norm.weight"])
    for layer in range(LAYERS):
        here, there = f"Llama/blocks/{layer}", f"model.layers.{layer}"
        q, k, v, o = (hf[f"{there}.self_attn.{p}_proj.weight"] for p in "qkvo")
        gate, up, down = (hf[f"{there}.mlp.{p}_proj.weight"] for p in ("gate", "up", "down"))
        if permuted:
            q, k = unpermute(q, HEADS), unpermute(k, KV_HEADS)
        put(f"{here}/attention_norm/gamma", hf[f"{there}.input_layernorm.weight"])
        put(f"{here}/mlp_norm/gamma", hf[f"{there}.post_attention_layernorm.weight"])
        put(f"{here}/attention/out_linear/weight", o)
        put(f"{here}/mlp/w2/weight", down)
        if f"{here}/attention/qkv_linear/weight" in mine:
            put(f"{here}/attention/qkv_linear/weight", np.concatenate([q, k, v]))
        else:
            put(f"{here}/attention/q_linear/weight", q)
            put(f"{here}/attention/kv_linear/weight", np.concatenate([k, v]))
        if f"{here}/mlp/w_gate_up/weight" in mine:
            put(f"{here}/mlp/w_gate_up/weight", np.concatenate([gate, up]))
        else:
            put(f"{here}/mlp/w1/weight", gate)
            put(f"{here}/mlp/w3/weight", up)


def hf_logits(hf: Mapping[str, Any], ids: Any, **changes: Any) -> Any:
    from transformers import LlamaConfig, LlamaForCausalLM

    tied = "lm_head.weight" not in hf
    config = LlamaConfig(**SHAPE | {"rms_norm_eps": 1e-5, "tie_word_embeddings": tied} | changes)
    model = LlamaForCausalLM(config)
    state = {name: torch.from_numpy(array) for name, array in hf.items()}
    model.load_state_dict(state if not tied else state | {"lm_head.weight": state["model.embed_tokens.weight"]})
    with torch.no_grad():
        return model(torch.from_numpy(ids)).logits.numpy()


@pytest.mark.parametrize(
    ("generation", "fused", "tied"),
    [
        ("B", [], False),
        ("B", [], True),
        ("C", ["qkv", "gate_up"], True),
        ("C", ["qkv"], False),
        ("C", ["gate_up"], False),
    ],
)
def test_logits_are_those_of_transformers_and_only_with_permuted_rows(
    generation: str, fused: list[str], tied: bool
) -> None:
    ids, _ = tokens(2, 64)
    hf = hf_weights(tied=tied)
    expected = hf_logits(hf, ids)
    errors = {}
    with doubles(generation, fused=fused):
        import ttml

        open_mesh()
        tying = ttml.models.WeightTyingType
        model = build(weight_tying=tying.Enabled if tied else tying.Disabled)
        for permuted in (True, False):
            give_hf_weights(model, hf, permuted=permuted)
            logits = in_native_precision(model(tensor(ids[:, None, None], "UINT32"), None))
            assert logits.shape == (2, 1, 64, VOCAB)
            errors[permuted] = np.abs(logits[:, 0].astype(np.float32) - expected).max() / np.abs(expected).max()
    assert errors[True] < 0.02  # a few roundings of 2^-9 each, in every one of some twenty operations
    assert errors[False] > 4 * errors[True]


def test_llama3_stretches_low_frequencies_as_transformers_does(board: None) -> None:
    import ttml

    numbers = {"high_freq_factor": 4.0, "low_freq_factor": 1.0}
    scaling = ttml.models.llama.LlamaRopeScalingConfig(scaling_factor=8.0, original_context_length=32, **numbers)
    ids, _ = tokens(1, 64)
    hf, errors = hf_weights(), []
    rope = {"rope_type": "llama3", "factor": 8.0, "original_max_position_embeddings": 32, "rope_theta": 10000.0}
    expected = hf_logits(hf, ids, rope_parameters=rope | numbers)
    for model in (build(rope_scaling=scaling), build()):
        give_hf_weights(model, hf)
        logits = in_native_precision(model(tensor(ids[:, None, None], "UINT32"), None)).astype(np.float32)
        errors.append(np.abs(logits[:, 0] - expected).max())
    assert errors[0] < errors[1] / 2


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


def test_head_dim_is_checked_by_the_model_and_not_by_its_config(board: None) -> None:
    import ttml

    config = ttml.models.llama.LlamaConfig(hidden_size=96, num_attention_heads=6, num_key_value_heads=6)
    with pytest.raises(ValueError, match="head_dim"):
        ttml.models.llama.Llama(config)


@pytest.mark.parametrize(
    ("shape", "message"),
    [
        ({"max_position_embeddings": 100}, "position"),
        ({"hidden_size": 80}, "Hidden size"),
        ({"num_attention_heads": 3, "num_key_value_heads": 1}, "attention heads"),
        ({"num_attention_heads": 2, "num_key_value_heads": 3}, "key/value heads"),
    ],
)
def test_what_the_config_checks(board: None, shape: dict[str, int], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        build(**shape)


def test_the_default_inner_size_is_rounded_up_to_256(board: None) -> None:
    inner = build(intermediate_size=None).parameters()["Llama/blocks/0/mlp/w1/weight"]
    assert inner.shape() == [1, 1, 256, HIDDEN]  # 8/3 of 64 is 170


def test_fused_gate_and_up_need_whole_tiles() -> None:
    with doubles("C"):
        open_mesh()
        with pytest.raises(ValueError, match="multiple of 32"):
            build(intermediate_size=100)


def test_biases_sit_on_every_projection_of_the_attention(board: None) -> None:
    names = build(attention_bias=True).parameters()
    assert {f"Llama/blocks/0/attention/{part}_linear/bias" for part in ("q", "kv", "out")} <= set(names)


def test_ids_and_labels_must_be_unsigned_and_row_major(board: None) -> None:
    import ttml

    model, (ids, labels) = build(), tokens()
    with pytest.raises(RuntimeError, match="ROW_MAJOR"):
        model(tensor(ids[:, None, None]), None)
    logits = model(tensor(ids[:, None, None], "UINT32"), None)
    for target, reduce, message in (
        (tensor(labels), "MEAN", "ROW_MAJOR"),
        (tensor(labels[:, None], "UINT32"), "MEAN", "does not fit"),
        (tensor(labels, "UINT32"), "SUM", "reduction"),
    ):
        with pytest.raises(RuntimeError, match=message):
            ttml.ops.loss.cross_entropy_loss(logits, target, ttml.ops.ReduceType[reduce])


def test_dropout_is_seeded_by_the_context_and_off_in_eval(board: None) -> None:
    model, (ids, labels) = build(mlp_dropout=0.5), tokens()

    def loss(seed: int) -> float:
        context().reset_graph()
        context().set_seed(seed)
        return float(in_native_precision(loss_of(model, ids, labels)).item())

    assert loss(1) == loss(1)
    assert len({loss(seed) for seed in range(4)}) > 1
    model.eval()
    assert len({loss(seed) for seed in range(4)}) == 1


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


def test_the_loss_is_bf16_and_a_label_outside_the_vocabulary_is_no_ignored_one(board: None) -> None:
    model, (ids, labels) = build(), tokens()
    loss = in_native_precision(loss_of(model, ids, labels))
    assert (loss.dtype, loss.shape) == (ml_dtypes.bfloat16, (1, 1, 1, 1))
    assert abs(loss.item() - np.log(VOCAB)) < 0.5
    with pytest.raises(RuntimeError, match="outside the vocabulary"):
        loss_of(model, ids, np.full_like(labels, 2**32 - 100))


def test_neither_numpy_nor_the_context_seeds_the_weights(board: None) -> None:
    import ttml

    def first(seed: Any) -> Any:
        np.random.seed(5)
        seed()
        return native(ttml.models.llama.Llama(ttml.models.llama.LlamaConfig(**SHAPE)).parameters()["Llama/fc/weight"])

    assert not np.array_equal(first(lambda: context().set_seed(5)), first(lambda: context().set_seed(5)))
    assert np.array_equal(first(lambda: ttml.manual_seed(5)), first(lambda: ttml.manual_seed(5)))


@generations
def test_names_and_shapes_of_the_parameters(generation: str) -> None:
    kv = KV_HEADS * HIDDEN // HEADS
    expected = {
        "B": {
            "attention/q_linear/weight": [HIDDEN, HIDDEN],
            "attention/kv_linear/weight": [2 * kv, HIDDEN],
            "mlp/w1/weight": [FFN, HIDDEN],
            "mlp/w3/weight": [FFN, HIDDEN],
        },
        "C": {
            "attention/qkv_linear/weight": [HIDDEN + 2 * kv, HIDDEN],
            "mlp/w_gate_up/weight": [2 * FFN, HIDDEN],
        },
    }[generation] | {
        "attention/out_linear/weight": [HIDDEN, HIDDEN],
        "mlp/w2/weight": [HIDDEN, FFN],
        "attention_norm/gamma": [1, HIDDEN],
        "mlp_norm/gamma": [1, HIDDEN],
    }
    with doubles(generation):
        import ttml

        open_mesh()
        shapes = {name: value.shape() for name, value in build().parameters().items()}
        block = {f"Llama/blocks/{layer}/{name}": [1, 1, *s] for layer in range(LAYERS) for name, s in expected.items()}
        ends = {f"Llama/{name}/weight": [1, 1, 96, HIDDEN] for name in ("fc", "tok_emb")}
        assert shapes == block | ends | {"Llama/ln_fc/gamma": [1, 1, 1, HIDDEN]}
        fields = ttml.models.llama.LlamaConfig.__dataclass_fields__
        assert ("embedding_placement" in fields, "embedding_parallel" in fields) == (
            generation == "C",
            generation == "B",
        )
        assert hasattr(ttml.checkpointing, "CheckpointShapeError") == (generation == "C")
        assert hasattr(ttml.autograd.AutoContext, "get_generator_state") == (generation == "C")


def test_tied_embeddings_survive_under_the_heads_name(board: None) -> None:
    import ttml

    names = list(build(weight_tying=ttml.models.WeightTyingType.Enabled).parameters().keys())
    assert "Llama/fc/weight" in names
    assert "Llama/tok_emb/weight" not in names


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


def test_the_root_of_a_name_is_the_outermost_class(board: None) -> None:
    import ttml

    mine = type("Mine", (ttml.models.llama.Llama,), {})
    model = mine(ttml.models.llama.LlamaConfig(**SHAPE))
    assert "Mine/fc/weight" in model.parameters()
    model.create_name("Llama")
    assert "Llama/fc/weight" in model.parameters()


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


@pytest.mark.parametrize("target", ["attention", "mlp", "fc"])
def test_targets_that_hit_a_container_or_a_norm_raise(board: None, target: str) -> None:
    """A search, not a match: "fc" is found in "ln_fc"."""
    with pytest.raises(RuntimeError, match="not a supported type"):
        wrap(build(), [target])
    wrap(build(), ["^fc$"])


def test_wrapping_changes_names_and_freezes_the_base(board: None) -> None:
    model = build()
    lora = wrap(model, ["q_linear"], trainable_modules=["blocks/0/mlp_norm", "blocks.1.mlp_norm"])
    assert "LoraModel/model/blocks/0/attention/q_linear/weight" in lora.parameters()
    assert "Llama/blocks/0/attention/q_linear/weight" in model.parameters()
    trained = {name for name, value in model.parameters().items() if value.get_requires_grad()}
    adapters = {f"Llama/blocks/{i}/attention/q_linear/lora_{m}" for i in range(LAYERS) for m in "AB"}
    assert trained == adapters | {"Llama/blocks/0/mlp_norm/gamma"}


def test_adapters_are_seeded_by_numpy(board: None) -> None:
    def first(**seeds: int) -> Any:
        model = build()
        np.random.seed(seeds["numpy"])
        wrap(model, ["q_linear"])
        return native(model.parameters()["Llama/blocks/0/attention/q_linear/lora_A"])

    assert np.array_equal(first(numpy=1), first(numpy=1))
    assert not np.array_equal(first(numpy=1), first(numpy=2))


def test_adapters_train_and_start_at_the_base(board: None) -> None:
    model, (ids, labels) = build(), tokens()
    before = in_native_precision(loss_of(model, ids, labels)).item()
    lora = wrap(model, ["q_linear", "kv_linear", "w1"], rank=8)
    assert in_native_precision(loss_of(lora, ids, labels)).item() == before
    train(lora, adamw(lora.parameters()), steps=5)
    assert in_native_precision(loss_of(lora, ids, labels)).item() < before


def test_an_optimizer_has_no_state_for_what_was_frozen_when_it_was_built(board: None) -> None:
    model = build()
    wrap(model, ["q_linear"])
    optimizer = adamw(model.parameters())
    model.parameters()["Llama/fc/weight"].set_requires_grad(True)
    backward(model)
    with pytest.raises(IndexError):
        optimizer.step()


# --- optimizers -------------------------------------------------------------------------------------------------


def test_full_precision_adamw_is_torchs(board: None) -> None:
    import ttml

    numbers = {"beta1": 0.8, "beta2": 0.9, "epsilon": 1e-8, "weight_decay": 0.1}
    parameters, weight = ttml.NamedParameters(), tensor(np.linspace(-1, 1, 32).reshape(1, 1, 1, 32))
    parameters["w"] = weight
    reference = torch.nn.Parameter(torch.from_numpy(native(weight)[0]))
    theirs = torch.optim.AdamW([reference], lr=1e-2, betas=(0.8, 0.9), eps=1e-8, weight_decay=0.1)
    ours = adamw(parameters, type="AdamWFullPrecision", **numbers)
    for step in range(5):
        gradient = tensor(np.sin(np.arange(32) + step).reshape(1, 1, 1, 32))
        weight.set_grad(gradient.get_value())
        reference.grad = torch.from_numpy(native(gradient)[0])
        ours.step()
        theirs.step()
    masters = native(ours.get_state_dict()["master_weights"]["w"])[0]
    np.testing.assert_allclose(masters, reference.detach().numpy(), rtol=1e-5, atol=1e-6)
    assert native(weight)[0].tolist() == masters.astype(ml_dtypes.bfloat16).astype(np.float32).tolist()


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


def test_the_state_dict_has_no_betas_and_restores_none(board: None) -> None:
    model = build()
    saved = adamw(model.parameters(), beta1=0.5, epsilon=1.0).get_state_dict()
    assert set(saved) == {"steps", "lr", "exp_avg", "exp_avg_sq", "amsgrad"}
    other = adamw(model.parameters(), lr=1.0)
    other.set_state_dict(saved)
    assert other.get_lr() == pytest.approx(1e-2)
    assert other._config.beta1 == pytest.approx(0.9)


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


def test_a_step_without_gradients_complains_about_nothing(board: None) -> None:
    model = build()
    optimizer, before = adamw(model.parameters()), native(model.parameters()["Llama/fc/weight"])
    optimizer.step()
    assert optimizer.get_state_dict()["steps"] == 1
    assert np.array_equal(native(model.parameters()["Llama/fc/weight"]), before)


def test_clipping_returns_the_norm_before_it_and_is_exact_to_bf16_only(board: None) -> None:
    import ttml

    model = build()
    backward(model)
    gradients = [value.get_grad().data for value in model.parameters().values()]
    before = torch.stack([g.float().norm() for g in gradients]).norm().item()
    limit = before / 3
    norm = ttml.core.clip_grad_norm(model.parameters(), limit)
    after = torch.stack([v.get_grad().data.float().norm() for v in model.parameters().values()]).norm().item()
    assert in_native_precision(norm).dtype == ml_dtypes.bfloat16
    assert in_native_precision(norm).item() == pytest.approx(before, rel=2**-8)
    assert after == pytest.approx(limit, rel=2**-7)
    assert after != pytest.approx(limit, rel=1e-6)


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


def test_two_devices_have_the_gradient_of_one(pair: None) -> None:
    import ttml

    open_mesh((1, 2))
    model = build()
    whole = loss_of(model, *tokens(2))
    whole.backward(False)
    weight = model.parameters()["Llama/fc/weight"]
    alone = weight.get_grad().data[0].float().numpy().copy()
    context().reset_graph()
    adamw(model.parameters()).zero_grad()
    backward(model, by_axis())
    halves = weight.get_grad().data.float().numpy()
    assert np.abs(halves[0] - halves[1]).max() > 1e-3
    ttml.sync_gradients(model.parameters())
    together = weight.get_grad().data.float().numpy()
    assert np.array_equal(together[0], together[1])
    assert np.abs(together[0] - alone).max() < 2**-7 * np.abs(alone).max()


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


def test_a_read_from_two_devices_needs_a_composer_which_stacks_replicas(pair: None) -> None:
    import ttml

    device = open_mesh((1, 2))
    weight = build().parameters()["Llama/fc/weight"]
    with pytest.raises(RuntimeError, match="distributed over mesh"):
        weight.to_numpy()
    composer = ttml.core.distributed.concat_mesh_to_tensor_composer(device, 0)
    assert weight.to_numpy(composer=composer).shape == (2, 1, 96, HIDDEN)
    assert ttml.Sharding.from_tensor(weight).gather(weight).shape == (1, 1, 96, HIDDEN)


def test_a_sharded_tensor_is_gathered_and_put_back(pair: None) -> None:
    import ttml
    import ttnn

    open_mesh((1, 2))
    values = np.arange(8, dtype=np.float32).reshape(4, 2)
    for mapper in (by_axis(), by_device()):
        there = tensor(values, "FLOAT32", mapper)
        sharding = ttml.Sharding.from_tensor(there)
        assert there.shape() == [2, 2]
        assert np.array_equal(sharding.gather(there), values)
        again = ttml.autograd.Tensor.from_numpy(values, ttnn.Layout.TILE, None, sharding.derive_mapper())
        assert np.array_equal(native(again), native(there))


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


def test_with_rounding_drawn_on_the_host_resuming_needs_the_generator() -> None:
    with doubles("C"):
        open_mesh()
        model = build()
        optimizer = adamw(model.parameters(), stochastic_rounding=True)
        train(model, optimizer)
        gamma = model.parameters()["Llama/ln_fc/gamma"]
        saved, state = native(gamma)[0], context().get_generator_state()
        outcomes = []
        for restore in (True, True, False):
            gamma.assign(tensor(saved))
            if restore:
                context().set_generator_state(state)
            for value in model.parameters().values():
                value.set_grad(tensor(np.full(value.shape(), 1e-3)).get_value())
            optimizer.step()
            outcomes.append(native(gamma))
        assert not np.array_equal(outcomes[1], outcomes[2])


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


@pytest.mark.parametrize(
    ("text", "message"),
    [
        (DESCRIPTOR.format("2, 2"), "Mesh shape mismatch"),
        (DESCRIPTOR.format("1, 2").replace("] }", "] dim_types: [ RING ] }"), "dim_types"),
        (DESCRIPTOR.format("1, 2") * 2, None),
        ("dims are not written here", None),
    ],
    ids=["other dims", "dim_types of another length", "several meshes", "unreadable"],
)
def test_a_descriptor_is_refused_only_where_it_can_be_read(pair: None, text: str, message: str | None) -> None:
    Path(os.environ["TT_MESH_GRAPH_DESC_PATH"]).write_text(text)
    if message is None:
        open_mesh((1, 2))
        return
    with pytest.raises(RuntimeError, match=message):
        open_mesh((1, 2))


def test_devices_opened_bare_have_no_fabric(pair: None) -> None:
    import ttml

    context().open_device([1, 2])
    model = build()
    backward(model, by_device())
    with pytest.raises(RuntimeError, match="fabric"):
        ttml.core.distributed.synchronize_gradients(model.parameters(), [1])


def test_a_batch_that_does_not_divide_is_refused(pair: None) -> None:
    open_mesh((1, 2))
    with pytest.raises(RuntimeError, match="over 2 devices"):
        loss_of(build(), *tokens(3), by_axis())


# --- opening and failing ----------------------------------------------------------------------------------------


def test_a_device_opens_once_and_by_itself(board: None) -> None:
    import ttml

    with pytest.raises(RuntimeError, match="open_device was called after"):
        context().open_device([1, 1])
    context().close_device()
    context().close_device()
    assert ttml.maybe_mesh() is not None  # a dead one
    tensor([1.0])
    with pytest.raises(RuntimeError, match="open_device was called after"):
        open_mesh()
    ttml.close_device_mesh()
    assert ttml.maybe_mesh() is None
    open_mesh()


def test_more_devices_than_present() -> None:
    with doubles(), pytest.raises(RuntimeError, match="too big"):
        open_mesh((1, 2))


def test_devices_that_another_process_holds() -> None:
    with doubles(busy=True), pytest.raises(RuntimeError, match="CHIP_IN_USE"):
        open_mesh()


def test_memory_runs_out_at_the_step_that_was_chosen() -> None:
    with doubles(oom_at_step=2):
        open_mesh()
        model = build()
        optimizer = adamw(model.parameters())
        train(model, optimizer)
        with pytest.raises(RuntimeError, match="Out of Memory"):
            train(model, optimizer)


@pytest.mark.parametrize(("first", "moves"), [(0, [True, True]), (1, [False, False]), (2, [True, False])])
def test_an_optimizer_that_changes_nothing_from_a_step_on(first: int, moves: list[bool]) -> None:
    """With no other sign of it: the step is counted."""
    with doubles(no_update_from_step=first):
        open_mesh()
        model = build()
        optimizer = adamw(model.parameters())
        moved = []
        for _ in moves:
            before = {name: native(tensor) for name, tensor in model.parameters().items()}
            train(model, optimizer)
            moved.append(any((native(tensor) != before[name]).any() for name, tensor in model.parameters().items()))
        assert moved == moves
        assert optimizer.get_state_dict()["steps"] == len(moves)


def test_an_older_build_lacks_names() -> None:
    with doubles(without=["open_device_mesh", "autograd.AutoContext.get_gradient_mode"]):
        import ttml

        assert not hasattr(ttml, "open_device_mesh")
        assert not hasattr(ttml.autograd.AutoContext, "get_gradient_mode")
        assert hasattr(ttml, "Mesh")


def test_how_an_import_fails(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("TT_METAL_RUNTIME_ROOT", raising=False)
    with doubles(bad_cast=True), pytest.raises(ImportError, match="std::bad_cast"):
        importlib.import_module("ttml")
    with doubles(needs_runtime_root=True), pytest.raises(RuntimeError, match="TT_METAL_RUNTIME_ROOT"):
        importlib.import_module("ttml")
    monkeypatch.setenv("TT_METAL_RUNTIME_ROOT", str(tmp_path))
    with doubles(needs_runtime_root=True):
        assert hasattr(importlib.import_module("ttml"), "autograd")
    with doubles(impostor=True):
        unrelated = importlib.import_module("ttml")
        assert (hasattr(unrelated, "autograd"), hasattr(unrelated, "__version__")) == (False, True)


def test_a_subprocess_finds_the_doubles_by_its_environment() -> None:
    code = "import ttml, ttnn; print(ttnn.get_num_devices(), hasattr(ttml.checkpointing, 'CheckpointShapeError'))"
    done = subprocess.run(
        [sys.executable, "-c", code],
        env=os.environ | environment("C", devices=2),
        capture_output=True,
        text=True,
        timeout=60,
    )
    assert done.stdout == "2 True\n", done.stderr


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
