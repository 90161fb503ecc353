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
from common.paths import ROOT
from tests.doubles.machines import MACHINES, descriptor, fake_host, pci, remove_card, remove_node, write
from tools.cli import main
from tools.containers import images, offer
from tools.doctor import machine as doctor_host
from tools.doctor.findings import Diagnosis
from tools.doctor.machine import bundle, numbers
from tools.machine import host, lease
from tools.machine.lease import Owner

LINES = [board for board in MACHINES if get(board).chips > 1]


@pytest.fixture
def doctor(monkeypatch, capsys, tmp_path) -> Callable[..., tuple[int, dict[str, Any], str]]:
    """Run `recipe doctor --json` for a board on the machine below `root`: exit code, findings by id, standard error."""
    monkeypatch.setattr(doctor_host, "check_engine", lambda: "28.0")
    monkeypatch.setattr(offer, "able", lambda hw: f"it can build the image of {hw.name}")
    monkeypatch.setattr(doctor_host, "ROOM_GB", 0)
    own = [
        check for check in doctor_host.ANY if check is not doctor_host.lock
    ]  # what this Python has: a test of its own
    monkeypatch.setattr(doctor_host, "ANY", own)
    monkeypatch.delenv("RECIPES_CONTAINER", raising=False)
    monkeypatch.setenv("HOME", str(tmp_path / "home"))
    write(tmp_path / "home/.tenstorrent-venv/bin/tt-smi", "#!/bin/sh\n")
    (tmp_path / "home/.tenstorrent-venv/bin/tt-smi").chmod(0o755)

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


def warned(findings: dict[str, Any]) -> list[str]:
    return [id for id, item in findings.items() if item["warning"]]


@pytest.mark.parametrize("board", MACHINES)
def test_a_healthy_machine_is_green_for_every_board(doctor, tmp_path, board):
    code, found, err = doctor(board, fake_host(tmp_path / "root", board))
    assert (code, wrong(found), warned(found), err) == (0, [], [], "")
    told = {"board.nodes", "board.driver", "board.firmware", "board.memory", "board.owner", "board.tt-smi"}
    assert all(found[id]["ok"] for id in told | ({"board.descriptor"} if board in LINES else set()))


PAGES = {"n150": 4, "n300": 4, "n300x2": 8, "t3k": 16, "p300c": 8, "qb2": 16, "p150x8": 32, "galaxy": 128}


@pytest.mark.parametrize("board", PAGES)
def test_four_hugepages_a_node_in_place_of_an_iommu_are_green_too(doctor, tmp_path, board):
    root = fake_host(tmp_path / "root", board, dma="identity", hugepages=PAGES[board], mounted=True)
    code, found, _ = doctor(board, root)
    assert code == 0
    assert f"{PAGES[board]} huge pages of 1 GiB, {PAGES[board]} are needed" in found["board.memory"]["evidence"]
    pages(root, PAGES[board] - 3)
    code, found, _ = doctor(board, root)
    assert (code, wrong(found)) == (4, ["board.memory"])
    assert f"{PAGES[board] - 3} huge pages" in found["board.memory"]["evidence"]
    assert f"hugepages={PAGES[board]}," in found["board.memory"]["cure"]


@pytest.mark.parametrize(
    ("line", "mounted"),
    [
        ("nodev /dev/hugepages-1G hugetlbfs rw,relatime,mode=777,pagesize=1024M 0 0", True),
        ("hugetlbfs /dev/hugepages-1G hugetlbfs rw,pagesize=1G,mode=777 0 0", True),
        ("nodev /dev/hugepages-1G hugetlbfs pagesize=1048576K 0 0", True),
        ("none /dev/hugepages-1G hugetlbfs rw,pagesize=1024M 0 0", False),  # a source that tt-umd does not look at
        ("nodev /dev/hugepages-1G hugetlbfs rw,pagesize=2M 0 0", False),
        ("nodev /dev/hugepages-1G hugetlbfs rw 0 0", False),
        ("nodev /dev/hugepages hugetlbfs rw,pagesize=1G 0 0", False),
    ],
)
def test_a_mount_is_told_as_tt_umd_tells_it(doctor, tmp_path, line, mounted):
    root = fake_host(tmp_path / "root", "n150", dma=None, hugepages=4)
    write(root / "proc/mounts", f"proc /proc proc rw 0 0\n{line}\n")
    assert wrong(doctor("n150", root)[1]) == ([] if mounted else ["board.memory"])


