"""What the lines of the bring-up checklist share: the board with the small model on it, and figures of its tensors."""

from __future__ import annotations

import contextlib
import hashlib
import math
from collections.abc import Iterator, Mapping, Sequence
from typing import Any

import numpy as np

from common.config import Config
from common.data.tokens import Batch
from common.engine import StepStats
from common.hardware import Hardware
from engines.ttml.contract import Build
from engines.ttml.engine import TTML, open_ttml
from tools.bringup.reference_llama import ARCHITECTURE, config_for, weights_for

Array = np.ndarray[Any, Any]
# Gradients (as norms) and losses (in nats) that only bf16 keeps apart: some 30 roundings of up to 2^-9 = 0.2 % each.
SAME_GRADIENT, NATS = 0.03, 0.02
BETA1, BETA2, DECAY = 0.5, 0.6, 0.5  # far from every default, so that each of them shows
ODD_ADAMW: dict[str, Any] = {
    "training__optimizer__beta1": BETA1,
    "training__optimizer__beta2": BETA2,
    "training__optimizer__weight_decay": DECAY,
}


class Bench:
    """The board that is brought up, and the small model on one of its devices or on its whole mesh."""

    def __init__(self, hw: Hardware, build: Build) -> None:
        self.hw, self.build = hw, build
        self.linears: list[str] = []  # of a block; known once a model was built

    @property
    def devices(self) -> int:
        return math.prod(self.hw.mesh_shape)

    def config(self, *, whole: bool = False, **values: Any) -> Config:
        return config_for(self.hw, self.hw.mesh_shape if whole else (1, 1), **values)

    @contextlib.contextmanager
    def model(
        self,
        *,
        whole: bool = False,
        architecture: Mapping[str, Any] = ARCHITECTURE,
        weights: Mapping[str, Array] | None = None,
        **values: Any,
    ) -> Iterator[TTML]:
        """Open the engine with the small model's weights loaded; `whole`: on all devices. Config values by key."""
        with open_ttml(self.hw, self.config(whole=whole, **values)) as backend:
            backend.build(architecture)
            backend.load(weights or weights_for(architecture))
            yield backend


def first_step(
    bench: Bench, batches: Sequence[Batch], *, whole: bool = False, **values: Any
) -> tuple[StepStats, dict[str, Array]]:
    """Take the first step of a model opened for it; return its stats and (clipped) gradients by name."""
    with bench.model(whole=whole, **{**ODD_ADAMW, **values}) as backend:
        return backend.train_step(batches, 1e-2, 1), gradients(backend)


def gradients(backend: TTML) -> dict[str, Array]:
    """Return the first step's gradients: AdamW's first moment is (1 - beta1) x gradient, as it was after clipping."""
    prefix = "optimizer/exp_avg/"
    return {n.removeprefix(prefix): a / (1 - BETA1) for n, a in snapshot_of(backend).items() if n.startswith(prefix)}


def norm_of(tensors: Mapping[str, Array]) -> float:
    return math.sqrt(sum(float((array**2).sum()) for array in tensors.values()))


def difference(found: Mapping[str, Array], expected: Mapping[str, Array]) -> float:
    """Return the norm of the difference over the norm, of all tensors together."""
    return norm_of({name: found[name] - expected[name] for name in expected}) / norm_of(expected)


def fingerprint(state: Mapping[str, Array]) -> str:
    """Return one hash over names and bits."""
    digest = hashlib.sha256()
    for name in sorted(state):
        digest.update(name.encode() + bits_of(state[name]))
    return digest.hexdigest()


def snapshot_of(backend: TTML) -> dict[str, Array]:
    return {name: array.astype(np.float64) for name, array in backend.state()}


def distance(found: Array, expected: Array) -> float:
    return difference({"": found}, {"": expected})


def bits_of(array: Array) -> bytes:
    return np.ascontiguousarray(array).tobytes()
