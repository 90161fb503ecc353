"""A double of `ttnn`: enums, device tensors, meshes, and the few functions that a training backend uses.

A tensor holds one torch tensor with the devices as its first dimension, so that every device has a copy or a shard of
its own and replicas can really drift apart. UINT32 lies in torch's int64, which has more operations than its uint32.
"""

from __future__ import annotations

import enum
import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import ml_dtypes
import numpy as np
import torch

from . import _metal_env, _switches


class Layout(enum.Enum):
    ROW_MAJOR = 0
    TILE = 1


class DataType(enum.Enum):
    BFLOAT16 = 0
    FLOAT32 = 1
    UINT32 = 2
    INT32 = 7


_STORED = {
    DataType.BFLOAT16: torch.bfloat16,
    DataType.FLOAT32: torch.float32,
    DataType.UINT32: torch.int64,
    DataType.INT32: torch.int32,
}
_DTYPE_OF = {stored: dtype for dtype, stored in _STORED.items()}


# --- meshes -----------------------------------------------------------------------------------------------------


class MeshShape(tuple[int, ...]):
    """Extents of a mesh, one per axis: `MeshShape(1, 2)` or `MeshShape([1, 2])`."""

    def __new__(cls, *extents: Any) -> MeshShape:
        return super().__new__(cls, extents[0] if len(extents) == 1 and not isinstance(extents[0], int) else extents)


class MeshDevice:
    def __init__(self, shape: Sequence[int]) -> None:
        self.shape = MeshShape(list(shape))

    def get_num_devices(self) -> int:
        return math.prod(self.shape)


def get_num_devices() -> int:
    """Devices that the machine has, open or not. Touches the cluster."""
    _metal_env.descriptor()
    return _switches.DEVICES


@dataclass(frozen=True)
class PlacementReplicate:
    pass


@dataclass(frozen=True)
class PlacementShard:
    dim: int


class TensorTopology:
    """How a tensor claims to lie on the mesh: a label, which operations pass on and nothing checks."""

    def __init__(self, distribution_shape: Sequence[int], placements: Sequence[Any]) -> None:
        self._shape, self._placements = MeshShape(list(distribution_shape)), list(placements)

    def distribution_shape(self) -> MeshShape:
        return self._shape

    def placements(self) -> list[Any]:
        return list(self._placements)

    def is_replicated(self) -> bool:
        return not any(isinstance(placement, PlacementShard) for placement in self._placements)


class CppTensorToMesh:
    """Splits a host tensor over the mesh, one piece per device."""

    def __init__(self, topology: TensorTopology) -> None:
        self.topology = topology

    def split(self, data: torch.Tensor) -> torch.Tensor:
        """[...] to [devices, ...]."""
        shape, placements = self.topology.distribution_shape(), self.topology.placements()

        def piece(at: tuple[int, ...]) -> torch.Tensor:
            part = data
            for axis, placement in enumerate(placements):
                if isinstance(placement, PlacementShard):
                    if part.shape[placement.dim] % shape[axis]:
                        raise fatal(f"dimension {placement.dim} of {list(data.shape)} over {shape[axis]} devices")
                    part = part.chunk(shape[axis], placement.dim)[at[axis]]
            return part

        return torch.stack([piece(at) for at in np.ndindex(*shape)])


class CppMeshToTensor:
    """Concatenates what every device has, replicas included, along one dimension."""

    def __init__(self, device: MeshDevice, dim: int) -> None:
        self.dim = dim

    def compose(self, data: torch.Tensor) -> torch.Tensor:
        return torch.cat(list(data), self.dim)


# --- tensors ----------------------------------------------------------------------------------------------------


class Tensor:
    """A device tensor. `data` [devices, *shape] is its buffer; two tensors may share one."""

    def __init__(self, data: torch.Tensor, layout: Layout = Layout.TILE, topology: TensorTopology | None = None):
        self.data, self.layout = data, layout
        self._topology = topology or TensorTopology([len(data)], [PlacementReplicate()])

    @property
    def shape(self) -> list[int]:
        """The shape on each device."""
        return list(self.data.shape[1:])

    @property
    def dtype(self) -> DataType:
        return _DTYPE_OF[self.data.dtype]

    def tensor_topology(self) -> TensorTopology:
        return self._topology

    def update_tensor_topology(self, topology: TensorTopology) -> None:
        self._topology = topology

    def item(self) -> float:
        return float(host(self).item())

    def to_numpy(self) -> np.ndarray[Any, Any]:
        return as_numpy(host(self))


def fatal(message: str) -> RuntimeError:
    """What a failed assertion of the C++ side becomes in Python."""
    return RuntimeError(f"TT_FATAL: {message}")


def host(tensor: Tensor, composer: CppMeshToTensor | None = None) -> torch.Tensor:
    """The tensor on the host; one that lies on several devices needs a composer."""
    if composer is not None:
        return composer.compose(tensor.data)
    if len(tensor.data) > 1:
        raise fatal("Can't get a single buffer from host storage distributed over mesh")
    return tensor.data[0].clone()


def as_numpy(data: torch.Tensor) -> np.ndarray[Any, Any]:
    if data.dtype is torch.bfloat16:
        bits: np.ndarray[Any, Any] = data.contiguous().view(torch.uint16).numpy()
        return bits.view(ml_dtypes.bfloat16)
    values: np.ndarray[Any, Any] = data.numpy()
    return values.astype(np.uint32) if data.dtype is torch.int64 else values


def typecast(tensor: Tensor, dtype: DataType) -> Tensor:
    """A new tensor: never the same buffer."""
    return Tensor(tensor.data.to(_STORED[dtype], copy=True), tensor.layout, tensor.tensor_topology())


def _pointwise(operation: Callable[[torch.Tensor, Any], torch.Tensor]) -> Callable[[Tensor, Tensor | float], Tensor]:
    """Computes in fp32, stores in the first operand's dtype."""

    def compute(a: Tensor, b: Tensor | float) -> Tensor:
        result = operation(a.data.float(), b.data.float() if isinstance(b, Tensor) else b)
        sharded = isinstance(b, Tensor) and a.tensor_topology().is_replicated()
        label = b.tensor_topology() if sharded and isinstance(b, Tensor) else a.tensor_topology()
        return Tensor(result.to(a.data.dtype), a.layout, label)

    return compute


add = _pointwise(torch.add)
multiply = _pointwise(torch.mul)


def pad(tensor: Tensor, padding: Sequence[tuple[int, int]], value: float) -> Tensor:
    """`padding`: (before, after) for every dimension."""
    flat = [count for pair in reversed(padding) for count in pair]
    return Tensor(torch.nn.functional.pad(tensor.data, flat, value=value), tensor.layout, tensor.tensor_topology())


def slice(tensor: Tensor, starts: Sequence[int], ends: Sequence[int]) -> Tensor:
    data = tensor.data
    for dim, (start, end) in enumerate(zip(starts, ends, strict=True), 1):
        data = data.narrow(dim, start, end - start)
    return Tensor(data.clone(), tensor.layout, tensor.tensor_topology())
