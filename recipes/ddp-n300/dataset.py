"""The recipe's data: a corpus of plain text, whole plays of it held out. It knows nothing of devices.

To fork: name your text file or folder with data_config.corpus; nothing here needs to change.
"""

from __future__ import annotations

from pathlib import Path

from common.config import Config
from common.data.corpora import Document, read_corpus, split_documents
from common.data.rows import evaluation_prompts


def documents(config: Config, recipe_dir: Path) -> dict[str, list[Document]]:
    """Training and held-out texts. A play is on one side whole, so that no held-out scene was half seen."""
    assert config.data.corpus is not None
    return split_documents(read_corpus(config.data.corpus, recipe_dir), config.data.held_out_share)


def prompts(config: Config, recipe_dir: Path) -> list[str]:
    """Beginnings that the model continues at every evaluation."""
    return evaluation_prompts(config.eval.prompts, recipe_dir)
