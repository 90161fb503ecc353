"""One row as tokens: `ChatTokenizer.encode_rows` for the tests of a single one."""

from __future__ import annotations

from typing import Any

from common.data.chat import ChatTokenizer, given
from common.data.rows import Row
from common.data.tokens import Encoded


def encode_row(tokenizer: ChatTokenizer, row: Row, **options: Any) -> Encoded:
    """Return the tokens and mask of a row, by the options of `encode_rows`. Raises DataError naming the row."""
    return given(*tokenizer.encode_rows([row], **options))
