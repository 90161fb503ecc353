from __future__ import annotations

import errno
import itertools
import json
import os
import resource
import shutil
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
import yaml

pytest.importorskip("torch", reason="the CPU engine is torch")

from common.data.chat import ChatTokenizer
from common.data.tokens import Encoded
from common.errors import MachineError, Stopped, UsageError, VerificationError
from common.files import try_lock
from common.model.weights import Weights
from common.train import metrics
from tests.doubles.tiny_recipe import FROM_SCRATCH, make_tiny_recipe, tiny_scratch
from tests.support.runs import newest_run, run_tiny
from tools.bases import plain
from tools.export import check, hf_folder
from tools.export.export import check_export, export_folder
from tools.export.record import WRITER, verified
from tools.launch.after_run import say_next
from tools.runs import trained
from tools.verify.tiny_base import write_tiny_base


@pytest.fixture(scope="module", autouse=True)
def home(tmp_path_factory):
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("RECIPES_HOME", str(tmp_path_factory.mktemp("home")))
        yield


@pytest.fixture(scope="module")
def recipe(tmp_path_factory, tiny_base) -> Path:
    return make_tiny_recipe(tmp_path_factory.mktemp("recipes") / "tiny", tiny_base)


@pytest.fixture(scope="module")
def exported(tmp_path_factory, recipe) -> Path:
    """A LoRA run that exported itself at its end; copy it before changing it."""
    return run_tiny(recipe, tmp_path_factory.mktemp("runs"))


@pytest.fixture
def run(exported, tmp_path) -> Path:
    return Path(shutil.copytree(exported, tmp_path / exported.name))


def record(folder: Path) -> dict:
    return json.loads((folder / "export" / "export.json").read_text())


def manifest(folder: Path) -> dict:
    return json.loads((folder / "manifest.json").read_text())


def export_again(folder: Path) -> list[str]:
    shutil.rmtree(folder / "export")
    lines: list[str] = []
    export_folder(folder, lines.append)
    return lines


def logits(model, ids) -> np.ndarray:
    import torch

    with torch.inference_mode():
        return model.eval()(input_ids=torch.tensor([ids])).logits[0].numpy()


def test_the_export_of_a_lora_run_computes_what_the_run_computed(exported, tiny_base):
    found = record(exported)
    last = metrics.read(exported / "metrics.jsonl")[-1]

    assert found["verified"]
    assert found["check"]["run_loss"] == pytest.approx(last["eval_loss"])
    assert found["check"]["losses"] == pytest.approx(
        {"merged": last["eval_loss"], "adapter": last["eval_loss"]}, abs=1e-5
    )
    assert manifest(exported)["export"]["status"] == "verified"
    assert "merged" in manifest(exported)["export"]["difference"]


def test_plain_transformers_and_plain_peft_load_the_same_function(exported, tiny_base):
    import peft
    import transformers

    ids = [5, 40, 77, 300, 12]
    merged = transformers.AutoModelForCausalLM.from_pretrained(exported / "export" / "merged")
    base = transformers.AutoModelForCausalLM.from_pretrained(tiny_base)
    untuned = logits(base, ids)
    adapted = peft.PeftModel.from_pretrained(base, str(exported / "export" / "adapter"))

    assert np.abs(logits(adapted, ids) - logits(merged, ids)).max() < 1e-4
    assert np.abs(untuned - logits(merged, ids)).max() > 0.1
    assert json.loads((exported / "export/adapter/adapter_config.json").read_text())["base_model_name_or_path"] == str(
        tiny_base
    )


def test_the_exported_tokenizer_and_generation_settings_stand_alone(exported, tiny_base):
    merged = exported / "export" / "merged"
    settings = json.loads((merged / "generation_config.json").read_text())
    ours = ChatTokenizer.load(tiny_base)

    assert ChatTokenizer.load(merged).prompt_ids("What is a fox?") == ours.prompt_ids("What is a fox?")
    assert settings["eos_token_id"] == list(ours.eos_ids)
    assert settings["temperature"] == 0  # greedy to transformers, and to vLLM, which knows no do_sample
    assert settings["max_length"] == 256
    assert "max_new_tokens" not in settings
    assert json.loads((merged / "tokenizer_config.json").read_text())["tokenizer_class"] == "PreTrainedTokenizerFast"


def drop_the_scale(patch):
    patch.setattr(hf_folder, "low_rank_update", lambda a, b, *, scale: b @ a)


def swap_two_layers(patch):
    real = hf_folder.adapters_of

    def swapped(run):
        found = real(run)
        first, second = (f"model.layers.{layer}.mlp.down_proj" for layer in (0, 1))
        return found | {first: found[second], second: found[first]}

    patch.setattr(hf_folder, "adapters_of", swapped)


