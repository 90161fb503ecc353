"""A double of `ttml.core.distributed`: fabric, mappers, composers, reductions, the C++ gradient sync."""

from __future__ import annotations

from collections.abc import Sequence

import ttnn
from ttnn import _metal_env

from . import _strict
from ._fabric import Fabric
from ._parameters import NamedParameters
from .autograd import AutoContext


def enable_fabric(num_devices: int) -> None:
    """Arm the interconnect; says nothing where the descriptor that is known is missing or wrong."""
    if _strict.integer("enable_fabric", num_devices) > 1:
        AutoContext.get_instance()._fabric = Fabric()


def disable_fabric() -> None:
    AutoContext.get_instance()._fabric = None


def release_metal_env() -> None:
    _metal_env.release()


def shard_tensor_to_mesh_mapper(
    device: ttnn.MeshDevice, dim: int, cluster_axis: int | None = None
) -> ttnn.CppTensorToMesh:
    """Shard `dim` over one axis of the mesh, with one placement per axis; or over all devices, with one in all."""
    _strict.member("device", device, ttnn.MeshDevice)
    shard = ttnn.PlacementShard(_strict.integer("dim", dim))
    if cluster_axis is None:
        return ttnn.CppTensorToMesh(ttnn.TensorTopology([device.get_num_devices()], [shard]))
    placements = [ttnn.PlacementReplicate() for _ in device.shape]
    placements[_strict.integer("cluster_axis", cluster_axis)] = shard
    return ttnn.CppTensorToMesh(ttnn.TensorTopology(device.shape, placements))


def concat_mesh_to_tensor_composer(mesh_device: ttnn.MeshDevice, dim: int) -> ttnn.CppMeshToTensor:
    _strict.member("mesh_device", mesh_device, ttnn.MeshDevice)
    return ttnn.CppMeshToTensor(mesh_device, _strict.integer("dim", dim))


def all_reduce(tensor: ttnn.Tensor, cluster_axis: int) -> ttnn.Tensor:
    """Sum over an axis of the mesh, one device after the other in the tensor's dtype. The label stays what it was."""
    context = AutoContext.get_instance()
    shape = context.get_device().shape
    if context._fabric is None:
        raise ttnn.fatal("all_reduce: the fabric is not enabled")
    grid = tensor.data.unflatten(0, shape)
    total = grid.select(cluster_axis, 0).clone()
    for index in range(1, shape[cluster_axis]):
        total += grid.select(cluster_axis, index)
    data = total.unsqueeze(cluster_axis).expand_as(grid).flatten(0, len(shape) - 1).clone()
    return ttnn.Tensor(data, tensor.layout, tensor.tensor_topology())


def mean_gradients(parameters: NamedParameters, axes: Sequence[int], *, skip_sharded: bool) -> None:
    """All-reduce every gradient over `axes` and divide by their size, in bf16.

    With a descriptor that is unset or of another shape the first call works and the second hangs; here it raises the
    time-out that a watched device ends in.
    """
    context = AutoContext.get_instance()
    shape = context.get_device().shape
    reduced = [axis for axis in axes if shape[axis] > 1]
    if not reduced:
        return
    if context._fabric is not None:
        context._fabric.syncs += 1
        if context._fabric.syncs > 1 and context._fabric.dims != list(shape):
            raise RuntimeError("TIMEOUT: device timeout, potential hang detected, the device is unrecoverable")
    for _, tensor in parameters.items():
        if not tensor.is_grad_initialized():
            continue
        gradient = tensor.get_grad()
        for axis in reduced:
            if not (skip_sharded and _claims_shard(tensor.get_value(), axis)):
                gradient = ttnn.multiply(all_reduce(gradient, axis), 1.0 / shape[axis])
        tensor.set_grad(gradient)


def synchronize_gradients(parameters: NamedParameters, cluster_axes: Sequence[int] | None = None) -> None:
    """The C++ sync. Without axes it takes the parallelism context's, and does nothing where there is none.

    It skips parameters labelled `Shard` on the axis, and replicated ones carry that label after their first update.
    """
    _strict.member("parameters", parameters, NamedParameters)
    context = AutoContext.get_instance()
    if cluster_axes is None:
        axis = context._parallelism.get_ddp_axis() if context._parallelism else None
        cluster_axes = [] if axis is None else [axis]
    mean_gradients(parameters, cluster_axes, skip_sharded=True)


def _claims_shard(value: ttnn.Tensor, axis: int) -> bool:
    placements = value.tensor_topology().placements()
    return axis < len(placements) and isinstance(placements[axis], ttnn.PlacementShard)
