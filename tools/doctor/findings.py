"""What `recipe doctor` says of one thing it looked at, as text or JSON, and the error that all of it together means."""

from __future__ import annotations

import dataclasses
import json
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from common.errors import MachineError

FORMAT = 1  # of the JSON
VERDICTS = {True: "ok", False: "WRONG", None: "cannot be told"}


@dataclass(frozen=True)
class Diagnosis:
    """One thing that was looked at. `ok` is None where it cannot be told; `cure` says what to do where it is not.

    A `warning` is ok, nothing fails by it, and is shown with its cure all the same: it works, but nobody tested it.
    """

    id: str
    ok: bool | None
    evidence: str
    cure: str | None = None
    warning: bool = False

    @property
    def verdict(self) -> str:
        return "warning" if self.ok and self.warning else VERDICTS[self.ok]

    def lines(self) -> Iterator[str]:
        yield f"{self.verdict}: {self.id}: {self.evidence}"
        if self.cure and (self.warning or not self.ok):
            yield f"  to do: {self.cure}"


def as_json(findings: Sequence[Diagnosis], **more: Any) -> str:
    body: Mapping[str, Any] = {**more, "findings": [dataclasses.asdict(finding) for finding in findings]}
    return json.dumps({"format": FORMAT, **body}, indent=1)


def end(findings: Sequence[Diagnosis]) -> None:
    """Raise MachineError, with all of them in one message, where something is wrong."""
    bad = [finding for finding in findings if finding.ok is False]
    if bad:
        raise MachineError(
            "; ".join(finding.evidence for finding in bad),
            where=", ".join(finding.id for finding in bad),
            todo=bad[0].cure,
        )
