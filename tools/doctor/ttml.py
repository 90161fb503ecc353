"""`recipe doctor --ttml`: every name of ttml that the backend relies on, and what the installed build is.

Nothing is changed or reset. What the machine itself lacks is tools/doctor/machine.py's.
"""

from __future__ import annotations

import os
import sys
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from typing import Any

from common.errors import MachineError, RecipeError
from common.hardware import Hardware
from engines.ttml.contract import ALL, contract, probe
from engines.ttml.engine import open_ttml
from engines.ttml.mesh import image_hint, prepare_environment
from tools.bringup.reference_llama import ARCHITECTURE, config_for
from tools.doctor import findings
from tools.doctor.findings import Diagnosis

STATUS = {True: "present", False: "missing", None: "cannot be told"}
NO_DEVICE = "not looked at: that needs an open device (without --no-device)"


@dataclass
class Ttml:
    """The installed ttml: findings, versions by name, and a row for each name of the contract."""

    findings: list[Diagnosis] = field(default_factory=list)
    build: dict[str, str] = field(default_factory=dict)
    names: list[dict[str, Any]] = field(default_factory=list)

    @property
    def missing(self) -> list[str]:
        return [row["name"] for row in self.names if row["required"] and row["status"] == STATUS[False]]


def print_ttml(hw: Hardware, reason: str, *, device: bool, as_json: bool, say: Callable[[str], None]) -> None:
    """Print what examine_ttml found. Raises MachineError where there is no ttml, or a finding is not ok."""
    if as_json:
        os.environ.setdefault("TT_LOGGER_LEVEL", "FATAL")  # tt-metal logs to standard output
    found = examine_ttml(hw, device)
    if as_json:
        say(findings.as_json(found.findings, hw=hw.name, why=reason, build=found.build, names=found.names))
    else:
        for line in (reason, *table(found)):
            say(line)
    findings.end(found.findings)


def examine_ttml(hw: Hardware, device: bool) -> Ttml:
    """Look for every name that the backend relies on; with `device`, open one and list a small Llama's parameters.

    Raises MachineError where there is no ttml, or one that is none of ours.
    """
    prepare_environment(hw, (1, 1))
    found = Ttml()
    try:
        build = probe(hw, 1)
    except MachineError as error:
        if "ttnn" not in sys.modules or not hasattr(sys.modules.get("ttml"), "autograd"):
            raise
        found.findings.append(Diagnosis("ttml.build", False, error.what, error.todo))
        parameters = None
        model = Diagnosis("ttml.model", None, "not looked at: the build is refused")
    else:
        found.build = build.versions()
        found.findings.append(Diagnosis("ttml.build", True, build.features))
        model, parameters = _small_model(hw) if device else (Diagnosis("ttml.model", None, NO_DEVICE), None)
    for row in contract(parameters):
        required = row["generations"] == ALL
        found.names.append({**row, "required": required, "status": STATUS[row["found"]]})
    found.findings += [_names(hw, found), model]
    return found


def _small_model(hw: Hardware) -> tuple[Diagnosis, list[str] | None]:
    """Return whether the small Llama has the parameters we map, and their names if it could be built."""
    names = None
    try:
        with open_ttml(hw, config_for(hw, (1, 1))) as backend:
            try:
                backend.build(ARCHITECTURE)
            finally:
                names = list(backend.weights) or None
    except RecipeError as error:
        return Diagnosis("ttml.model", False, error.what, error.todo), names
    except Exception as error:  # what ttml raises has no common class
        said = f"{type(error).__name__}: {' '.join(str(error).split())[:300]}"
        return Diagnosis("ttml.model", False, f"a small Llama cannot be built: {said}", image_hint(hw)), names
    return Diagnosis("ttml.model", True, f"a small Llama opens with {len(names or ())} parameters, all mapped"), names


def _names(hw: Hardware, found: Ttml) -> Diagnosis:
    required = [row for row in found.names if row["required"]]
    untold = sum(row["status"] == STATUS[None] for row in required)
    if found.missing:
        evidence = f"missing, of {len(required)} names that every build has: "
        cure = f"build tt-metal v0.74 or newer with tt-train; {image_hint(hw)}"
        return Diagnosis("ttml.names", False, evidence + ", ".join(found.missing), cure)
    return Diagnosis(
        "ttml.names", True, f"{len(required) - untold} names present, {untold} cannot be told, none missing"
    )


def table(found: Ttml) -> Iterator[str]:
    """Yield for people: the build, a line for each name, then the diagnoses."""
    yield from (f"{name}: {version}" for name, version in found.build.items())
    width = max(len(row["name"]) for row in found.names)
    yield f"{'':14}  {'name':{width}}  generations  needed for"
    for row in found.names:
        # What other builds have instead is no lack of this one.
        status = row["status"] if row["required"] or row["found"] else "not here"
        yield f"{status:14}  {row['name']:{width}}  {row['generations']:11}  {row['needed_for']}"
    for finding in found.findings:
        yield from finding.lines()
