from __future__ import annotations

import gc
import os
from pathlib import Path

import pytest

from tools.verify.tiny_base import write_tiny_base

os.environ.setdefault("OMP_NUM_THREADS", "1")  # two workers of one thread, not two of two, on two cores


def pytest_collection_finish() -> None:
    """An engine collects garbage as it closes: without the million objects of torch's import that is quick."""
    gc.freeze()


@pytest.fixture(scope="session")
def tiny_base(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A random two-layer Llama with a byte-level tokenizer and a chat template."""
    return write_tiny_base(tmp_path_factory.mktemp("base") / "tiny")
