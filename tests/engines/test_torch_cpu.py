# ruff: noqa: E402  what needs torch is imported after the skip
from __future__ import annotations

import contextlib
import math
import shutil
from typing import Any

import numpy as np
import pytest

torch = pytest.importorskip("torch", reason="the CPU engine is torch")

import transformers

from common.data.tokens import Batch
from common.errors import DataError, MachineError, TrainingError, UsageError
from common.hardware import get
from common.model.bases import resolve
from engines import cpu
from engines.cpu import engine as torch_cpu
from engines.cpu.blocks import Mlp
from engines.registry import engine_for
from tests.support.engines import config_for, engine, fingerprint, gradients_of, make_batch, on_transformers, state_of
from tools.verify.tiny_base import write_tiny_base

LORA = {"rank": 4, "alpha": 8.0}


@pytest.fixture(scope="module")
def untied_base(tmp_path_factory):
    return write_tiny_base(tmp_path_factory.mktemp("untied") / "base", tied=False, kv_heads=2, seed=3)


@pytest.fixture(scope="module")
def grouped_base(tmp_path_factory):
    """Six query heads over two key/value heads: an order that is mixed up shows."""
    folder = tmp_path_factory.mktemp("grouped") / "base"
    return write_tiny_base(folder, hidden=96, heads=6, kv_heads=2, seed=4)


def plain_model(folder) -> Any:
    return transformers.AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32).eval()


def plain_nll(model, batch: Batch) -> Any:
    """Per position, from all logits of all positions, as a textbook does it; zero where the mask is."""
    ids = torch.from_numpy(batch.input_ids.astype(np.int64))
    labels = torch.from_numpy(batch.labels.astype(np.int64))
    logits = model(input_ids=ids).logits.float()
    nll = torch.nn.functional.cross_entropy(logits.transpose(1, 2), labels, reduction="none")
    return nll * torch.from_numpy(batch.loss_mask)


def plain_loss(model, batch: Batch) -> Any:
    return plain_nll(model, batch).sum() / float(batch.loss_mask.sum())


def close(a: dict[str, np.ndarray], b: dict[str, np.ndarray], rtol: float = 1e-4) -> None:
    """Equal names, and values equal to `rtol` of each tensor's largest."""
    assert set(a) == set(b)
    for name in a:
        assert np.abs(a[name] - b[name]).max() <= rtol * np.abs(b[name]).max() + 1e-9, name


# --- one loss, however it is computed -----------------------------------------------------------------------------


@pytest.mark.parametrize("lora", [None, LORA], ids=["full", "lora"])
def test_one_batch_of_8_is_4_times_2_accumulated(tiny_base, lora):
    config = config_for(tiny_base, model__lora=lora, training__optimizer__epsilon=1e-3)
    batch, found = make_batch(), []
    for parts in (1, 4):
        with engine(config) as backend:
            stats, gradients = gradients_of(backend, batch.split(parts))
            backend.train_step(batch.split(parts), 1e-2, 1)
            found.append((stats, gradients, state_of(backend)))
    (whole, gradients, after), (cut, gradients_cut, after_cut) = found
    assert whole.loss == pytest.approx(cut.loss, rel=1e-6)
    assert whole.grad_norm == pytest.approx(cut.grad_norm, rel=1e-5)
    assert (whole.tokens, whole.supervised_tokens) == (cut.tokens, cut.supervised_tokens)
    close(gradients_cut, gradients)
    close(after_cut, after)


@pytest.mark.parametrize("kind", ["tiny_base", "untied_base", "grouped_base"])
def test_loss_and_gradients_are_those_of_plain_transformers(kind, request):
    base, batch = request.getfixturevalue(kind), make_batch()
    model = plain_model(base)
    loss = plain_loss(model, batch)
    loss.backward()
    with engine(config_for(base, training__max_grad_norm=0)) as backend:
        stats, gradients = gradients_of(backend, [batch])
    expected = {name: p.grad.numpy() for name, p in model.named_parameters()}
    assert stats.loss == pytest.approx(loss.item(), rel=1e-6)
    assert stats.grad_norm == pytest.approx(math.sqrt(sum((g**2).sum() for g in expected.values())), rel=1e-5)
    assert stats.supervised_tokens == batch.loss_mask.sum()
    close(gradients, expected)


