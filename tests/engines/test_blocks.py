# ruff: noqa: E402  what needs torch is imported after the skip
"""The blocks written by hand against transformers and autograd; rows that share what they begin with, against alone."""

from __future__ import annotations

import dataclasses
from typing import Any

import numpy as np
import pytest

torch = pytest.importorskip("torch", reason="the CPU engine is torch")

from transformers import LlamaConfig, LlamaForCausalLM

from common.config.schema import Lora
from common.data.tokens import Batch
from engines.cpu import blocks, ragged
from engines.cpu.lora import add_lora, lora_layers
from tests.support.engines import config_for, engine, gradients_of, make_batch, on_transformers

ALL = ["q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj"]


def a_model(**options: Any) -> Any:
    """Two blocks, six query heads over two of keys, seeded; norms and biases are not what they begin as."""
    torch.manual_seed(1)
    architecture: dict[str, Any] = {
        "hidden_size": 48,
        "intermediate_size": 80,
        "num_hidden_layers": 2,
        "vocab_size": 300,
    }
    heads: dict[str, Any] = {"num_attention_heads": 6, "num_key_value_heads": 2}
    model = LlamaForCausalLM(LlamaConfig(**architecture, **heads, **options))
    for parameter in model.parameters():
        parameter.data += 0.1 * torch.randn_like(parameter)
    return model


def adapted(model: Any, **options: Any) -> Any:
    """The model with adapters that are not zero."""
    lora = Lora.model_validate({"rank": 4, "alpha": 8.0, "target_modules": ALL, **options})
    add_lora(model, lora, 0, dtype=torch.float32, keep_half=False)
    for _, layer in lora_layers(model):
        layer.lora_B.data.normal_(std=0.1)
    return model


def hidden_of(model: Any, batch: Batch, *, share: bool = True, recompute: bool = False) -> Any:
    layout = ragged.lay_out(batch, share)
    return blocks.hidden_states(model, layout, model.dtype, recompute)[layout.place]


def plain_hidden_of(model: Any, batch: Batch) -> Any:
    """By transformers, padding and all."""
    hidden = model.model(input_ids=torch.from_numpy(batch.input_ids.astype(np.int64)), use_cache=False)
    return hidden.last_hidden_state[torch.from_numpy(batch.loss_mask > 0)]


def assert_same(model: Any, hidden: Any, expected: Any) -> None:
    """The same hidden states, and the same gradient of every trained tensor, to the rounding of fp32."""
    trained = {name: p for name, p in model.named_parameters() if p.requires_grad and "lm_head" not in name}
    torch.manual_seed(2)
    upstream = torch.randn_like(expected)
    found, wanted = (torch.autograd.grad(h, list(trained.values()), upstream) for h in (hidden, expected))
    torch.testing.assert_close(hidden, expected, rtol=1e-4, atol=1e-4)
    for name, mine, theirs in zip(trained, found, wanted, strict=True):
        assert (mine - theirs).abs().max() <= 2e-5 * theirs.abs().max(), name
    assert trained


def beginning_alike(batch: Batch, rows: list[int], length: int) -> Batch:
    """The batch with the first `length` ids of `rows` those of the first of them."""
    ids = batch.input_ids.copy()
    ids[rows, :length] = ids[rows[0], :length]
    return dataclasses.replace(batch, input_ids=ids)


def computed(batch: Batch) -> int:
    """The tokens of a batch that are computed, without those that only fill."""
    return max(span[-1] for group in ragged.lay_out(batch).attending.groups for span in group.spans)


# --- against transformers ---------------------------------------------------------------------------------------------


