"""A text, or several, of which some are held out."""

from __future__ import annotations

from pathlib import Path

from common.config import Config
from common.data.rows import hold_out, read_prompts
from common.data.texts import Document, cut_in_two, read_texts


def splits(config: Config, recipe_dir: Path) -> dict[str, list[Document]]:
    assert config.data.corpus is not None
    texts = read_texts(config.data.corpus, recipe_dir)
    if len(texts) == 1:
        return cut_in_two(texts[0], config.data.held_out_share)
    held_out = hold_out([text.where for text in texts], config.data.held_out_share)
    return {
        "train": [text for text in texts if text.where not in held_out],
        "held_out": [text for text in texts if text.where in held_out],
    }


def prompts(config: Config, recipe_dir: Path) -> list[str]:
    return read_prompts(config.eval.prompts, recipe_dir)
