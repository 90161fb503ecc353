"""Rows of a file, and whole topics of them held out."""

from __future__ import annotations

from pathlib import Path

from common.config import Config
from common.data.rows import Row, groups_of, hold_out, read_prompts, read_rows


def splits(config: Config, recipe_dir: Path) -> dict[str, list[Row]]:
    """Return the rows to train on and those to hold out: whole topics (split_by), so that no question was half seen."""
    assert config.data.source is not None
    rows = read_rows(recipe_dir / config.data.source)
    topics = groups_of(rows, config.data.split_by)
    held_out = hold_out(topics, config.data.held_out_share)
    return {
        "train": [row for row, topic in zip(rows, topics, strict=True) if topic not in held_out],
        "held_out": [row for row, topic in zip(rows, topics, strict=True) if topic in held_out],
    }


def prompts(config: Config, recipe_dir: Path) -> list[str]:
    """Return the evaluation prompts: never trained on, answered at every evaluation."""
    return read_prompts(config.eval.prompts, recipe_dir)
