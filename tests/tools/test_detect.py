"""Boards as they are detected on faked machines, and the choice of a run's hardware."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import pytest

from common import hardware
from common.errors import MachineError
from tests.doubles.machines import MACHINES, fake_machine
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
    assert unset.hardware == named.hardware == hardware.get(name)
    assert unset.nodes == named.nodes == hardware.get(name).device_nodes
    assert MACHINES[name][0] in unset.reason
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
def test_machines_that_are_no_single_board(cards, name, why, tmp_path, choose):
    choice = choose(fake_machine(tmp_path, cards), None)
    assert choice.hardware.name == name
    assert why in choice.reason
    assert len(choice.nodes) == hardware.get(name).nodes


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
