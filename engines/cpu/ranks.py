"""The processes of one data-parallel run on CPUs: rank 0 leads, the others repeat its calls on rows of their own.

As on a board, one process drives: recipe, data, files and decisions are rank 0's alone. Whatever it asks of its engine
it broadcasts to the other ranks first, with the whole batch; each takes its rows, and PyTorch's DistributedDataParallel
sums the gradients in buckets while the backward pass goes on. tools/launch/processes.py starts the processes, gloo
carries what they send.
"""

from __future__ import annotations

import contextlib
import datetime
import json
import os
import re
import socket
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import ml_dtypes
import numpy as np
import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.nn.parallel import DistributedDataParallel

from common.config import Config
from common.data.tokens import Batch
from common.engine import Array
from common.errors import MachineError, RankLost, UsageError

# How long ranks wait in a step for the slowest: less than the watchdog's shortest allowance, so that what was trained
# is saved before it ends the run. A rank that is dead, and not only stopped, is known at once.
SLOWEST_RANK = datetime.timedelta(seconds=100)
IDLE = datetime.timedelta(days=365)  # a rank waits for the next call for as long as rank 0 evaluates, saves or exports
Call = tuple[str, list[Any], list[Batch]]  # name, arguments, batches


@dataclass(frozen=True)
class Ranks:
    """This process among those of a run; in a run of one process no method sends anything."""

    rank: int = 0
    world: int = 1
    on_this_host: int = 1
    calls_group: Any = None

    # --- what an engine computes with -----------------------------------------------------------------------------

    def rows_of(self, batch: Batch) -> Batch:
        """Return this rank's rows of `batch`, in order; all ranks' together are the batch."""
        return batch if self.world == 1 else batch.cut(self.rank, self.world)

    def parallel(self, module: nn.Module) -> nn.Module:
        """Return `module` with its gradients summed over the ranks during `backward`.

        Not averaged, as DDP does by itself: a loss is already divided by the tokens of all ranks.
        """
        if self.world == 1:
            return module
        # Nothing to send at first or in a forward pass: all ranks have loaded the same weights, and no buffer changes.
        wrapped = DistributedDataParallel(
            module, init_sync=False, forward_sync_buffers=False, gradient_as_bucket_view=True
        )
        wrapped.register_comm_hook(None, lambda _, bucket: sum_gradients(bucket.buffer()))
        return wrapped

    def no_sync(self, module: nn.Module) -> contextlib.AbstractContextManager[None]:
        """Return a context in which backward adds to this rank's gradients alone; for a `module` of `parallel`."""
        return module.no_sync() if isinstance(module, DistributedDataParallel) else contextlib.nullcontext()

    def all_gather(self, value: float) -> list[float]:
        """Return `value` of every rank, in their order."""
        if self.world == 1:
            return [value]
        values = np.zeros(self.world)  # a sum in which each rank has one place of its own: exact, as the rest is 0
        values[self.rank] = value
        return [float(each) for each in self.all_reduce_sum(values)]

    def all_reduce_sum(self, values: Array) -> Array:
        """Replace `values` (float64, of one shape on every rank) by their sum over the ranks, and return them."""
        if self.world > 1:
            with gloo_errors():
                dist.all_reduce(torch.from_numpy(values))
        return values

    # --- what rank 0 sends ----------------------------------------------------------------------------------------

    def broadcast_command(self, call: str, *arguments: Any, batches: Sequence[Batch] = ()) -> None:
        """Send a call to the other ranks, from rank 0; on another rank nothing is done. `arguments` are JSON."""
        if self.world == 1 or self.rank:
            return
        with gloo_errors():
            self._broadcast_text(json.dumps([call, arguments, [batch.loss_mask.shape for batch in batches]]))
            for batch in batches:
                for array in (batch.input_ids, batch.labels, batch.loss_mask, batch.rows):
                    self._broadcast(array)

    def commands(self) -> Iterator[Call]:
        """Yield rank 0's calls as they come; for every other rank."""
        while True:
            batches = []
            with gloo_errors():
                call, arguments, shapes = json.loads(self._broadcast_text(""))
                for rows, width in shapes:
                    shape, (u32, f32, i64) = (rows, width), (np.uint32, np.float32, np.int64)
                    arrays = [np.empty(shape, u32), np.empty(shape, u32), np.empty(shape, f32), np.empty(rows, i64)]
                    batches.append(Batch(*map(self._broadcast, arrays)))
            yield call, arguments, batches

    def broadcast_tensors(self, tensors: Mapping[str, Array]) -> Mapping[str, Array]:
        """Return rank 0's tensors on every rank; to be read one at a time, by all ranks in one order."""
        return tensors if self.world == 1 else _BroadcastTensors(self, tensors)

    def all_gather_text(self, text: str) -> list[str]:
        """Return `text` of every rank, in their order."""
        mine = text.encode()
        sizes = [int(size) for size in self.all_gather(len(mine))]
        texts = torch.zeros(self.world, max(sizes), dtype=torch.uint8)
        texts[self.rank, : len(mine)] = torch.frombuffer(bytearray(mine), dtype=torch.uint8)
        if self.world > 1:
            with gloo_errors():
                dist.all_reduce(texts)
        return [bytes(line[:size].tolist()).decode() for line, size in zip(texts, sizes, strict=True)]

    def assert_same_on_all_ranks(self, facts: Mapping[str, Any]) -> str:
        """Raise UsageError on every rank if the `facts` (JSON) of one are not rank 0's; return rank 0's host."""
        texts = self.all_gather_text(json.dumps([socket.gethostname(), facts]))
        (first, expected), *others = map(json.loads, texts)
        for rank, (host, found) in enumerate(others, 1):
            odd = [key for key in {**expected, **found} if expected.get(key) != found.get(key)]
            if odd:
                shown = "; ".join(f"{key}: {expected.get(key)} and {found.get(key)}" for key in odd[:3])
                raise UsageError(
                    f"rank {rank} was not started as rank 0 was: {shown}",
                    where=f"rank 0 on {first}, rank {rank} on {host}",
                    todo="give every host the same command, files and package versions",
                )
        return str(first)

    def _broadcast_text(self, text: str) -> str:
        # gloo sends arrays of a known size: first how many bytes, then the bytes.
        size = torch.tensor([len(text.encode())])
        dist.broadcast(size, 0, group=self.calls_group)
        raw = np.frombuffer(text.encode(), np.uint8).copy() if self.rank == 0 else np.empty(int(size), np.uint8)
        return self._broadcast(raw).tobytes().decode()

    def _broadcast(self, array: Array) -> Array:
        """Return rank 0's bytes, in an array that has its shape and type on every rank."""
        array = np.ascontiguousarray(array)
        if array.size:
            dist.broadcast(torch.from_numpy(array.reshape(-1).view(np.uint8)), 0, group=self.calls_group)
        return array