def test_padding_has_no_effect(tiny_base, monkeypatch):
    narrow, wide = make_batch(width=96), make_batch(width=160)
    with engine(config_for(tiny_base)) as backend:
        first = gradients_of(backend, [narrow])
        assert fingerprint(gradients_of(backend, [wide])[1]) == fingerprint(first[1])
    on_transformers(monkeypatch)
    with engine(config_for(tiny_base)) as backend:
        padded = gradients_of(backend, [wide])
    assert padded[0].loss == pytest.approx(first[0].loss, rel=1e-6)
    close(padded[1], first[1])


def test_what_stands_in_the_padding_has_no_effect(tiny_base):
    batch = make_batch()
    padding = np.arange(96)[None] >= np.array([[5, 90, 17, 44, 8, 63, 30, 71]]).T
    other = Batch(np.where(padding, np.uint32(77), batch.input_ids), batch.labels, batch.loss_mask, batch.rows)
    with engine(config_for(tiny_base)) as backend:
        assert fingerprint(gradients_of(backend, [other])[1]) == fingerprint(gradients_of(backend, [batch])[1])


def unsupervised(batch: Batch, *rows: int) -> Batch:
    mask = batch.loss_mask.copy()
    mask[list(rows)] = 0
    return Batch(batch.input_ids, batch.labels, mask, batch.rows)


def test_rows_and_micro_batches_without_a_supervised_token_have_no_effect(tiny_base):
    """Such rows come of cutting at data_config.max_length."""
    batch = unsupervised(make_batch(), 0, 2, 3, 7)
    with engine(config_for(tiny_base)) as backend:
        whole, gradients = gradients_of(backend, [batch])
        cut, gradients_cut = gradients_of(backend, batch.split(4))
    loss = plain_loss(plain_model(tiny_base), batch).item()
    assert whole.loss == pytest.approx(loss, rel=1e-6)
    assert cut.loss == pytest.approx(loss, rel=1e-6)
    assert whole.tokens == cut.tokens == 90 + 8 + 63 + 30
    close(gradients_cut, gradients)


def test_a_step_without_a_supervised_token_is_refused(tiny_base):
    batch = unsupervised(make_batch(), *range(8))
    with engine(config_for(tiny_base)) as backend:
        nll, tokens = backend.eval_nll(batch)
        assert not nll.any()
        assert not tokens.any()
        before = fingerprint(state_of(backend))
        with pytest.raises(DataError, match="step 1 has no supervised token"):
            backend.train_step([batch], 1e-3, 1)
        assert fingerprint(state_of(backend)) == before


def test_tokens_are_counted_without_padding(tiny_base):
    with engine(config_for(tiny_base)) as backend:
        stats = backend.train_step([make_batch((5, 90), width=96)], 1e-3, 1)
    assert stats.tokens == 95
    assert stats.supervised_tokens == 4 + 60


def test_gradient_checkpointing_changes_nothing(tiny_base, monkeypatch):
    found: list[Any] = []
    forwards: list[list[bool]] = []
    forward = Mlp.forward

    def counted(*arguments: Any) -> Any:
        forwards[-1].append(True)
        return forward(*arguments)

    monkeypatch.setattr(Mlp, "forward", counted)
    for on in (False, True):
        with engine(config_for(tiny_base, model__gradient_checkpointing=on, model__lora=LORA)) as backend:
            forwards.append([])
            found.append(gradients_of(backend, [make_batch()]))
    assert [len(calls) for calls in forwards] == [2, 4], "activations are recomputed, where that was asked for"
    assert found[0][0].loss == found[1][0].loss
    close(found[0][1], found[1][1], rtol=1e-6)


# --- precision ----------------------------------------------------------------------------------------------------


def without_shortcuts(backend) -> None:
    """What autocast does by itself: every weight cast at every use, every norm's output in fp32."""
    backend.objective.head16 = None
    for module in backend.model.modules():
        if hasattr(module, "weight16"):
            module.weight16 = None
        module._forward_hooks.clear()


