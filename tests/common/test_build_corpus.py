"""Token files of a corpus: windows, masks, what is counted beside them, and what is refused."""

from __future__ import annotations

import math
from collections.abc import Callable

import numpy as np
import pytest

from common import config as configs
from common import hardware
from common.config import Config
from common.data.build import UNKNOWN_ALLOWED
from common.data.tokens import TokenDataset
from common.errors import DataError
from common.train.plan import prepare
from tests.doubles.tiny_recipe import FROM_SCRATCH as RECIPE
from tests.doubles.tiny_recipe import tiny_scratch
from tools.launch.resolve import resolve
from tools.recipes import load_dataset

T = 64


@pytest.fixture
def build(tmp_path, monkeypatch) -> Callable[..., TokenDataset]:
    monkeypatch.setenv("RECIPES_HOME", str(tmp_path / "home"))
    small = tiny_scratch(tmp_path / "play.txt")

    def run(*overrides: str, text: str | None = None) -> TokenDataset:
        if text is not None:
            (tmp_path / "play.txt").write_text(text, encoding="utf-8")
        launch = resolve(RECIPE, hw="cpu", overrides=(*small, *overrides))
        return prepare(launch, load_dataset(RECIPE)[0])[2]

    return run


def config_of(*overrides: str) -> Config:
    return configs.load(RECIPE, hardware.get("cpu"), overrides)


def test_a_window_is_named_by_its_split_and_first_token(build):
    dataset = build()
    assert dataset.places("train")[:2] == ["train, token 0", f"train, token {T}"]
    assert dataset.places("held_out")[0] == "held_out, token 0"
    assert [len(dataset.places(name)) for name in dataset.splits] == [len(split) for split in dataset.splits.values()]


def test_every_token_but_the_first_is_predicted_once(build):
    dataset = build()
    split = dataset.train
    assert dataset.length == T
    seen = np.concatenate([split.row(row).ids[1:] for row in range(len(split))])
    assert np.array_equal(seen, split.arrays.ids[1:])
    first, second = split.row(0), split.row(1)
    assert len(first.ids) == T + 1
    assert first.ids[-1] == second.ids[0]
    batch = split.batch(1, seed=0, batch_size=8)
    assert batch.input_ids.shape == (8, T)
    assert np.array_equal(batch.labels[:, :-1], batch.input_ids[:, 1:])


def test_the_held_out_text_is_in_no_training_window(build):
    dataset = build()
    facts = dataset.info["corpus"]
    assert facts["train"]["characters"] > facts["held_out"]["characters"] > 0
    train, held_out = (split.arrays.ids.tobytes() for split in (dataset.train, dataset.held_out))
    lines = 4 * 200  # bytes of two hundred characters: more than a scene, and each has a number of its own
    pieces = [held_out[at : at + lines] for at in range(0, len(held_out) - lines, 4)]
    assert not [piece for piece in pieces if piece in train]


def test_built_once_and_again_when_the_text_or_an_option_changes(build):
    assert build().report.action == "built"
    assert build().report.action == "reused"
    assert build("data_config.num_proc=1").report.action == "reused", "threads make no other tokens"
    assert build("data_config.max_length=32").report.action == "built"
    assert build(text="Another text.\n" * 500).report.action == "built"


def test_unknown_characters_are_never_supervised_and_counted(build):
    text = "abcdefgh\n" * 300
    dataset = build(text=text + "abc\u0416\n" * 20)
    ids, mask = dataset.held_out.arrays.ids, dataset.held_out.arrays.mask
    unknown = dataset.info["vocab_size"] - 1
    assert (ids == unknown).any()
    assert np.array_equal(mask == 0, ids == unknown)
    assert dataset.info["unknown"] == pytest.approx((ids == unknown).mean())
    assert dataset.info["unknown"] > UNKNOWN_ALLOWED
    assert any("warning: 7." in line and "bits per byte is not given" in line for line in dataset.report.lines())
    assert not any("warning" in line for line in build(text=text).report.lines())


def test_bytes_and_the_unigram_model_are_counted_by_row(build):
    text = "ab\u00e9\n" * 1000  # 5 bytes in 4 characters, each a quarter of the text
    info = build(text=text).info
    held_out = round(len(text) * 0.1)
    assert sum(info["held_out_bytes"]) == pytest.approx(held_out * 5 / 4, abs=3)
    per_token = sum(info["unigram_nll"]) / (held_out - 1)
    assert per_token == pytest.approx(math.log(4), rel=5e-3)


@pytest.mark.parametrize(
    ("text", "overrides", "message"),
    [
        ("", (), "the corpus is empty"),
        ("Too short.\n", (), "shorter than one context: 11 tokens to train on, 65 are needed"),
        ("fine\0", (), "binary data"),
        ("abc\n" * 120, (), "do not fill one batch of 8"),
        (
            None,
            ("data_config.tokenizer={type: bpe}", "model_config.architecture.vocab_size=32000"),
            "cannot fill a BPE",
        ),
        ("".join(map(chr, range(0x4E00, 0x4E00 + 400))) + "\n", (), "room for 96"),
    ],
)
def test_what_cannot_be_trained_on_is_refused(build, text, overrides, message):
    with pytest.raises(DataError, match=message):
        build(*overrides, text=text)


def test_bpe_counts_the_same_bytes_as_characters(build):
    wide = "model_config.architecture.vocab_size=320"
    characters, bpe = build(), build(wide, "data_config.tokenizer={type: bpe}")
    assert bpe.train.tokens < characters.train.tokens
    assert sum(bpe.info["held_out_bytes"]) == pytest.approx(sum(characters.info["held_out_bytes"]), abs=4)