def own_pids(root: Path, pids: str = "1\n") -> None:
    write(root / "proc/driver/tenstorrent/0/pids", pids)


FAULTS: dict[str, tuple[str, Callable[[Path], object], str, str]] = {
    "missing node": ("n150", lambda root: remove_node(root, 0), "board.nodes", "tenstorrent!0 without a node"),
    "wrong count": ("qb2", lambda root: remove_card(root, 3), "board.nodes", "found 3 x p300c"),
    "another board": ("n150", lambda root: write(card(root), "n300\n"), "board.nodes", "found 1 x n300"),
    "a board that is in no table": (
        "p150",
        lambda root: write(card(root), "unknown\n"),
        "board.nodes",
        "unknown-0x0040",
    ),
    "no driver": ("n150", lambda root: shutil.rmtree(root / "sys/module"), "board.driver", "not loaded"),
    "old driver": ("n150", lambda root: write(root / "sys/module/tenstorrent/version", "1.34"), "board.driver", "1.34"),
    "old firmware": ("p150", lambda root: write(firmware(root), "18.9.0.0"), "board.firmware", "0 has 18.9.0.0; tt-m"),
    "firmware from before 18": (
        "n150",
        lambda root: write(firmware(root), "80.17.0.0"),
        "board.firmware",
        "80.x is old",
    ),
    "no huge pages": ("n150", lambda root: pages(root, 0), "board.memory", "0 huge pages"),
    "one card passed through": ("qb2", lambda root: write(group(root), "identity"), "board.memory", "some cards"),
    "a busy card": ("n150", own_pids, "board.owner", "/dev/tenstorrent/0 by process 1 ("),
    "busy twice over": (
        "n150",
        lambda root: own_pids(root, "1\n1\n"),
        "board.owner",
        "in use: /dev/tenstorrent/0 by pro",
    ),
    "a card of another container": ("n150", lambda root: own_pids(root, "0\n"), "board.owner", "another PID namespace"),
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
    write(root / "proc/mounts", "nodev /dev/hugepages-1G hugetlbfs rw,pagesize=1024M 0 0\n")


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


def test_a_process_that_has_a_card_open_twice_is_named_once(doctor, tmp_path):
    root = fake_host(tmp_path / "root", "n150")
    own_pids(root, "1\n1\n0\n0\n")
    _, found, _ = doctor("n150", root)
    assert found["board.owner"]["evidence"].count("process 1 ") == 1
    assert found["board.owner"]["evidence"].count("another PID namespace") == 1
    assert "process 0" not in found["board.owner"]["evidence"]


def no_smi(root: Path) -> None:
    (root.parent / "home/.tenstorrent-venv/bin/tt-smi").unlink()


UNTESTED: dict[str, tuple[str, Callable[[Path], object], str, str]] = {
    "firmware": (
        "p150",
        lambda root: write(firmware(root), "19.8.0.0"),
        "board.firmware",
        "upstream names 19.8.1 for p150",
    ),
    "firmware of an n150": (
        "n150",
        lambda root: write(firmware(root), "18.10.0.0"),
        "board.firmware",
        "names 19.15.0 for n150",
    ),
    "driver": ("galaxy", lambda root: write(root / "sys/module/tenstorrent/version", "2.7.1"), "board.driver", "2.8.0"),
    "no tt-smi": ("n150", no_smi, "board.tt-smi", "could not be reset"),
}


@pytest.mark.parametrize("what", UNTESTED)
def test_what_nobody_tested_is_a_warning_that_fails_nothing(doctor, tmp_path, what):
    board, plant, id, words = UNTESTED[what]
    root = fake_host(tmp_path / "root", board)
    plant(root)
    code, found, err = doctor(board, root)
    assert (code, wrong(found), warned(found), err) == (0, [], [id], "")
    assert words in found[id]["evidence"]
    assert found[id]["cure"]


def test_a_driver_that_no_guide_names_for_a_wormhole_card_is_no_warning(doctor, tmp_path):
    root = fake_host(tmp_path / "root", "n150")
    write(root / "sys/module/tenstorrent/version", "2.0.0")
    assert warned(doctor("n150", root)[1]) == []


def test_a_warning_is_shown_to_people_with_its_cure():
    finding = Diagnosis("board.firmware", True, "old", "renew it", warning=True)
    assert list(finding.lines()) == ["warning: board.firmware: old", "  to do: renew it"]
    assert list(Diagnosis("board.firmware", True, "new", "renew it").lines()) == ["ok: board.firmware: new"]


def test_tt_smi_is_found_on_path_then_where_the_installer_puts_it(tmp_path, monkeypatch):
    places = {name: tmp_path / name / "bin/tt-smi" for name in ("path", "home/.tenstorrent-venv", "elsewhere")}
    for place in places.values():
        write(place, "#!/bin/sh\n")
        place.chmod(0o755)
    monkeypatch.setenv("HOME", str(tmp_path / "home"))
    monkeypatch.delenv("TT_NEW_VENV_LOCATION", raising=False)
    monkeypatch.setenv("PATH", str(tmp_path / "path/bin"))
    assert host.tt_smi() == str(places["path"])
    monkeypatch.setenv("PATH", str(tmp_path / "nothing"))
    assert host.tt_smi() == str(places["home/.tenstorrent-venv"])
    monkeypatch.setenv("TT_NEW_VENV_LOCATION", str(tmp_path / "elsewhere"))
    assert host.tt_smi() == str(places["elsewhere"])
    places["elsewhere"].unlink()
    assert host.tt_smi() is None


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


def test_an_environment_made_of_a_board_s_lock_is_held_to_that(monkeypatch):
    """As the README makes one for a board without Docker: no torch, and the numpy that ttnn asks for."""
    text = (ROOT / "requirements/board-3.10.txt").read_text("utf-8")
    pins = {name: version for name, version, _ in doctor_host.PIN.findall(text)}
    monkeypatch.setattr(doctor_host, "installed", pins.get)
    monkeypatch.setattr("sys.version_info", (3, 10, 12))
    (found,) = doctor_host.lock(doctor_host.Machine(get("n150"), (), False))
    assert (found.ok, found.evidence) == (True, f"{len(pins)} packages are those of requirements/board-3.10.txt")
    monkeypatch.setattr("sys.version_info", (3, 12, 3))
    (found,) = doctor_host.lock(doctor_host.Machine(get("n150"), (), False))
    assert (found.ok, "no requirements/board-3.12.txt" in found.evidence) == (None, True)


def test_a_pin_of_another_python_lock_is_a_fault(doctor, tmp_path, monkeypatch):
    lock = images.read_lock()
    lock["pins"]["cpu"]["python"] = {"requirements/cpu-3.11.txt": "0" * 64}
    monkeypatch.setattr(doctor_host, "read_lock", lambda: lock)
    assert wrong(doctor("cpu", tmp_path)[1]) == ["engine.pins"]


@pytest.mark.parametrize(("text", "expected"), [("19.2.0", (19, 2, 0)), ("2.10.0-rc1", (2, 10, 0)), ("none", ())])
def test_versions_are_compared_by_their_numbers(text, expected):
    assert numbers(text) == expected
    assert numbers("2.10") > numbers("2.9.1")


def test_bundles_are_compared_by_their_age():
    shuffled = ["19.8.1", "18.10.0.0", "80.17.0.0", "19.15.0.0", "18.3.0"]
    assert sorted(shuffled, key=bundle) == ["80.17.0.0", "18.3.0", "18.10.0.0", "19.8.1", "19.15.0.0"]
