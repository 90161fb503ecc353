"""Layers, messages with file:line, the split of the batch over boards, and the two digests."""

from __future__ import annotations

import json
import re
import subprocess
import sys
from pathlib import Path

import pytest
from hypothesis import example, given
from hypothesis import strategies as st
from pydantic import BaseModel

from common import hardware
from common.config import Config, load, load_resolved
from common.config.layers import read_file, read_override, to_yaml
from common.errors import UsageError
from engines import cpu

CONFIG = """\
training_config:
  batch_size: 32
  seed: 0
  learning_rate: 1e-4
  max_steps: 100
model_config:
  base: tiny
  lora: {rank: 4, alpha: 8}
data_config:
  source: rows.jsonl
eval_config:
  every: 10
  prompts: [Hello]
checkpoint_config:
  every: 20
"""
SHAPE = {
    "vocab_size": 96,
    "hidden_size": 64,
    "intermediate_size": 128,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "max_position_embeddings": 64,
}


class Recipe:
    """A recipe's folder of which a test writes the layers."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder

    def write(self, name: str, text: str) -> Recipe:
        path = self.folder / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(text)
        return self

    def load(self, *overrides: str, board: str = "cpu", steps: int | None = None) -> Config:
        return load(self.folder, hardware.get(board), overrides, steps)

    def error(self, *overrides: str, board: str = "cpu", steps: int | None = None) -> str:
        with pytest.raises(UsageError) as error:
            self.load(*overrides, board=board, steps=steps)
        return str(error.value)


@pytest.fixture
def recipe(tmp_path: Path) -> Recipe:
    return Recipe(tmp_path / "demo").write("config.yaml", CONFIG)


# --- YAML ---------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("text", "value"),
    [
        ("1e-4", 1e-4),
        ("-2.5E+3", -2500.0),
        (".5", 0.5),
        ("1.0e-08", 1e-8),
        ("12", 12),
        ("-3", -3),
        ("true", True),
        ("null", None),
        ("~", None),
        ("'1e-4'", "1e-4"),
        ('"12"', "12"),
        ("yes", "yes"),
        ("no", "no"),
        ("off", "off"),
        ("010", "010"),
        ("1:30", "1:30"),
        ("2024-01-01", "2024-01-01"),
        ("1_000", "1_000"),
        ("0x10", "0x10"),
        ("[1, 2e0, a]", [1, 2.0, "a"]),
        ("{a: {b: no}}", {"a": {"b": "no"}}),
    ],
)
def test_scalars_mean_what_they_look_like(text, value, tmp_path):
    (tmp_path / "x.yaml").write_text(f"key: {text}\n")
    in_file = read_file(tmp_path / "x.yaml").tree["key"]
    assert (in_file, type(in_file)) == (value, type(value))
    assert read_override(f"key={text}").tree["key"] == value


JSON = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats(allow_nan=False, allow_infinity=False) | st.text(),
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.text(min_size=1), inner, max_size=3),
    max_leaves=6,
)


@given(JSON)
@example("\x85")
@example("a\u2028b")
def test_written_yaml_reads_back_the_same(tmp_path_factory, value):
    path = tmp_path_factory.mktemp("yaml") / "x.yaml"
    path.write_text(to_yaml({"key": value}), encoding="utf-8")
    layer = read_file(path)
    assert not layer.problems
    assert repr(layer.tree) == repr({"key": value})


@given(st.from_regex(r"[-+]?[0-9]{1,3}(\.[0-9]{0,3})?([eE][-+]?[0-9]{1,2})?|true|no|null|~|\.inf", fullmatch=True))
def test_text_that_looks_like_something_else_stays_text(tmp_path_factory, text):
    path = tmp_path_factory.mktemp("yaml") / "x.yaml"
    path.write_text(to_yaml({"key": text}))
    assert read_file(path).tree == {"key": text}


@pytest.mark.parametrize(
    ("line", "place", "message"),
    [
        ("training_config: {seed: 1}", "config.yaml:16", "duplicate key, first set at"),
        (
            "logging_config: {log_every: 1, log_every: 2}",
            "config.yaml:16",
            "logging_config.log_every: duplicate key",
        ),
        ("logging_config: {1: 2}", "config.yaml:16", "a key must be text"),
        ("logging_config: {log_level: !!python/name:os.system x}", "config.yaml:16", "is not supported"),
        ("logging_config: [1", "config.yaml:17", "not valid YAML"),
        ("logging_config: &a [*a]", "config.yaml:16", "aliases"),
    ],
)
def test_yaml_that_is_not_plain_is_refused_with_its_line(recipe, line, place, message):
    text = recipe.write("config.yaml", CONFIG + line + "\n").error()
    assert place in text
    assert message in text


def test_a_file_that_is_not_there_or_not_utf8(recipe):
    (recipe.folder / "config.yaml").write_bytes(b"a: \xff")
    assert "not UTF-8" in recipe.error()
    assert "byte 3" in recipe.error()
    (recipe.folder / "config.yaml").unlink()
    assert "cannot read" in recipe.error()


# --- schema and messages ------------------------------------------------------------------------


def test_every_mistake_is_listed_with_file_line_and_key(recipe):
    broken = CONFIG.replace("learning_rate: 1e-4", "learning_rat: 1e-4").replace("every: 20", "every: true")
    text = recipe.write("config.yaml", broken).error("eval_config.every='3'", "device_config.threads=0")
    assert text.startswith("5 mistakes")
    assert "config.yaml:4: training_config.learning_rat: unknown key; did you mean learning_rate?" in text
    assert "config.yaml:1: training_config.learning_rate: is required" in text
    assert "config.yaml:15: checkpoint_config.every: should be a valid integer, got true" in text
    assert """--set eval_config.every='3': eval_config.every: should be a valid integer, got "3\"""" in text
    assert "--set device_config.threads=0: device_config.threads: should be greater than 0, got 0" in text


