from __future__ import annotations

import os
from pathlib import Path

import pytest

from tools.verify.tiny_base import write_tiny_base

os.environ.setdefault("OMP_NUM_THREADS", "1")  # two workers of one thread, not two of two, on two cores


@pytest.fixture(scope="session")
def tiny_base(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A random two-layer Llama with a byte-level tokenizer and a chat template."""
    return write_tiny_base(tmp_path_factory.mktemp("base") / "tiny")
