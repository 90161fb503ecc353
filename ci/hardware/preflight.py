"""Is this machine fit to train on its board? Looked at before a job, and after each reset."""

from __future__ import annotations

import json
import os
from pathlib import Path

from ci.hardware.commands import ended, recipe, snapshot
from ci.hardware.job import Job
from common.errors import MachineError
from tools.doctor import findings
from tools.doctor.findings import Diagnosis
from tools.doctor.machine import room

DOCTOR_SECONDS = 60


def preflight(job: Job) -> str:
    """Raises MachineError naming what is wrong."""
    refuse_quarantined()
    found = [*examine(job, "before"), room("disk.out", job.out)]
    findings.end(found)
    found.append(snapshot(job.out / "tt-smi-before.json"))  # only now: it opens every card
    findings.end(found)
    facts = json.loads((job.out / "doctor-before.json").read_text("utf-8"))
    job.note(cards=[address for address in facts["host"]["pci"] if address], nodes=len(facts["host"]["nodes"]))
    others = (f"{finding.verdict}: {finding.id}" for finding in found if finding.warning or finding.ok is None)
    return "; ".join([f"{facts['why']}; nothing is wrong", *others])


def quarantine_file() -> Path:
    return Path(os.environ.get("RECIPES_QUARANTINE") or "/var/lib/recipes-runner/quarantine")


def refuse_quarantined() -> None:
    path = quarantine_file()
    if path.exists():
        raise MachineError(
            f"this machine is out of service: {'; '.join(path.read_text('utf-8').splitlines())}",
            where=str(path),
            todo="look at the board; when it is well again, remove that file",
        )


def examine(job: Job, name: str) -> list[Diagnosis]:
    """What `recipe doctor` finds for the job's board; its words go to `doctor-<name>.json`."""
    said, errors = job.out / f"doctor-{name}.json", job.out / f"doctor-{name}.txt"
    code = ended(recipe("doctor", "--hw", job.board.name, "--json", *job.where), DOCTOR_SECONDS, said, errors)
    try:
        return [Diagnosis(**item) for item in json.loads(said.read_text("utf-8"))["findings"]]
    except ValueError:
        how = "does not end" if code is None else f"ends with {code}"
        return [Diagnosis("doctor", False, f"recipe doctor {how}, and finds nothing", f"see {errors.name}")]
