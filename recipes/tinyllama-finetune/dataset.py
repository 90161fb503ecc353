"""The recipe's data: rows to train on and to hold out, and prompts of their own.

`recipe new` makes a recipe for other rows; this file stays as it is, unless yours have to be made or chosen by code.
"""

from __future__ import annotations

from pathlib import Path

from common.config import Config
from common.data.rows import Row, evaluation_prompts, split_held_out
from tools.data.convert import read_source


def splits(config: Config, recipe_dir: Path) -> dict[str, list[Row]]:
    """Training and held-out rows. Whole groups are held out, by `split_by`, so that no question was half seen."""
    rows = read_source(config.data, recipe_dir)
    return split_held_out(rows, config.data.held_out_share, by=config.data.split_by)


def prompts(config: Config, recipe_dir: Path) -> list[str]:
    """The evaluation prompts: never trained on, answered at every evaluation."""
    return evaluation_prompts(config.eval.prompts, recipe_dir)
