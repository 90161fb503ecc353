"""What is served, and why not: a run's verified export or a Llama in a folder, on a host and a port of this machine."""

from __future__ import annotations

import contextlib
import ipaddress
import math
import socket
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from common.errors import MachineError, UsageError
from common.model.llama import attention_widths
from common.model.weights import Weights
from tools.export.record import verified
from tools.generate.chat import architecture_of, folder_speaker, run_speakers
from tools.runs.folder import RunFolder, is_run, read_run
from tools.serve.ahead import ReadAhead, gc_paused
from tools.serve.batcher import Scheduler
from tools.serve.model import Model

Say = Callable[[str], None]
SAMPLING = ("max_new_tokens", "temperature", "top_k", "top_p", "repetition_penalty")  # of the config's eval section
EXAMPLES, EXAMPLE = 4, 120  # prompts to try it with, and the most characters of one: what fits a phone
GB = 1e9
WIDEST = 4  # bytes of a number in fp32; keys and values of a run in bf16 take half


@dataclass(frozen=True)
class Target:
    """A model that may be served. `run` is None for a plain folder; `folder` has the weights, the run's merged ones."""

    path: Path
    folder: Path
    run: RunFolder | None
    step: int | None
    architecture: Mapping[str, Any]

    @property
    def name(self) -> str:
        """Return the name that the model has where none is given."""
        return self.path.resolve().name

    def changes(self) -> dict[str, Any]:
        """Return what the run's config says of its answers, as changes to the config of a plain folder."""
        if self.run is None:
            return {}
        config = self.run.config
        sampling = {f"eval.{name}": getattr(config.eval, name) for name in SAMPLING}
        return {**sampling, "data.system_prompt": config.data.system_prompt}

    def examples(self) -> list[str]:
        """Return a few of the prompts that the run was asked at its evaluations; none of a plain folder."""
        records = [] if self.run is None else self.run.evaluations
        samples = [sample for sample in records[-1]["samples"] if isinstance(sample, dict)] if records else []
        asked = [str(sample.get("prompt", "")) for sample in samples]
        return [prompt for prompt in asked if 0 < len(prompt) <= EXAMPLE][:EXAMPLES]

    def weights_bytes(self, base: bool) -> int:
        """Return the bytes that the weights take in memory; with `base` those of what is then loaded."""
        shapes = Weights(sorted(self.folder.glob("*.safetensors"))).shapes
        whole = sum(math.prod(shape) for shape in shapes.values()) * WIDEST
        if not base or self.run is None:
            return whole
        if self.run.config.model.lora is None:
            return 2 * whole
        # Beside frozen weights in fp32 a mixed run keeps their bf16 copies, and computes with those.
        return whole * 3 // 2 if self.run.config.training.precision == "bf16-mixed" else whole


def find_target(path: Path, base: bool) -> Target:
    """Return what there is to serve at `path`.

    Raises UsageError for what is no run with an export and no Llama, VerificationError for an export that is not good.
    """
    if (path / "state.json").is_file():
        raise UsageError("that is a checkpoint", where=str(path), todo="give the run's folder")
    if not is_run(path):
        if base:
            todo = "give the run's folder"
            raise UsageError("a Hugging Face folder has no untuned model beside it", where=str(path), todo=todo)
        architecture = architecture_of(path)
        for pattern in ("*.safetensors", "tokenizer.json"):
            if not any(path.glob(pattern)):
                raise UsageError(f"no {pattern} there", where=str(path), todo="give a whole Hugging Face folder")
        return Target(path, path, None, None, architecture)
    record = verified(path)
    folder = path / "export" / "merged"
    return Target(path, folder, read_run(path), int(record["step"]), architecture_of(folder))


def cache_bytes(architecture: Mapping[str, Any], count: int, context: int) -> int:
    """Return the most bytes that the KV cache takes: of `count` slots with `context` tokens, in every layer."""
    _, width = attention_widths(architecture)
    return int(count * context * architecture["num_hidden_layers"] * 2 * width * WIDEST)


