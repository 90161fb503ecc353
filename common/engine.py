"""The protocol every engine implements, and the one place where an engine is plugged in.

Parameters cross this border as numpy arrays in Hugging Face Llama names and layout, so that a checkpoint written
by one engine continues on another.

A launch names the module of its engine, such as `engines.cpu`. Importing it is light: it has the six functions of
`Engine`, of which the first five answer before a device is opened, and before data and weights are fetched.
"""

from __future__ import annotations

import importlib
from collections.abc import Iterator, Mapping, Sequence
from contextlib import AbstractContextManager
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, Protocol, TypeAlias, cast

from common.errors import DataError, TrainingError

if TYPE_CHECKING:
    import numpy as np

    from common.config import Config
    from common.data.tokens import Batch
    from common.hardware import Hardware

Array: TypeAlias = "np.ndarray[Any, Any]"  # quoted: a board's host imports this module and has no numpy


@dataclass(frozen=True)
class StepStats:
    """What one optimizer step did. `loss` in nats per supervised token, `grad_norm` before clipping."""

    loss: float
    grad_norm: float
    learning_rate: float
    tokens: int
    supervised_tokens: int
    seconds: float
    without_gradient: tuple[str, ...]  # trained tensors that none, not even zeros, has reached in this process


@dataclass(frozen=True)
class BackendInfo:
    """What runs, and why: goes to the screen and into the manifest."""

    backend: str
    device: str
    precision: str
    world: int
    threads: int
    compiled: bool
    versions: Mapping[str, str]
    reason: str
    notes: tuple[str, ...] = ()


class Backend(Protocol):
    """One engine, open on its device."""

    @property
    def info(self) -> BackendInfo: ...

    def build(self, architecture: Mapping[str, Any]) -> None:
        """Make the model of `architecture` (the keys of a Llama config.json), without its weights."""

    def load(self, weights: Mapping[str, Array]) -> int:
        """Take every tensor of the base by its Hugging Face name, add adapters and the optimizer.

        Returns the base's parameter count. Raises MachineError for a missing, unknown or misshapen tensor.
        """

    def train_step(self, micro_batches: Sequence[Batch], learning_rate: float, step: int) -> StepStats:
        """Take one optimizer step: loss = sum(mask x nll) / sum(mask) over all the micro-batches together.

        Raises TrainingError, with the parameters untouched, when loss or gradient norm is not finite.
        """

    def eval_nll(self, batch: Batch) -> tuple[Array, Array]:
        """Return, per row of the batch, the sum of nll in nats [B] and the supervised tokens [B], both float64."""

    def next_token_logits(self, ids: Array, lengths: Array, cache: Any = None) -> tuple[Array, Any]:
        """Return logits [B, V] after each row's last token, and a cache for the next call.

        First call: `ids` [B, n] filled on the right, `lengths` [B]. With a cache: `ids` [B, 1], the new tokens, and
        `lengths` 0 in rows that have ended: what comes back for those is nothing, and an engine may leave them out.
        """

    def state(self) -> Iterator[tuple[str, Array]]:
        """Yield (name, array), one at a time: `model/<hf name>`, `optimizer/<slot>/<hf name>`."""

    def load_state(self, state: Mapping[str, Array]) -> None:
        """Take back what `state` yielded; `state` may read lazily. A missing or unknown name is an error."""

    def disable_adapter(self) -> AbstractContextManager[None]:
        """Return a context in which the model answers as its base does; only for LoRA runs."""

    def set_grad_sync(self, on: bool) -> None:
        """Sum the gradients of several devices, as every run does, or not: a control that `recipe verify ddp` needs."""

    def replicas(self) -> list[str]:
        """Return the sha256 over the trained parameters of each device, in their order."""

    def close(self) -> None: ...


class Engine(Protocol):
    """The functions that the module of an engine has."""

    def refuse_launch(self, hw: Hardware, config: Config, /) -> None:
        """Raise MachineError for what this machine lacks for `hw`, UsageError for a key that cannot be honored."""

    def refuse_model(self, architecture: Mapping[str, Any], /) -> None:
        """Raise MachineError for a Llama (the keys of its config.json) that the engine cannot compute."""

    def precision_for(self, hw: Hardware, /) -> tuple[str, str]:
        """Return what `precision: auto` means on `hw`, and the sentence that says why."""

    def tie_groups_for(self, hw: Hardware, /) -> tuple[list[list[Any]], str]:
        """Return the groups of projections that `tie_groups: build` means on `hw`, and what they were taken from."""

    def refuse_too_large(self, hw: Hardware, config: Config, architecture: Mapping[str, Any], length: int, /) -> None:
        """Raise UsageError where training on rows of `length` tokens cannot fit into the memory of `hw`."""

    def open_backend(self, hw: Hardware, config: Config, /) -> AbstractContextManager[Backend]:
        """Open the engine on `hw`; it is closed on leaving the context, whatever happened."""


def load_engine(name: str) -> Engine:
    """Import the module of an engine by its name, such as `engines.cpu`."""
    return cast("Engine", importlib.import_module(name))


def supervised_tokens(micro_batches: Sequence[Batch], step: int) -> int:
    """Return the supervised tokens of a step, by which its loss is divided. Raises DataError where there are none."""
    supervised = int(sum(batch.loss_mask.sum(dtype="int64") for batch in micro_batches))
    if not supervised:
        todo = "raise it: the responses of this batch were cut away"
        raise DataError(f"step {step} has no supervised token", where="data_config.max_length", todo=todo)
    return supervised


def not_reached(tensors: Sequence[str], where: str) -> TrainingError:
    """Return the error of a training in which no gradient reaches the trained `tensors`."""
    what = f"no gradient reaches {len(tensors)} trained tensors, which would never change: first"
    todo = "nothing of this run is worth keeping: report it with manifest.json, which has the engine's versions"
    return TrainingError(f"{what} {', '.join(tensors[:6])}", where=where, todo=todo)
