from __future__ import annotations

import gc
import os
import signal
from collections.abc import Iterator
from pathlib import Path
from unittest import mock

import pytest

from tools.verify.tiny_base import write_tiny_base

os.environ.setdefault("OMP_NUM_THREADS", "1")  # two workers of one thread, not two of two, on two cores

# As at a terminal: what `nohup` or a script's `&` had this ignore, all that the tests start would ignore, too.
signal.signal(signal.SIGINT, signal.default_int_handler)
signal.signal(signal.SIGHUP, signal.SIG_DFL)


def pytest_collection_finish() -> None:
    """An engine collects garbage as it closes: without the million objects of torch's import that is quick."""
    gc.freeze()


@pytest.fixture(autouse=True)
def environment_is_put_back() -> Iterator[None]:
    """Put the environment back after each test: an engine sets variables that its library reads, for good."""
    with mock.patch.dict(os.environ):
        yield


@pytest.fixture(scope="session")
def tiny_base(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A random two-layer Llama with a byte-level tokenizer and a chat template."""
    return write_tiny_base(tmp_path_factory.mktemp("base") / "tiny")
