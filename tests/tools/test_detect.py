"""Boards as they are detected on faked machines, and the choice of a run's hardware."""

from __future__ import annotations

import contextlib
import os
from collections.abc import Callable
from pathlib import Path

import pytest

from common import hardware
from common.errors import MachineError
from tests.doubles.machines import MACHINES, fake_machine, pci
from tools.machine import detect


@pytest.fixture
def choose(monkeypatch) -> Callable[..., detect.Choice]:
    """`detect.choose` on the machine below a folder."""

    def on(root: Path, name: str | None, **options: bool) -> detect.Choice:
        monkeypatch.setenv("RECIPES_SYSFS_ROOT", str(root))
        return detect.choose(name, **options)

    return on


@pytest.mark.parametrize("name", MACHINES)
def test_every_board_is_detected_and_chosen(name, tmp_path, monkeypatch):
    monkeypatch.setenv("RECIPES_SYSFS_ROOT", str(fake_machine(tmp_path, MACHINES[name])))
    unset, named = detect.choose(None), detect.choose(name)
    assert named.hardware == hardware.get(name)
    assert named.nodes == hardware.get(name).device_nodes
    if named.hardware.only_named:
        assert f"they are also HW={name}" in unset.reason
    else:
        assert (unset.hardware, unset.nodes) == (named.hardware, named.nodes)
    assert f"{len(MACHINES[name])} x {MACHINES[name][0]}" in unset.reason
    assert "HW is not set" in unset.reason
    assert "as named" in named.reason


@pytest.mark.parametrize("name", MACHINES)
def test_a_named_board_that_is_absent_is_refused_and_never_replaced(name, tmp_path, choose):
    with pytest.raises(MachineError, match="HW=cpu") as error:
        choose(tmp_path, name)
    assert error.value.code == 4
    assert f"{hardware.get(name).nodes} node" in error.value.what
    assert "found none" in error.value.what
    dry = choose(tmp_path, name, require_present=False)
    assert dry.hardware.name == name
    assert dry.nodes == ()
    assert "not on this machine" in dry.reason


def test_another_card_than_the_named_one_is_refused_with_what_was_found(tmp_path, choose):
    root = fake_machine(tmp_path, ["n150"])
    with pytest.raises(MachineError, match="found 1 x n150 at /dev/tenstorrent/0"):
        choose(root, "p150")
    with pytest.raises(MachineError, match="4 nodes of n300"):
        choose(root, "t3k")


def test_a_machine_without_cards_trains_on_cpu_and_says_why(tmp_path, choose):
    choice = choose(tmp_path, None)
    assert choice.hardware.name == "cpu"
    assert "no /dev/tenstorrent" in choice.reason
    assert choose(tmp_path, "cpu-x2").hardware.chips == 2


def test_a_card_without_a_node_is_no_reason_for_the_cpu(tmp_path, choose):
    root = fake_machine(tmp_path, ["n150"])
    (root / "dev/tenstorrent/0").unlink()
    with pytest.raises(MachineError, match="sysfs lists tenstorrent!0 without a node") as caught:
        choose(root, None)
    assert "HW=cpu" in str(caught.value.todo)
    assert choose(root, "cpu").hardware.name == "cpu"


@pytest.mark.parametrize(
    ("cards", "name", "why"),
    [
        (["n150"] * 3, "n150", "3 x n150"),  # the largest board that they make up
        # Whether a cable joins two cards cannot be seen; over two that are not joined training would hang.
        (["n300"] * 3, "n300", "they are also HW=n300x2 (two n300 cards, cabled to each other)"),
        (["n300"] * 5, "t3k", "; they are also HW=n300 ("),
        (["p150a", "p150b"], "p150", "1 x p150a, 1 x p150b"),
        (["p150b"] * 7, "p150x4", "7 x p150b"),
        (["p300c"] * 3, "p300c", "3 x p300c"),
        (["p300b"] * 4, "qb2", "4 x p300b"),
        (["n300 L"], "n300", "1 x n300"),  # tt-smi's words
        (["bh-scrappy"], "p100", "bh-scrappy"),
        (["tt-galaxy-wh L"] * 32, "galaxy", "32 x tt-galaxy-wh"),
        (["tt-galaxy-bh"] * 32, "galaxy-bh", "32 x tt-galaxy-bh"),
    ],
)
def test_cards_of_one_kind_are_the_largest_board_that_they_make_up(cards, name, why, tmp_path, choose):
    choice = choose(fake_machine(tmp_path, cards), None)
    assert choice.hardware.name == name
    assert why in choice.reason
    assert len(choice.nodes) == hardware.get(name).nodes


