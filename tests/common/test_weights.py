"""Tensors into files and out of them, one at a time."""

from __future__ import annotations

import os
import tracemalloc
from collections.abc import Iterator
from pathlib import Path

import ml_dtypes
import numpy as np
import pytest
from safetensors.numpy import load_file

from common.config import Config
from common.errors import MachineError
from common.model import llama
from common.model.weights import SafetensorsWriter, Weights
from common.train import checkpoint
from tests.support.engines import config_for

TINYLLAMA = {
    "vocab_size": 32000,
    "hidden_size": 2048,
    "intermediate_size": 5632,
    "num_hidden_layers": 22,
    "num_attention_heads": 32,
    "num_key_value_heads": 4,
    "max_position_embeddings": 2048,
}


def arrays() -> dict[str, np.ndarray]:
    return {
        "a": np.arange(6, dtype=np.float32).reshape(2, 3),
        "half": np.arange(5).astype(ml_dtypes.bfloat16),
        "turned": np.arange(6, dtype=np.float32).reshape(2, 3).T,
        "step": np.array([7], np.int64),
        "none": np.zeros((0, 4), np.float32),
    }


def test_what_is_written_is_what_the_library_reads(tmp_path):
    with SafetensorsWriter(tmp_path / "x.safetensors", {"format": "pt"}) as file:
        for name, array in arrays().items():
            file.add(name, array)
    found, lazily = load_file(tmp_path / "x.safetensors"), Weights([tmp_path / "x.safetensors"])
    assert set(found) == set(lazily) == set(arrays())
    for name, array in arrays().items():
        assert found[name].dtype == array.dtype
        assert np.array_equal(found[name], array)
        assert np.array_equal(lazily[name], array)
        assert lazily.shapes[name] == array.shape


def test_a_header_that_outgrows_its_room_is_no_file(tmp_path):
    with pytest.raises(AssertionError, match="does not fit"), SafetensorsWriter(tmp_path / "x", room=64) as file:
        file.add("a" * 100, np.zeros(1, np.float32))


def test_a_failure_leaves_nothing_that_can_be_read(tmp_path):
    def failing() -> Iterator[tuple[str, np.ndarray]]:
        yield "model/a", np.zeros(4, np.float32)
        raise KeyError("the device went away")

    with pytest.raises(KeyError):
        checkpoint.write_tensors(tmp_path, failing(), full())
    with pytest.raises(MachineError, match="damaged"):
        Weights([tmp_path / "model.safetensors"])


def test_a_checkpoint_of_the_1_1_b_model_needs_memory_for_one_tensor(tmp_path, monkeypatch):
    """Weights and both moments of TinyLlama in bf16, made when they are asked for, into nowhere."""
    shapes = llama.shapes(TINYLLAMA)
    largest = 4 * 32000 * 2048  # bytes of the embedding in fp32

    def state() -> Iterator[tuple[str, np.ndarray]]:
        for group in ("model", "optimizer/exp_avg", "optimizer/exp_avg_sq"):
            for name, shape in shapes.items():
                yield f"{group}/{name}", np.ones(shape, ml_dtypes.bfloat16)
        yield "optimizer/step", np.array([1], np.int64)

    for name in ("model.safetensors", "optimizer.safetensors"):
        (tmp_path / name).symlink_to(os.devnull)
    peak = peak_of(lambda: checkpoint.write_tensors(tmp_path, state(), full()))
    assert sum(2 * int(np.prod(shape)) for shape in shapes.values()) > 2e9, "two GB of weights went through"
    assert peak <= 2.5 * largest  # one device: (1 + 1.5) x the largest tensor in fp32


def full() -> Config:
    return config_for(Path("base"))


def peak_of(call) -> int:
    """Bytes that numpy and Python held at most, above what they held before."""
    tracemalloc.start()
    try:
        call()
        return tracemalloc.get_traced_memory()[1]
    finally:
        tracemalloc.stop()
