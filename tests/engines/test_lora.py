# ruff: noqa: E402  what needs torch is imported after the skip
from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest

torch = pytest.importorskip("torch", reason="the CPU engine is torch")

from common.config.schema import Lora
from common.errors import MachineError, UsageError
from common.train.checkpoint import write_tensors
from engines.cpu.lora import LoraLinear, lora_layers
from tests.support.engines import config_for, engine, gradients_of, make_batch, state_of

LORA = {"rank": 4, "alpha": 8.0}
UNTIED = {**LORA, "tie_groups": []}


def lora_engine(base: Path, **values):
    return engine(config_for(base, model__lora={**LORA, **values}))


def test_training_starts_at_the_base(tiny_base):
    with lora_engine(tiny_base) as backend, engine(config_for(tiny_base)) as base:
        ids, lengths = np.array([[7, 8, 9, 40]]), np.array([4])
        tuned = backend.next_token_logits(ids, lengths)[0]
        assert np.array_equal(tuned, base.next_token_logits(ids, lengths)[0])


def test_only_the_adapters_are_trained(tiny_base):
    with lora_engine(tiny_base) as backend:
        frozen = {n: p.detach().clone() for n, p in backend.model.named_parameters() if not p.requires_grad}
        backend.train_step([make_batch()], 1e-1, 1)
        assert all("lora_" in name for name in backend.trained)
        assert all(torch.equal(dict(backend.model.named_parameters())[n], p) for n, p in frozen.items())
        assert len(frozen) == 2 + 2 * 9, "embedding, last norm; seven projections and two norms a layer"
        assert all(p.any() for p in backend.trained.values()), "B moved away from zero"


def test_the_initial_a_is_uniform_by_fan_in_and_fixed_by_seed(tiny_base):
    def first(seed: int) -> dict[str, np.ndarray]:
        with engine(config_for(tiny_base, model__lora=LORA, training__seed=seed)) as backend:
            return {n: p.detach().numpy() for n, p in backend.trained.items() if "lora_A" in n}

    found, again, other = first(0), first(0), first(1)
    assert all(np.array_equal(found[name], again[name]) for name in found)
    assert not any(np.array_equal(found[name], other[name]) for name in found)
    for name, a in found.items():
        bound = a.shape[1] ** -0.5
        assert bound * 0.95 < np.abs(a).max() <= bound, name


def test_a_tied_group_shares_one_a_and_sums_its_gradients(tiny_base):
    batch = make_batch()
    with lora_engine(tiny_base) as backend:
        attention = backend.model.model.layers[0].self_attn
        assert attention.q_proj.lora_A is attention.k_proj.lora_A is attention.v_proj.lora_A
        assert attention.o_proj.lora_A is not attention.q_proj.lora_A
        assert backend.model.model.layers[1].self_attn.q_proj.lora_A is not attention.q_proj.lora_A
        mlp = backend.model.model.layers[0].mlp
        assert mlp.gate_proj.lora_A is mlp.up_proj.lora_A
        assert len(backend.trained) == 2 * (4 + 7), "A: qkv, o, gate+up, down; B: seven; two layers"
        backend.train_step([batch], 1e-2, 1)
        state = state_of(backend)
        tied = gradients_of(backend, [batch])[1]["model.layers.0.self_attn.q_proj.lora_A"]
    with lora_engine(tiny_base, tie_groups=[]) as backend:
        for name, layer in lora_layers(backend.model):
            for matrix in ("lora_A", "lora_B"):
                key = f"model/base_model.model.{name}.{matrix}.weight"
                getattr(layer, matrix).data.copy_(torch.from_numpy(state[key]))
        alone = gradients_of(backend, [batch])[1]
    parts = [alone[f"model.layers.0.self_attn.{p}_proj.lora_A"] for p in "qkv"]
    assert np.abs(tied - sum(parts)).max() < 1e-3 * np.abs(tied).max()