def refuse_too_large(weights: int, cache: int, slots: int, context: int) -> None:
    """Raise MachineError where weights and KV cache do not fit into the memory that is free now."""
    free = free_memory()
    if weights + cache > free:
        raise MachineError(
            f"the weights take {weights / GB:.2f} GB, and the KV cache of {slots} slots of {context} tokens "
            f"at most {cache / GB:.2f} GB: more than the {free / GB:.2f} GB that are free",
            where="memory",
            todo="fewer slots (--slots 1), or a shorter context (--context 2048)",
        )


def free_memory() -> int:
    """Return the bytes that may be taken without swapping: the machine's, or less where a container is limited."""
    lines = Path("/proc/meminfo").read_text(encoding="utf-8").splitlines()
    (free,) = (int(line.split()[1]) * 1024 for line in lines if line.startswith("MemAvailable:"))
    with contextlib.suppress(OSError, ValueError):  # no cgroup of version 2, or "max": no limit
        group = Path("/sys/fs/cgroup")
        limit, used = (int((group / f"memory.{name}").read_text()) for name in ("max", "current"))
        free = min(free, limit - used)
    return free


def bind(host: str, port: int) -> socket.socket:
    """Return a socket that listens; port 0 is any. Raises UsageError for an unknown host, MachineError if taken."""
    try:
        family, kind, _, _, address = socket.getaddrinfo(host, port, type=socket.SOCK_STREAM, flags=socket.AI_PASSIVE)[
            0
        ]
    except OSError as error:
        raise UsageError(f"no such host: {error.strerror or error}", where=f"--host {host}") from None
    found = socket.socket(family, kind)
    found.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
    try:
        found.bind(address)
        found.listen()
    except OSError as error:
        found.close()
        todo = "end what listens there, or give another --port"
        raise MachineError(f"cannot listen: {error.strerror}", where=f"{host}, port {port}", todo=todo) from None
    return found


def is_loopback(bound: socket.socket) -> bool:
    """Return whether only this machine reaches a socket."""
    return ipaddress.ip_address(bound.getsockname()[0].partition("%")[0]).is_loopback


def key_in(path: Path) -> str:
    """Return the key in a file. Raises UsageError for one that no header can carry."""
    try:
        key = path.read_text(encoding="utf-8").strip()
    except (OSError, ValueError) as error:
        raise UsageError(f"the key cannot be read: {type(error).__name__}", where=str(path)) from None
    if not key or not key.isascii() or not key.isprintable() or " " in key:
        raise UsageError("the file must hold one key: ASCII, without blanks", where=str(path))
    return key


@contextlib.contextmanager
def open_models(
    target: Target, name: str, base: bool, max_tokens: int | None, slots: int, context: int, say: Say
) -> Iterator[list[Model]]:
    """Yield the models to answer as: the target's under `name` and, with `base`, the untuned one it began as.

    Without `base` it is the export that answers. With it, it is the run's checkpoint, whose adapter is on for the one
    and off for the other: the same weights in memory, once.
    """
    weights = None if base else ReadAhead(sorted(target.folder.glob("*.safetensors")))
    with gc_paused():  # torch takes seconds to import: only once all that can be refused was
        from engines.cpu.engine import TorchCPU
        from engines.cpu.slots import Slots

    changes = {} if base else target.changes()
    if max_tokens is not None:
        changes["eval.max_new_tokens"] = max_tokens
    with contextlib.ExitStack() as stack:
        if base:
            speakers = stack.enter_context(run_speakers(target.path, True, changes, say))
        else:
            speakers = [stack.enter_context(folder_speaker(target.folder, changes, weights))]
        models: list[Model] = []
        examples = target.examples()
        for speaker in speakers:
            assert isinstance(speaker.backend, TorchCPU), "speakers are opened on the CPU"
            taken = [model.name for model in models]
            own = name if not models else speaker.name if speaker.name not in taken else f"{speaker.name}-untuned"
            scheduler = Scheduler(Slots(speaker.backend, slots, context), speaker.mode)
            models.append(Model(own, speaker, scheduler, examples=examples))
        if base:
            models[0] = replace(models[0], parent=models[1].name)
        yield models


def cache_of(target: Target, base: bool, slots: int, context: int) -> int:
    """Return the most bytes that the KV cache takes: each of the models has slots of its own."""
    return cache_bytes(target.architecture, slots, context) * (2 if base else 1)