@pytest.mark.parametrize("queries", [256, 16], ids=["whole", "long rows in blocks"])
@pytest.mark.parametrize(
    "options",
    [{}, {"attention_bias": True, "mlp_bias": True}, {"head_dim": 12}, {"rope_theta": 50.0}],
    ids=["plain", "biases", "wide heads", "another rope"],
)
def test_all_weights_get_the_gradients_of_transformers(options, queries, monkeypatch):
    monkeypatch.setattr(ragged, "QUERIES", queries)
    model, batch = a_model(**options), beginning_alike(make_batch(), [1, 3, 5, 7], 21)
    assert_same(model, hidden_of(model, batch), plain_hidden_of(model, batch))


@pytest.mark.parametrize(
    "options",
    [{}, {"tie_groups": []}, {"target_modules": ["v_proj", "down_proj"], "tie_groups": []}],
    ids=["tied", "untied", "some"],
)
def test_adapters_get_the_gradients_of_autograd(options):
    model, batch = adapted(a_model(), **options), beginning_alike(make_batch(), [1, 3, 5, 7], 21)
    assert_same(model, hidden_of(model, batch), plain_hidden_of(model, batch))


def test_dropout_gets_the_gradients_of_autograd(monkeypatch):
    """Every third column is dropped, on both sides."""

    def mask(x: Any) -> Any:
        return (torch.arange(x.shape[-1]) % 3 > 0).to(x.dtype).repeat(*x.shape[:-1], 1)

    monkeypatch.setattr(torch, "bernoulli", mask)
    monkeypatch.setattr("torch.nn.functional.dropout", lambda x, p, on: x * mask(x) / (1 - p) if on and p else x)
    model, batch = adapted(a_model(), dropout=0.25).train(), make_batch()
    expected = plain_hidden_of(model, batch)
    assert_same(model, hidden_of(model, batch), expected)
    model.eval()
    assert (plain_hidden_of(model, batch) - expected).abs().max() > 1e-3, "dropout acts"
    torch.testing.assert_close(hidden_of(model, batch), plain_hidden_of(model, batch), rtol=1e-4, atol=1e-4)


def test_adapters_that_are_off_have_no_effect():
    model, batch = adapted(a_model()), make_batch()
    on = hidden_of(model, batch)
    for _, layer in lora_layers(model):
        layer.enabled = False
    off = hidden_of(model, batch)
    torch.testing.assert_close(off, plain_hidden_of(model, batch), rtol=1e-4, atol=1e-4)
    assert (on - off).abs().max() > 1e-2


@pytest.mark.parametrize("dropout", [0.0, 0.5])
def test_recomputing_keeps_less_and_gives_the_same_bits(dropout):
    model, batch, sizes, found = adapted(a_model(), dropout=dropout).train(), make_batch(), [], []
    weights = {p.data_ptr() for p in model.parameters()}
    for recompute in (False, True):
        kept: list[int] = []
        torch.manual_seed(3)

        def keep(tensor: Any, kept: list[int] = kept) -> Any:
            kept.append(0 if tensor.data_ptr() in weights else tensor.nbytes)
            return tensor

        with torch.autograd.graph.saved_tensors_hooks(keep, lambda tensor: tensor):
            hidden = hidden_of(model, batch, recompute=recompute)
        sizes.append(sum(kept))
        found.append(torch.autograd.grad(hidden.sum(), [p for p in model.parameters() if p.requires_grad]))
    assert sizes[1] < sizes[0] / 3
    assert all(torch.equal(one, other) for one, other in zip(*found, strict=True))


@pytest.mark.parametrize("precision", ["bf16-mixed", "bf16"])
def test_bf16_is_as_near_to_transformers_as_bf16_is_to_fp32(tiny_base, precision, monkeypatch):
    config = config_for(tiny_base, training__precision=precision, model__lora={"rank": 4, "alpha": 8.0})
    with engine(config) as backend:
        backend.train_step([make_batch(seed=1)], 1e-2, 1)  # B is no longer zero
        stats, gradients = gradients_of(backend, [make_batch()])
        state = dict(backend.state())
    on_transformers(monkeypatch)
    with engine(config) as backend:
        backend.load_state(state)
        plain, expected = gradients_of(backend, [make_batch()])
    assert stats.loss == pytest.approx(plain.loss, rel=1e-3)
    assert all(np.abs(gradients[n] - expected[n]).max() <= 0.04 * np.abs(expected[n]).max() for n in expected)