@pytest.mark.parametrize(
    ("override", "message"),
    [
        ("lr=1e-4", "did you mean training_config.learning_rate?"),
        ("training_config.lr=1e-4", "did you mean training_config.learning_rate?"),
        ("max_steps=4", "did you mean training_config.max_steps?"),
        ("training.seed=1", "did you mean training_config?"),
        ("recipe=x", "recipe: unknown key"),
        ("training_config.learning_rate=0", "greater than 0"),
        ("training_config.learning_rate=true", "should be a valid number, got true"),
        ("training_config.learning_rate=.nan", "finite number"),
        ("training_config.seed=1.0", "should be a valid integer"),
        ("training_config.optimizer.beta2=1", "less than 1"),
        ("training_config.optimizer.type=Adam", "'AdamW', 'AdamWFp32Norms' or 'AdamWFullPrecision'"),
        ("training_config=null", "a section with keys below it"),
        ("eval_config.top_p=0", "greater than 0"),
        ("eval_config.prompts=3", "valid string, got 3, or should be a valid list"),
        ("data_config.max_length=100", "multiple of 32"),
        ("data_config.source=hub:a/b", "as JSONL: recipe data convert hub:a/b b.jsonl"),
        ("data_config.source=data/my.csv", "as JSONL: recipe data convert data/my.csv data/my.jsonl"),
        ("data_config.format=csv", "data_config.format: is no key"),
        ("data_config.map={prompt: ask}", "is no key: recipe data convert, with --format, --map, --revision, makes"),
        ("data_config.revision=abc", "data_config.revision: is no key"),
        ("model_config.base=null", "needs a base"),
        ("model_config.init=random", "init: random"),
        ("model_config.lora={target_modules: [q_proj], tie_groups: [[q_proj, k_proj]]}", "add ['k_proj']"),
        (
            "model_config.lora.tie_groups=fused",
            "tie_groups: should be 'build', got \"fused\", or should be a valid list",
        ),
        ("model_config.lora.tie_groups=[[q]]", "tie_groups[0][0]: should be 'q_proj'"),
        ("model_config.lora.target_modules=[q]", "'q_proj'"),
        ("model_config.lora.tie_groups=[[q_proj, k_proj], [k_proj, v_proj]]", "two tie groups"),
        ("model_config.lora.tie_groups=[[q_proj, o_proj]]", "share no input"),
        ("device_config.mesh_shape=[2, 2]", "on a line"),
        ("device_config.mesh_shape=[1, true]", "mesh_shape[1]: should be a valid integer"),
        ("training_config.max_steps=null", "exactly one of max_steps and num_epochs"),
        ("no-value", "not of the form"),
        ("training_config.seed=", "write null"),
        ("training_config.seed=a: b", "not one scalar"),
    ],
)
def test_bad_values_are_refused_where_they_were_set(recipe, override, message):
    text = recipe.error(override)
    assert message in text
    assert f"--set {override}" in text or "config.yaml:" in text


