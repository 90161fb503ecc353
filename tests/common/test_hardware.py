"""The table of boards."""

from __future__ import annotations

import math

import pytest

from common import hardware
from common.errors import UsageError
from engines.ttml.mesh import OURS, check_descriptor

ALL = [
    *("cpu", "cpu-x2", "n150", "n300", "n300x2", "t3k", "p100", "p150", "p150x2", "p150x4", "p150x8", "p300c", "qb2"),
    *("galaxy", "galaxy-bh", "galaxy-cf"),
]


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


def test_an_unknown_name_lists_the_boards_and_the_nearest():
    with pytest.raises(UsageError, match="did you mean n300") as error:
        hardware.get("N30O")
    assert all(name in str(error.value) for name in ALL)


def test_our_descriptors_have_the_mesh_of_their_board():
    ours = {path.stem for path in OURS.iterdir()}
    boards = [hw for hw in hardware.table().values() if hw.mesh_graph_descriptor in ours]
    assert {hw.mesh_graph_descriptor for hw in boards} == ours, "each is some board's"
    for hw in boards:
        path = OURS / f"{hw.mesh_graph_descriptor}.textproto"
        check_descriptor(path, hw.mesh_shape)
        assert f"arch: {hw.arch.upper()}\n" in path.read_text()
    for hw in hardware.table().values():
        if hw.chips > 2 and not hw.is_cpu:
            assert hw.mesh_graph_descriptor in ours, f"{hw.name}: tt-metal ships none that fits"
