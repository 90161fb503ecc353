"""The board that this machine has, and the one that a run uses, with the reason.

Everything is read below `RECIPES_SYSFS_ROOT`, where the driver and udev put it; no device is opened.
"""

from __future__ import annotations

import contextlib
import os
import re
from collections import Counter
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path

from common.errors import MachineError
from common.hardware import Hardware, get, table

VISIBLE = "TT_VISIBLE_DEVICES"  # of tt-umd: which devices a process is to see


@dataclass(frozen=True, order=True)
class Node:
    """One /dev/tenstorrent/<index>, with what the driver says about it (None: not readable)."""

    index: int
    card: str | None
    serial: str | None
    pci: str | None = None

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
    """Return the hardware of a run: the named one, else the detected one, else cpu where there is no device node.

    A named board is never replaced: if its nodes are not here this raises MachineError, or says so in the
    reason with `require_present=False` (a dry run). An unknown name raises UsageError. Without a name, nodes that are
    not one board of hardware.yaml raise MachineError: whoever has a card is not given the CPU in its place.
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
    lost = f"; {lost}" if (lost := _without_node()) else ""
    looked = f"looked for {wanted}, found {_describe(found)}{lost}"
    if require_present:
        raise MachineError(
            f"{hw.name} was named but is not on this machine: {looked}",
            where="HW / --hw",
            todo="check the card and its driver, or train on the CPU twin with HW=cpu",
        )
    return Choice(hw, f"{hw.name}: as named, but not on this machine: {looked}", ())


def choose_board(name: str | None, require_present: bool) -> Choice:
    """Return the board that `--hw` names or that is here, and why. Raises MachineError where it is the CPU."""
    choice = choose(name, require_present=require_present)
    if choice.hardware.is_cpu:
        raise MachineError(
            f"ttml drives Tenstorrent boards, and there is none: {choice.reason}",
            where="HW / --hw",
            todo="run it on the board's machine, or name a board with --hw",
        )
    return choice


def _detected(found: tuple[Node, ...]) -> Choice:
    """The largest board that these nodes make up, or cpu where there are none. Raises MachineError for any others.

    A board that is `only_named` is never guessed.
    """
    if not found:
        if lost := _without_node():
            raise MachineError(
                f"HW is not set, and there are cards that no process here can open: {lost}",
                where="/dev/tenstorrent",
                todo="give the container its node (--device), or see to udev; or train on the CPU twin: HW=cpu",
            )
        return Choice(get("cpu"), f"cpu: HW is not set and no /dev/tenstorrent/<N> node here{_restriction()}", ())
    boards = {card: _largest(card, found) for card in dict.fromkeys(node.card for node in found)}
    kinds = set(boards.values())
    if len(kinds) == 1 and (hw := kinds.pop()):
        mine = tuple(node.path for node in _pick(hw, found))
        others = [b for b in _made_of(found[0].card) if b != hw and _pick(b, found)]
        names = ", ".join(f"HW={board.name} ({board.title})" for board in others)
        also = f"; they are also {names}" if others else ""
        return Choice(hw, f"{hw.name}: HW is not set and found {_describe(found)}{also}", mine)
    why = [_no_board(card) for card, hw in boards.items() if hw is None] or ["these are boards of several kinds"]
    known = dict.fromkeys(f"HW={hw.name}" for hw in boards.values() if hw)
    names = " or ".join([*known, *(["HW=<its name in common/hardware.yaml>"] if None in boards else [])])
    ways = [f"name the board: {names}"] if names else []
    ways += ["train on the CPU twin: HW=cpu"]
    ways += (
        [] if all(card is None or _made_of(card) for card in boards) else ["add a row (CONTRIBUTING.md, Add a board)"]
    )
    raise MachineError(
        f"HW is not set, and which board to train on cannot be told: found {_describe(found)}; {'; '.join(why)}",
        where="/dev/tenstorrent",
        todo="; or ".join(ways),
    )


def _no_board(card: str | None) -> str:
    """Why cards of this type are no board."""
    if card is None:
        return "the driver does not say of what type a card is"
    if boards := _made_of(card):
        least = min(boards, key=lambda hw: hw.nodes)
        return f"{card} is a part of {least.name}, which has {least.nodes} nodes"
    return f"{card} is in no row of common/hardware.yaml"


def _made_of(card: str | None) -> list[Hardware]:
    """The boards that cards of this type make up, few or many of them."""
    return [hw for hw in table().values() if card in hw.cards]


def nodes() -> tuple[Node, ...]:
    """Return the device nodes of this machine that TT_VISIBLE_DEVICES leaves; opens no device and needs no rights.

    Raises MachineError where that variable names a device that is not here.
    """
    folder = system_root() / "dev/tenstorrent"
    # udev also makes by-id/ links: only numeric names are nodes.
    numbers = sorted(number for path in folder.glob("*") if (number := whole(path.name)) is not None)
    found = tuple(Node(number, card_of(number), attribute(number, "tt_serial"), pci_of(number)) for number in numbers)
    words = os.environ.get(VISIBLE)
    return found if words is None else visible(found, words)


def visible(found: tuple[Node, ...], words: str) -> tuple[Node, ...]:
    """Return the nodes that a value of TT_VISIBLE_DEVICES leaves, in their order: none for an empty one.

    The value is read as tt-umd does since February 2026 (its pull requests 2056 and 2057; docs/TT_VISIBLE_DEVICES.md
    there has an older rule for numbers): words with commas between them. A number counts the cards from 0 in the order
    of their PCI addresses, whatever their nodes are called; any other word is a part of addresses, `0000:02:00.0` or
    `0000:c`, and takes every card of such an address. Raises MachineError for a word that takes none.
    """
    cards = sorted((node.pci, node) for node in found if node.pci)
    mine: set[Node] = set()
    for word in filter(None, map(str.strip, words.split(","))):
        if (place := whole(word)) is not None:
            taken = [node for _, node in cards[place:][:1]]
        elif re.fullmatch(r"[0-9a-fA-F]*[:.][0-9a-fA-F:.]*", word):
            taken = [node for pci, node in cards if word in pci]
        else:
            taken = []
        if not taken:
            here = ", ".join(f"{place} is {pci} ({node.path})" for place, (pci, node) in enumerate(cards)) or "no card"
            raise MachineError(
                f"{word!r} is no device of this machine",
                where=f"{VISIBLE}={words}",
                todo=f"give places in the order of PCI addresses, or parts of addresses, or unset it: {here}",
            )
        mine |= set(taken)
    return tuple(node for node in found if node in mine)


@contextlib.contextmanager
def alone(paths: Sequence[str]) -> Iterator[None]:
    """Have what opens devices see these nodes and no other until the block ends, as in a container.

    tt-metal opens every card that it sees, whatever the mesh: another run's as well. Nothing is changed where these are
    all that can be seen, or where a PCI address is not known.
    """
    before, here = os.environ.get(VISIBLE), nodes() if paths else ()
    mine = [node.pci for node in here if node.path in paths]
    if len(mine) == len(here) or None in mine:
        yield
        return
    os.environ[VISIBLE] = ",".join(map(str, mine))
    try:
        yield
    finally:
        if before is None:
            del os.environ[VISIBLE]
        else:
            os.environ[VISIBLE] = before


def whole(text: str) -> int | None:
    """Return a text as a whole number of at most nine digits; None: it is none."""
    return int(text) if re.fullmatch("[0-9]{1,9}", text) else None


def card_of(number: int) -> str | None:
    """Return what the card of node `number` is called in hardware.yaml; None: the driver does not say.

    That is the driver's word, or tt-smi's without the " L" or " R" that it adds to it. The driver calls every board
    `unknown` that it has no word for; the PCI subsystem, which stands behind it here, tells those apart.
    """
    word = attribute(number, "tt_card_type")
    if word == "unknown" and (subsystem := attribute(number, "device/subsystem_device")):
        return f"{word}-{subsystem}"
    return re.sub(" [LR]$", "", word) if word else None


def pci_of(number: int) -> str | None:
    """Return the PCI address of node `number`, such as 0000:01:00.0; None: the driver does not say."""
    device = system_root() / f"sys/class/tenstorrent/tenstorrent!{number}/device"  # a link to the PCI device
    return device.resolve().name if device.exists() else None


def attribute(number: int, name: str) -> str | None:
    """What the driver says of node `number` in sysfs; None: it does not say."""
    try:
        return (system_root() / f"sys/class/tenstorrent/tenstorrent!{number}" / name).read_text("ascii").strip() or None
    except (OSError, UnicodeDecodeError):
        return None


def _without_node() -> str:
    """Cards that the driver lists but that have no device node (udev, or a container without --device)."""
    nodes = system_root() / "dev/tenstorrent"
    cards = sorted(path.name for path in (system_root() / "sys/class/tenstorrent").glob("tenstorrent!*"))
    lost = [name for name in cards if not (nodes / name.partition("!")[2]).exists()]
    return f"sysfs lists {', '.join(lost)} without a node" if lost else ""


def _restriction() -> str:
    """The value of TT_VISIBLE_DEVICES, to stand behind what was found."""
    words = os.environ.get(VISIBLE)
    return "" if words is None else f" (with {VISIBLE}={words})"


def _describe(nodes: tuple[Node, ...]) -> str:
    if not nodes:
        return f"none{_restriction()}"
    counts = Counter(node.card or "card of unknown type" for node in nodes)
    cards = ", ".join(f"{count} x {card}" for card, count in counts.items())
    numbers = [node.index for node in nodes]
    several = numbers == list(range(numbers[0], numbers[0] + len(numbers))) and len(numbers) > 2
    rest = f" to {numbers[-1]}" if several else "".join(f", {number}" for number in numbers[1:])
    return f"{cards} at {nodes[0].path}{rest}{_restriction()}"


def _largest(card: str | None, nodes: tuple[Node, ...]) -> Hardware | None:
    """The board with the most nodes that the cards of this type can make up."""
    fitting = [hw for hw in _made_of(card) if not hw.only_named and _pick(hw, nodes)]
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