def test_groups_may_be_untied_and_whole_groups_targeted(recipe):
    assert recipe.load("model_config.lora.target_modules=[gate_proj, up_proj, o_proj]").model.lora
    untied = ["model_config.lora.target_modules=[q_proj, v_proj]", "model_config.lora.tie_groups=[]"]
    assert recipe.load(*untied).model.lora


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"num_attention_heads": 3}, "3 heads do not divide hidden_size 64"),
        ({"num_key_value_heads": 3}, "3 key/value heads do not divide num_attention_heads 4"),
        ({"vocab_size": 97}, "multiple of 32"),
        ({"layers": 3}, "unknown key"),
        ({"max_position_embeddings": 32}, "data_config.max_length: longer than max_position_embeddings 32"),
    ],
)
def test_shapes_that_cannot_be_built(recipe, change, message):
    settings = ["model_config.init=random", "model_config.lora=null", "data_config.source=null"]
    settings += ["data_config.corpus=play.txt", "data_config.max_length=64"]
    assert recipe.load(*settings, f"model_config.architecture={json.dumps(SHAPE)}").model.architecture
    assert message in recipe.error(*settings, f"model_config.architecture={json.dumps(SHAPE | change)}")


CORPUS = ["data_config.source=null", "data_config.corpus=play.txt", "data_config.max_length=64"]
SCRATCH = ["model_config.init=random", "model_config.lora=null", f"model_config.architecture={json.dumps(SHAPE)}"]


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        (SCRATCH, "data_config.source: init: random trains on a corpus"),
        (CORPUS, "data_config.corpus: init: random trains on a corpus"),
        (["data_config.corpus=play.txt"], "exactly one of source (rows) and corpus"),
        (["data_config.source=null"], "exactly one of source (rows) and corpus"),
        ([*SCRATCH, *CORPUS, "data_config.max_length=null"], "max_length: a corpus needs it"),
        ([*SCRATCH, *CORPUS, "data_config.max_length=33"], "multiple of 32"),
        ([*SCRATCH, *CORPUS, "data_config.split_by=topic"], "split_by: belongs to rows"),
        ([*SCRATCH, *CORPUS, "data_config.control=shuffled_words"], "control: belongs to rows"),
        ([*SCRATCH, *CORPUS, "data_config.tokenizer.vocab_size=512"], "vocab_size: belongs to type: bpe"),
        ([*SCRATCH, *CORPUS, "data_config.tokenizer={type: bpe, vocab_size: 300}"], "larger than the model's vocab"),
        ([*SCRATCH, *CORPUS, "model_config.lora={rank: 4}"], "lora: adapters need a pretrained base"),
        (["data_config.tokenizer.type=bpe"], "tokenizer: belongs to a corpus"),
        (["data_config.num_proc=2"], "num_proc: belongs to a corpus"),
        (["model_config.initializer=gpt2"], "initializer: belongs to init: random"),
    ],
)
def test_rows_and_a_base_or_a_corpus_and_random_weights(recipe, settings, message):
    assert recipe.load(*SCRATCH, *CORPUS).data.corpus == "play.txt"
    assert message in recipe.error(*settings)


# --- layers -------------------------------------------------------------------------------------


def test_later_layers_win_and_say_where(recipe):
    recipe.write("config.yaml", CONFIG.replace("base: tiny", "base: tiny\n  preset: big"))
    recipe.write("presets/big.yaml", "training_config: {seed: 1, learning_rate: 2e-4, optimizer: {beta1: 0.5}}\n")
    recipe.write("hw/n150.yaml", "training_config: {seed: 2, learning_rate: 3e-4}\n")
    config = recipe.load("training_config.seed=3", "training_config.seed=4", board="n150")
    training = config.training
    assert (training.seed, training.learning_rate, training.optimizer.beta1) == (4, 3e-4, 0.5)
    assert training.optimizer.beta2 == 0.999
    assert config.where("training_config.seed") == "--set training_config.seed=4"
    assert config.where("training_config.learning_rate").endswith("n150.yaml:1")
    assert config.where("training_config.optimizer.beta1").endswith("big.yaml:1")
    assert config.where("training_config.optimizer.beta2") == "(default)"
    assert recipe.load().training.learning_rate == 2e-4


