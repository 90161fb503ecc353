"""What a run from random weights has besides: a gate, bits per byte, an honest end, and an export others load."""

from __future__ import annotations

import json
import math
import os
import shutil
from collections.abc import Callable, Iterator
from pathlib import Path

import numpy as np
import pytest

pytest.importorskip("torch", reason="the CPU engine is torch")

from common import config as configs
from common import hardware
from common.errors import Stopped, VerificationError
from common.model import llama
from common.model.weights import InitialWeights
from common.train import metrics
from common.train.evaluate import held_out
from common.train.run import Run
from engines.cpu.engine import Objective, TorchCPU
from tests.doubles.tiny_recipe import FROM_SCRATCH as RECIPE
from tests.doubles.tiny_recipe import tiny_scratch
from tests.support.runs import log, manifest, outcome, run_tiny
from tools.export import unmoved
from tools.export.export import check_export, export_folder
from tools.generate.chat import talk
from tools.runs import trained

QUICK = (
    "training_config.precision=fp32",
    "training_config.scheduler.warmup_steps=0",
    "eval_config.every=4",
    "eval_config.max_new_tokens=4",
    "checkpoint_config.every=4",
    "device_config.threads=1",
    "device_config.compile=never",
)


@pytest.fixture(scope="module", autouse=True)
def home(tmp_path_factory) -> Iterator[None]:
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("RECIPES_HOME", str(tmp_path_factory.mktemp("home")))
        patch.setattr(os, "fsync", lambda descriptor: None)  # no test pulls the plug, and the disk is slow
        yield


@pytest.fixture(scope="module")
def small(tmp_path_factory) -> tuple[str, ...]:
    return (*QUICK, *tiny_scratch(tmp_path_factory.mktemp("corpus") / "play.txt"))


@pytest.fixture(scope="module")
def finished(small, tmp_path_factory) -> Path:
    """A whole run with its export; read only."""
    return run_tiny(RECIPE, tmp_path_factory.mktemp("finished"), *small, steps=24)


@pytest.fixture
def go(small, tmp_path) -> Callable[..., Path]:
    def run(*overrides: str, steps: int = 8, resume: str = "never", **options) -> Path:
        return run_tiny(RECIPE, tmp_path, *small, *overrides, steps=steps, resume=resume, export=False, **options)

    return run


def evaluations(folder: Path) -> list[dict]:
    return [record for record in metrics.read(folder / "metrics.jsonl") if "eval_loss" in record]


# --- bits per byte --------------------------------------------------------------------------------------------------


def test_bits_per_byte_is_the_loss_in_another_unit(finished):
    """Characters of one byte each: bits per byte = nats per character / ln 2."""
    for record in evaluations(finished):
        assert record["bits_per_byte"] == pytest.approx(record["eval_loss"] / math.log(2), rel=1e-12)
        assert record["bits_per_byte_se"] == pytest.approx(record["eval_loss_se"] / math.log(2), rel=1e-12)
    assert evaluations(finished)[-1]["bits_per_byte"] < evaluations(finished)[0]["bits_per_byte"]
    assert "bits per byte (unigram 4." in log(finished)


def test_bits_per_byte_compares_tokenizers_where_the_loss_does_not(go):
    """Two untrained models of one size know equally little; tokens of several bytes halve the bits a byte."""
    wide = "model_config.architecture.vocab_size=320"
    char, bpe = (
        evaluations(go(wide, f"data_config.tokenizer={{type: {kind}}}", steps=4))[0] for kind in ("char", "bpe")
    )
    assert bpe["eval_loss"] == pytest.approx(char["eval_loss"], abs=0.1)
    assert bpe["bits_per_byte"] < 0.6 * char["bits_per_byte"]


def test_bits_per_byte_is_refused_where_much_is_unknown(small, tmp_path, go):
    text = "abcdefgh\n" * 300 + "ab\u0416c\n" * 50
    (tmp_path / "odd.txt").write_text(text, encoding="utf-8")
    folder = go(f"data_config.corpus={tmp_path / 'odd.txt'}", steps=4)
    assert "bits_per_byte" not in evaluations(folder)[-1]
    assert "bits per byte is not given" in log(folder)


