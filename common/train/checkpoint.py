"""Write, verify and delete checkpoints: a folder that is whole or is not there.

`checkpoints/step-00000100/` is the state after the 100th update: the model (`model.safetensors`, or an adapter in
PEFT's format), `optimizer.safetensors` and `state.json` with the sha256 of each file. It is written under another name,
flushed to the disk and renamed, so that a process killed at any point leaves the old checkpoints as they were; the file
`latest`, for people and other programs, moves last, and nothing here reads it.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from common.config import Config
from common.errors import MachineError
from common.files import clear, disk_errors, inside, made_whole, read_json, sha256_file, sync, write_atomic, write_json
from common.model.weights import SafetensorsWriter, Weights

FORMAT = 1
PRUNED = ".pruned-"  # begins the name of a folder that is being deleted; `save` clears away what a kill left of one
Array = np.ndarray[Any, Any]


@dataclass(frozen=True)
class Checkpoint:
    """A verified checkpoint: its folder and its state.json."""

    folder: Path
    state: Mapping[str, Any]

    @property
    def step(self) -> int:
        """Return the number of updates behind it."""
        return int(self.state["step"])


def folder_of(checkpoints: Path, step: int) -> Path:
    """Return the folder of a step, whether it is there or not. Eight digits: names sort as their steps do."""
    return checkpoints / f"step-{step:08d}"


def save(
    checkpoints: Path, step: int, tensors: Iterable[tuple[str, Array]], config: Config, facts: Mapping[str, Any]
) -> Path:
    """Write the checkpoint of `step`; return its folder.

    `tensors` are `Backend.state`'s, `facts` go to state.json. Raises MachineError where the disk is full.
    """
    folder = folder_of(checkpoints, step)
    with disk_errors(f"save the checkpoint of step {step}", checkpoints):
        for left in checkpoints.glob(".*"):  # of a process that was killed while it saved; this one has the run's lock
            clear(left)
        with made_whole(folder) as made:
            write_tensors(made, tensors, config)
            hashes = {file.name: sha256_file(file) for file in sorted(made.iterdir())}
            write_json(made / "state.json", {"format": FORMAT, "step": step, **facts, "sha256": hashes})
            set_aside(folder)  # a damaged one of this step, which a resume passed over
        sync(checkpoints.parent)  # the name of the folder that it is in
        write_atomic(checkpoints / "latest", folder.name + "\n")
    return folder


def write_tensors(folder: Path, tensors: Iterable[tuple[str, Array]], config: Config) -> None:
    """Write `Backend.state`'s tensors as they come, one in memory at a time: with AdamW they are three models."""
    model_file = "adapter_model.safetensors" if config.model.lora else "model.safetensors"
    with (
        SafetensorsWriter(folder / model_file, {"format": "pt"}) as model,  # Hugging Face's loaders ask for this key
        SafetensorsWriter(folder / "optimizer.safetensors") as optimizer,
    ):
        files = {"model": model, "optimizer": optimizer}
        for name, array in tensors:
            group, _, rest = name.partition("/")
            files[group].add(rest, array)
    if config.model.lora:
        write_json(folder / "adapter_config.json", adapter_config(config))


def adapter_config(config: Config) -> dict[str, Any]:
    """Return PEFT's adapter_config.json for the LoRA section of `config`."""
    lora = config.model.lora
    assert lora is not None
    return {
        "peft_type": "LORA",
        "task_type": "CAUSAL_LM",
        "base_model_name_or_path": config.model.base,
        "r": lora.rank,
        "lora_alpha": lora.alpha,
        "lora_dropout": lora.dropout,
        "target_modules": sorted(lora.target_modules),
        "bias": "none",
        "fan_in_fan_out": False,
        "inference_mode": True,
        "use_rslora": False,
    }


def set_aside(folder: Path) -> None:
    """Rename `folder`, if it is there, to `<name>.replaced-<n>`; nothing is overwritten."""
    number = 0
    while folder.exists():
        other = folder.with_name(f"{folder.name}.replaced-{number}")
        if not other.exists():
            folder.rename(other)
        number += 1


def steps_saved(checkpoints: Path) -> list[int]:
    """Return the steps that have a checkpoint folder, newest first; verified or not."""
    found = [re.fullmatch(r"step-(\d{8})", entry.name) for entry in checkpoints.glob("step-*")]
    return sorted((int(match[1]) for match in found if match), reverse=True)


def verify(folder: Path) -> Checkpoint:
    """Return the checkpoint in `folder`, every file's hash checked. Raises MachineError, which says what is wrong."""
    state = read_json(folder / "state.json", FORMAT)
    kinds = {"step": int, "sha256": dict, "training_digest": str, "tokens_sha256": str}
    if not all(type(state.get(key)) is kind for key, kind in kinds.items()):
        raise MachineError("state.json is no checkpoint's", where=str(folder))
    for name, sha256 in state["sha256"].items():
        file = inside(folder, name)
        if not file.is_file() or sha256_file(file) != sha256:
            raise MachineError(f"{name} is {'damaged' if file.is_file() else 'missing'}", where=str(folder))
    return Checkpoint(folder, state)


def newest(checkpoints: Path, say: Callable[[str], None] = lambda _: None) -> Checkpoint | None:
    """Return the newest checkpoint that verifies, or None; say which ones are passed over, and why."""
    for step in steps_saved(checkpoints):
        try:
            return verify(folder_of(checkpoints, step))
        except MachineError as error:
            say(f"skipped {folder_of(checkpoints, step).name}: {error.what}")
    return None


def read_tensors(folder: Path) -> Weights:
    """Return the tensors of a checkpoint by the names `Backend.state` gave them, read one at a time."""
    adapter = folder / "adapter_model.safetensors"
    model = adapter if adapter.is_file() else folder / "model.safetensors"
    return Weights([model, folder / "optimizer.safetensors"], ["model/", "optimizer/"])


def prune(checkpoints: Path, keep_last: int, keep: Sequence[int], *, newest: int) -> None:
    """Delete all but the `keep_last` last checkpoints up to step `newest`, and those of the steps in `keep`.

    What lies above `newest` was damaged and passed over; the run will write those steps again.
    """
    # steps_saved has the newest first: from keep_last on they are the older ones.
    for step in [step for step in steps_saved(checkpoints) if step <= newest][keep_last:]:
        if step not in keep:
            delete(folder_of(checkpoints, step))


def delete(folder: Path) -> None:
    """Delete a folder. It is renamed first, so that no kill or power cut leaves half of it under its name."""
    leaving = folder.rename(folder.with_name(f"{PRUNED}{folder.name}"))
    sync(folder.parent)
    clear(leaving)