def test_the_last_layer_that_names_a_preset_chooses_it(recipe):
    recipe.write("config.yaml", CONFIG.replace("base: tiny", "base: tiny\n  preset: a"))
    recipe.write("presets/a.yaml", "training_config: {seed: 1}\n")
    recipe.write("presets/b.yaml", "training_config: {seed: 2}\n")
    recipe.write("hw/n150.yaml", "model_config: {preset: b}\n")
    assert recipe.load().training.seed == 1
    assert recipe.load(board="n150").training.seed == 2
    assert recipe.load("model_config.preset=a", board="n150").training.seed == 1
    assert recipe.load("model_config.preset=null").training.seed == 0
    assert "presets here: a, b" in recipe.error("model_config.preset=../a")
    recipe.write("presets/a.yaml", "model_config: {preset: b}\n")
    assert "a preset cannot name a preset" in recipe.error()


def test_null_clears_and_a_key_after_null_starts_from_defaults(recipe):
    merged = recipe.load("model_config.lora.dropout=0.1").model.lora
    assert merged is not None
    assert (merged.rank, merged.alpha, merged.dropout) == (4, 8.0, 0.1)
    assert recipe.load("model_config.lora=null").model.lora is None
    fresh = recipe.load("model_config.lora=null", "model_config.lora.rank=2").model.lora
    assert fresh is not None
    assert (fresh.rank, fresh.alpha) == (2, 16.0)


def test_places_follow_the_layer_that_counts(recipe):
    config = recipe.load("model_config.lora=null", "model_config.lora.rank=2")
    assert config.where("model_config.lora.alpha") == "(default)"
    assert config.where("model_config.lora.rank") == "--set model_config.lora.rank=2"
    # A missing key is missed in the file's section, not in a --set that touched the section.
    recipe.write("config.yaml", CONFIG.replace("  learning_rate: 1e-4\n", ""))
    assert "config.yaml:1: training_config.learning_rate: is required" in recipe.error("training_config.seed=1")
    recipe.write("config.yaml", "")
    text = recipe.error()
    assert text.startswith("5 mistakes")
    assert "config.yaml: checkpoint_config: is required" in text


def test_a_stop_rule_clears_the_other_of_an_earlier_layer(recipe):
    recipe.write("hw/n150.yaml", "training_config: {num_epochs: 2}\n")
    training = recipe.load(board="n150").training
    assert (training.max_steps, training.num_epochs) == (None, 2.0)
    assert recipe.load("training_config.max_steps=7", board="n150").training.num_epochs is None
    training = recipe.load("training_config.num_epochs=3", steps=5).training
    assert (training.max_steps, training.num_epochs) == (5, None)
    assert "--steps 0" in recipe.error(steps=0)


def test_both_stop_rules_in_one_layer_are_an_error(recipe):
    text = recipe.error("training_config.max_steps=7", "training_config.num_epochs=1")
    assert text.startswith("1 mistake ")
    assert "both max_steps and num_epochs" in text
    recipe.write("config.yaml", CONFIG.replace("max_steps: 100", "max_steps: 100\n  num_epochs: 1"))
    text = recipe.error()
    assert "config.yaml:5 and" in text
    assert "config.yaml:6" in text


def test_an_overlay_that_nobody_would_read_is_refused(recipe):
    recipe.write("hw/n15O.yaml", "")
    assert "named after no board" in recipe.error()


# --- boards -------------------------------------------------------------------------------------


@pytest.mark.parametrize("board", hardware.table())
def test_a_recipe_resolves_on_every_board_with_its_batch(recipe, board):
    hw, config = hardware.get(board), recipe.load(board=board)
    assert config.hw == board
    assert config.training.batch_size == 32
    assert config.training.micro_batch_size == config.micro_batch <= hw.micro_batch
    assert config.micro_batch * hw.chips * config.accumulation == 32
    assert config.device.mesh_shape == hw.mesh_shape
    assert config.device.enable_ddp == (hw.chips > 1)


@pytest.mark.parametrize(
    ("board", "rows", "parts"),
    [("cpu", 8, 4), ("n150", 8, 4), ("n300", 8, 2), ("t3k", 4, 1), ("p150", 16, 2)],
)
def test_the_split_per_board(recipe, board, rows, parts):
    config = recipe.load(board=board)
    assert (config.micro_batch, config.accumulation) == (rows, parts)


