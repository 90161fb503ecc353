"""What the recipes that train on Shakespeare make of the edition: the same text, the same plays held out."""

from __future__ import annotations

import pytest

from common import config as configs
from common import hardware
from common.data import texts
from common.data.texts import Document, text_sha256
from common.recipe import load
from tools.recipes import RECIPES

OURS = [path.parent for path in sorted(RECIPES.glob("*/dataset.py")) if "clean_play" in path.read_text()]
PLAY = "KING FOX\n\nby William Shakespeare\n\n\n\nACT I.\n\n\n\nFOX.\n  A word.  \n\nTHE END"
HELD_OUT = "16455b5e3d6c30c0389d1e51e485edde70b6d6856ae7d1ec5a06606adfe219e9"
each = pytest.mark.parametrize("recipe", OURS, ids=lambda path: path.name)


@each
def test_a_play_loses_its_head_its_foot_and_loose_white_space(recipe):
    clean_play = load(recipe, "dataset").clean_play
    assert clean_play(PLAY) == "ACT I.\n\nFOX.\n  A word.\n"
    text = "No head here, nor\nby William Shakespeare's side."
    assert clean_play(text) == f"{text}\n"


@each
def test_the_same_plays_are_held_out_every_time(recipe, monkeypatch):
    """The choice depends on the names alone."""
    plays = ["hamlet_gut.txt", "henry_vi_part_2_gut.txt", "lovers_complaint_gut.txt", "macbeth_gut.txt"]
    plays += ["timon_of_athens_gut.txt", "winters_tale_gut.txt"]
    module = load(recipe, "dataset")
    monkeypatch.setattr(module, "read_texts", lambda name, folder: [Document(play, "x") for play in plays])
    held_out = module.splits(configs.load(recipe, hardware.get("cpu")), recipe)["held_out"]
    assert [text.where for text in held_out] == [play for play in plays if play[0] not in "hm" or "vi_" in play]


@each
def test_the_real_corpus_if_it_was_fetched(recipe):
    """sha256 of the text that comes of the pinned package."""
    if not texts.corpus_folder("shakespeare").is_dir():
        pytest.skip("the corpus is not in this machine's cache: recipe data build nano-transformer-scratch")
    split = load(recipe, "dataset").splits(configs.load(recipe, hardware.get("cpu")), recipe)
    assert {name: text_sha256(part) for name, part in split.items()} == {
        "train": "226666af1f01d4a2e5fe61ecf70b9988a2993cdeed799436a3737b1d87b21a4c",
        "held_out": HELD_OUT,
    }
    assert sum(len(text.text) for part in split.values() for text in part) == 5_050_081