def test_files_have_peft_s_names_one_a_for_each_projection(tiny_base):
    with lora_engine(tiny_base) as backend:
        names = [n.removeprefix("model/") for n in state_of(backend) if n.startswith("model/")]
    start = "base_model.model.model.layers.1.self_attn.v_proj."
    assert f"{start}lora_A.weight" in names
    assert f"{start}lora_B.weight" in names
    assert len(names) == 2 * 7 * 2


@pytest.mark.parametrize("tied", [True, False])
def test_peft_loads_the_adapter_and_computes_the_same(tiny_base, tmp_path, tied):
    peft = pytest.importorskip("peft")
    import transformers

    config = config_for(tiny_base, model__lora=LORA if tied else UNTIED)
    ids = np.array([[7, 8, 9, 40, 41]])
    with engine(config) as backend:
        for step in (1, 2, 3):
            backend.train_step([make_batch(seed=step)], 3e-2, step)
        ours = backend.next_token_logits(ids, np.array([5]))[0]
        write_tensors(tmp_path, backend.state(), config)
    plain = transformers.AutoModelForCausalLM.from_pretrained(tiny_base, dtype=torch.float32)
    with torch.no_grad():
        base = plain(torch.from_numpy(ids)).logits[:, -1].numpy()
        model = peft.PeftModel.from_pretrained(plain, str(tmp_path)).eval()
        theirs = model(torch.from_numpy(ids)).logits[:, -1].numpy()
    assert np.abs(ours - base).max() > 0.05
    assert np.abs(ours - theirs).max() < 1e-5


def test_some_targets_only(tiny_base):
    with lora_engine(tiny_base, target_modules=["o_proj"]) as backend:
        assert {name.rpartition(".")[2] for name, _ in lora_layers(backend.model)} == {"o_proj"}
        before = backend.eval_nll(make_batch())[0].sum()
        backend.train_step([make_batch()], 1e-2, 1)
        assert backend.eval_nll(make_batch())[0].sum() < before


def test_a_target_that_matches_no_layer_is_refused(tiny_base):
    lora = Lora(rank=4).model_copy(update={"target_modules": ["o_proj", "c_attn"]})
    config = config_for(tiny_base)
    config = config.model_copy(update={"model": config.model.model_copy(update={"lora": lora})})
    with pytest.raises(UsageError, match="match no layer: c_attn") as caught, engine(config):
        pass
    assert "q_proj" in str(caught.value)


def test_an_adapter_of_another_tying_is_refused(tiny_base):
    with lora_engine(tiny_base, tie_groups=[]) as backend:
        backend.train_step([make_batch()], 1e-2, 1)
        state = state_of(backend)
    state = {k: v for k, v in state.items() if k.startswith("model/") or k == "optimizer/step"}
    with lora_engine(tiny_base) as backend:
        full = state_of(backend) | state
        with pytest.raises(MachineError, match="another tying"):
            backend.load_state(full)


def test_alpha_scales_the_update(tiny_base):
    found = {}
    for alpha in (8.0, 16.0):
        with lora_engine(tiny_base, alpha=alpha) as backend:
            layer = next(layer for _, layer in lora_layers(backend.model))
            layer.lora_B.data.fill_(0.1)
            x = torch.ones(1, 1, 64)
            with torch.no_grad():
                found[alpha] = layer(x) - super(LoraLinear, layer).forward(x)
                expected = alpha / 4 * (x @ layer.lora_A.t() @ layer.lora_B.t())
            torch.testing.assert_close(found[alpha], expected)
    torch.testing.assert_close(found[16.0], 2 * found[8.0])


def test_dropout_acts_in_training_only(tiny_base):
    with lora_engine(tiny_base, dropout=0.5) as backend:
        backend.train_step([make_batch()], 1e-2, 1)
        first, second = (backend.eval_nll(make_batch())[0] for _ in range(2))
        assert np.array_equal(first, second)
        with_dropout = gradients_of(backend, [make_batch()])[0].loss
        state = state_of(backend)
    with lora_engine(tiny_base) as backend:
        backend.load_state(state)
        assert gradients_of(backend, [make_batch()])[0].loss != with_dropout
        assert gradients_of(backend, [make_batch()])[0].loss == pytest.approx(
            first.sum() / make_batch().loss_mask.sum(), rel=1e-5
        )
