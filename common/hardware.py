"""The boards there are (hardware.yaml), the one this machine has, and the one a run uses, with the reason."""

from __future__ import annotations

import difflib
import functools
import math
import os
from collections import Counter
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from common.errors import MachineError, UsageError

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
    minimum_firmware: str | None
    dram_gib_per_chip: float | None
    cores_per_chip: int | None
    tflops_per_core: float | None
    mesh_shape: tuple[int, int]
    mesh_graph_descriptor: str | None
    image: str
    micro_batch: int

    @property
    def is_cpu(self) -> bool:
        """Trained by the CPU twin: no device nodes."""
        return self.arch == "cpu"

    def peak_tflops(self, cores_per_chip: int | None = None) -> float | None:
        """bf16 peak of all chips, for MFU; None where no peak is known (then MFU is unknown, not guessed).

        `cores_per_chip` is the device's own compute grid where it was read: harvested parts differ.
        Formula: chips x cores x TFLOPS per core, as tt-train's performance.py counts it.
        """
        cores = cores_per_chip or self.cores_per_chip
        if cores is None or self.tflops_per_core is None:
            return None
        return self.chips * cores * self.tflops_per_core

    @property
    def device_nodes(self) -> tuple[str, ...]:
        """The nodes that a machine with nothing but this board has."""
        return tuple(f"/dev/tenstorrent/{index}" for index in range(self.nodes))


@dataclass(frozen=True)
class Node:
    """One /dev/tenstorrent/<index>, with what the driver says about it (None: not readable)."""

    index: int
    card: str | None
    serial: str | None

    @property
    def path(self) -> str:
        return f"/dev/tenstorrent/{self.index}"


@dataclass(frozen=True)
class Detection:
    """The board this machine shows (None: none of the table, or not just one), why, and every node found."""

    hardware: Hardware | None
    reason: str
    nodes: tuple[Node, ...]


@dataclass(frozen=True)
class Choice:
    """The hardware a run uses, the sentence that says why, and its device nodes on this machine."""

    hardware: Hardware
    reason: str
    nodes: tuple[str, ...]


@functools.cache
def table() -> dict[str, Hardware]:
    """All boards by name, in the order of hardware.yaml."""
    import yaml

    entries: dict[str, dict[str, Any]] = yaml.safe_load(Path(__file__).with_name("hardware.yaml").read_text("utf-8"))
    return {name: _row(name, entry) for name, entry in entries.items()}


def _row(name: str, entry: dict[str, Any]) -> Hardware:
    columns: dict[str, Any] = {key: tuple(value) if isinstance(value, list) else value for key, value in entry.items()}
    hw = Hardware(name=name, **columns)  # a missing or unknown column is a TypeError, and so a failing test
    if math.prod(hw.mesh_shape) != hw.chips:
        raise ValueError(f"hardware.yaml: the mesh {hw.mesh_shape} of {name} does not have {hw.chips} chips")
    return hw


def get(name: str) -> Hardware:
    """The board of that name. Raises UsageError with the allowed names and the nearest one."""
    boards = table()
    if name in boards:
        return boards[name]
    near = difflib.get_close_matches(name.lower(), boards, n=1)
    hint = f"did you mean {near[0]}? " if near else ""
    raise UsageError(f"unknown hardware {name!r}", where="HW / --hw", todo=f"{hint}known: {', '.join(boards)}")


VECTOR_UNITS = ("avx2", "avx512f", "avx512_bf16", "amx_bf16")


def cpu_class(cpuinfo: Path = Path("/proc/cpuinfo")) -> str:
    """Vendor, family and vector units of this CPU: what numeric libraries choose their code by, and so the bits."""
    lines = cpuinfo.read_text(encoding="utf-8").splitlines() if cpuinfo.is_file() else []
    facts = {key.strip(): value.strip() for key, _, value in (line.partition(":") for line in lines)}
    units = [unit for unit in VECTOR_UNITS if unit in facts.get("flags", "").split()]
    name = f"{facts.get('vendor_id', 'unknown vendor')} family {facts.get('cpu family', '?')}"
    return f"{name}, {' '.join(units) or 'no known vector units'}"


def system_root() -> Path:
    """The prefix of /sys, /proc/driver/tenstorrent and /dev/tenstorrent: `RECIPES_SYSFS_ROOT`, else `/`."""
    return Path(os.environ.get("RECIPES_SYSFS_ROOT") or "/")