# --- the gate -------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("initializer", ["ttml", "gpt2"])
@pytest.mark.parametrize("tied", [True, False])
def test_the_first_loss_is_that_of_knowing_nothing(go, initializer, tied):
    overrides = [
        f"model_config.initializer={initializer}",
        f"model_config.architecture.tie_word_embeddings={tied}".lower(),
    ]
    first = metrics.read(go(*overrides, steps=1) / "metrics.jsonl")[1]
    assert first["loss"] == pytest.approx(math.log(96), abs=0.6)


@pytest.mark.parametrize("wrong", [0.5, 2.0])
def test_another_first_loss_ends_the_run_with_6(go, monkeypatch, tmp_path, wrong):
    """As if the loss were normalized by half or twice the supervised tokens."""
    of = Objective.forward
    monkeypatch.setattr(Objective, "forward", lambda self, batch: wrong * of(self, batch))
    with pytest.raises(VerificationError, match=r"untrained weights give 4\.\d\d") as error:
        go()
    assert error.value.code == 6
    assert "failed: the first loss" in manifest(next(tmp_path.glob("*/manifest.json")).parent)["exit_reason"]


def test_weights_that_are_not_the_initial_ones_are_seen(go, monkeypatch):
    """Weights ten times as large as the initial ones spread the first logits."""
    of = InitialWeights.__getitem__
    monkeypatch.setattr(InitialWeights, "__getitem__", lambda self, name: of(self, name) * np.float32(10))
    with pytest.raises(VerificationError, match="the first loss is"):
        go("model_config.architecture.tie_word_embeddings=false")


# --- the end --------------------------------------------------------------------------------------------------------


def say_losses(monkeypatch, losses: list[float]) -> None:
    """Make the evaluations of a run come out as told, the first being step 0's."""
    left = iter(losses)

    def told(backend, split):
        found = held_out(backend, split)
        return type(found)(found.tokens * next(left), found.tokens)

    monkeypatch.setattr("common.train.run.held_out", told)


def test_patience_ends_the_run_and_the_best_is_kept_and_exported(go, small, tmp_path, monkeypatch):
    say_losses(monkeypatch, [4.6, 3.0, 2.0, 2.5, 2.4, 1.0])
    folder = go("eval_config.patience=2", "checkpoint_config.keep_last=1", steps=20)
    assert manifest(folder)["ended_early"] == 16
    assert outcome(folder)["step"] == 16
    assert (
        "ended after step 16 of 20: the held-out loss did not fall in 2 evaluations; it was lowest after step 8"
        in log(folder)
    )
    assert sorted(path.name for path in (folder / "checkpoints").glob("step-*")) == ["step-00000008", "step-00000016"]
    assert trained.read(folder, print).step == 8


def test_without_patience_it_goes_on_to_its_last_step(go, monkeypatch):
    say_losses(monkeypatch, [4.6, 3.0, 2.0, 2.5, 2.4, 2.3])
    folder = go("eval_config.patience=null", steps=20)
    assert outcome(folder)["step"] == 20
    assert "ended_early" not in manifest(folder)


def test_a_run_that_was_ended_early_and_killed_ends_at_the_same_step(go, monkeypatch):
    """Killed after the checkpoint of the last step: what is left is to finish, not to train on."""
    say_losses(monkeypatch, [4.6, 3.0, 2.0, 2.5, 2.4])
    killed = Run.finish
    monkeypatch.setattr(Run, "finish", lambda self: (_ for _ in ()).throw(KeyboardInterrupt))
    with pytest.raises(KeyboardInterrupt):
        go("eval_config.patience=2", steps=20)
    monkeypatch.setattr(Run, "finish", killed)
    folder = go("eval_config.patience=2", steps=20, resume="auto")
    assert outcome(folder)["step"] == 16
    assert manifest(folder)["resumed"][0]["step"] == 16


