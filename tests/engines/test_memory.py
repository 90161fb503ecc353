"""The arithmetic of a chip's memory, the refusal that stands on it, and what `recipe plan` says."""

from __future__ import annotations

import dataclasses
import json
import shutil
from pathlib import Path
from typing import Any

import pytest
import yaml

from common import config as configs
from common import hardware
from common.config import Config
from common.errors import UsageError
from common.model import bases, llama
from engines.ttml import memory
from tests.doubles.tiny_recipe import FINE_TUNE, FROM_SCRATCH, make_tiny_recipe
from tools.cli import main
from tools.plan import estimate

TINYLLAMA: dict[str, Any] = bases.locked()["tinyllama-1.1b-chat"]["architecture"]
FULL = ("model_config.lora=null",)


def config_of(board: str, *overrides: str) -> Config:
    return configs.load(FINE_TUNE, hardware.get(board), overrides)


def needed(board: str, *overrides: str, length: int = 128, **architecture: int) -> memory.Memory:
    return memory.footprint(hardware.get(board), config_of(board, *overrides), TINYLLAMA | architecture, length)


# --- arithmetic -------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(("vocabulary", "published"), [(96, 3708.8), (32_000, 4207.3)])
def test_moments_of_tinyllama_s_body_are_the_published_ones(vocabulary, published):
    """tt-train's memory document: bf16 moments, norm gains padded to whole tiles; unpadded it is 0.3 % less."""
    moments = needed("n150", *FULL, vocab_size=vocabulary).mib()["moments"]
    assert moments == pytest.approx(published, rel=1e-4)


@pytest.mark.parametrize("name", ["tinyllama-1.1b-chat", "smollm2-135m-instruct"])
def test_a_locked_base_has_the_shape_of_its_parameters(name):
    entry = bases.locked()[name]
    assert llama.parameters(entry["architecture"]) == entry["parameters"]


def test_tiles():
    assert memory.elements((33, 64)) == 64 * 64
    assert memory.elements((2048,)) == 32 * 2048
    assert memory.elements((33, 64), tile=1) == 33 * 64


FUSED = "model_config.lora.tie_groups=[[q_proj,k_proj,v_proj],[gate_proj,up_proj]]"
UNFUSED = "model_config.lora.tie_groups=[[k_proj,v_proj]]"


@pytest.mark.parametrize(("ties", "shared_inputs"), [(FUSED, 3), (UNFUSED, 5)])
def test_adapters_alone_have_gradients_and_moments(ties, shared_inputs):
    lora, full = needed("n150", ties), needed("n150", *FULL)
    a_layer = 32 * (shared_inputs * 2048 + 5632)  # rank 16, padded; one A for q, k, v and one for gate, up, or five
    a_layer += 32 * (2048 * 2 + 2 * 256 + 2 * 5632 + 2048)
    assert lora.gradients == 22 * a_layer * 2
    assert lora.moments == 2 * lora.gradients
    assert lora.weights == full.weights + lora.gradients


def test_adapters_in_an_unfused_mlp_keep_one_tensor_more():
    """Of 10,240 tokens it is 2.5 GB: tt-metal PR 45335 measured 26.7 GB without the fused op and 24.3 GB with it."""
    size = ("training_config.batch_size=5", "training_config.micro_batch_size=5")
    composite, fused = (needed("n150", ties, *size, length=2048).activations for ties in (UNFUSED, FUSED))
    assert composite - fused == 5 * 2048 * 22 * 5632 * 2 == pytest.approx(2.4e9, rel=0.06)
    attention = (*size, "model_config.lora.target_modules=[q_proj,k_proj,v_proj,o_proj]")
    outside, same = (needed("n150", ties, *attention, length=2048).activations for ties in (UNFUSED, FUSED))
    assert outside == same < fused, "adapters elsewhere leave the fused op, and the inputs of the MLP go"


def test_a_plan_says_which_build_it_reckons_with(monkeypatch, tmp_path, tiny_base):
    monkeypatch.setenv("RECIPES_HOME", str(tmp_path / "home"))
    recipe = make_tiny_recipe(tmp_path / "tiny", tiny_base)
    (recipe / "results.yaml").write_text("format: 1\nrecipe: tiny\nentries: []\n")
    words = "adapters as on a build of ttml that fuses least"
    for board, overrides, says in (("n150", (), True), ("n150", (FUSED,), False), ("cpu", (), False)):
        lines = "\n".join(estimate.lines(estimate.outlook(recipe, board, overrides, None)))
        assert (words in lines) == says, lines