def transpose_a_square_projection(patch):
    real = hf_folder.low_rank_update

    def transposed(a, b, *, scale):
        update = real(a, b, scale=scale)
        return update.T if update.shape[0] == update.shape[1] else update

    patch.setattr(hf_folder, "low_rank_update", transposed)


def forget_one_adapter(patch):
    real = hf_folder.adapters_of
    patch.setattr(hf_folder, "adapters_of", lambda run: dict(list(real(run).items())[1:]))


@pytest.mark.parametrize("defect", [drop_the_scale, swap_two_layers, transpose_a_square_projection, forget_one_adapter])
def test_a_wrong_merge_is_caught_and_recorded(run, monkeypatch, defect):
    defect(monkeypatch)
    with pytest.raises(VerificationError, match="merged/ has a held-out loss"):
        export_again(run)

    assert record(run)["verified"] is False
    assert manifest(run)["export"]["status"] == "failed"


def test_a_wrong_adapter_is_caught(run, monkeypatch):
    real = hf_folder.write_adapter

    def with_another_alpha(folder, run):
        real(folder, run)
        path = folder / "adapter_config.json"
        path.write_text(json.dumps(json.loads(path.read_text()) | {"lora_alpha": 4}))

    monkeypatch.setattr("tools.export.export.write_adapter", with_another_alpha)
    with pytest.raises(VerificationError, match="adapter/ has a held-out loss"):
        export_again(run)


def test_another_chat_template_is_caught(run, monkeypatch):
    real = plain.write_tokenizer

    def with_a_space(source, folder, context):
        real(source, folder, context)
        path = folder / "chat_template.jinja"
        path.write_text(path.read_text().replace("<|assistant|>", "<|assistant|> "))

    monkeypatch.setattr(hf_folder, "write_tokenizer", with_a_space)
    with pytest.raises(VerificationError, match="AutoTokenizer makes other tokens"):
        export_again(run)


@pytest.mark.parametrize("tied", [True, False])
def test_a_tied_output_head_is_stored_once_and_an_untied_one_beside_the_embedding(tmp_path, tied):
    base = write_tiny_base(tmp_path / "base", tied=tied)
    folder = run_tiny(make_tiny_recipe(tmp_path / "tiny", base), tmp_path / "runs", steps=2)
    names = list(Weights([folder / "export/merged/model.safetensors"]))

    assert record(folder)["verified"]
    assert ("lm_head.weight" in names) is not tied
    assert json.loads((folder / "export/merged/config.json").read_text())["tie_word_embeddings"] is tied


@pytest.mark.parametrize(
    ("overrides", "dtype", "allowed"),
    [
        (["model_config.lora=null"], "float32", 1e-3),
        (["training_config.precision=bf16"], "bfloat16", 0.02),
        (["training_config.precision=bf16", "model_config.lora=null"], "bfloat16", 0.02),
        (["training_config.precision=bf16", "export_config.dtype=fp32"], "float32", 1e-3),
        (["export_config.dtype=bf16"], "bfloat16", 0.02),
    ],
)
def test_every_way_of_training_is_exported_in_the_dtype_it_says(recipe, tmp_path, overrides, dtype, allowed):
    folder = run_tiny(recipe, tmp_path, "training_config.learning_rate=1e-3", *overrides, steps=2)
    weights = Weights([folder / "export/merged/model.safetensors"])

    assert record(folder)["check"]["allowed"]["merged"] == allowed
    assert {str(weights[name].dtype) for name in weights} == {dtype}
    assert json.loads((folder / "export/merged/config.json").read_text())["dtype"] == dtype
    assert (folder / "export/adapter").is_dir() is ("model_config.lora=null" not in overrides)
    rounded = "training_config.precision=bf16" in overrides
    assert ("Both were computed in bf16, by the run" in (folder / "export/merged/README.md").read_text()) is rounded


def test_a_stopped_run_is_exported_at_a_step_it_never_evaluated(recipe, tmp_path):
    with pytest.raises(Stopped):
        run_tiny(recipe, tmp_path, stop_at=2)
    folder = newest_run(tmp_path)
    export_folder(folder, print)

    assert record(folder)["step"] == 2
    assert record(folder)["verified"]
    assert "did not evaluate" in record(folder)["check"]["compared_with"]
    assert "did not evaluate the exported step" in (folder / "export/merged/README.md").read_text()


def test_a_verified_export_is_kept_and_a_damaged_one_set_aside(run):
    lines: list[str] = []
    export_folder(run, lines.append)
    assert "kept" in lines[-1]

    (run / "export/merged/config.json").write_text("{}")
    export_folder(run, lines.append)
    assert record(run)["verified"]
    assert (run / "export.replaced-0/merged/config.json").read_text() == "{}"


