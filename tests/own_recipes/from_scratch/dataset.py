"""A text, or several, of which some are held out."""

from __future__ import annotations

from pathlib import Path

from common.config import Config
from common.data.corpora import Document, read_corpus, split_documents
from common.data.rows import evaluation_prompts


def splits(config: Config, recipe_dir: Path) -> dict[str, list[Document]]:
    assert config.data.corpus is not None
    return split_documents(read_corpus(config.data.corpus, recipe_dir), config.data.held_out_share)


def prompts(config: Config, recipe_dir: Path) -> list[str]:
    return evaluation_prompts(config.eval.prompts, recipe_dir)