def test_another_patience_on_resume_untrains_nothing(go, monkeypatch):
    """Step 20 was trained; a patience that would have ended the run at 16 ends it there and then."""
    losses = [4.6, 3.0, 2.0, 2.5, 2.4, 2.3]
    say_losses(monkeypatch, losses)
    with pytest.raises(Stopped):
        go("eval_config.patience=null", steps=40, stop_at=20)
    folder = go("eval_config.patience=2", steps=40, resume="auto")
    assert outcome(folder)["step"] == 20
    assert manifest(folder)["ended_early"] == 20
    assert not list((folder / "checkpoints").glob("*.replaced-*"))


def test_evaluations_of_other_rows_are_not_compared_on_resume(go, small, tmp_path, monkeypatch):
    with pytest.raises(Stopped):
        go("eval_config.max_rows=4", steps=16, stop_at=8)
    folder = go("eval_config.max_rows=6", steps=16, resume="auto")
    assert "earlier evaluations are of other rows than the 6 of now: left out" in log(folder)
    assert {len(r["nll"]) for r in metrics.read(folder / "evaluations.jsonl")} == {6}
    assert [r["step"] for r in metrics.read(folder / "evaluations.jsonl")] == [12, 16]
    export_folder(folder, print)


def test_memorizing_is_said_by_its_margin_and_not_before(go, monkeypatch):
    say_losses(monkeypatch, [9.0, 9.0, 9.0])
    folder = go()
    assert log(folder).count("memorizing now: the mean training loss of the last 4 steps") == 2
    assert "more than 0.2 below the lowest held-out loss so far, 9.0000 (step 0)" in log(folder)
    monkeypatch.undo()


def test_memorizing_is_not_said_of_a_model_that_learns(finished):
    assert "memorizing" not in log(finished)


# --- what moved -----------------------------------------------------------------------------------------------------


def test_parameters_that_never_moved_are_named(finished, go, monkeypatch):
    assert manifest(finished)["never_moved"] == []
    assert "every one of 20 trained tensors moved" in log(finished)
    of = TorchCPU._update

    def frozen(self, rate):
        before = self.model.model.norm.weight.detach().clone()
        of(self, rate)
        self.model.model.norm.weight.data.copy_(before)

    monkeypatch.setattr(TorchCPU, "_update", frozen)
    run = trained.read(go(), print)
    assert unmoved.unmoved(run) == (["model.norm.weight"], 20)


def test_bf16_gains_that_round_back_are_found(go):
    """A gain of 1 in bf16 moves by steps of 0.0078: smaller updates are rounded away."""
    run = trained.read(go("training_config.precision=bf16", "training_config.learning_rate=1e-4"), print)
    still, _ = unmoved.unmoved(run)
    assert {name for name in still if "norm" in name} == {
        name for name in llama.shapes(run.base.architecture) if "norm" in name
    }


# --- the run's folder and its export --------------------------------------------------------------------------------


def test_the_export_is_loaded_by_transformers_with_the_same_tokens_and_loss(finished):
    import torch
    from transformers import AutoModelForCausalLM, AutoTokenizer

    folder = finished / "export" / "merged"
    record = json.loads((finished / "export" / "export.json").read_text())
    assert record["verified"]
    assert record["check"]["difference"]["merged"] < 1e-3
    run = trained.read(finished, print)
    tokenizer, model = AutoTokenizer.from_pretrained(folder), AutoModelForCausalLM.from_pretrained(folder)
    text = "FOX.\nThe slope goes downhill."
    assert tokenizer(text)["input_ids"] == run.tokenizer.encode_text(text)
    answer = model.generate(  # type: ignore[misc]
        **tokenizer("FOX", return_tensors="pt"), max_new_tokens=40, do_sample=True, temperature=50.0
    )
    never = {*run.tokenizer.never_ids, *range(run.tokenizer.vocab_size, 96)}
    end = tokenizer.eos_token_id
    assert end == run.tokenizer.vocab_size, "an end token that stands for no text, as some readers want one"
    assert {model.config.eos_token_id, model.generation_config.eos_token_id, tokenizer.bos_token_id} == {end}
    assert never.isdisjoint(answer[0].tolist()), "padding and the unknown sign are suppressed"
    assert torch.isfinite(model(**tokenizer(text, return_tensors="pt")).logits).all()


