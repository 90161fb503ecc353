"""Weights by name, one tensor at a time: from safetensors files, from a seed, or into a safetensors file."""

from __future__ import annotations

import json
import struct
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np

from common.errors import MachineError
from common.model import llama

Array = np.ndarray[Any, Any]
HEADER_ROOM = 1 << 19  # bytes: some 3,500 tensors; moments of a Llama of 80 layers are 1,446
CODES = {"float32": "F32", "bfloat16": "BF16", "float16": "F16", "int64": "I64", "uint32": "U32"}
Shapes = dict[str, tuple[int, ...]]


class _OneAtATime(Mapping[str, Array]):
    """Tensors by name, each read or made when it is asked for."""

    shapes: Shapes

    def __contains__(self, name: object) -> bool:
        return name in self.shapes  # without this, Mapping would read the tensor to find out

    def __iter__(self) -> Iterator[str]:
        return iter(self.shapes)

    def __len__(self) -> int:
        return len(self.shapes)


class Weights(_OneAtATime):
    """The tensors of safetensors files by name; `prefixes`, one a file, go before the names.

    A file is opened anew for each tensor: a mapping that stays keeps every page that was read in memory.
    """

    def __init__(self, files: Sequence[Path], prefixes: Sequence[str] | None = None) -> None:
        import ml_dtypes  # noqa: F401  registers bfloat16 with numpy, which lets safetensors read it
        from safetensors import SafetensorError, safe_open

        self.file_of: dict[str, tuple[Path, str]] = {}
        self.shapes: Shapes = {}
        for path, prefix in zip(files, prefixes or [""] * len(files), strict=True):
            try:
                with safe_open(path, framework="numpy") as file:
                    for name in file.keys():  # noqa: SIM118
                        self.file_of[prefix + name] = path, name
                        self.shapes[prefix + name] = tuple(file.get_slice(name).get_shape())
            except SafetensorError as error:
                todo = "put the model's own file there again"
                raise MachineError(f"{path.name} is damaged: {error}", where=str(path), todo=todo) from error

    def __getitem__(self, name: str) -> Array:
        from safetensors import safe_open

        path, name_there = self.file_of[name]
        with safe_open(path, framework="numpy") as file:
            return np.asarray(file.get_tensor(name_there))


class InitialWeights(_OneAtATime):
    """Random weights of a Llama, made on the host when asked for: the same bits for every engine.

    Each tensor depends only on the seed and its own name, by the rules of `common.model.init`.
    """

    def __init__(self, architecture: Mapping[str, Any], initializer: str, seed: int) -> None:
        self.architecture = dict(architecture)
        self.shapes: Shapes = llama.shapes(architecture)
        self.layers = int(architecture["num_hidden_layers"])
        self.initializer, self.seed = initializer, seed

    def __getitem__(self, name: str) -> Array:
        from common.model.init import initial

        return initial(self.initializer, self.seed, name, self.shapes[name], self.layers)


class SafetensorsWriter:
    """Writes a safetensors file tensor by tensor: one is in memory at a time, and none need be known beforehand.

    The format: header length (u64, little-endian), a JSON header, the data (huggingface/safetensors, README,
    "Format"). The data is written behind room for the header, which is filled at the end and padded with spaces.
    """

    def __init__(self, path: Path, metadata: Mapping[str, str] | None = None, room: int = HEADER_ROOM) -> None:
        self.room = room + -room % 8  # the format aligns the data's beginning to 8 bytes, by spaces behind the header
        self.header: dict[str, Any] = {"__metadata__": dict(metadata)} if metadata else {}
        self.end = 0
        self.file = path.open("wb")
        self.file.seek(8 + self.room)

    def add(self, name: str, array: Array) -> None:
        """Append a tensor; its dtype is one of CODES."""
        start, self.end = self.end, self.end + array.nbytes
        entry = {"dtype": CODES[array.dtype.name], "shape": list(array.shape), "data_offsets": [start, self.end]}
        self.header[name] = entry
        self.file.write(np.ascontiguousarray(array).reshape(-1).view(np.uint8).data)  # bytes: bf16 has no buffer format

    def __enter__(self) -> SafetensorsWriter:
        return self

    def __exit__(self, failed: object, *_: object) -> None:
        with self.file:
            if failed:
                return
            text = json.dumps(self.header, separators=(",", ":")).encode()
            if len(text) > self.room:
                raise AssertionError(f"a header of {len(text)} bytes does not fit the {self.room} kept for it")
            self.file.seek(0)
            self.file.write(struct.pack("<Q", self.room) + text.ljust(self.room))
