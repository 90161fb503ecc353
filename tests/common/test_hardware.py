"""The table of boards, their detection on faked machines, and the choice of a run's hardware."""

from __future__ import annotations

import math
from collections.abc import Sequence
from pathlib import Path

import pytest

from common import hardware
from common.errors import MachineError, UsageError
from engines.ttml.mesh import OURS, check_descriptor

ALL = ["cpu", "cpu-x2", "n150", "n300", "t3k", "p100", "p150", "p300c", "qb2", "galaxy"]
# The cards of each board as its driver names them, one per node.
MACHINES = {
    "n150": ["n150"],
    "n300": ["n300"],
    "t3k": ["n300"] * 4,
    "p100": ["p100a"],
    "p150": ["p150b"],
    "p300c": ["p300c"] * 2,
    "qb2": ["p300c"] * 4,
    "galaxy": ["galaxy-wormhole"] * 32,
}


def fake_machine(root: Path, cards: Sequence[str | None], serials: Sequence[str] = ()) -> Path:
    """Device nodes and sysfs as the driver makes them; a card of None has no readable type."""
    (root / "dev/tenstorrent/by-id").mkdir(parents=True)
    for index, card in enumerate(cards):
        (root / f"dev/tenstorrent/{index}").touch()
        folder = root / f"sys/class/tenstorrent/tenstorrent!{index}"
        folder.mkdir(parents=True)
        if card:
            (folder / "tt_card_type").write_text(f"{card}\n")
        if serials:
            (folder / "tt_serial").write_text(f"{serials[index]}\n")
    return root


def test_the_table_has_every_board_and_its_facts_agree():
    table = hardware.table()
    assert list(table) == ALL
    for hw in table.values():
        assert math.prod(hw.mesh_shape) == hw.chips
        assert hw.mesh_shape[0] == 1, "data parallel runs on a line"
        assert hw.micro_batch > 0
        assert (hw.mesh_graph_descriptor is None) == (hw.chips == 1 or hw.is_cpu)
        assert hw.is_cpu == (hw.nodes == 0) == (not hw.cards) == (hw.dram_gib_per_chip is None)
        assert hw.is_cpu or hw.nodes in (hw.chips, hw.chips // 2), "a second chip may be remote"


def test_peaks_are_those_that_upstream_reports():
    peaks = {name: hw.peak_tflops() for name, hw in hardware.table().items()}
    assert peaks["n150"] == 64
    assert peaks["t3k"] == 448
    assert peaks["galaxy"] == 2304
    assert (peaks["p100"], peaks["p300c"], peaks["qb2"]) == (148.5, 297, 594)
    assert peaks["cpu"] is None
    assert hardware.get("p150").peak_tflops(cores_per_chip=120) == pytest.approx(162)


def test_an_unknown_name_lists_the_boards_and_the_nearest():
    with pytest.raises(UsageError, match="did you mean n300") as error:
        hardware.get("N30O")
    assert all(name in str(error.value) for name in ALL)


@pytest.mark.parametrize("name", MACHINES)
def test_every_board_is_detected_and_chosen(name, tmp_path, monkeypatch):
    monkeypatch.setenv("RECIPES_SYSFS_ROOT", str(fake_machine(tmp_path, MACHINES[name])))
    assert hardware.detect().hardware == hardware.get(name)
    unset, named = hardware.choose(None), hardware.choose(name)
    assert unset.hardware == named.hardware == hardware.get(name)
    assert unset.nodes == named.nodes == hardware.get(name).device_nodes
    assert MACHINES[name][0] in unset.reason
    assert "HW is not set" in unset.reason
    assert "as named" in named.reason


@pytest.mark.parametrize("name", MACHINES)
def test_a_named_board_that_is_absent_is_refused_and_never_replaced(name, tmp_path):
    with pytest.raises(MachineError, match="HW=cpu") as error:
        hardware.choose(name, root=tmp_path)
    assert error.value.code == 4
    assert f"{hardware.get(name).nodes} node" in error.value.what
    assert "found none" in error.value.what
    dry = hardware.choose(name, require_present=False, root=tmp_path)
    assert dry.hardware.name == name
    assert dry.nodes == ()
    assert "not on this machine" in dry.reason


def test_another_card_than_the_named_one_is_refused_with_what_was_found(tmp_path):
    root = fake_machine(tmp_path, ["n150"])
    with pytest.raises(MachineError, match="found 1 x n150 at /dev/tenstorrent/0"):
        hardware.choose("p150", root=root)
    with pytest.raises(MachineError, match="4 nodes of n300"):
        hardware.choose("t3k", root=root)


def test_a_machine_without_cards_trains_on_cpu_and_says_why(tmp_path):
    choice = hardware.choose(None, root=tmp_path)
    assert choice.hardware.name == "cpu"
    assert "no /dev/tenstorrent" in choice.reason
    assert hardware.choose("cpu-x2", root=tmp_path).hardware.chips == 2


@pytest.mark.parametrize(
    ("cards", "name", "why"),
    [
        (["n150"] * 3, "n150", "3 x n150"),  # the largest board that they make up
        (["n300"] * 3, "n300", "3 x n300"),
        (["p150a", "p150b"], "p150", "1 x p150a, 1 x p150b"),
        (["p300c"] * 3, "p300c", "3 x p300c"),
        (["p300c"], "cpu", "no board"),  # half a card
        (["galaxy-blackhole"] * 32, "cpu", "no board"),
        ([None], "cpu", "unknown type"),
        (["n150", "p150a"], "cpu", "several kinds"),
    ],
)
def test_machines_that_are_no_single_board(cards, name, why, tmp_path):
    choice = hardware.choose(None, root=fake_machine(tmp_path, cards))
    assert choice.hardware.name == name
    assert why in choice.reason
    assert len(choice.nodes) == hardware.get(name).nodes


def test_one_card_of_a_quietbox_is_one_card(tmp_path):
    root = fake_machine(tmp_path, ["p300c"] * 4, serials=["a", "b", "a", "b"])
    assert hardware.choose("p300c", root=root).nodes == ("/dev/tenstorrent/0", "/dev/tenstorrent/2")
    assert len(hardware.choose("qb2", root=root).nodes) == 4


def test_a_named_board_whose_type_cannot_be_read_is_taken_at_its_word(tmp_path):
    choice = hardware.choose("n150", root=fake_machine(tmp_path, [None]))
    assert choice.nodes == ("/dev/tenstorrent/0",)
    assert "not readable" in choice.reason


def test_a_card_that_has_no_node_is_named(tmp_path):
    fake_machine(tmp_path, ["n150"])
    (tmp_path / "dev/tenstorrent/0").unlink()
    with pytest.raises(MachineError, match="tenstorrent!0 without a node"):
        hardware.choose("n150", root=tmp_path)


def test_our_descriptors_have_the_mesh_of_their_board():
    ours = {path.stem for path in OURS.iterdir()}
    boards = {hw.mesh_graph_descriptor: hw for hw in hardware.table().values() if hw.mesh_graph_descriptor in ours}
    assert set(boards) == ours, "each is some board's"
    for name, hw in boards.items():
        check_descriptor(OURS / f"{name}.textproto", hw.mesh_shape)
        assert f"arch: {hw.arch.upper()}\n" in (OURS / f"{name}.textproto").read_text()
    for hw in hardware.table().values():
        if hw.chips > 2 and not hw.is_cpu:
            assert hw.mesh_graph_descriptor in ours, f"{hw.name}: tt-metal ships none that fits"