class _BroadcastTensors(Mapping[str, Array]):
    """Tensors that rank 0 reads and every rank gets."""

    def __init__(self, ranks: Ranks, tensors: Mapping[str, Array]) -> None:
        self.ranks, self.tensors = ranks, tensors
        with gloo_errors():
            self.names: list[str] = json.loads(ranks._broadcast_text(json.dumps(list(tensors))))

    def __getitem__(self, name: str) -> Array:
        if name not in self.names:
            raise KeyError(name)
        with gloo_errors():
            if self.ranks.rank == 0:
                array = np.array(self.tensors[name])  # a copy: what is read from a file cannot be written to
                self.ranks._broadcast_text(json.dumps([array.dtype.name, array.shape]))
            else:
                described = json.loads(self.ranks._broadcast_text(""))
                if len(described) != 2:  # a call, which rank 0 could not make before all tensors were there
                    raise RankLost("rank 0 broke off while it handed out the weights")
                kind, shape = described
                array = np.empty(shape, ml_dtypes.bfloat16 if kind == "bfloat16" else np.dtype(kind))
            return self.ranks._broadcast(array)

    def __iter__(self) -> Iterator[str]:
        return iter(self.names)

    def __len__(self) -> int:
        return len(self.names)


_current: list[Ranks] = []  # this process's place among several; empty while it is alone


@contextlib.contextmanager
def process_group() -> Iterator[Ranks]:
    """Meet the other processes that torchrun started with this one. Raises MachineError when they do not come."""
    try:
        dist.init_process_group("gloo", timeout=SLOWEST_RANK)
        # Commands have a group of their own, as a timeout is a group's: a rank may wait long for them, never in a step.
        calls_group = dist.new_group(timeout=IDLE)
    except (RuntimeError, ValueError) as error:
        raise MachineError(
            f"the processes of this run cannot reach each other: {reason_of(error)}",
            where="gloo, PyTorch's network layer for CPUs",
            todo="on several hosts, set GLOO_SOCKET_IFNAME to the interface that leads to the others",
        ) from error
    on_this_host = int(os.environ["LOCAL_WORLD_SIZE"])
    _current[:] = [Ranks(dist.get_rank(), dist.get_world_size(), on_this_host, calls_group)]
    try:
        yield _current[0]
    finally:
        _current.clear()
        dist.destroy_process_group()


def ranks_of(config: Config) -> Ranks:
    """Return the processes that train a config's mesh of [1, N], this one alone for [1, 1]. Raises MachineError."""
    found, wanted = _current[0] if _current else Ranks(), config.device.devices
    if wanted == 1:
        return Ranks()
    if found.world != wanted:
        raise MachineError(
            f"the mesh {list(config.device.mesh_shape or ())} needs {wanted} processes, this is one of {found.world}",
            where="device_config.mesh_shape",
            todo="`recipe run` starts them; under a torchrun of your own, start as many",
        )
    return found


def sum_gradients(bucket: Tensor) -> torch.futures.Future[Tensor]:
    """Begin the sum over ranks of a full bucket of gradients, while the backward pass goes on; DDP calls it."""
    work = dist.all_reduce(bucket, async_op=True)
    assert work is not None, "this rank is in the group"
    return work.get_future().then(lambda done: done.value()[0])  # type: ignore[no-any-return]


@contextlib.contextmanager
def gloo_errors() -> Iterator[None]:
    """Turn gloo's errors, raised when another process is gone, into RankLost."""
    try:
        yield
    except RuntimeError as error:
        if "gloo" not in str(error).lower():
            raise
        raise RankLost(f"another process of this run is gone: {reason_of(error)}") from error


def reason_of(error: BaseException) -> str:
    """Return gloo's reason, without its source file and advice."""
    line = str(error).strip().partition("\n")[0]
    return re.sub(r"^\[[^\]]*\.(cc|h|cpp):\d+\]\s*", "", line).partition(". This is typically")[0]
