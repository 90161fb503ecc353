"""A double of `ttml.sharding`: reading a tensor by what its label claims."""

from __future__ import annotations

import math
from typing import Any

import numpy as np
import torch
import ttnn

from .autograd import PreferredPrecision, Tensor


class Sharding:
    """The label of a tensor. It believes it: a replicated tensor labelled `Shard(0)` is gathered N times over."""

    def __init__(self, topology: ttnn.TensorTopology) -> None:
        self._placements = topology.placements()
        self._dist_shape = topology.distribution_shape()

    @classmethod
    def from_tensor(cls, tensor: Tensor) -> Sharding:
        return cls(tensor.get_value(PreferredPrecision.NATIVE).tensor_topology())

    @property
    def is_fully_replicated(self) -> bool:
        return not any(isinstance(placement, ttnn.PlacementShard) for placement in self._placements)

    def gather(self, tensor: Tensor) -> np.ndarray[Any, Any]:
        """One copy, read NATIVE: shards concatenated, replicas dropped."""
        pieces = list(tensor.get_value(PreferredPrecision.NATIVE).data)
        array: np.ndarray[Any, Any] = ttnn.as_numpy(self._gather(pieces, 0).clone())
        return array

    def _gather(self, pieces: list[torch.Tensor], axis: int) -> torch.Tensor:
        """Put together what lies along `axis` and all later ones."""
        if axis == len(self._placements) or len(pieces) == 1:
            return pieces[0]
        size = math.ceil(len(pieces) / self._dist_shape[axis])
        parts = [self._gather(pieces[at : at + size], axis + 1) for at in range(0, len(pieces), size)]
        placement = self._placements[axis]
        return torch.cat(parts, placement.dim) if isinstance(placement, ttnn.PlacementShard) else parts[0]
