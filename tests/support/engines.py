"""CPU engines over a tiny base, and batches of rows of very different lengths."""

from __future__ import annotations

import contextlib
import hashlib
from collections.abc import Callable, Iterator
from pathlib import Path
from types import SimpleNamespace
from typing import Any
from unittest import mock

import numpy as np
import pytest

from common.config import Config
from common.data.tokens import Batch
from common.engine import Backend
from common.hardware import get
from common.model.bases import resolve
from engines.registry import engine_for

LENGTHS = (5, 90, 17, 44, 8, 63, 30, 71)  # tokens that a row predicts


def config_for(base: Path, **values: Any) -> Config:
    """A config over `base`, full fine-tuning in fp32 on one thread; dotted keys with __ for the dot."""
    config = Config.model_validate(
        {
            "recipe": "tiny",
            "hw": "cpu",
            "training_config": {"batch_size": 8, "learning_rate": 1e-2, "max_steps": 10, "precision": "fp32"},
            "model_config": {"base": str(base)},
            "data_config": {"source": "rows.jsonl"},
            "eval_config": {"every": 0, "prompts": ["What is a fox?"]},
            "checkpoint_config": {"every": 0},
            "device_config": {"threads": 1},
        }
    )
    return config.with_values(**{key.replace("__", "."): value for key, value in values.items()})


@contextlib.contextmanager
def engine(config: Config) -> Iterator[Any]:
    """The engine of `config` with its base loaded."""
    with engine_for(get("cpu")).open_backend(get("cpu"), config) as backend:
        base = resolve(str(config.model.base))
        backend.build(base.architecture)
        backend.load(base.weights())
        yield backend


def make_batch(lengths: tuple[int, ...] = LENGTHS, width: int = 96, seed: int = 0, vocab: int = 300) -> Batch:
    """Rows of `lengths` predicted tokens, the last two thirds of each supervised."""
    rng = np.random.default_rng(seed)
    inputs, labels = (np.zeros((len(lengths), width), np.uint32) for _ in range(2))
    mask = np.zeros((len(lengths), width), np.float32)
    for row, length in enumerate(lengths):
        tokens = rng.integers(6, vocab, length + 1)
        inputs[row, :length], labels[row, :length] = tokens[:-1], tokens[1:]
        mask[row, length // 3 : length] = 1
    return Batch(inputs, labels, mask, np.arange(len(lengths), dtype=np.int64))


@contextlib.contextmanager
def mlp_layers(change: Callable[[list[Any]], list[Any]]) -> Iterator[None]:
    """Within, the engine's MLPs compute with what `change` makes of their layers: gate, up and down."""
    from engines.cpu import blocks

    of = blocks.tensors_of

    def tensors_of(modules: Any, work: Any) -> Any:
        return of(change(list(modules)) if len(modules) == 3 else modules, work)

    with mock.patch.object(blocks, "tensors_of", tensors_of):
        yield


def without_adapter(layer: Any) -> Any:
    """The layer as if it had no adapter."""
    return SimpleNamespace(weight=layer.weight, bias=layer.bias)


def state_of(backend: Backend) -> dict[str, np.ndarray]:
    return dict(backend.state())


def fingerprint(state: dict[str, np.ndarray]) -> str:
    """One hash over names, dtypes and bits."""
    digest = hashlib.sha256()
    for name in sorted(state):
        digest.update(f"{name} {state[name].dtype} {state[name].shape}".encode() + state[name].tobytes())
    return digest.hexdigest()


def gradients_of(backend: Any, batches: list[Batch]) -> tuple[Any, dict[str, np.ndarray]]:
    """The stats of a step whose update is left out, and the (clipped) gradients it would have used."""
    found = {}

    def look(_learning_rate: float) -> None:
        found.update({name: p.grad.detach().float().numpy().copy() for name, p in backend.trained.items()})
        backend._clear_gradients()

    update, backend._update = backend._update, look
    try:
        stats = backend.train_step(batches, 1e-3, 1)
    finally:
        backend._update = update
    return stats, found


def on_transformers(monkeypatch: pytest.MonkeyPatch) -> None:
    """Let steps go through transformers' own forward, as where they are compiled, without the half minute it takes."""
    from engines.cpu import engine as torch_cpu

    monkeypatch.setattr(torch_cpu, "decide_compile", lambda _config: (True, "by a test"))
    monkeypatch.setattr("torch.compile", lambda forward, **_options: forward)
