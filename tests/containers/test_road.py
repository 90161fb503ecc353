"""`make rehearse ROAD=1`: from a clean clone to a checkpoint with one command, and the one message of a break.

The others of BREAKS are minutes each: `make rehearse ROAD=1 FAULT=...`, and marked slow here.
"""

from __future__ import annotations

import os
from pathlib import Path

import pytest

from ci.rehearse import road
from ci.rehearse.road import BREAKS, NOTHING, Arrival, Break, travel
from common.errors import UsageError
from common.paths import ROOT
from tools.containers.build import LOCAL_BASE
from tools.containers.docker import inspect_image

QUICK = ("old-firmware", "few-pages", "no-tt-smi", "unknown-authority")


@pytest.fixture
def place(base_image: str, the_only_board: None, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A folder to rehearse in. What this checkout has of wheels is not downloaded again; each still has its hash."""
    if os.getuid():
        pytest.skip("only root can make device nodes")
    if inspect_image(LOCAL_BASE) is None:
        pytest.skip(f"this engine has no {LOCAL_BASE} (ci/engine.sh makes it)")
    monkeypatch.setenv("PIP_FIND_LINKS", str(ROOT / "docker/wheelhouse"))
    return tmp_path


def test_one_command_goes_from_a_clone_to_a_checkpoint(place: Path) -> None:
    arrival = travel(place, NOTHING)
    assert arrival.is_that_of(NOTHING)
    for step in ("setup: ready in", "it is built now", "[ttml-builder 6/8] RUN", "n150: sha256:", "step 2/2  loss "):
        assert step in arrival.said
    assert arrival.said.index("it is built now") < arrival.said.index("HW=n150 trains on ttml")


@pytest.mark.parametrize(
    "name", [*QUICK, *(pytest.param(it, marks=pytest.mark.slow) for it in BREAKS if it not in QUICK)]
)
def test_a_break_is_answered_as_it_must_be(name: str, place: Path) -> None:
    arrival = travel(place, BREAKS[name])
    assert arrival.is_that_of(BREAKS[name]), arrival.said
    if name in ("old-firmware", "few-pages"):
        assert "buildx" not in arrival.said, "an hour of building is not begun on a host that cannot train"


BUILT = "#9 [ttml-builder 1/8] RUN"
ONE = "error: no such\n  where: here\n  to do: say CURE\n"
REFUSED = Break("x", "CURE")


@pytest.mark.parametrize(
    ("planted", "arrival", "as_it_must"),
    [
        (NOTHING, Arrival(0, BUILT, 1), True),
        (NOTHING, Arrival(0, BUILT, 0), False),
        (NOTHING, Arrival(5, BUILT, 1), False),
        (NOTHING, Arrival(0, "", 1), False),
        (BREAKS["published"], Arrival(0, "", 1), True),
        (BREAKS["published"], Arrival(0, BUILT, 1), False),
        (REFUSED, Arrival(4, ONE, 0), True),
        (REFUSED, Arrival(0, ONE, 0), False),
        (REFUSED, Arrival(4, ONE, 1), False),
        (REFUSED, Arrival(4, ONE + ONE, 0), False),
        (REFUSED, Arrival(4, ONE.replace("CURE", "nothing") + "CURE\n", 0), False),
    ],
)
def test_only_what_it_must_come_to_is_green(planted: Break, arrival: Arrival, as_it_must: bool) -> None:
    assert arrival.is_that_of(planted) is as_it_must


def test_a_fault_of_the_other_rehearsal_is_none_of_the_road(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("FAULT", "hung-step")
    with pytest.raises(UsageError, match=r"on the road(?s:.*)old-firmware"):
        road.main()