def test_the_card_s_snippet_stays_within_the_context_and_the_text_is_as_the_run_says_it(finished, monkeypatch, caplog):
    monkeypatch.chdir(finished / "export" / "merged")
    assert "one ends where prompt and answer fill the 64 tokens" in Path("README.md").read_text()
    names: dict = {}
    exec(Path("README.md").read_text().split("```python\n")[1].split("```")[0], names)
    whole = names["model"].generate(**names["inputs"])[0].tolist()
    assert len(whole) == names["model"].config.max_position_embeddings
    assert not any("exceeded" in record.message for record in caplog.records)


def test_a_folder_is_talked_to_as_its_run(finished, capsys):
    answers = []
    for target in (finished, finished / "export" / "merged"):
        capsys.readouterr()
        talk(target, ["FOX."], sampling={"temperature": 100.0, "top_k": 0, "max_new_tokens": 40}, seed=3)
        answers.append(capsys.readouterr().out)
    assert answers[0] == answers[1], "no token more is sampled of an export, whose tokenizer has an end token"


def test_a_prompt_of_characters_that_no_text_has_is_said(go):
    folder = go("eval_config.prompts=[FOX., Zebra@]", steps=1)
    assert "the evaluation prompt 'Zebra@' has characters that no training text has" in log(folder)
    assert "prompt 'FOX.'" not in log(folder)


def test_the_sampler_never_chooses_padding_or_the_unknown_sign(go):
    folder = go("eval_config.temperature=100", "eval_config.top_k=0", "eval_config.max_new_tokens=32", steps=1)
    answers = [s["answer"] for r in metrics.read(folder / "evaluations.jsonl") for s in r["samples"]]
    assert answers
    assert not any("\ufffd" in answer for answer in answers)


def test_a_run_outlives_the_cache(finished, tmp_path, monkeypatch):
    monkeypatch.setenv("RECIPES_HOME", str(tmp_path / "empty"))
    run = trained.read(finished, print)
    assert run.tokenizer.encode_text("FOX")
    assert run.dataset().tokens_sha256 == run.manifest.data.tokens_sha256, "built again from the corpus"
    copy = shutil.copytree(finished, tmp_path / finished.name)
    shutil.rmtree(copy / "export")
    export_folder(copy, print)
    assert manifest(copy)["export"]["status"] == "verified"


def test_initial_weights_hang_on_seed_and_name_alone():
    config = configs.load(RECIPE, hardware.get("cpu"), ("model_config.preset=small",))
    assert config.model.architecture is not None
    shape = llama.hf_config(config.model.architecture.model_dump())
    first, other = InitialWeights(shape, "ttml", 1), InitialWeights(shape, "ttml", 2)
    name = "model.layers.0.self_attn.q_proj.weight"
    assert np.array_equal(first[name], InitialWeights(shape, "ttml", 1)[name])
    assert not np.array_equal(first[name], other[name])
    assert np.abs(first[name]).max() <= 256**-0.5
    assert np.abs(first[name]).max() > 0.99 * 256**-0.5
    assert first[llama.EMBEDDING].std() == pytest.approx(0.02, rel=0.01)
    gpt2 = InitialWeights(shape, "gpt2", 1)
    assert gpt2[name].std() == pytest.approx(0.02, rel=0.01)
    assert gpt2["model.layers.0.self_attn.o_proj.weight"].std() == pytest.approx(0.02 / math.sqrt(12), rel=0.01)
    assert (gpt2[llama.FINAL_NORM] == 1).all()


def test_a_copy_of_the_run_elsewhere_still_checks(finished, tmp_path):
    copy = shutil.copytree(finished, tmp_path / finished.name)
    check_export(copy, print)