@pytest.mark.parametrize(
    ("cards", "why", "todo"),
    [
        (["p300c"], "p300c is a part of p300c, which has 2 nodes", "train on the CPU twin: HW=cpu"),
        (["galaxy-wormhole"] * 8, "galaxy-wormhole is a part of galaxy, which has 32 nodes", "HW=cpu"),
        (["unknown-0x0303"], "unknown-0x0303 is in no row of common/hardware.yaml", "HW=cpu; or add a row"),
        (["unknown"], "unknown-0x0040 is in no row", "HW=cpu"),
        (["p800x"], "p800x is in no row", "HW=cpu"),
        ([None], "the driver does not say of what type a card is", "name the board: HW=<its name"),
        (["n150", "p150a"], "boards of several kinds", "name the board: HW=n150 or HW=p150; or"),
        (["n150", "p300c"], "p300c is a part of p300c", "name the board: HW=n150; or"),
    ],
)
@pytest.mark.parametrize("require_present", [True, False])
def test_cards_that_are_no_board_are_never_answered_with_a_cpu(cards, why, todo, require_present, tmp_path, choose):
    root = fake_machine(tmp_path, cards)
    with pytest.raises(MachineError) as error:
        choose(root, None, require_present=require_present)
    assert "HW is not set" in error.value.what
    assert why in error.value.what
    assert todo in str(error.value.todo)
    assert choose(root, "cpu").hardware.is_cpu


# --- TT_VISIBLE_DEVICES: tt-umd's PCIDevice::enumerate_devices ------------------------------------------------------


@pytest.mark.parametrize(
    ("words", "indices"),
    [
        ("0", [0]),
        ("3,1", [1, 3]),
        (" 1 , 1 ", [1]),
        ("0000:02:00.0", [1]),
        ("0000:0", [0, 1, 2, 3]),  # a part of an address takes every node that has it
        ("03:00.0,2", [2]),  # the same card twice
        (",", []),
        ("", []),
    ],
)
def test_what_tt_visible_devices_leaves(words, indices, tmp_path, monkeypatch):
    monkeypatch.setenv("RECIPES_SYSFS_ROOT", str(fake_machine(tmp_path, ["n300"] * 4)))
    monkeypatch.setenv("TT_VISIBLE_DEVICES", words)
    assert [node.index for node in detect.nodes()] == indices


@pytest.mark.parametrize("words", ["4", "n150", "0000:99:00.0", "0000:0A", "0,x", "-1", "0:g"])
def test_a_device_that_is_not_here_is_refused_by_its_name(words, tmp_path, choose, monkeypatch):
    monkeypatch.setenv("TT_VISIBLE_DEVICES", words)
    root = fake_machine(tmp_path, ["n300"] * 4)
    for name in (None, "n300"):
        with pytest.raises(MachineError, match="is no device of this machine") as error:
            choose(root, name)
        assert error.value.where == f"TT_VISIBLE_DEVICES={words}"
        assert "3 is 0000:04:00.0 (/dev/tenstorrent/3)" in str(error.value.todo)


