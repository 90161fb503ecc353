"""A double of the interconnect between devices, and of the file that describes it."""

from __future__ import annotations

import os
import re
from pathlib import Path

_DIMS = re.compile(r"device_topology\s*\{[^}]*dims\s*:\s*\[([\d\s,]+)\]")


def descriptor_dims(text: str) -> list[int] | None:
    """The `dims` of a mesh graph descriptor's device topology; None where they cannot be read."""
    found = _DIMS.search(text)
    return [int(number) for number in found[1].split(",") if number.strip()] if found else None


class Fabric:
    """Armed before the devices are opened. `dims`: those of the descriptor that was set then; None without one."""

    def __init__(self) -> None:
        path = os.environ.get("TT_MESH_GRAPH_DESC_PATH")
        self.dims = descriptor_dims(Path(path).read_text()) if path and Path(path).is_file() else None
        self.syncs = 0
