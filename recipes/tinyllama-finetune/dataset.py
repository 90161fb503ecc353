"""The recipe's data: rows that explain machine learning in a trickster's voice, and prompts on topics of their own.

To fork: put your rows into data/ (or name them with data_config.source), and your prompts beside them.
"""

from __future__ import annotations

from pathlib import Path

from common.config import Config
from common.data.convert import read_source
from common.data.rows import Row, evaluation_prompts, split_held_out


def splits(config: Config, recipe_dir: Path) -> dict[str, list[Row]]:
    """Training and held-out rows. Whole topics are held out, so that no held-out question was half seen."""
    rows = read_source(config.data, recipe_dir)
    return split_held_out(rows, config.data.held_out_share, by=config.data.split_by)


def prompts(config: Config, recipe_dir: Path) -> list[str]:
    """The evaluation prompts: never trained on, answered at every evaluation."""
    return evaluation_prompts(config.eval.prompts, recipe_dir)
