"""A double of the interconnect between devices, and of the file that describes it."""

from __future__ import annotations

import os
import re
from pathlib import Path

from ttnn import _metal_env

ROUTERS = "TT_THROW: Fabric Router Sync: Timeout after 10000 ms on Device 0"

_DIMS = re.compile(r"device_topology\s*\{[^}]*dims\s*:\s*\[([\d\s,]+)\]")


def descriptor_dims(text: str) -> list[int] | None:
    """The `dims` of a mesh graph descriptor's device topology; None where they cannot be read."""
    found = _DIMS.search(text)
    return [int(number) for number in found[1].split(",") if number.strip()] if found else None


class Fabric:
    """Armed before the devices are opened. `dims`: of the descriptor that the process knows; None without one."""

    def __init__(self) -> None:
        path = _metal_env.descriptor()
        self.dims = descriptor_dims(Path(path).read_text()) if path and Path(path).is_file() else None
        self.late = path != os.environ.get("TT_MESH_GRAPH_DESC_PATH")
        self.syncs = 0

    def connect(self, devices: int) -> None:
        """Wait for the routers of the devices that are opened: in vain where they lie otherwise than is known.

        That is so where the descriptor was named after the first touch of the cluster, and for one device alone
        (tt-metal 55519). It ends after 10 s with this error, and on a board with devices that need a reset.
        """
        if devices == 1 or self.late:
            raise RuntimeError(ROUTERS)
