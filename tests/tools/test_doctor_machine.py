"""`recipe doctor` on faked machines: green where all is well, and each planted fault named with its cure."""

from __future__ import annotations

import json
import shutil
import sys
from collections.abc import Callable, Sequence
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest

from common.errors import MachineError
from common.hardware import get
from tests.doubles.machines import MACHINES, descriptor, fake_host, pci, remove_card, remove_node, write
from tools.cli import main
from tools.containers import images
from tools.doctor import machine as doctor_host
from tools.doctor.machine import numbers
from tools.machine import lease
from tools.machine.lease import Owner

LINES = ["t3k", "qb2", "galaxy", "n300", "p300c"]


@pytest.fixture
def doctor(monkeypatch, capsys, tmp_path) -> Callable[..., tuple[int, dict[str, Any], str]]:
    """Run `recipe doctor --json` for a board on the machine below `root`: exit code, findings by id, standard error."""
    monkeypatch.setattr(doctor_host, "check_engine", lambda: "28.0")
    monkeypatch.setattr(doctor_host, "ROOM_GB", 0)
    own = [
        check for check in doctor_host.ANY if check is not doctor_host.lock
    ]  # what this Python has: a test of its own
    monkeypatch.setattr(doctor_host, "ANY", own)
    monkeypatch.delenv("RECIPES_LAUNCH", raising=False)

    def run(
        board: str, root: Path, mesh: str | None = None, options: Sequence[str] = ()
    ) -> tuple[int, dict[str, Any], str]:
        monkeypatch.setenv("RECIPES_SYSFS_ROOT", str(root))
        if board in LINES:
            monkeypatch.setenv("TT_MESH_GRAPH_DESC_PATH", str(descriptor(tmp_path, mesh or board)))
        monkeypatch.setattr(sys, "argv", ["recipe", "doctor", "--json", "--hw", board, *options])
        with pytest.raises(SystemExit) as ended:
            main.main()
        said = capsys.readouterr()
        body = json.loads(said.out)
        assert body["hw"] == board
        return int(ended.value.code or 0), {item["id"]: item for item in body["findings"]}, said.err

    return run


def wrong(findings: dict[str, Any]) -> list[str]:
    return [id for id, item in findings.items() if item["ok"] is False]


@pytest.mark.parametrize("board", MACHINES)
def test_a_healthy_machine_is_green_for_every_board(doctor, tmp_path, board):
    code, found, err = doctor(board, fake_host(tmp_path / "root", board))
    assert (code, wrong(found), err) == (0, [], "")
    told = {"board.nodes", "board.driver", "board.firmware", "board.memory", "board.owner", "engine.answers"}
    assert all(found[id]["ok"] for id in told | ({"board.descriptor"} if board in LINES else set()))


def test_hugepages_in_place_of_an_iommu_are_green_too(doctor, tmp_path):
    code, found, _ = doctor("t3k", fake_host(tmp_path / "root", "t3k", dma="identity", hugepages=4, mounted=True))
    assert code == 0
    assert "4 huge pages" in found["board.memory"]["evidence"]


def own_pids(root: Path) -> None:
    write(root / "proc/driver/tenstorrent/0/pids", "1\n")


FAULTS: dict[str, tuple[str, Callable[[Path], object], str, str]] = {
    "missing node": ("n150", lambda root: remove_node(root, 0), "board.nodes", "tenstorrent!0 without a node"),
    "wrong count": ("qb2", lambda root: remove_card(root, 3), "board.nodes", "found 3 x p300c"),
    "another board": ("n150", lambda root: write(card(root), "n300\n"), "board.nodes", "found 1 x n300"),
    "no driver": ("n150", lambda root: shutil.rmtree(root / "sys/module"), "board.driver", "not loaded"),
    "old driver": ("n150", lambda root: write(root / "sys/module/tenstorrent/version", "1.34"), "board.driver", "1.34"),
    "old firmware": ("p150", lambda root: write(firmware(root), "18.4.9"), "board.firmware", "0 has 18.4.9"),
    "no huge pages": ("n150", lambda root: pages(root, 0), "board.memory", "0 huge pages"),
    "too few huge pages": ("t3k", lambda root: pages(root, 3), "board.memory", "3 huge pages"),
    "one card passed through": ("qb2", lambda root: write(group(root), "identity"), "board.memory", "some cards"),
    "a busy card": ("n150", own_pids, "board.owner", "/dev/tenstorrent/0 by process 1"),
}


def card(root: Path) -> Path:
    return root / "sys/class/tenstorrent/tenstorrent!0/tt_card_type"


def firmware(root: Path) -> Path:
    return root / "sys/class/tenstorrent/tenstorrent!0/tt_fw_bundle_ver"


def group(root: Path) -> Path:
    return root / f"sys/devices/{pci(1)}/iommu_group/type"


def pages(root: Path, count: int) -> None:
    """As without an IOMMU: every card's group is gone."""
    for file in root.glob("sys/devices/*/iommu_group/type"):
        file.unlink()
    write(root / "sys/kernel/mm/hugepages/hugepages-1048576kB/nr_hugepages", f"{count}\n")
    write(root / "proc/mounts", "none /dev/hugepages-1G hugetlbfs rw,pagesize=1024M 0 0\n")


