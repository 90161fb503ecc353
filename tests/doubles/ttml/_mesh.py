"""A double of the named mesh: `ttml.Mesh`, opening and closing, and the Python gradient sync."""

from __future__ import annotations

import gc
import math
import os
import re
from collections.abc import Sequence
from pathlib import Path

import ttnn

from . import _distributed
from ._fabric import descriptor_dims
from ._parameters import NamedParameters
from .autograd import AutoContext

_mesh: Mesh | None = None


class Mesh:
    """A grid of devices whose axes have names."""

    def __init__(self, shape: Sequence[int], axis_names: Sequence[str]) -> None:
        if len(shape) != len(axis_names):
            raise ValueError("each axis in a mesh must have an assigned name")
        self.shape, self.axis_names = tuple(shape), tuple(axis_names)

    def num_devices(self) -> int:
        return math.prod(self.shape)

    def has_axis(self, name: str) -> bool:
        return name in self.axis_names

    def axis_size(self, name: str) -> int:
        return self.shape[self.axis_index(name)]

    def axis_index(self, name: str) -> int:
        if name not in self.axis_names:
            raise RuntimeError(f"Mesh has no axis named '{name}': shape {self.shape}, names {self.axis_names}")
        return self.axis_names.index(name)

    def axis_mapper(self, name: str, tdim: int) -> ttnn.CppTensorToMesh:
        """Shards dimension `tdim` over the named axis."""
        device = AutoContext.get_instance().get_device()
        return _distributed.shard_tensor_to_mesh_mapper(device, tdim, self.axis_index(name))


def open_device_mesh(mesh: Mesh | Sequence[int], device_ids: Sequence[int] | None = None) -> None:
    """Open the devices and, for more than one, arm the fabric. A plain tuple's axes are called `_0`, `_1`."""
    global _mesh
    if not isinstance(mesh, Mesh):
        mesh = Mesh(mesh, [f"_{axis}" for axis in range(len(mesh))])
    several = mesh.num_devices() > 1
    if several:
        _validate_mgd(mesh)
        _distributed.enable_fabric(mesh.num_devices())
    try:
        AutoContext.get_instance().open_device(list(mesh.shape), list(device_ids or ()))
    except BaseException:
        if several:
            _distributed.disable_fabric()
        raise
    _mesh = mesh


def close_device_mesh() -> None:
    """Close the devices and forget the mesh; calling it again is harmless."""
    global _mesh
    AutoContext.get_instance().close_device()
    _mesh = None


def reset_metal_env() -> None:
    """Close the devices and forget what is known of the cluster: the next mesh may have another descriptor."""
    close_device_mesh()
    gc.collect()
    _distributed.release_metal_env()


def maybe_mesh() -> Mesh | None:
    """The open mesh; a dead one after a bare `close_device`."""
    return _mesh


def mesh() -> Mesh:
    if _mesh is None:
        raise RuntimeError("Device mesh is not initialized.")
    return _mesh


def sync_gradients(parameters: NamedParameters, axis_names: Sequence[str] = ("dp",)) -> None:
    """Mean of the gradients over the axes of these names; does nothing where there is no mesh or no such axis."""
    if _mesh is not None:
        axes = [_mesh.axis_index(name) for name in axis_names if _mesh.has_axis(name)]
        _distributed.mean_gradients(parameters, axes, skip_sharded=False)


def _validate_mgd(mesh: Mesh) -> None:
    """Raises only where the descriptor can be read and has another shape; all else is a printed warning."""
    path = os.environ.get("TT_MESH_GRAPH_DESC_PATH")
    if not path or not Path(path).is_file():
        print(f"WARNING: mesh graph descriptor not validated: {path or 'TT_MESH_GRAPH_DESC_PATH not set'}")
        return
    text = Path(path).read_text()
    dims = descriptor_dims(text)
    if text.count("mesh_descriptors {") > 1 or dims is None:
        print(f"WARNING: mesh graph descriptor not validated: {path} has several meshes or no dims")
        return
    if dims != list(mesh.shape):
        raise RuntimeError(f"Mesh shape mismatch! Requested {list(mesh.shape)}, MGD device_topology dims {dims}")
    types = re.search(r"device_topology\s*\{[^}]*dim_types\s*:\s*\[([A-Z_,\s]+)\]", text)
    if types and len(types[1].split(",")) != len(dims):
        raise RuntimeError(f"Malformed MGD: dim_types has another length than dims: {path}")
