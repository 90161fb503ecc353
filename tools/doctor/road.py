"""The road from this machine to a training step: what `recipe doctor` found missing, in the order it is done in."""

from __future__ import annotations

import dataclasses
from collections.abc import Iterator, Sequence

from common.hardware import Hardware
from tools.doctor.findings import Diagnosis

# A later step needs the earlier ones: no node without a driver, no build without an engine. What is not named here
# (this Python, a descriptor, disks) comes after these, as nothing of these needs it.
ORDER = (
    *("board.driver", "board.nodes", "board.firmware", "board.memory"),
    *("engine.answers", "engine.pins", "engine.builds", "engine.image", "data.fetched"),
)
TO_DO = ("engine.image", "data.fetched")  # no fault of a machine, yet a run needs them


@dataclasses.dataclass(frozen=True)
class Step:
    """One thing to do: the id of its finding, why, and the command or the words that say how."""

    id: str
    why: str
    do: str


def steps(found: Sequence[Diagnosis], hw: Hardware, contained: bool) -> list[Step]:
    """Return what is still to be done before a training step on a board, and last the run itself."""
    ours = (*ORDER, *(finding.id for finding in found if finding.id not in ORDER))
    missing = [
        finding for finding in found if finding.ok is False or (finding.id in TO_DO and needed(finding, contained))
    ]
    way = [
        Step(finding.id, finding.evidence, finding.cure or "recipe doctor says no more of it")
        for finding in sorted(missing, key=lambda finding: ours.index(finding.id))
    ]
    return [*way, run(hw, contained, {step.id for step in way})]


def needed(finding: Diagnosis, contained: bool) -> bool:
    """Return whether a finding that is no fault is still a step of the road."""
    return not finding.ok and (contained or finding.id != "engine.image")


def run(hw: Hardware, contained: bool, before: set[str]) -> Step:
    """Return the last step: the command that trains, which does by itself what it can of the steps before it."""
    words = f"make recipe-finetune HW={hw.name}"
    if contained:
        words += " CONTAINER=1" if hw.is_cpu else ""
        words += " BUILD=1" if "engine.image" in before else ""
    elif not hw.is_cpu:
        words += " CONTAINER=0"
    does = [name for id, name in (("engine.image", "the image"), ("data.fetched", "the downloads")) if id in before]
    return Step("run", f"it trains, and sees to {' and '.join(does)} first" if does else "it trains", words)


def lines(road: Sequence[Step], hw: Hardware) -> Iterator[str]:
    """Yield the road as text, a step in two lines."""
    yield f"the road to a training step on {hw.name}:"
    for number, step in enumerate(road, 1):
        yield f"  {number}. {step.id}: {step.why}"
        yield f"     {step.do}"
