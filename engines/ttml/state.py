"""A checkpoint's tensors out of ttml and back: the names and layouts that every engine writes, one tensor at a time.

What an optimizer keeps besides AdamW's two moments and fp32 masters goes under its own name (`optimizer/<slot>/...`).
A weight that ttml stores in fp32 is its own master: as every engine does, a checkpoint has it twice, rounded to bf16 as
the model computes with it (`model/...`) and as it is (`optimizer/master/...`).
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Iterator, Mapping
from typing import Any

import ml_dtypes
import numpy as np

from common.errors import MachineError
from engines.ttml.hf_map import Entry
from engines.ttml.tensors import Array, Tensors

SLOTS = {"master_weights": "master"}  # ttml's key in an optimizer's state dict, and ours where it is another
ALWAYS = ("exp_avg", "exp_avg_sq")  # slots that every engine writes


def save(
    io: Tensors, trained: Mapping[str, Entry], weights: Mapping[str, Any], optimizer: Any, step: int
) -> Iterator[tuple[str, Array]]:
    """Yield what `Backend.state` does. Peak memory: (devices + 1) times the largest tensor as it is stored."""
    for name, entry in trained.items():
        for hf, array in entry.to_hf(io.read_first(weights[name])):
            yield f"model/{hf}", array.astype(ml_dtypes.bfloat16, copy=False)
        if is_master(io, weights[name]):
            for hf, array in entry.under_optimizer().to_hf(io.read_first(weights[name])):
                yield f"optimizer/master/{hf}", array
    for slot, tensors in slots_of(optimizer.get_state_dict()).items():
        for name, entry in trained.items():
            for hf, array in entry.under_optimizer().to_hf(io.read_first(tensors[name])):
                yield f"optimizer/{slot}/{hf}", array
    yield "optimizer/step", np.array([step], np.int64)


def restore(
    io: Tensors, trained: Mapping[str, Entry], weights: Mapping[str, Any], optimizer: Any, state: Mapping[str, Array]
) -> tuple[int, list[str]]:
    """Put `state` into weights and optimizer; return its step and what is to be said about it.

    Values are written into the optimizer's own tensors: a second set of moments might not fit on the device.
    """
    live = optimizer.get_state_dict()
    slots = slots_of(live)
    sources, notes = _sources(slots, state)
    masters = {name: entry.under_optimizer() for name, entry in trained.items() if is_master(io, weights[name])}
    of_masters, more = _sources(["master"] if masters else [], state)
    work = [
        (of_masters["master"], masters[name], weights[name]) if name in masters else ("model/", entry, weights[name])
        for name, entry in trained.items()
    ]
    for slot, prefix in sources.items():
        for name, entry in trained.items():
            work.append((prefix, entry if prefix == "model/" else entry.under_optimizer(), slots[slot][name]))
    names = {prefix + part.name for prefix, entry, _ in work for part in entry.parts} | {"optimizer/step"}
    _check_names(state, names | {f"model/{part.name}" for name in masters for part in trained[name].parts})
    given = Watched(state)
    converted = set()
    for prefix, entry, tensor in work:
        stored = io.stored(tensor)
        io.put(tensor, entry.from_hf(given, stored, prefix))
        if given.dtype != stored:
            converted.add(f"{prefix.rstrip('/')}: {given.dtype} in the checkpoint, {stored} here")
    step = int(state["optimizer/step"][0])
    live["steps"] = type(live["steps"])(step)
    optimizer.set_state_dict(live)
    _check_taken(io, optimizer, slots, min(trained, key=lambda name: math.prod(trained[name].shape)), step)
    return step, notes + more + sorted(converted)


def is_master(io: Tensors, weight: Any) -> bool:
    """Say whether a weight is stored in fp32."""
    return io.stored(weight) == np.float32


def slots_of(state: Mapping[str, Any]) -> dict[str, Any]:
    """Return the tensors of an optimizer's state dict by our names; scalars and empty slots left out."""
    return {SLOTS.get(key, key): value for key, value in state.items() if hasattr(value, "items") and len(value)}


def _sources(slots: Iterable[str], state: Mapping[str, Array]) -> tuple[dict[str, str], list[str]]:
    """Return where in the checkpoint each of our slots comes from, and what to say where it is not there."""
    sources, notes = {}, []
    for slot in slots:
        prefix = f"optimizer/{slot}/"
        if slot in ALWAYS or any(name.startswith(prefix) for name in state):
            sources[slot] = prefix
        elif slot == "master":
            sources[slot] = "model/"
            notes.append("optimizer/master: not in the checkpoint, begun from its weights")
        else:
            notes.append(f"{prefix.rstrip('/')}: not in the checkpoint, begun anew")
    return sources, notes


def _check_names(state: Mapping[str, Array], mine: set[str]) -> None:
    if odd := sorted(mine ^ set(state)):
        raise MachineError(
            f"the checkpoint does not fit this model: {len(odd)} tensor names differ, such as {odd[0]}",
            where="the checkpoint that is resumed",
            todo="resume with the model_config it was trained with, or start anew with --resume never",
        )


def _check_taken(io: Tensors, optimizer: Any, slots: Mapping[str, Any], name: str, step: int) -> None:
    """Raise MachineError where step or tensor `name` did not arrive: ttml checks nothing that it is given."""
    after = optimizer.get_state_dict()
    given, taken = slots[ALWAYS[0]], slots_of(after)[ALWAYS[0]]
    if int(after["steps"]) != step or io.read_first(given[name]).tobytes() != io.read_first(taken[name]).tobytes():
        raise MachineError(
            "this build of ttml did not take the optimizer's state",
            where=f"set_state_dict, {name}",
            todo="report this with the build's versions; --resume never starts a new run",
        )


class Watched(Mapping[str, Array]):
    """A mapping that remembers the dtype of what was read last."""

    def __init__(self, tensors: Mapping[str, Array]) -> None:
        self.tensors, self.dtype = tensors, np.dtype(np.float32)

    def __getitem__(self, name: str) -> Array:
        array = self.tensors[name]
        self.dtype = array.dtype
        return array

    def __iter__(self) -> Iterator[str]:
        return iter(self.tensors)

    def __len__(self) -> int:
        return len(self.tensors)
