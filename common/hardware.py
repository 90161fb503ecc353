"""The boards there are (hardware.yaml), and what kind of CPU this is."""

from __future__ import annotations

import difflib
import functools
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from common.errors import UsageError

TILE = 32  # rows and columns of the blocks that Tenstorrent chips compute in: every size is padded to whole ones


def round_up(size: int, multiple: int = TILE) -> int:
    """Return the smallest multiple of `multiple` that is not below `size`."""
    return -(-size // multiple) * multiple


@dataclass(frozen=True)
class Hardware:
    """One row of hardware.yaml, which explains the fields and names the source of every value."""

    name: str
    title: str
    arch: str
    chips: int
    nodes: int
    cards: tuple[str, ...]
    validated_firmware: str | None
    validated_driver: str | None
    dram_gib_per_chip: float | None
    mesh_shape: tuple[int, int]
    mesh_graph_descriptor: str | None
    mesh_device: str | None
    image: str
    micro_batch: int
    only_named: bool = False

    @property
    def is_cpu(self) -> bool:
        """Trained by the CPU twin: no device nodes."""
        return self.arch == "cpu"

    @property
    def device_nodes(self) -> tuple[str, ...]:
        """Return the nodes that a machine with nothing but this board has."""
        return tuple(f"/dev/tenstorrent/{index}" for index in range(self.nodes))


@functools.cache
def table() -> dict[str, Hardware]:
    """Return all boards by name, in the order of hardware.yaml."""
    import yaml

    entries: dict[str, dict[str, Any]] = yaml.safe_load(Path(__file__).with_name("hardware.yaml").read_text("utf-8"))
    tuples: dict[str, dict[str, Any]] = {
        name: {key: tuple(value) if isinstance(value, list) else value for key, value in entry.items()}
        for name, entry in entries.items()
    }
    return {name: Hardware(name=name, **columns) for name, columns in tuples.items()}


def get(name: str) -> Hardware:
    """Return the board of that name. Raises UsageError with the allowed names and the nearest one."""
    boards = table()
    if name in boards:
        return boards[name]
    near = difflib.get_close_matches(name.lower(), boards, n=1)
    hint = f"did you mean {near[0]}? " if near else ""
    raise UsageError(f"unknown hardware {name!r}", where="HW / --hw", todo=f"{hint}known: {', '.join(boards)}")


VECTOR_UNITS = ("avx2", "avx512f", "avx512_bf16", "amx_bf16")


def cpu_class(cpuinfo: Path = Path("/proc/cpuinfo")) -> str:
    """Return vendor, family and vector units of this CPU: by them numeric libraries choose their code, and its bits."""
    lines = cpuinfo.read_text(encoding="utf-8").splitlines() if cpuinfo.is_file() else []
    facts = {key.strip(): value.strip() for key, _, value in (line.partition(":") for line in lines)}
    units = [unit for unit in VECTOR_UNITS if unit in facts.get("flags", "").split()]
    name = f"{facts.get('vendor_id', 'unknown vendor')} family {facts.get('cpu family', '?')}"
    return f"{name}, {' '.join(units) or 'no known vector units'}"