def test_bf16_mixed_shortcuts_compute_what_autocast_computes(tiny_base):
    config = config_for(tiny_base, training__precision="bf16-mixed", model__lora=LORA)
    ids, lengths = np.array([[7, 8, 9, 40]]), np.array([4])
    with engine(config) as backend:
        backend.train_step([make_batch(seed=1)], 1e-2, 1)  # B is no longer zero
        logits = backend.next_token_logits(ids, lengths)[0]
        stats, gradients = gradients_of(backend, [make_batch()])
        hidden = sum(hasattr(module, "weight16") for module in backend.model.modules())
        assert hidden == 14, "every linear layer but the head keeps a bf16 copy"
        without_shortcuts(backend)
        assert np.array_equal(backend.next_token_logits(ids, lengths)[0], logits)
        plain, plain_gradients = gradients_of(backend, [make_batch()])
    assert stats.loss == plain.loss, "the forward pass has the same bits"
    close(gradients, plain_gradients, rtol=0.02)


def test_bf16_mixed_computes_in_bf16_and_keeps_fp32(tiny_base):
    found = {}
    for precision in ("fp32", "bf16-mixed"):
        with engine(config_for(tiny_base, training__precision=precision)) as backend:
            found[precision] = gradients_of(backend, [make_batch()])[0].loss
            assert {a.dtype.name for n, a in state_of(backend).items() if n != "optimizer/step"} == {"float32"}
    assert found["fp32"] != found["bf16-mixed"]
    assert found["fp32"] == pytest.approx(found["bf16-mixed"], rel=2e-3)


def test_bf16_stores_weights_and_moments_in_bf16(tiny_base):
    with engine(config_for(tiny_base, training__precision="bf16")) as backend:
        backend.train_step([make_batch()], 1e-3, 1)
        dtypes = {name: array.dtype.name for name, array in state_of(backend).items()}
    assert dtypes.pop("optimizer/step") == "int64"
    assert set(dtypes.values()) == {"bfloat16"}


def test_full_precision_adamw_keeps_what_bf16_weights_lose(tiny_base):
    batch, moved = make_batch(), {}
    for kind in ("AdamW", "AdamWFullPrecision"):
        config = config_for(tiny_base, training__precision="bf16", training__optimizer__type=kind)
        with engine(config) as backend:
            before = state_of(backend)["model/model.norm.weight"]
            for step in (1, 2, 3):
                backend.train_step([batch], 1e-3, step)  # a third of a bf16 step at 1.0
            state = state_of(backend)
            moved[kind] = state["model/model.norm.weight"].astype(np.float32) - before.astype(np.float32)
    assert not moved["AdamW"].any(), "each update is lost by rounding"
    assert moved["AdamWFullPrecision"].any(), "three together are not"
    masters = {n.removeprefix("optimizer/master/"): a for n, a in state.items() if "/master/" in n}
    assert {a.dtype.name for a in masters.values()} == {"float32"}
    assert {a.dtype.name for n, a in state.items() if "exp_avg" in n} == {"float32"}
    weights = {n.removeprefix("model/"): a for n, a in state.items() if n.startswith("model/")}
    assert set(masters) == set(weights)
    assert all(np.array_equal(masters[n].astype(weights[n].dtype), weights[n]) for n in weights)


def test_auto_precision_asks_the_cpu(tmp_path):
    cpuinfo = tmp_path / "cpuinfo"
    cpuinfo.write_text("flags : fpu avx512_bf16 sse\n")
    assert cpu.precision_for(get("cpu"), cpuinfo) == (
        "bf16-mixed",
        "this CPU multiplies bf16 in hardware (avx512_bf16)",
    )
    cpuinfo.write_text("flags : fpu sse\n")
    assert cpu.precision_for(get("cpu"), cpuinfo)[0] == "fp32"
    assert cpu.precision_for(get("cpu"), tmp_path / "none")[0] == "fp32"
    assert engine_for(get("n150")).precision_for(get("n150"))[0] == "bf16"


# --- the update ---------------------------------------------------------------------------------------------------


def test_adamw_is_the_textbook_s_on_every_parameter(untied_base):
    """Loshchilov and Hutter, 2019: decoupled decay; on norms and embeddings as well."""
    options = {"weight_decay": 0.3, "beta1": 0.8, "beta2": 0.9, "epsilon": 1e-4}
    rate, batch = 1e-2, make_batch()
    values = {f"training__optimizer__{key}": value for key, value in options.items()}
    with engine(config_for(untied_base, training__max_grad_norm=0, **values)) as backend:
        expected = {n: p.detach().numpy().astype(np.float64) for n, p in backend.trained.items()}
        first = {name: np.zeros_like(p) for name, p in expected.items()}
        second = {name: np.zeros_like(p) for name, p in expected.items()}
        for step in (1, 2):
            gradients = gradients_of(backend, [batch])[1]
            backend.train_step([batch], rate, step)
            for name, g in gradients.items():
                first[name] = 0.8 * first[name] + 0.2 * g
                second[name] = 0.9 * second[name] + 0.1 * g.astype(np.float64) ** 2
                root = np.sqrt(second[name] / (1 - 0.9**step)) + 1e-4
                expected[name] *= 1 - rate * 0.3
                expected[name] -= rate * first[name] / (1 - 0.8**step) / root
        found = {n: p.detach().numpy() for n, p in backend.trained.items()}
    assert "model.norm.weight" in found
    assert "model.embed_tokens.weight" in found
    close(found, expected, rtol=1e-5)