@given(size=st.integers(1, 300), board=st.sampled_from(list(hardware.table().values())))
def test_the_split_never_changes_the_batch(tmp_path_factory, size, board):
    recipe = Recipe(tmp_path_factory.mktemp("demo")).write("config.yaml", CONFIG.replace("size: 32", f"size: {size}"))
    if size % board.chips:
        assert f"does not divide by the {board.chips} devices" in recipe.error(board=board.name)
        return
    config = recipe.load(board=board.name)
    assert config.micro_batch * board.chips * config.accumulation == config.training.batch_size == size
    assert not [
        rows for rows in range(config.micro_batch + 1, board.micro_batch + 1) if size % (rows * board.chips) == 0
    ]


@pytest.mark.parametrize("layer", ["config.yaml", "presets/a.yaml", "hw/n300.yaml", "--set"])
def test_the_batch_size_is_the_rows_of_a_step_in_every_layer(recipe, layer):
    text = "training_config: {batch_size: 64}\nmodel_config: {preset: a}\n"
    recipe.write("presets/a.yaml", "")
    sets = ["training_config.batch_size=64", "model_config.preset=a"] if layer == "--set" else []
    if layer == "config.yaml":
        recipe.write(layer, CONFIG.replace("size: 32", "size: 64"))
    elif layer == "hw/n300.yaml":
        recipe.write(layer, text)
    elif layer == "presets/a.yaml":
        recipe.write(layer, text.partition("model")[0]).write("hw/n300.yaml", "model_config: {preset: a}\n")
    config = recipe.load(*sets, board="n300")
    assert (config.training.batch_size, config.micro_batch, config.accumulation) == (64, 8, 4)


def test_a_micro_batch_is_the_rows_of_one_device(recipe):
    recipe.write("hw/n300.yaml", "training_config: {micro_batch_size: 4}\n")
    config = recipe.load(board="n300")
    assert (config.training.batch_size, config.micro_batch, config.accumulation) == (32, 4, 4)
    larger = recipe.load("training_config.micro_batch_size=16", board="n300")
    assert (larger.training.batch_size, larger.micro_batch, larger.accumulation) == (32, 16, 1)
    share = recipe.load("training_config.micro_batch_size=64", board="n300").training
    assert (share.batch_size, share.micro_batch_size) == (32, 16)


def test_a_batch_that_does_not_divide_is_refused_with_sizes_that_do(recipe):
    text = recipe.error("training_config.batch_size=3", board="cpu-x2")
    assert "batch_size 3 does not divide by the 2 devices of cpu-x2" in text
    assert "--set training_config.batch_size=3" in text
    assert "use a multiple of 2: 2 or 4" in text
    recipe.write("hw/n300.yaml", "training_config:\n  micro_batch_size: 5\n")
    text = recipe.error(board="n300")
    assert "micro_batch_size 5 does not divide batch_size / devices = 32 / 2" in text
    assert "n300.yaml:2" in text
    assert "use one of 1, 2, 4, 8, 16" in text


@pytest.mark.parametrize(
    ("layer", "board", "place", "text"),
    [
        (
            "config.yaml",
            "n150",
            "config.yaml:3",
            "8 x 4 -> training_config.batch_size=32; training_config.micro_batch_size=8",
        ),
        (
            "hw/qb2.yaml",
            "qb2",
            "qb2.yaml:3",
            "32 x 4 -> training_config.batch_size=128; training_config.micro_batch_size=8",
        ),
        (
            "--set",
            "cpu",
            "--set training_config.gradient_accumulation_steps=2",
            "32 x 2 -> training_config.batch_size=64",
        ),
    ],
)
def test_accumulation_is_no_key_and_its_error_says_what_to_write(recipe, layer, board, place, text):
    sets = ["training_config.gradient_accumulation_steps=2"] if layer == "--set" else []
    if layer == "config.yaml":
        recipe.write(layer, CONFIG.replace("size: 32", "size: 8\n  gradient_accumulation_steps: 4"))
    elif not sets:
        recipe.write(layer, "training_config:\n  batch_size: 32\n  gradient_accumulation_steps: 4\n")
    said = recipe.error(*sets, board=board)
    assert f"{place}: training_config.gradient_accumulation_steps: is no key" in said
    assert text in said
    wrong = recipe.error("training_config.gradient_accumulation_steps=yes", "device_config.mesh_shape=[1, x]")
    assert "is no key: accumulation is batch_size / (micro_batch_size x devices)" in wrong