def test_what_a_killed_export_left_is_cleared_and_a_full_disk_costs_no_export(run):
    for left in (".tmp-export-1", ".export-1"):  # as earlier versions named it, and as it is named now
        (run / left / "merged").mkdir(parents=True)
    before = record(run)
    (run / "export/adapter/README.md").unlink()  # so that it is made anew
    soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (200_000, hard))
    try:
        with pytest.raises(MachineError, match="could not write the export"):
            export_folder(run, print)
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))

    assert record(run) == before
    assert not list(run.glob(".*export-*"))


def test_a_disk_that_fails_as_it_is_flushed_costs_no_export(run, monkeypatch):
    before, flush = record(run), os.fsync
    (run / "export/adapter/README.md").unlink()  # so that it is made anew

    def fails_for_weights(descriptor: int) -> None:
        if Path(f"/proc/self/fd/{descriptor}").readlink().suffix == ".safetensors":
            raise OSError(errno.EIO, os.strerror(errno.EIO))
        flush(descriptor)

    monkeypatch.setattr(os, "fsync", fails_for_weights)
    with pytest.raises(MachineError, match="could not write the export"):
        export_folder(run, print)

    assert record(run) == before
    assert not list(run.glob("export.replaced-*"))


def test_checking_an_export_measures_it_again_and_finds_one_changed_byte(run):
    lines: list[str] = []
    check_export(run, lines.append)
    assert "verified: held-out loss merged" in lines[-1]

    path = run / "export/merged/model.safetensors"
    data = bytearray(path.read_bytes())
    data[-1] ^= 1
    path.write_bytes(data)
    with pytest.raises(VerificationError, match=r"merged/model\.safetensors is damaged"):
        check_export(run, print)
    assert manifest(run)["export"]["status"] == "failed"


def test_without_torch_an_export_is_unverified_until_a_machine_with_torch_checks_it(run, monkeypatch, capsys):
    with monkeypatch.context() as patch:
        patch.setattr(check, "missing_packages", lambda: "torch")
        export_again(run)
    assert manifest(run)["export"]["status"] == "unverified"
    assert "no torch here" in record(run)["reason"]
    say_next(run)
    assert "make serve" not in "".join(capsys.readouterr()), "recipe serve would refuse it"

    check_export(run, print)
    assert manifest(run)["export"]["status"] == "verified"
    say_next(run)
    assert "make serve" in "".join(capsys.readouterr())


def test_without_torch_a_missing_tensor_is_still_found(run, monkeypatch):
    monkeypatch.setattr(check, "missing_packages", lambda: "torch")
    real = hf_folder.merged_shapes
    monkeypatch.setattr(hf_folder, "merged_shapes", lambda run: dict(list(real(run).items())[1:]))
    with pytest.raises(VerificationError, match="is missing"):
        export_again(run)


def test_the_loss_over_a_large_vocabulary_is_that_of_float64():
    """Summed over another axis than the last, fp32 lost 1.5e-4 nats a token: more than most defects of an export."""
    import torch

    table = torch.from_numpy(np.random.default_rng(0).standard_normal((8, 49152)).astype(np.float32)) * 2
    table[:, 0] += 14  # one likely token, and all others small beside it, as of a trained model
    rows = [[1, 3, 5, 7, 2], [2, 4, 6]]

    class Model(torch.nn.Module):
        config = SimpleNamespace(vocab_size=table.shape[1])

        def forward(self, input_ids, logits_to_keep, **_):
            return SimpleNamespace(logits=table[input_ids[:, logits_to_keep]])

    encoded = [Encoded(np.array(row, np.uint32), np.ones(len(row), np.uint8)) for row in rows]
    found = check.plain_nll(Model(), SimpleNamespace(row=encoded.__getitem__), [0, 1])  # type: ignore[arg-type]
    exact = torch.log_softmax(table.double(), dim=-1)
    wanted = [-sum(float(exact[a, b]) for a, b in itertools.pairwise(row)) for row in rows]
    assert found.nll.tolist() == pytest.approx(wanted, abs=1e-4)


def test_a_large_held_out_set_is_sampled(run, monkeypatch):
    monkeypatch.setattr(check, "CHECKED_ROWS", 3)
    (line,) = export_again(run)

    assert "on 3 of 10 held-out rows" in line
    assert record(run)["verified"]


def test_a_run_that_is_going_and_a_folder_that_is_no_run_are_refused(run, tmp_path):
    lock = try_lock(run)
    assert lock is not None
    with lock, pytest.raises(UsageError, match="still going"):
        export_folder(run, print)
    with pytest.raises(UsageError, match="no run there"):
        export_folder(tmp_path, print)
    shutil.rmtree(run / "export")
    with pytest.raises(UsageError, match="no export"):
        check_export(run, print)