def test_gradients_are_clipped_to_the_norm_and_zero_turns_it_off(tiny_base):
    norms = {}
    for limit in (0.0, 0.01, 1000.0):
        with engine(config_for(tiny_base, training__max_grad_norm=limit)) as backend:
            stats, gradients = gradients_of(backend, [make_batch()])
            norms[limit] = math.sqrt(sum((g**2).sum() for g in gradients.values()))
    assert norms[0.0] == pytest.approx(stats.grad_norm, rel=1e-5), "grad_norm is the norm before clipping"
    assert norms[1000.0] == pytest.approx(stats.grad_norm, rel=1e-5)
    assert norms[0.01] == pytest.approx(0.01, rel=1e-3)
    assert stats.grad_norm > 0.1


@pytest.mark.parametrize("bad", [math.nan, math.inf])
def test_a_step_that_is_not_finite_is_refused_and_leaves_no_trace(tiny_base, bad):
    batch, config = make_batch(), config_for(tiny_base)
    with engine(config) as backend:
        backend.train_step([batch], 1e-2, 1)
        before, loss = fingerprint(state_of(backend)), backend.objective.forward
        backend.objective.forward = lambda batch: loss(batch) * bad
        with pytest.raises(TrainingError, match="step 2 is not finite") as caught:
            backend.train_step(batch.split(2), 1e-2, 2)
        assert caught.value.code == 5
        assert caught.value.todo
        assert fingerprint(state_of(backend)) == before
        backend.objective.forward = loss
        backend.train_step([batch], 1e-2, 2)
        after = fingerprint(state_of(backend))
    with engine(config) as backend:
        for step in (1, 2):
            backend.train_step([batch], 1e-2, step)
        assert fingerprint(state_of(backend)) == after, "no gradient was left over"


def test_a_gradient_alone_that_is_not_finite_is_refused(tiny_base):
    with engine(config_for(tiny_base)) as backend:
        before = fingerprint(state_of(backend))
        backend.trained["model.norm.weight"].register_hook(lambda grad: grad * math.inf)
        with pytest.raises(TrainingError, match="gradient norm"):
            backend.train_step([make_batch()], 1e-2, 1)
        assert fingerprint(state_of(backend)) == before


def test_stochastic_rounding_is_refused(tiny_base):
    config = config_for(tiny_base, training__precision="bf16", training__optimizer__stochastic_rounding=True)
    with pytest.raises(UsageError, match="boards only"), engine(config):
        pass


def test_dropout_is_a_function_of_the_step_and_not_of_history(tiny_base):
    config = config_for(tiny_base, model__lora={**LORA, "dropout": 0.5})
    with engine(config) as backend:
        backend.train_step([make_batch(seed=9)], 1e-2, 1)
        state = state_of(backend)
        backend.eval_nll(make_batch(seed=4))
        loss = backend.train_step([make_batch()], 1e-2, 2).loss
    with engine(config) as backend:
        backend.load_state(state)
        assert backend.train_step([make_batch()], 1e-2, 2).loss == loss
    with engine(config) as backend:
        backend.load_state(state)
        assert backend.train_step([make_batch()], 1e-2, 3).loss != loss


def test_threads_are_what_was_configured(tiny_base):
    before = torch.get_num_threads()
    try:
        for threads in (1, 2):
            with engine(config_for(tiny_base, device__threads=threads)) as backend:
                assert torch.get_num_threads() == backend.info.threads == threads
    finally:
        torch.set_num_threads(before)


# --- evaluation and generation ------------------------------------------------------------------------------------