def detect(root: Path | None = None) -> Detection:
    """Looks at device nodes and the driver's sysfs; opens no device and needs no rights."""
    nodes = _nodes(root or system_root())
    if not nodes:
        return Detection(None, "no /dev/tenstorrent/<N> node here", nodes)
    found = f"found {_describe(nodes)}"
    boards = {_largest(node.card, nodes) for node in nodes}
    if None in boards:
        return Detection(None, f"{found}, which is no board of hardware.yaml", nodes)
    if len(boards) > 1:
        return Detection(None, f"{found}: boards of several kinds, name one with HW=", nodes)
    return Detection(boards.pop(), found, nodes)


def choose(name: str | None, require_present: bool = True, root: Path | None = None) -> Choice:
    """The hardware of a run: the named one, else the detected one, else cpu.

    A named board is never replaced: if its nodes are not here this raises MachineError, or says so in the
    reason with `require_present=False` (a dry run). An unknown name raises UsageError.
    """
    if not name:
        return _default(detect(root))
    hw = get(name)
    if hw.is_cpu:
        return Choice(hw, f"{hw.name}: as named", ())
    nodes = _nodes(root or system_root())
    mine = _pick(hw, nodes)
    if mine:
        unread = "" if all(node.card for node in mine) else " (card type not readable, taken at its word)"
        return Choice(hw, f"{hw.name}: as named, found {_describe(mine)}{unread}", tuple(node.path for node in mine))
    wanted = f"{hw.nodes} node{'s' if hw.nodes > 1 else ''} of {' or '.join(hw.cards)} in /dev/tenstorrent"
    looked = f"looked for {wanted}, found {_describe(nodes)}{_without_node(root or system_root(), nodes)}"
    if require_present:
        raise MachineError(
            f"{hw.name} was named but is not on this machine: {looked}",
            where="HW / --hw",
            todo="check the card and its driver, or train on the CPU twin with HW=cpu",
        )
    return Choice(hw, f"{hw.name}: as named, but not on this machine: {looked}", ())


def _default(seen: Detection) -> Choice:
    if seen.hardware is None:
        return Choice(get("cpu"), f"cpu: HW is not set and {seen.reason}", ())
    mine = tuple(node.path for node in _pick(seen.hardware, seen.nodes))
    return Choice(seen.hardware, f"{seen.hardware.name}: HW is not set and {seen.reason}", mine)


def _nodes(root: Path) -> tuple[Node, ...]:
    folder = root / "dev/tenstorrent"
    # udev also makes by-id/ links: only numeric names are nodes.
    numbers = sorted(int(path.name) for path in folder.glob("*") if path.name.isdecimal())
    return tuple(
        Node(number, attribute(root, number, "tt_card_type"), attribute(root, number, "tt_serial"))
        for number in numbers
    )


def attribute(root: Path, number: int, name: str) -> str | None:
    """What the driver says of node `number` in sysfs; None: it does not say."""
    try:
        return (root / f"sys/class/tenstorrent/tenstorrent!{number}" / name).read_text("ascii").strip() or None
    except (OSError, UnicodeDecodeError):
        return None


def _without_node(root: Path, nodes: tuple[Node, ...]) -> str:
    """Cards that the driver lists but that have no device node (udev, or a container without --device)."""
    known = {node.index for node in nodes}
    listed = sorted(path.name for path in (root / "sys/class/tenstorrent").glob("tenstorrent!*"))
    lost = [name for name in listed if name.partition("!")[2] not in {str(index) for index in known}]
    return f"; sysfs lists {', '.join(lost)} without a node" if lost else ""


def _describe(nodes: tuple[Node, ...]) -> str:
    if not nodes:
        return "none"
    counts = Counter(node.card or "card of unknown type" for node in nodes)
    cards = ", ".join(f"{count} x {card}" for card, count in counts.items())
    paths = nodes[0].path if len(nodes) == 1 else f"{nodes[0].path} to {nodes[-1].index}"
    return f"{cards} at {paths}"


def _largest(card: str | None, nodes: tuple[Node, ...]) -> Hardware | None:
    """The board with the most nodes that the cards of this type can make up."""
    fitting = [hw for hw in table().values() if card in hw.cards and _pick(hw, nodes)]
    return max(fitting, key=lambda hw: hw.nodes, default=None)


def _pick(hw: Hardware, nodes: tuple[Node, ...]) -> tuple[Node, ...]:
    """The board's nodes among those found, or none if there are too few.

    Chips of one card carry one serial, so a p300c picked from a QuietBox 2 is one card, not two halves.
    """
    mine = [node for node in nodes if node.card in hw.cards] or [node for node in nodes if node.card is None]
    for serial in dict.fromkeys(node.serial for node in mine if node.serial):
        card = [node for node in mine if node.serial == serial]
        if len(card) >= hw.nodes:
            return tuple(card[: hw.nodes])
    return tuple(mine[: hw.nodes]) if len(mine) >= hw.nodes else ()
