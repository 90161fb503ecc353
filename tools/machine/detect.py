"""The board that this machine has, and the one that a run uses, with the reason.

Everything is read below `RECIPES_SYSFS_ROOT`, where the driver and udev put it; no device is opened.
"""

from __future__ import annotations

import os
from collections import Counter
from dataclasses import dataclass
from pathlib import Path

from common.errors import MachineError
from common.hardware import Hardware, get, table


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
class Choice:
    """The hardware a run uses, the sentence that says why, and its device nodes on this machine."""

    hardware: Hardware
    reason: str
    nodes: tuple[str, ...]


def system_root() -> Path:
    """Return the prefix of /sys, /proc/driver/tenstorrent and /dev/tenstorrent: `RECIPES_SYSFS_ROOT`, else `/`."""
    return Path(os.environ.get("RECIPES_SYSFS_ROOT") or "/")


def choose(name: str | None, require_present: bool = True) -> Choice:
    """Return the hardware of a run: the named one, else the detected one, else cpu.

    A named board is never replaced: if its nodes are not here this raises MachineError, or says so in the
    reason with `require_present=False` (a dry run). An unknown name raises UsageError.
    """
    if not name:
        return _detected(nodes())
    hw = get(name)
    if hw.is_cpu:
        return Choice(hw, f"{hw.name}: as named", ())
    found = nodes()
    mine = _pick(hw, found)
    if mine:
        unread = "" if all(node.card for node in mine) else " (card type not readable, taken at its word)"
        return Choice(hw, f"{hw.name}: as named, found {_describe(mine)}{unread}", tuple(node.path for node in mine))
    wanted = f"{hw.nodes} node{'s' if hw.nodes > 1 else ''} of {' or '.join(hw.cards)} in /dev/tenstorrent"
    looked = f"looked for {wanted}, found {_describe(found)}{_without_node(found)}"
    if require_present:
        raise MachineError(
            f"{hw.name} was named but is not on this machine: {looked}",
            where="HW / --hw",
            todo="check the card and its driver, or train on the CPU twin with HW=cpu",
        )
    return Choice(hw, f"{hw.name}: as named, but not on this machine: {looked}", ())


def _detected(found: tuple[Node, ...]) -> Choice:
    """The one board that these nodes make up, else cpu; why."""
    boards = {_largest(node.card, found) for node in found}
    if not found:
        why = "no /dev/tenstorrent/<N> node here"
    elif None in boards:
        why = f"found {_describe(found)}, which is no board of hardware.yaml"
    elif len(boards) > 1:
        why = f"found {_describe(found)}: boards of several kinds, name one with HW="
    elif hw := boards.pop():
        mine = tuple(node.path for node in _pick(hw, found))
        return Choice(hw, f"{hw.name}: HW is not set and found {_describe(found)}", mine)
    return Choice(get("cpu"), f"cpu: HW is not set and {why}", ())


def nodes() -> tuple[Node, ...]:
    """Return the device nodes of this machine; opens no device and needs no rights."""
    folder = system_root() / "dev/tenstorrent"
    # udev also makes by-id/ links: only numeric names are nodes.
    numbers = sorted(int(path.name) for path in folder.glob("*") if path.name.isdecimal())
    return tuple(Node(number, attribute(number, "tt_card_type"), attribute(number, "tt_serial")) for number in numbers)


def attribute(number: int, name: str) -> str | None:
    """What the driver says of node `number` in sysfs; None: it does not say."""
    try:
        return (system_root() / f"sys/class/tenstorrent/tenstorrent!{number}" / name).read_text("ascii").strip() or None
    except (OSError, UnicodeDecodeError):
        return None


def _without_node(nodes: tuple[Node, ...]) -> str:
    """Cards that the driver lists but that have no device node (udev, or a container without --device)."""
    known = {f"tenstorrent!{node.index}" for node in nodes}
    lost = sorted({path.name for path in (system_root() / "sys/class/tenstorrent").glob("tenstorrent!*")} - known)
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