def test_numbers_count_the_cards_that_are_here_by_their_addresses_and_not_by_their_nodes(tmp_path, choose, monkeypatch):
    root = fake_machine(tmp_path, ["n150", "p150a", "n150"])
    for index, other in ((0, 2), (2, 0)):  # as after a reset, which numbers nodes anew
        link = root / f"sys/class/tenstorrent/tenstorrent!{index}/device"
        link.unlink()
        link.symlink_to(root / f"sys/devices/{pci(other)}")
    (root / "dev/tenstorrent/1").unlink()
    monkeypatch.setenv("TT_VISIBLE_DEVICES", "1")  # of 0000:01:00.0, which is node 2, and 0000:03:00.0, which is node 0
    choice = choose(root, None)
    assert (choice.hardware.name, choice.nodes) == ("n150", ("/dev/tenstorrent/0",))
    assert "/dev/tenstorrent/0 (with TT_VISIBLE_DEVICES=1)" in choice.reason


def test_a_board_is_detected_named_and_missed_among_what_is_visible(tmp_path, choose, monkeypatch):
    root = fake_machine(tmp_path, ["n300"] * 4)
    monkeypatch.setenv("TT_VISIBLE_DEVICES", "1,3")
    assert choose(root, None).hardware.name == "n300"
    assert choose(root, "n300x2").nodes == ("/dev/tenstorrent/1", "/dev/tenstorrent/3")
    assert choose(root, "n300").nodes == ("/dev/tenstorrent/1",)
    with pytest.raises(MachineError, match=r"found 2 x n300 at /dev/tenstorrent/1, 3 \(with TT_VISIBLE_DEVICES=1,3\)"):
        choose(root, "t3k")
    monkeypatch.setenv("TT_VISIBLE_DEVICES", "")
    choice = choose(root, None)
    assert choice.hardware.name == "cpu"
    assert "TT_VISIBLE_DEVICES=" in choice.reason


def test_one_card_of_a_quietbox_is_one_card(tmp_path, choose):
    root = fake_machine(tmp_path, ["p300c"] * 4, serials=["a", "b", "a", "b"])
    assert choose(root, "p300c").nodes == ("/dev/tenstorrent/0", "/dev/tenstorrent/2")
    assert len(choose(root, "qb2").nodes) == 4


def test_a_named_board_whose_type_cannot_be_read_is_taken_at_its_word(tmp_path, choose):
    choice = choose(fake_machine(tmp_path, [None]), "n150")
    assert choice.nodes == ("/dev/tenstorrent/0",)
    assert "not readable" in choice.reason


def test_a_card_that_has_no_node_is_named(tmp_path, choose):
    fake_machine(tmp_path, ["n150"])
    (tmp_path / "dev/tenstorrent/0").unlink()
    with pytest.raises(MachineError, match="tenstorrent!0 without a node"):
        choose(tmp_path, "n150")


def test_what_opens_devices_sees_the_board_s_own_and_no_other(tmp_path, monkeypatch):
    """tt-metal opens every card that it sees: a p300c's run would open both cards of a QuietBox 2."""
    monkeypatch.setenv("RECIPES_SYSFS_ROOT", str(fake_machine(tmp_path, ["p300c"] * 4, serials=["a", "b", "a", "b"])))
    card, box = (detect.choose(name).nodes for name in ("p300c", "qb2"))
    with detect.alone(card):
        assert os.environ["TT_VISIBLE_DEVICES"] == "0000:01:00.0,0000:03:00.0"
        assert tuple(node.path for node in detect.nodes()) == card
    with detect.alone(box):
        assert "TT_VISIBLE_DEVICES" not in os.environ, "that is all there is"
    monkeypatch.setenv("TT_VISIBLE_DEVICES", "0,1,2")
    with contextlib.suppress(RuntimeError), detect.alone(detect.choose("p300c").nodes):
        assert os.environ["TT_VISIBLE_DEVICES"] == "0000:01:00.0,0000:03:00.0"
        raise RuntimeError
    assert os.environ["TT_VISIBLE_DEVICES"] == "0,1,2", "as it was, whatever ended it"
    monkeypatch.delenv("TT_VISIBLE_DEVICES")
    (tmp_path / "sys/class/tenstorrent/tenstorrent!2/device").unlink()
    with detect.alone(("/dev/tenstorrent/0", "/dev/tenstorrent/2")):
        assert "TT_VISIBLE_DEVICES" not in os.environ, "a card without an address cannot be named"
