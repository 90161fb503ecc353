"""summary.md: what the job did, and what its run was held against; the page of the workflow run has it, too."""

from __future__ import annotations

import json
import os
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from ci.hardware.job import Job
from common import known_errors
from tools.doctor.findings import Diagnosis
from tools.runs.folder import read_run


def add(job: Job, lines: list[str]) -> None:
    """Append to summary.md, and to the page."""
    text = "\n".join(lines) + "\n\n"
    page = os.environ.get("GITHUB_STEP_SUMMARY")
    for path in (job.out / "summary.md", *([Path(page)] if page else [])):
        with path.open("a", encoding="utf-8") as file:
            file.write(text)


def summary(job: Job, left_out: list[str]) -> Iterator[str]:
    """The job so far: its phases, the grade, the run, the machine, and what of it is not in OUT."""
    steps = f", {job.steps} steps" if job.steps else ""
    yield f"# {job.recipe} on {job.board.name}{steps}: {verdict(job)}"
    yield ""
    yield "| phase | code | |"
    yield "|---|---|---|"
    for name, phase in job.phases.items():
        if "code" in phase:
            yield f"| {name} | {phase['code']} | {cell(phase['said'])} |"
        elif name != "collect":
            yield f"| {name} | | it was killed, or goes on |"
    yield ""
    yield from grade_lines(job)
    yield from run_lines(job)
    yield from machine_lines(job)
    if left_out:
        yield "Left out, as large: " + "; ".join(left_out)


def verdict(job: Job) -> str:
    """In a word or two: what the job comes to."""
    phases = job.phases
    bad = next((name for name, phase in phases.items() if phase.get("code", 0) != 0), None)
    killed = next((name for name, phase in phases.items() if "code" not in phase and name != "collect"), None)
    if bad or killed:
        return f"FAILED in {bad or killed}"
    if "grade" not in phases:
        return "NOT TRAINED" if "train" not in phases else "NOT GRADED"
    return str(phases["grade"]["said"]).partition(":")[0]


def cell(text: str) -> str:
    return " ".join(text.split()).replace("|", r"\|").replace("<", "&lt;")


def read(job: Job, name: str) -> dict[str, Any]:
    """A JSON of this job; nothing where it did not come to that."""
    try:
        found: dict[str, Any] = json.loads((job.out / name).read_text("utf-8"))
    except (OSError, ValueError):
        found = {}
    return found


def grade_lines(job: Job) -> Iterator[str]:
    """What was held against what."""
    grade = read(job, "grade.json")
    if "entry" in grade:
        entry = grade["entry"]
        yield f"Held against: {cell(entry['what'])} ({entry['evidence']})"
        yield ""
        yield "| verdict | figure | |"
        yield "|---|---|---|"
        for line in grade["lines"]:
            yield f"| {line['verdict']} | {line['figure']} | {cell(line['says'])} |"
        yield ""
    elif "recorded" in grade:
        known = "; ".join(f"{entry['board']}: {entry['what']}" for entry in grade["recorded"])
        yield f"Held against nothing. Recorded of this recipe: {cell(known) or 'nothing'}"
        yield ""


def run_lines(job: Job) -> Iterator[str]:
    """What ran, and what its log is known to mean."""
    if job.run is None:
        return
    run = read_run(job.run)
    fact = run.fact
    yield f"Run `{run.name}`: {cell(str(fact('exit_reason') or 'it did not end'))}"
    changes = " with changes" if fact("git_dirty") else ""
    image = run.image or "none, this machine's own Python"
    yield f"- commit `{fact('git_commit')}`{changes}; image: {cell(image)}"
    engine = cell(str(fact("backend", "backend")))
    yield f"- engine: {engine}, {fact('backend', 'world')} devices; {cell(str(fact('host')))}"
    log = run.folder / "train.log"
    lines = log.read_text("utf-8", "replace").splitlines() if log.is_file() else []
    for known in {row.id: row for line in lines if (row := known_errors.match(line))}.values():
        yield f"- its log says {known.id}: {known.means}; {known.answer}"
    yield ""


def machine_lines(job: Job) -> Iterator[str]:
    """What doctor found wrong or could not tell, before, where it failed, and after."""
    for name in ("before", "failed", "after"):
        for item in read(job, f"doctor-{name}.json").get("findings", ()):
            found = Diagnosis(**item)
            if found.ok is not True or found.warning:
                yield f"- {name}: {found.verdict}: {found.id}: {cell(found.evidence)}"
    yield ""
