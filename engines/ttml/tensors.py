"""numpy arrays to the devices and back. `Any` is ttml's tensor, which has no types."""

from __future__ import annotations

import importlib
from typing import Any

import ml_dtypes
import numpy as np

Array = np.ndarray[Any, Any]


class Tensors:
    """Moves arrays between the host and an open mesh of `devices`, all of them or shared out by rows."""

    def __init__(self, mesh: Any, devices: int) -> None:
        ttml, ttnn = importlib.import_module("ttml"), importlib.import_module("ttnn")
        device = ttml.autograd.AutoContext.get_instance().get_device()
        self.devices = devices
        self.by_rows = mesh.axis_mapper("dp", 0) if devices > 1 else None
        self._from_numpy, self._wrap = ttml.autograd.Tensor.from_numpy, ttml.autograd.create_tensor
        self._composer = ttml.core.distributed.concat_mesh_to_tensor_composer(device, 0)
        self._native = ttml.autograd.PreferredPrecision.NATIVE
        self._types, self._layouts, self._slice = ttnn.DataType, ttnn.Layout, ttnn.slice

    def new(self, array: Array, dtype: str, mapper: Any, layout: str = "TILE") -> Any:
        """Make a tensor on the devices, without a gradient; `mapper` None puts all of it on each.

        The array is copied: from_numpy reads the raw buffer, so it must be contiguous, and newer ones want it writable.
        """
        values = np.array(array, order="C")
        tensor = self._from_numpy(values, getattr(self._layouts, layout), getattr(self._types, dtype), mapper)
        tensor.set_requires_grad(False)  # it is True unless said otherwise, of masks and ids, too
        return tensor

    def put(self, tensor: Any, array: Array) -> None:
        """Replace the tensor's values on every device, rounded to its dtype here, to nearest even.

        Not by `assign`: it takes the bf16 view of fp32 values.
        """
        values = np.require(array, self.stored(tensor), ["C", "W"])
        fresh = self._from_numpy(values, self._layouts.TILE, self._dtype(tensor), None)
        tensor.set_value(fresh.get_value(self._native))  # shares the buffer of `fresh`, which nobody else keeps

    def widen(self, tensor: Any) -> None:
        """Store the tensor's values in fp32 from now on, on every device; ttml computes with a bf16 copy of them."""
        values = np.require(self.read_first(tensor), np.float32, ["C", "W"])
        tensor.set_value(
            self._from_numpy(values, self._layouts.TILE, self._types.FLOAT32, None).get_value(self._native)
        )

    def read(self, tensor: Any) -> Array:
        """Return [devices x N, ...] from a tensor [N, ...] of each device, in the dtype it is stored in.

        NATIVE, because the default view of a bf16 tensor is a copy that no optimizer step refreshes.
        """
        array: Array = tensor.to_numpy(self._dtype(tensor), self._composer, self._native)
        return array

    def read_first(self, tensor: Any) -> Array:
        """Return the first device's copy. Not by Sharding.gather: after a step, replicas pass as shards."""
        array = self.read(tensor)
        # Its rows by count: asking an fp32 tensor for its shape makes, and keeps, a bf16 copy of it on the device.
        return array if self.devices == 1 else array[: len(array) // self.devices].copy()  # a view would keep them all

    def cut(self, tensor: Any, start: int, end: int) -> Any:
        """Return positions start..end of [B, 1, T, V], without a gradient; both in whole tiles."""
        rows, _, _, width = tensor.shape()
        return self._wrap(self._slice(tensor.get_value(self._native), [0, 0, start, 0], [rows, 1, end, width]), False)

    def stored(self, tensor: Any) -> np.dtype[Any]:
        """Return numpy's name for the dtype the tensor is stored in."""
        return np.dtype(ml_dtypes.bfloat16 if self._dtype(tensor) == self._types.BFLOAT16 else np.float32)

    def _dtype(self, tensor: Any) -> Any:
        return tensor.get_value(self._native).dtype
