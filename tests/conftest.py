from __future__ import annotations

from pathlib import Path

import pytest

from tests.tiny import write_tiny_base


@pytest.fixture(scope="session")
def tiny_base(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A random two-layer Llama with a byte-level tokenizer and a chat template."""
    return write_tiny_base(tmp_path_factory.mktemp("base") / "tiny")
