"""Rows of a file, and whole topics of them held out."""

from __future__ import annotations

from pathlib import Path

from common.config import Config
from common.data.rows import Row, evaluation_prompts, split_held_out
from tools.data.convert import read_source


def splits(config: Config, recipe_dir: Path) -> dict[str, list[Row]]:
    rows = read_source(config.data, recipe_dir)
    return split_held_out(rows, config.data.held_out_share, by=config.data.split_by)


def prompts(config: Config, recipe_dir: Path) -> list[str]:
    return evaluation_prompts(config.eval.prompts, recipe_dir)
