"""Machines with a board, as files below RECIPES_SYSFS_ROOT: what driver, kernel and udev show of a healthy one."""

from __future__ import annotations

import contextlib
import os
import shutil
import stat
from collections.abc import Sequence
from pathlib import Path

from common.hardware import get

DRIVER, FIRMWARE = "2.11.0", "19.16.0"
# The cards of each board as its driver names them, one per node; what stands behind `unknown` is their PCI subsystem.
MACHINES = {
    "n150": ["n150"],
    "n300": ["n300"],
    "n300x2": ["n300"] * 2,
    "t3k": ["n300"] * 4,
    "p100": ["p100a"],
    "p150": ["p150b"],
    "p150x2": ["p150a"] * 2,
    "p150x4": ["p150c"] * 4,
    "p150x8": ["p150b"] * 8,
    "p300c": ["p300c"] * 2,
    "qb2": ["p300c"] * 4,
    "galaxy": ["galaxy-wormhole"] * 32,
    "galaxy-bh": ["galaxy-blackhole"] * 32,
    "galaxy-cf": ["unknown-0x0202"] * 32,
}


def bare_environment() -> dict[str, str]:
    """Return this process's environment without what names a machine, a board, our own settings or a job of CI."""
    return {name: value for name, value in os.environ.items() if not name.startswith(("RECIPES_", "TT_", "GITHUB_"))}


def fake_machine(root: Path, cards: Sequence[str | None], serials: Sequence[str] = ()) -> Path:
    """Device nodes and sysfs as the driver makes them; a card of None has no readable type."""
    (root / "dev/tenstorrent/by-id").mkdir(parents=True)
    for index, card in enumerate(cards):
        (root / f"dev/tenstorrent/{index}").touch()
        folder = root / f"sys/class/tenstorrent/tenstorrent!{index}"
        folder.mkdir(parents=True)
        device = root / f"sys/devices/{pci(index)}"
        device.mkdir(parents=True)
        (folder / "device").symlink_to(device)
        if card:
            word, _, subsystem = card.partition("-0x")
            (folder / "tt_card_type").write_text(f"{word}\n")
            write(device / "subsystem_device", f"0x{subsystem or '0040'}\n")
        if serials:
            (folder / "tt_serial").write_text(f"{serials[index]}\n")
    return root


def fake_host(root: Path, board: str, *, dma: str | None = "DMA-FQ", hugepages: int = 0, mounted: bool = False) -> Path:
    """A machine with that board, its driver and firmware; `dma` is the type of every card's IOMMU group (None: none).

    `hugepages` of 1 GiB are set aside, and `mounted` where tt-umd looks. Take files away or write others for a fault.
    """
    fake_machine(root, MACHINES[board], serials=[f"{index // 2:04x}" for index in range(len(MACHINES[board]))])
    for index in range(get(board).nodes):
        folder = root / f"sys/class/tenstorrent/tenstorrent!{index}"
        device = root / f"sys/devices/{pci(index)}"
        (device / "iommu_group").mkdir()
        (folder / "tt_fw_bundle_ver").write_text(f"{FIRMWARE}\n")
        if dma:
            (device / "iommu_group/type").write_text(f"{dma}\n")
        write(root / f"proc/driver/tenstorrent/{index}/pids", "")
    write(root / "sys/module/tenstorrent/version", f"{DRIVER}\n")
    write(root / "sys/kernel/mm/hugepages/hugepages-1048576kB/nr_hugepages", f"{hugepages}\n")
    line = "nodev /dev/hugepages-1G hugetlbfs rw,relatime,mode=777,pagesize=1024M 0 0\n"
    write(root / "proc/mounts", line if mounted else "")
    return root


def pci(index: int) -> str:
    return f"0000:{index + 1:02x}:00.0"


def write(path: Path, text: str) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(text)


def real_nodes(root: Path) -> bool:
    """Make the machine's nodes devices that an engine can give away: each is another /dev/null. Needs root."""
    with contextlib.suppress(OSError):
        for node in (root / "dev/tenstorrent").glob("[0-9]*"):
            node.unlink()
            os.mknod(node, stat.S_IFCHR | 0o666, os.makedev(1, 3))
            node.chmod(0o666)
        return True
    return False


def descriptor(root: Path, board: str) -> Path:
    """A mesh graph descriptor of the board's mesh, for boards whose own is tt-metal's."""
    rows, columns = get(board).mesh_shape
    path = root / "mesh.textproto"
    write(path, f"mesh_descriptors {{ device_topology {{ dims: [ {rows}, {columns} ] }} }}\n")
    return path


def remove_node(root: Path, index: int) -> None:
    (root / f"dev/tenstorrent/{index}").unlink()


def remove_card(root: Path, index: int) -> None:
    remove_node(root, index)
    shutil.rmtree(root / f"sys/class/tenstorrent/tenstorrent!{index}")
