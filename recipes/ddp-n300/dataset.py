"""The recipe's data: a corpus of plain text, whole texts of it held out (the end, of a single one).

`recipe new` makes a recipe for another text; data_config.corpus names it, and nothing here needs to change.
"""

from __future__ import annotations

from pathlib import Path

from common.config import Config
from common.data.corpora import Document, read_corpus, split_documents
from common.data.rows import evaluation_prompts


def splits(config: Config, recipe_dir: Path) -> dict[str, list[Document]]:
    """Training and held-out texts. Each of several is on one side whole, so that none was half seen."""
    assert config.data.corpus is not None
    return split_documents(read_corpus(config.data.corpus, recipe_dir), config.data.held_out_share)


def prompts(config: Config, recipe_dir: Path) -> list[str]:
    """Beginnings that the model continues at every evaluation."""
    return evaluation_prompts(config.eval.prompts, recipe_dir)