def test_what_that_error_says_resolves_to_the_same_split(recipe):
    said = recipe.error("training_config.batch_size=16", "training_config.gradient_accumulation_steps=3", board="n300")
    sets = said.partition("-> ")[2].splitlines()[0].split("; ")
    config = recipe.load(*sets, board="n300")
    assert (config.micro_batch * config.device.devices, config.accumulation) == (16, 3)


def test_mesh_and_data_parallel_must_agree_with_the_board(recipe):
    assert "contradicts the mesh [1, 1] of n150" in recipe.error("device_config.enable_ddp=true", board="n150")
    one, off = ["device_config.mesh_shape=[1, 1]"], "device_config.enable_ddp=false"
    assert recipe.load(*one, board="n300").accumulation == 4
    assert recipe.load(off, board="n300").device.mesh_shape == (1, 1)
    assert "contradicts" in recipe.error(off, "device_config.mesh_shape=[1, 2]", board="n300")
    text = recipe.error("device_config.mesh_shape=[1, 4]", board="n300")
    assert "4 devices, n300 has 2" in text
    assert "--set device_config.mesh_shape" in text


def test_an_overlay_that_changes_the_training_is_told_apart(recipe):
    recipe.write("hw/n150.yaml", "training_config: {micro_batch_size: 4}\n")
    recipe.write("hw/cpu.yaml", "model_config: {base: small}\ntraining_config: {batch_size: 4}\n")
    assert recipe.load(board="n150").departures() == []
    assert recipe.load(board="n300").departures() == []
    lines = recipe.load("training_config.seed=3").departures()
    assert [line.partition(" ")[0] for line in lines] == ["training_config.batch_size:", "model_config.base:"]
    assert recipe.load().recipe_batch == 32


# --- copies, files, digests ---------------------------------------------------------------------


def settled(config: Config) -> Config:
    return config.with_values(**{"training.precision": "fp32", "model.lora.tie_groups": []})


def test_values_set_by_the_run_are_validated(recipe):
    config = recipe.load("training_config.num_epochs=2")
    named = {"training.precision": "fp32", "training.max_steps": 9, "model.lora.tie_groups": []}
    for left in named:
        with pytest.raises(ValueError, match=r"not resolved yet"):
            config.with_values(**{key: value for key, value in named.items() if key != left}).training_digest(FACTS)
    done = settled(config).with_values(**{"training.max_steps": 9})
    assert done.training_digest(FACTS)
    assert done.training.num_epochs is None
    assert done.with_values(**{"training_config.max_steps": 9}) == done
    assert config.training.num_epochs == 2
    with pytest.raises(UsageError, match=r"training_config\.precision"):
        config.with_values(**{"training.precision": "fp8"})


def test_changes_are_told_key_by_key(recipe):
    old = recipe.load()
    new = old.with_values(**{"training.learning_rate": 2e-4, "logging.log_level": "DEBUG"})
    assert old.changes(new) == [
        "training_config.learning_rate: 0.0001 -> 0.0002",
        'logging_config.log_level: "INFO" -> "DEBUG"',
    ]
    assert old.changes(recipe.load()) == []


def test_a_resolved_file_reads_back_equal(recipe, tmp_path):
    texts = ["data_config.system_prompt='no'", "eval_config.prompts=['1e-4', \"a: b\"]"]
    config = settled(recipe.load(*texts, board="n300"))
    path = tmp_path / "config.resolved.yaml"
    path.write_text(config.to_yaml())
    again = load_resolved(path)
    assert again == config
    assert again.config_digest() == config.config_digest()
    assert again.to_yaml() == config.to_yaml()
    path.write_text(config.to_yaml().replace("format: 2", "format: 3", 1))
    with pytest.raises(UsageError, match="unknown format 3"):
        load_resolved(path)