@pytest.mark.parametrize("fault", FAULTS)
def test_each_planted_fault_is_named_and_alone(doctor, tmp_path, fault):
    board, plant, id, words = FAULTS[fault]
    root = fake_host(tmp_path / "root", board)
    plant(root)
    code, found, err = doctor(board, root)
    assert code == 4
    assert wrong(found) == [id]
    assert words in found[id]["evidence"]
    assert found[id]["cure"]
    assert id in err


def test_a_descriptor_of_another_mesh_is_a_fault(doctor, tmp_path):
    code, found, _ = doctor("n300", fake_host(tmp_path / "root", "n300"), mesh="qb2")
    assert (code, wrong(found)) == (4, ["board.descriptor"])
    assert "dims [1, 4], the mesh is [1, 2]" in found["board.descriptor"]["evidence"]


def test_pages_that_are_mounted_elsewhere_are_none(doctor, tmp_path):
    root = fake_host(tmp_path / "root", "n150", dma=None, hugepages=1)
    code, found, _ = doctor("n150", root)
    assert (code, wrong(found)) == (4, ["board.memory"])
    assert "not mounted" in found["board.memory"]["evidence"]


def test_who_has_the_lease_is_named(doctor, tmp_path, monkeypatch):
    root = fake_host(tmp_path / "root", "n150")
    monkeypatch.setenv("RECIPES_SYSFS_ROOT", str(root))
    with lease.taken([pci(0)], Owner("n150", 4321, "a-run", "recipes-a-run")):
        _, found, _ = doctor("n150", root)
    assert wrong(found) == ["board.owner"]
    assert "process 4321 with the run a-run, in the container recipes-a-run" in found["board.owner"]["evidence"]
    assert "recipe stop --hw n150" in found["board.owner"]["cure"]
    assert doctor("n150", root)[0] == 0, "a lease ends with its run"


def test_an_engine_that_does_not_answer_is_a_fault_for_a_board_and_none_for_a_cpu(doctor, tmp_path, monkeypatch):
    def none() -> None:
        raise MachineError("no Docker engine answers here", todo="start Docker")

    monkeypatch.setattr(doctor_host, "check_engine", none)
    assert wrong(doctor("n150", fake_host(tmp_path / "root", "n150"))[1]) == ["engine.answers"]
    code, found, _ = doctor("cpu", tmp_path)
    assert code == 0
    assert found["engine.answers"]["ok"] is None


def test_a_board_whose_runs_need_no_container_needs_no_engine(doctor, tmp_path, monkeypatch):
    def none() -> None:
        raise MachineError("no Docker engine answers here", todo="start Docker")

    monkeypatch.setattr(doctor_host, "check_engine", none)
    code, found, _ = doctor("n150", fake_host(tmp_path / "root", "n150"), options=["--no-container"])
    assert found["engine.answers"]["ok"] is None
    assert (code, wrong(found)) == (4, ["python.ttml"]), "but a ttml"


def test_no_room_is_a_fault(doctor, tmp_path, monkeypatch):
    monkeypatch.setattr(doctor_host, "ROOM_GB", 5)
    monkeypatch.setattr(shutil, "disk_usage", lambda path: SimpleNamespace(free=4e9))
    code, found, _ = doctor("cpu", tmp_path)
    assert (code, wrong(found)) == (4, ["disk.runs", "disk.home"])


def test_an_impostor_of_ttml_is_told_by_its_modules_and_not_imported(doctor, tmp_path, monkeypatch):
    write(tmp_path / "site/ttml/__init__.py", "raise SystemExit('imported')\n")
    monkeypatch.syspath_prepend(str(tmp_path / "site"))
    assert wrong(doctor("n150", fake_host(tmp_path / "root", "n150"))[1]) == ["python.ttml"]
    write(tmp_path / "site/ttml/models/__init__.py", "")
    assert doctor("n150", fake_host(tmp_path / "again", "n150"))[0] == 0


def test_packages_that_are_not_the_lock_s_are_named(monkeypatch):
    machine = doctor_host.Machine(get("cpu"), (), False)
    real = doctor_host.installed
    versions: dict[str, str | None] = {"click": "0.1", "rich": None}
    monkeypatch.setattr(doctor_host, "installed", lambda name: versions.get(name, real(name)))
    (found,) = doctor_host.lock(machine)
    assert found.ok is False
    assert "click 0.1, not " in found.evidence
    assert "no rich" in found.evidence


def test_a_pin_of_another_python_lock_is_a_fault(doctor, tmp_path, monkeypatch):
    lock = images.read_lock()
    lock["pins"]["cpu"]["python"] = {"requirements/cpu-3.11.txt": "0" * 64}
    monkeypatch.setattr(doctor_host, "read_lock", lambda: lock)
    assert wrong(doctor("cpu", tmp_path)[1]) == ["engine.pins"]


@pytest.mark.parametrize(("text", "expected"), [("19.2.0", (19, 2, 0)), ("2.10.0-rc1", (2, 10, 0)), ("none", ())])
def test_versions_are_compared_by_their_numbers(text, expected):
    assert numbers(text) == expected
    assert numbers("2.10") > numbers("2.9.1")