def test_the_model_card_says_what_the_run_measured_and_no_local_path(exported, tiny_base):
    text = (exported / "export/merged/README.md").read_text()
    front = yaml.safe_load(text.split("---")[1])
    base, tuned = (r for r in metrics.read(exported / "metrics.jsonl") if "eval_loss" in r and r["step"] in (0, 6))

    assert front["license"] == "unknown"
    assert f"| base | {base['eval_loss']:.4f} ± {base['eval_loss_se']:.4f} |" in text
    assert f"| this model (step 6) | {tuned['eval_loss']:.4f} ± {tuned['eval_loss_se']:.4f} |" in text
    for card in exported.glob("export/*/README.md"):
        assert str(tiny_base) not in card.read_text()


def test_the_card_s_snippet_runs(exported, monkeypatch, capsys):
    monkeypatch.chdir(exported / "export" / "merged")
    exec(Path("README.md").read_text().split("```python\n")[1].split("```")[0], {})

    assert capsys.readouterr().out.strip()


def test_the_snippet_prints_what_the_card_shows(recipe, tmp_path, monkeypatch, capsys):
    """Sampling that the folder did not carry would show as another answer: the penalty turns this one."""
    answers = {}
    for penalty in (1.0, 8.0):
        out = tmp_path / str(penalty)
        folder = run_tiny(recipe, out, f"eval_config.repetition_penalty={penalty}", "eval_config.max_new_tokens=24")
        card = (folder / "export/merged/README.md").read_text()
        monkeypatch.chdir(folder / "export/merged")
        capsys.readouterr()
        exec(card.split("```python\n")[1].split("```")[0], {})
        sample = metrics.read(folder / "evaluations.jsonl")[-1]["samples"][0]["answer"]
        answers[penalty] = sample
        assert capsys.readouterr().out.strip().startswith(sample)
        assert (
            hf_folder.sampling(trained.read(folder, print).config.eval).items()
            <= json.loads(Path("generation_config.json").read_text()).items()
        )
    assert answers[1.0] != answers[8.0], "the penalty changed nothing: nothing is tested"


def test_the_card_counts_the_rows_that_were_evaluated(recipe, exported, tmp_path):
    folder = run_tiny(recipe, tmp_path, "eval_config.max_rows=4", steps=2)
    for card in (folder / "export").glob("*/README.md"):
        assert "Evaluated in fp32 on 4 of 10 rows that were not trained on." in card.read_text()
        assert "on all of those rows" in card.read_text()
    assert "Evaluated in fp32 on all 10 rows" in (exported / "export/merged/README.md").read_text()


def test_an_export_of_an_earlier_writer_is_served_and_checked_and_made_anew_when_asked(run):
    path = run / "export" / "export.json"
    old = {key: value for key, value in json.loads(path.read_text()).items() if key != "writer"}
    path.write_text(json.dumps(old))
    assert verified(run)["step"] == 6
    check_export(run, print)

    lines: list[str] = []
    export_folder(run, lines.append)
    assert record(run)["verified"]
    assert record(run)["writer"] == WRITER
    assert json.loads((run / "export.replaced-0" / "export.json").read_text())["checkpoint"] == old["checkpoint"]
    export_folder(run, lines.append)
    assert "kept" in lines[-1]


def test_the_card_says_where_a_user_s_own_base_is_misread(recipe, tiny_base, tmp_path):
    base = Path(shutil.copytree(tiny_base, tmp_path / "base"))
    config = json.loads((base / "config.json").read_text())
    del config["rope_theta"]
    rope = {"rope_theta": 50000.0, "rope_type": "default"}
    (base / "config.json").write_text(json.dumps(config | {"rope_parameters": rope}))
    folder = run_tiny(recipe, tmp_path / "runs", f"model_config.base={base}", steps=2)

    assert (
        "keeps the rotary base, 50000, in `rope_parameters` alone" in (folder / "export/adapter/README.md").read_text()
    )
    assert json.loads((folder / "export/merged/config.json").read_text())["rope_theta"] == 50000.0


def test_other_tokens_of_plain_text_are_caught(tmp_path, monkeypatch):
    folder = run_tiny(
        FROM_SCRATCH, tmp_path, *tiny_scratch(tmp_path / "play.txt"), "eval_config.max_new_tokens=4", steps=2
    )
    real = plain.write_tokenizer

    def lower_case(source, target, context):
        real(source, target, context)
        path = target / "tokenizer.json"
        path.write_text(json.dumps(json.loads(path.read_text()) | {"normalizer": {"type": "Lowercase"}}))

    monkeypatch.setattr(hf_folder, "write_tokenizer", lower_case)
    with pytest.raises(VerificationError, match="AutoTokenizer makes other tokens"):
        export_again(folder)