def test_a_file_of_format_1_is_read_as_the_same_training(recipe, tmp_path):
    config, path = settled(recipe.load(board="n300")), tmp_path / "config.resolved.yaml"
    assert (config.micro_batch, config.accumulation) == (8, 2)
    text = config.to_yaml().replace("format: 2", "format: 1", 1).replace("batch_size: 32", "batch_size: 16", 1)
    path.write_text(text.replace("micro_batch_size: 8", "gradient_accumulation_steps: 2", 1))
    assert load_resolved(path) == config
    converted = 'source: "data/my rows.csv"\n  format: csv\n  map: {prompt: ask}'
    path.write_text(re.sub(r"source: \S+", converted, path.read_text()))
    assert load_resolved(path).data.source == "data/my rows.jsonl"
    path.write_text("format: 1\n")
    with pytest.raises(UsageError, match="is required"):
        load_resolved(path)


FACTS = {"base": "aa", "data": "bb"}


@pytest.mark.parametrize(
    ("key", "value", "fixes_training"),
    [
        ("training.learning_rate", 2e-4, True),
        ("training.seed", 1, True),
        ("training.max_steps", 101, True),
        ("training.max_grad_norm", 0.5, True),
        ("training.precision", "bf16", True),
        ("training.optimizer.weight_decay", 0.0, True),
        ("training.scheduler.warmup_steps", 3, True),
        ("training.batch_size", 4, True),
        ("model.base", "other", True),
        ("model.lora.rank", 8, True),
        ("model.lora.tie_groups", [["k_proj", "v_proj"]], True),
        ("model.lora", None, True),
        ("data.control", "permuted_responses", True),
        ("data.held_out_share", 0.2, True),
        ("model.gradient_checkpointing", True, False),
        ("model.preset", "x", False),
        ("eval.every", 3, False),
        ("checkpoint.every", 3, False),
        ("device.threads", 1, False),
        ("device.compile", "never", False),
        ("logging.log_level", "DEBUG", False),
        ("export.dtype", "bf16", False),
    ],
)
def test_training_digest_sees_only_what_fixes_the_next_update(recipe, key, value, fixes_training):
    config = settled(recipe.load())
    other = config.with_values(**{key: value})
    assert config.config_digest() != other.config_digest()
    assert (config.training_digest(FACTS) != other.training_digest(FACTS)) == fixes_training


def test_digests_depend_on_facts_and_not_on_the_board_or_the_way_a_value_is_written(recipe):
    config = settled(recipe.load())
    assert config.training_digest(FACTS) != config.training_digest({**FACTS, "data": "cc"})
    for board in hardware.table():
        assert settled(recipe.load(board=board)).training_digest(FACTS) == config.training_digest(FACTS)
    assert recipe.load("model_config.lora.alpha=8.0").config_digest() == recipe.load().config_digest()
    with pytest.raises(ValueError, match="not resolved"):
        recipe.load().training_digest(FACTS)


GOLDEN = "e4f00d557d580a5d8c54deebdd23fae0aedadd865ddcdbd4848d3bbe1c205ab5"
GOLDEN_LORA = "ffdac88f11df42581f784695ca8a662329a5aff464a856ccbd51627f0f08110f"  # with what the CPU twin ties


def test_the_digest_is_the_same_in_every_version():
    # When this changes (a new key in these sections changes it), runs made before can no longer be resumed.
    config = Config.model_validate(
        {
            "recipe": "demo",
            "hw": "cpu",
            "training_config": {"batch_size": 2, "learning_rate": 1e-4, "max_steps": 3, "precision": "fp32"},
            "model_config": {"base": "tiny"},
            "data_config": {"source": "rows.jsonl"},
            "eval_config": {"every": 0, "prompts": []},
            "checkpoint_config": {"every": 0},
        }
    )
    assert config.training_digest({"base": "aa"}) == GOLDEN
    twin_s = {"rank": 4, "alpha": 8.0, "tie_groups": cpu.tie_groups_for(hardware.get("cpu"))[0]}
    assert config.with_values(**{"model.lora": twin_s}).training_digest({"base": "aa"}) == GOLDEN_LORA


# --- schema -------------------------------------------------------------------------------------


def test_sections_cannot_be_changed(recipe):
    config = recipe.load()
    for section in (config, config.training, config.training.optimizer):
        assert isinstance(section, BaseModel)
        with pytest.raises(ValueError, match="frozen"):
            section.seed = 1  # type: ignore[attr-defined]


def test_importing_the_config_needs_no_heavy_library():
    heavy = "torch transformers datasets pyarrow numpy"
    code = f"import sys, tools.launch.lint; sys.exit(any(name in sys.modules for name in {heavy.split()}))"
    assert subprocess.run([sys.executable, "-c", code], check=False).returncode == 0
