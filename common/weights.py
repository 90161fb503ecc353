"""Weights by their Hugging Face names, one tensor at a time: from safetensors files, or made from a seed."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np

from common import llama
from common.errors import MachineError

Array = np.ndarray[Any, Any]
Shapes = dict[str, tuple[int, ...]]


class Weights(Mapping[str, Array]):
    """The tensors of safetensors files by name, read one at a time.

    A file is opened anew for each: a mapping that stays keeps every page that was read in memory.
    """

    def __init__(self, files: Sequence[Path]) -> None:
        import ml_dtypes  # noqa: F401  registers bfloat16 with numpy, which lets safetensors read it
        from safetensors import SafetensorError, safe_open

        self.file_of: dict[str, Path] = {}
        self.shapes: Shapes = {}
        for path in files:
            try:
                with safe_open(path, framework="numpy") as file:
                    for name in file.keys():  # noqa: SIM118
                        self.file_of[name] = path
                        self.shapes[name] = tuple(file.get_slice(name).get_shape())
            except SafetensorError as error:
                raise MachineError(
                    f"{path.name} is damaged: {error}", where=str(path), todo="put the model's own file there again"
                ) from error

    def __getitem__(self, name: str) -> Array:
        from safetensors import safe_open

        with safe_open(self.file_of[name], framework="numpy") as file:
            return np.asarray(file.get_tensor(name))

    def __contains__(self, name: object) -> bool:
        return name in self.file_of  # without this, Mapping would read the tensor to find out

    def __iter__(self) -> Iterator[str]:
        return iter(self.file_of)

    def __len__(self) -> int:
        return len(self.file_of)


class InitialWeights(Mapping[str, Array]):
    """Random weights of a Llama, made on the host when asked for: the same bits for every engine.

    Each tensor hangs on the seed and its own name, by the rules of `common.backends.init`.
    """

    def __init__(self, architecture: Mapping[str, Any], initializer: str, seed: int) -> None:
        self.architecture = dict(architecture)
        self.shapes: Shapes = llama.shapes(architecture)
        self.layers = int(architecture["num_hidden_layers"])
        self.initializer, self.seed = initializer, seed

    def __getitem__(self, name: str) -> Array:
        from common.backends.init import initial

        return initial(self.initializer, self.seed, name, self.shapes[name], self.layers)

    def __contains__(self, name: object) -> bool:
        return name in self.shapes

    def __iter__(self) -> Iterator[str]:
        return iter(self.shapes)

    def __len__(self) -> int:
        return len(self.shapes)