def with_fill(batch: Batch) -> Batch:
    """The last two rows are only there to fill the batch."""
    mask, rows = batch.loss_mask.copy(), batch.rows.copy()
    mask[-2:], rows[-2:] = 0, -1
    return Batch(batch.input_ids, batch.labels, mask, rows)


@pytest.mark.parametrize("precision", ["fp32", "bf16-mixed", "bf16"])
def test_held_out_nll_of_each_row_is_the_plain_one_in_fp32(tiny_base, precision):
    batch, model = with_fill(make_batch()), plain_model(tiny_base)
    if precision == "bf16":
        model = model.bfloat16().float()
    with torch.no_grad():
        expected = plain_nll(model, batch).double().sum(dim=1).numpy()
    with engine(config_for(tiny_base, training__precision=precision)) as backend:
        before = fingerprint(state_of(backend))
        nll, tokens = backend.eval_nll(batch)
        assert fingerprint(state_of(backend)) == before
    assert nll.dtype == tokens.dtype == np.float64
    assert tokens.tolist() == batch.loss_mask.sum(axis=1).tolist()
    assert nll == pytest.approx(expected, rel=1e-5)
    assert nll[-2:].tolist() == tokens[-2:].tolist() == [0, 0]


@pytest.mark.parametrize("precision", ["fp32", "bf16-mixed"])
def test_cached_logits_of_ragged_prompts_are_those_of_each_row_alone(tiny_base, precision):
    model, rng = plain_model(tiny_base), np.random.default_rng(1)
    lengths = np.array([3, 11, 7])
    rows = [list(rng.integers(6, 300, length)) for length in lengths]
    ids = np.zeros((3, 11), np.int64)
    for row, tokens in enumerate(rows):
        ids[row, : len(tokens)] = tokens
    cache, fresh = None, ids
    with engine(config_for(tiny_base, training__precision=precision)) as backend:
        for _ in range(4):
            logits, cache = backend.next_token_logits(fresh, lengths, cache)
            with torch.no_grad():
                alone = [model(torch.tensor([tokens])).logits[0, -1].numpy() for tokens in rows]
            assert logits.dtype == np.float32
            assert np.abs(logits - np.stack(alone)).max() < (1e-5 if precision == "fp32" else 0.02)
            fresh = rng.integers(6, 300, (3, 1))
            rows = [[*tokens, int(fresh[row, 0])] for row, tokens in enumerate(rows)]


def test_without_the_adapter_it_is_the_base_and_only_within(tiny_base):
    ids, lengths = np.array([[7, 8, 9]]), np.array([3])
    with engine(config_for(tiny_base, model__lora=LORA)) as backend:
        base = backend.next_token_logits(ids, lengths)[0]
        backend.train_step([make_batch()], 5e-2, 1)
        tuned = backend.next_token_logits(ids, lengths)[0]
        with backend.disable_adapter():
            assert np.array_equal(backend.next_token_logits(ids, lengths)[0], base)
        with contextlib.suppress(KeyError), backend.disable_adapter():
            raise KeyError
        assert np.array_equal(backend.next_token_logits(ids, lengths)[0], tuned)
    assert np.abs(tuned - base).max() > 1e-3


# --- weights and state --------------------------------------------------------------------------------------------


def test_parameters_are_counted_and_ties_counted_once(tiny_base, untied_base):
    for base in (tiny_base, untied_base):
        weights = dict(resolve(str(base)).weights())
        with engine(config_for(base)) as backend:
            assert backend.load(weights) == sum(array.size for array in weights.values())


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda w: w.pop("model.norm.weight"), "model.norm.weight is missing"),
        (lambda w: w.update(surplus=np.zeros(3, np.float32)), "surplus is unknown"),
        (
            lambda w: w.update({"model.norm.weight": np.ones(63, np.float32)}),
            r"model.norm.weight is \(63,\), expected \(64,\)",
        ),
    ],
    ids=["missing", "unknown", "misshapen"],
)
def test_weights_that_do_not_fit_are_named(tiny_base, change, message):
    base = resolve(str(tiny_base))
    weights = dict(base.weights())
    change(weights)
    with engine(config_for(tiny_base)) as backend:
        backend.build(base.architecture)
        with pytest.raises(MachineError, match=message):
            backend.load(weights)


