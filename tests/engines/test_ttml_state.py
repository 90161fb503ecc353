"""A checkpoint's tensors pass through the host one at a time: measured at TinyLlama's widths, without a model."""

from __future__ import annotations

import tracemalloc
from collections.abc import Iterator, Mapping
from types import SimpleNamespace
from typing import Any

import ml_dtypes
import numpy as np
import pytest

from engines.ttml import state as ttml_state
from engines.ttml.hf_map import map_parameters
from engines.ttml.tensors import Tensors

LAYERS = 2  # the other twenty are the same again
ARCHITECTURE = {
    "vocab_size": 32000,
    "hidden_size": 2048,
    "intermediate_size": 5632,
    "num_hidden_layers": LAYERS,
    "num_attention_heads": 32,
    "num_key_value_heads": 4,
}
LARGEST = 32000 * 2048 * 4  # bytes of the embedding in fp32
SHAPES = {
    "fc/weight": (32000, 2048),
    "tok_emb/weight": (32000, 2048),
    "ln_fc/gamma": (1, 2048),
    **{
        f"blocks/{layer}/{name}": shape
        for layer in range(LAYERS)
        for name, shape in {
            "attention/qkv_linear/weight": (2560, 2048),
            "attention/out_linear/weight": (2048, 2048),
            "mlp/w_gate_up/weight": (11264, 2048),
            "mlp/w2/weight": (2048, 5632),
            "attention_norm/gamma": (1, 2048),
            "mlp_norm/gamma": (1, 2048),
        }.items()
    },
}


class Device(Tensors):
    """Tensors that are made when they are read and forgotten when they are written; weights bf16, the rest `dtype`."""

    def __init__(self, devices: int) -> None:
        self.devices = devices

    def read(self, tensor: Any) -> np.ndarray:
        return np.ones((self.devices, *tensor.shape()[1:]), tensor.dtype)

    def put(self, tensor: Any, array: np.ndarray) -> None:
        assert list(array.shape) == tensor.shape()
        assert array.dtype == tensor.dtype

    def stored(self, tensor: Any) -> np.dtype:
        return np.dtype(tensor.dtype)


class Lazy(Mapping[str, np.ndarray]):
    """A checkpoint whose tensors are made when they are read: fp32, the widest there is."""

    def __init__(self, shapes: Mapping[str, tuple[int, ...]]) -> None:
        self.shapes = shapes

    def __getitem__(self, name: str) -> np.ndarray:
        return np.ones(self.shapes[name], np.int64 if name == "optimizer/step" else np.float32)

    def __iter__(self) -> Iterator[str]:
        return iter(self.shapes)

    def __len__(self) -> int:
        return len(self.shapes)


class Optimizer:
    def __init__(self, dtype: Any) -> None:
        self.maps = {key: tensors(dtype) for key in ("master_weights", "exp_avg", "exp_avg_sq")}
        self.steps = 0

    def get_state_dict(self) -> dict[str, Any]:
        return {"steps": self.steps, "lr": 0.1, **self.maps}

    def set_state_dict(self, state: dict[str, Any]) -> None:
        self.steps = state["steps"]


def tensors(dtype: Any) -> dict[str, Any]:
    full = {f"Llama/{name}": [1, 1, *shape] for name, shape in sorted(SHAPES.items())}  # the engine's order
    return {name: SimpleNamespace(shape=lambda s=shape: s, dtype=dtype) for name, shape in full.items()}


@pytest.mark.parametrize(("devices", "dtype"), [(1, ml_dtypes.bfloat16), (2, np.float32)], ids=["bf16", "fp32"])
def test_state_goes_out_and_in_with_one_tensor_in_flight(devices, dtype):
    """At most (devices + 1.5) times the largest tensor in fp32, at any moment. Collect what save yields, or read two
    tensors before the first is put, and it is more.
    """
    io, weights = Device(devices), tensors(ml_dtypes.bfloat16)
    entries = map_parameters({name: tensor.shape() for name, tensor in weights.items()}, ARCHITECTURE)
    optimizer, shapes = Optimizer(dtype), {}
    tracemalloc.start()
    try:
        for name, array in ttml_state.save(io, entries, weights, optimizer, 1):
            shapes[name] = array.shape
        del array
        ttml_state.restore(io, entries, weights, optimizer, Lazy(shapes))
        peak = tracemalloc.get_traced_memory()[1]
    finally:
        tracemalloc.stop()
    assert len(shapes) == 4 * (3 + 9 * LAYERS) + 1
    assert peak <= (devices + 1.5) * LARGEST