def test_a_build_that_nobody_has_asked_is_the_one_that_needs_most():
    assert needed("n150") == needed("n150", UNFUSED)
    assert needed("n150").total > needed("n150", FUSED).total


def test_full_precision_has_fp32_masters_and_moments():
    half = needed("n150", *FULL)
    full = needed("n150", *FULL, "training_config.optimizer.type=AdamWFullPrecision")
    assert (full.moments, full.masters) == (2 * half.moments, half.moments)
    assert (half.masters, full.weights, full.gradients) == (0, half.weights, half.gradients)


def test_recomputing_keeps_the_inputs_of_blocks():
    kept, again = needed("n150", *FULL), needed("n150", *FULL, "model_config.gradient_checkpointing=true")
    assert dataclasses.replace(again, activations=kept.activations) == kept
    assert 15 * again.activations < 22 * kept.activations < 22 * 15 * again.activations


def test_a_batch_is_shared_out_and_the_rest_is_on_every_device():
    one, two = needed("n150", "training_config.batch_size=8"), needed("n300", "training_config.batch_size=8")
    assert two.activations == one.activations // 2
    assert two.weights == one.weights


# --- the refusal ------------------------------------------------------------------------------------------------------


def refusal(board: str, *overrides: str, length: int = 512) -> str | None:
    try:
        memory.refuse_too_large(hardware.get(board), config_of(board, *overrides), TINYLLAMA, length)
    except UsageError as error:
        return str(error)
    return None


def test_what_cannot_fit_is_refused_with_settings_that_fit():
    said = refusal("n150", *FULL)
    assert said is not None
    assert "which has 12,288 MiB" in said
    ways = [way for way in said.partition("to do: ")[2].split("; or ") if "the same training" in way]
    assert len(ways) == 2
    for way in ways:
        words = way.replace(" (the same training)", "").split()[1::2]
        assert refusal("n150", *FULL, *words) is None, way
    assert "gradient_checkpointing=true" in ways[1]
    assert "gradient_checkpointing" not in ways[0]


def test_another_training_is_offered_last_and_called_so():
    said = refusal("n150", *FULL, "training_config.optimizer.type=AdamWFullPrecision")
    assert said is not None
    ways = said.partition("to do: ")[2].split("; or ")
    assert all(way.endswith("(another training)") for way in ways), "fp32 masters and moments alone are too much"
    assert "optimizer.type=AdamW" in ways[0]


@pytest.mark.parametrize(("board", "overrides"), [("n150", ()), ("p150", FULL), ("cpu", FULL)])
def test_what_fits_and_what_runs_on_the_host_is_not_refused(board, overrides):
    assert refusal(board, *overrides) is None


def test_a_run_is_refused_before_its_engine_starts(monkeypatch, tmp_path, tiny_base):
    """The hook: make_plan asks for what the chip has not."""
    from common.train.plan import make_plan
    from tools.launch.resolve import resolve
    from tools.recipes import load_dataset

    monkeypatch.setenv("RECIPES_HOME", str(tmp_path / "home"))
    small = dataclasses.replace(hardware.get("cpu"), dram_gib_per_chip=1e-4)
    monkeypatch.setattr("common.hardware.table", lambda: {"cpu": small})
    monkeypatch.setattr("engines.cpu.refuse_too_large", memory.refuse_too_large)
    recipe = make_tiny_recipe(tmp_path / "tiny", tiny_base)
    launch = resolve(recipe, hw="cpu", out=tmp_path)
    with pytest.raises(UsageError, match="cannot fit into a chip of cpu"):
        make_plan(launch, *load_dataset(recipe), lambda line: None, lambda line: None)


# --- recipe plan ------------------------------------------------------------------------------------------------------


@pytest.fixture
def home(tmp_path, monkeypatch) -> Path:
    """Nothing is downloaded: an attempt to is an error."""
    monkeypatch.setenv("RECIPES_HOME", str(tmp_path / "home"))
    monkeypatch.setattr(bases, "_pinned", lambda *arguments: pytest.fail("it fetches a base"))
    return tmp_path / "home"