@pytest.mark.parametrize("lora", [None, LORA], ids=["full", "lora"])
@pytest.mark.parametrize("kind", ["AdamW", "AdamWFullPrecision"])
@pytest.mark.parametrize("precision", ["fp32", "bf16"])
def test_state_goes_into_a_new_engine_bit_for_bit(tiny_base, lora, precision, kind):
    config = config_for(tiny_base, model__lora=lora, training__precision=precision, training__optimizer__type=kind)
    with engine(config) as backend:
        assert {n: a.shape for n, a in backend.state()} == dict(backend.state_shapes())
        for step in (1, 2):
            backend.train_step([make_batch(seed=step)], 1e-2, step)
        saved = state_of(backend)
        backend.train_step([make_batch(seed=3)], 1e-2, 3)
        after = fingerprint(state_of(backend))
    with engine(config) as backend:
        backend.load_state(saved)
        assert fingerprint(state_of(backend)) == fingerprint(saved)
        backend.train_step([make_batch(seed=3)], 1e-2, 3)
        assert fingerprint(state_of(backend)) == after


def test_state_has_the_names_of_hugging_face(tiny_base, untied_base):
    for base in (tiny_base, untied_base):
        names = set(dict(resolve(str(base)).weights()))
        with engine(config_for(base)) as backend:
            state = set(state_of(backend))
        assert {n.removeprefix("model/") for n in state if n.startswith("model/")} == names
        for slot in ("exp_avg", "exp_avg_sq"):
            start = f"optimizer/{slot}/"
            assert {n.removeprefix(start) for n in state if n.startswith(start)} == names


def test_a_state_of_another_model_is_refused(tiny_base):
    with engine(config_for(tiny_base, model__lora=LORA)) as backend:
        state = state_of(backend)
        missing = {k: v for k, v in state.items() if "layers.1" not in k}
        with pytest.raises(MachineError, match="tensor names differ"):
            backend.load_state(missing)
        name = next(k for k in state if "lora_B" in k)
        with pytest.raises(MachineError, match="has shape"):
            backend.load_state({**state, name: np.zeros((1, 4), np.float32)})


# --- compilation --------------------------------------------------------------------------------------------------


def test_compilation_is_decided_by_config_and_total_steps_and_says_why(tiny_base, monkeypatch):
    monkeypatch.setattr(shutil, "which", lambda name: "/usr/bin/" + name)
    short, long = (config_for(tiny_base, training__max_steps=n) for n in (299, 300))
    assert torch_cpu.decide_compile(short)[0] is False
    assert torch_cpu.decide_compile(long) == (True, "compiled: 300 steps earn it back")
    assert torch_cpu.decide_compile(long.with_values(**{"model.lora": LORA}))[0] is False
    assert torch_cpu.decide_compile(long.with_values(**{"device.compile": "never"}))[0] is False
    assert torch_cpu.decide_compile(short.with_values(**{"device.compile": "always"}))[0] is True
    monkeypatch.setattr(shutil, "which", lambda name: None)
    decided, why = torch_cpu.decide_compile(short.with_values(**{"device.compile": "always"}))
    assert decided is False
    assert "no C++ compiler" in why


@pytest.mark.slow  # torch.compile calls the C++ compiler: half a minute
@pytest.mark.skipif(not shutil.which("g++"), reason="compiling needs a C++ compiler")
@pytest.mark.parametrize("lora", [None, LORA], ids=["full", "lora"])
def test_compiled_training_gives_the_same_losses_and_resumes_bit_for_bit(tiny_base, lora):
    def losses(backend, steps) -> list[float]:
        return [backend.train_step(make_batch(seed=s).split(2), 1e-3, s).loss for s in steps]

    config = config_for(tiny_base, model__lora=lora)
    with engine(config) as backend:
        eager = losses(backend, range(1, 5))
    compiled = config.with_values(**{"device.compile": "always"})
    with engine(compiled) as backend:
        assert backend.info.compiled
        backend.eval_nll(make_batch())  # an unbroken run evaluates first, a resumed one trains first
        backend.next_token_logits(np.array([[7, 8, 9]]), np.array([3]))
        first = losses(backend, (1, 2))
        saved = state_of(backend)
        unbroken = first + losses(backend, (3, 4))
        end = fingerprint(state_of(backend))
    torch.compiler.reset()
    with engine(compiled) as backend:
        backend.load_state(saved)
        assert losses(backend, (3, 4)) == unbroken[2:]
        assert fingerprint(state_of(backend)) == end
    assert unbroken == pytest.approx(eager, rel=1e-4)
