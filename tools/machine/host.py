"""What a run stands on besides its Python: kernel, driver, cards, memory for DMA.

Everything is read below `RECIPES_SYSFS_ROOT`, like the boards themselves; no device is opened.
"""

from __future__ import annotations

import os
import platform
import re
import shutil
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from tools.machine.detect import attribute, pci_of, system_root, whole

CONTAINER = "RECIPES_CONTAINER"  # environment of a container of ours: what it is called
LAUNCH = "RECIPES_LAUNCH"  # and of a run's: the Launch that runs in it, as JSON
HUGEPAGES = Path("/dev/hugepages-1G")  # tt-umd looks for 1 GiB pages there and nowhere else
PAGES_PER_NODE = 4  # that Tenstorrent's hugepages-setup.sh (tt-system-tools) sets aside for each card on PCIe
# As tt-umd reads /proc/mounts (hugepage.cpp): the source, the place, and a page size in any unit.
MOUNT = re.compile(rf"(?:nodev|hugetlbfs) {re.escape(str(HUGEPAGES))} hugetlbfs (\S+) 0 0")
PAGE_SIZE = re.compile(r"(?:^|,)pagesize=(\d{1,9})([KMGT])(?:,|$)")
UNITS = {"K": 2**10, "M": 2**20, "G": 2**30, "T": 2**40}


def in_container() -> bool:
    """Return whether this is a container of ours."""
    return bool(os.environ.get(CONTAINER))


@dataclass(frozen=True)
class Card:
    """One device node and what the driver says about it; None: it does not say."""

    node: str
    pci: str | None
    firmware: str | None
    dma: str | None  # the type of its IOMMU group: DMA and DMA-FQ translate, identity does not; "none": it has no group
    holders: tuple[int, ...]  # processes that have it open; 0 is one of another PID namespace

    @property
    def key(self) -> str:
        """What its lease is called: the PCI address, as nodes are numbered anew by a reset."""
        return self.pci or f"node-{Path(self.node).name}"

    @property
    def translated(self) -> bool | None:
        """Whether an IOMMU translates its DMA: then it takes ordinary memory, else 1 GiB huge pages."""
        return None if self.dma is None else self.dma.startswith("DMA")


def cards(nodes: Sequence[str]) -> tuple[Card, ...]:
    """Return the cards of these /dev/tenstorrent/<N> nodes."""
    return tuple(map(_card, nodes))


def _card(node: str) -> Card:
    root, number = system_root(), int(Path(node).name)
    device = root / f"sys/class/tenstorrent/tenstorrent!{number}/device"  # a link to the PCI device
    dma = _read(device / "iommu_group/type") or "none" if device.exists() else None
    pids = _read(root / f"proc/driver/tenstorrent/{number}/pids") or ""
    # One line for each time that it is open: a process may have several.
    holders = tuple(dict.fromkeys(pid for word in pids.split() if (pid := whole(word)) is not None))
    return Card(node, pci_of(number), attribute(number, "tt_fw_bundle_ver"), dma, holders)


def holder(pid: int) -> str:
    """Return what a process that has a card open is called in a message.

    The driver lists one that this process cannot see, as it is of another PID namespace, as 0.
    """
    if pid == 0:
        return "a process of another PID namespace (look outside of this container)"
    name = _read(Path(f"/proc/{pid}/comm")) or "not visible from here"
    return f"process {pid} ({name})"


@dataclass(frozen=True)
class HugePages:
    """Pages of 1 GiB that the kernel has set aside, and whether they are mounted where tt-umd looks."""

    count: int
    mounted: bool


def hugepages() -> HugePages:
    """Return what the kernel says of its huge pages."""
    root = system_root()
    count = _read(root / "sys/kernel/mm/hugepages/hugepages-1048576kB/nr_hugepages") or ""
    mounts = (_read(root / "proc/mounts") or "").splitlines()
    options = (found[1] for line in mounts if (found := MOUNT.fullmatch(line)))
    sizes = (int(size[1]) * UNITS[size[2]] for text in options if (size := PAGE_SIZE.search(text)))
    return HugePages(whole(count) or 0, 2**30 in sizes)


def driver() -> str | None:
    """Return the version of the kernel's tenstorrent module; None where it is not loaded."""
    return _read(system_root() / "sys/module/tenstorrent/version")


def tt_smi() -> str | None:
    """Return tt-smi's path: the one on PATH, else that of the environment tt-installer makes; None: neither is there.

    The installer puts no link to its environment on PATH: ~/.tenstorrent-venv, or what TT_NEW_VENV_LOCATION says, by
    which older installers were told another place (newer ones: --new-venv-location).
    """
    environment = os.environ.get("TT_NEW_VENV_LOCATION") or Path.home() / ".tenstorrent-venv"
    return shutil.which("tt-smi") or shutil.which("tt-smi", path=str(Path(environment) / "bin"))


def facts(nodes: Sequence[str]) -> dict[str, Any]:
    """Return what there is to say of the machine under a run, for its manifest."""
    found: dict[str, Any] = {"kernel": platform.release()}
    if nodes:
        mine = cards(nodes)
        found |= {
            "driver": driver(),
            "nodes": list(nodes),
            "pci": [card.pci for card in mine],
            "firmware": [card.firmware for card in mine],
            "iommu": [card.dma for card in mine],
        }
    return found


def _read(path: Path) -> str | None:
    try:
        return path.read_text("ascii").strip() or None
    except (OSError, UnicodeDecodeError):
        return None
