"""A start that reads beside an import: the same weights, no tensor kept, and garbage is collected again afterwards."""

from __future__ import annotations

import gc
import importlib
import weakref
from pathlib import Path

import numpy as np
import pytest

from common.model.weights import Weights
from tools.serve.ahead import ReadAhead, gc_paused
from tools.verify.tiny_base import write_tiny_base


def test_what_is_read_ahead_is_what_the_files_hold_and_is_not_kept(tmp_path: Path) -> None:
    file = write_tiny_base(tmp_path / "tiny", layers=3) / "model.safetensors"
    ahead, expected = ReadAhead([file]), dict(Weights([file]))
    assert list(ahead) == list(expected)
    for name, array in ahead.items():
        assert np.array_equal(array, expected[name])
        last = weakref.ref(array)
    del array
    assert last() is None, "whoever asked for it is the only one who holds it"


def test_garbage_is_collected_again_whatever_happened() -> None:
    with gc_paused():
        assert not gc.isenabled()
    assert gc.isenabled()
    with pytest.raises(ModuleNotFoundError), gc_paused():
        importlib.import_module("no_such_library")
    assert gc.isenabled()
    gc.unfreeze()