def text_of(recipe: Path, board: str, *overrides: str, steps: int | None = None) -> str:
    said: list[str] = []
    estimate.print_outlook(recipe, board, overrides, steps, False, said.append)
    return "\n".join(said)


def test_a_plan_without_base_and_corpus_downloads_nothing_and_says_what_it_assumed(home):
    text = text_of(FINE_TUNE, "n300")
    assert "batch_size 32 = micro_batch_size 8 x 2 devices x 2 accumulated" in text
    assert "the base tinyllama-1.1b-chat is not here; lengths estimated at 3 characters a token" in text
    assert "14 training rows, 10 held out: 0.4 steps an epoch" in text
    assert "no speed of this model on n300 is recorded or published: nothing is guessed" in text
    assert "rows of 256 tokens (the corpus shakespeare is not here" in text_of(FROM_SCRATCH, "p300c")
    assert not home.exists()


def test_a_plan_of_rows_that_are_here_counts_their_tokens(tiny_base, tmp_path, monkeypatch):
    monkeypatch.setenv("RECIPES_HOME", str(tmp_path / "home"))
    recipe = make_tiny_recipe(tmp_path / "tiny", tiny_base)
    entry = {
        "board": "cpu",
        "evidence": "measured",
        "what": "a test",
        "overrides": ["training_config.learning_rate=0.5"],
        "date": "2026-11-22",
        "commit": "4e118d7",
        "machine": "a toaster",
        "tokens_per_second": 100.0,
    }
    tree = yaml.safe_dump({"format": 1, "recipe": "tiny", "entries": [entry]})
    (recipe / "results.yaml").write_text(tree.replace("'2026-11-22'", "2026-11-22"))
    found = estimate.outlook(recipe, "cpu", (), None)
    assert (found.rows.train, found.rows.held_out, found.rows.length) == (14, 10, 96)
    assert found.rows.evidence == "tokenised here"
    assert found.rows.tokens_per_row is not None
    assert found.rows.padding == pytest.approx(1 - found.rows.tokens_per_row / 96)
    assert found.time.seconds == pytest.approx(6 * 4 * found.rows.tokens_per_row / 100)
    assert found.time.evidence == "measured: 100 tokens/s on a toaster"
    full = estimate.outlook(recipe, "cpu", FULL, None)
    assert full.time.seconds is None, "another model than the recorded one"
    one = found.needed
    assert one is not None
    assert estimate.disk(found)["checkpoints"] == pytest.approx(one.gradients * 3 * 4 / 1e6, abs=0.1)


def test_a_published_speed_is_called_published(home):
    text = text_of(FROM_SCRATCH, "p300c", steps=3000)
    assert "time: 8m12s of training steps, published: 100,000 tokens/s on one chip" in text


def test_a_plan_that_cannot_fit_prints_it_and_ends_with_2(home, monkeypatch, capsys):
    command = ["recipe", "plan", str(FINE_TUNE), "--hw", "n150", "--json"]
    for override in (*FULL, "training_config.micro_batch_size=32", "data_config.max_length=1024"):
        command += ["--set", override]
    monkeypatch.setattr("sys.argv", command)
    with pytest.raises(SystemExit) as ended:
        main.main()
    assert ended.value.code == 2
    captured = capsys.readouterr()
    found = json.loads(captured.out)
    assert found["fits"] == "no"
    assert found["memory_mib"]["moments"] == pytest.approx(4207.3, rel=1e-3)
    assert "cannot fit into a chip of n150" in captured.err


def test_an_unknown_recipe_and_a_wrong_key_have_their_messages(monkeypatch, capsys):
    for words, text in ((["no-such-recipe"], "no recipe called"), ([str(FINE_TUNE), "--set", "a=1"], "a")):
        monkeypatch.setattr("sys.argv", ["recipe", "plan", *words])
        with pytest.raises(SystemExit) as ended:
            main.main()
        assert ended.value.code == 2
        assert text in capsys.readouterr().err


def test_a_copied_folder_plans_as_well(home, tmp_path):
    copied = Path(shutil.copytree(FINE_TUNE, tmp_path / "mine"))
    (copied / "results.yaml").write_text("format: 1\nrecipe: mine\nentries: []\n")
    assert estimate.outlook(copied, "n150", (), 5).steps == 5