# --- what rows begin with ---------------------------------------------------------------------------------------------


@pytest.mark.parametrize("length", range(31))
def test_a_beginning_of_any_length_is_computed_once_and_changes_nothing(length):
    model, batch = adapted(a_model()), beginning_alike(make_batch((60, 45, 33, 50)), [0, 1, 2, 3], length)
    assert computed(batch) == 60 + 45 + 33 + 50 - 3 * (length - length % ragged.SHARE_BY)
    assert_same(model, hidden_of(model, batch), hidden_of(model, batch, share=False))


def nested() -> Batch:
    """All begin with 16 tokens; two with 32, and two others with 40."""
    batch = beginning_alike(make_batch((60, 45, 50, 70, 55), seed=4), [0, 1, 2, 3, 4], 16)
    return beginning_alike(beginning_alike(batch, [0, 2], 32), [1, 3], 40)


def equal_rows() -> Batch:
    """Three rows are the same, and the supervised tokens of two others are within what they begin with."""
    batch = beginning_alike(make_batch((40, 40, 40, 56, 24)), [0, 1, 2], 40)
    return beginning_alike(batch, [0, 3, 4], 24)


@pytest.mark.parametrize(
    ("make", "tokens"),
    [(nested, 280 - 4 * 16 - 16 - 24), (equal_rows, 40 + 56 - 24), (make_batch, 328)],
    ids=["nested", "equal rows", "none"],
)
def test_beginnings_within_beginnings_change_nothing(make, tokens):
    batch, model = make(), a_model()
    assert computed(batch) == tokens
    assert_same(model, hidden_of(model, batch), hidden_of(model, batch, share=False))
    assert_same(model, hidden_of(model, batch), plain_hidden_of(model, batch))


def test_the_same_ids_with_other_labels_are_two_losses_of_one_hidden_state(tiny_base):
    """A token that is trained on in one row and not in another, and one that goes on differently in each."""
    batch = beginning_alike(make_batch((40, 40)), [0, 1], 32)
    mask = batch.loss_mask.copy()
    mask[1, :20] = 0
    batch = dataclasses.replace(batch, loss_mask=mask)
    rows = batch.split(2)
    with engine(config_for(tiny_base)) as backend:
        stats, gradients = gradients_of(backend, [batch])
        alone, expected = gradients_of(backend, rows)
        nll = backend.eval_nll(batch)[0]
        assert nll == pytest.approx(np.concatenate([backend.eval_nll(row)[0] for row in rows]), rel=1e-6)
    assert stats.loss == pytest.approx(alone.loss, rel=1e-6)
    assert all(np.abs(gradients[n] - expected[n]).max() <= 1e-5 * np.abs(expected[n]).max() for n in expected)


def test_rows_share_nothing_where_dropout_acts(tiny_base):
    batch = beginning_alike(make_batch(), [1, 3, 5, 7], 24)
    with engine(config_for(tiny_base, model__lora={"rank": 4, "dropout": 0.5})) as backend:
        backend.train_step([batch], 1e-3, 1)
        backend.eval_nll(batch)
        assert backend.objective.lengths == {352, 288}, "328 tokens in training, 256 held out: filled up"


def test_what_is_shared_depends_on_the_ids_alone():
    batch = nested()
    other = dataclasses.replace(batch, rows=batch.rows[::-1].copy(), labels=batch.labels + 1)
    first, second = ragged.lay_out(batch), ragged.lay_out(other)
    assert torch.equal(first.ids, second.ids)
    assert torch.equal(first.attending.place, second.attending.place)
    assert [group.spans for group in first.attending.groups] == [group.spans for group in second.attending.groups]
