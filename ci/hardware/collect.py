"""What a job leaves behind: everything about its run and its machine but what is large."""

from __future__ import annotations

import importlib.util
import re
import shutil
from collections.abc import Iterator
from pathlib import Path

from ci.hardware.commands import ended, recipe, snapshot
from ci.hardware.job import Job, say
from ci.hardware.own import end_own
from ci.hardware.preflight import examine
from ci.hardware.summary import add, summary
from common.errors import RecipeError

ROOM_MB = 200  # that OUT may have; weights of a fine-tuned model alone are gigabytes
KERNEL = re.compile(r"tenstorrent|iommu|hugetlb|pcieport|aer:|out of memory|oom-kill", re.IGNORECASE)
KERNEL_LINES = 200  # about a board, the last ones: the rest of a host's log is nobody's business


def collect(job: Job) -> str:
    """Gather, write summary.md, move aside what makes OUT too large. What cannot be had is said, and fails nothing."""
    end_own(job)  # else its files would still change
    for what, gather in (("doctor", machine), ("the kernel's log", kernel_log), ("the report", report)):
        try:
            gather(job)
        except (RecipeError, OSError) as error:
            say(f"without {what}: {error}")
    left_out = list(lighten(job))
    add(job, list(summary(job, left_out)))
    return f"{job.out / 'summary.md'}" + (f"; left out: {'; '.join(left_out)}" if left_out else "")


def machine(job: Job) -> None:
    examine(job, "after")
    snapshot(job.out / "tt-smi-after.json")


def kernel_log(job: Job) -> None:
    """Many hosts let only root read it."""
    path = job.out / "dmesg.txt"
    code = ended(["dmesg"], 20, path) if shutil.which("dmesg") else 127
    printed = path.read_text("utf-8", "replace").splitlines() if code == 0 else []
    lines = [line for line in printed if KERNEL.search(line)][-KERNEL_LINES:]
    path.write_text("\n".join(lines or [f"nothing of a board (dmesg ends with {code})"]) + "\n")


def report(job: Job) -> None:
    """A run that hung or was killed has not written its own; drawing one needs more than a board's host has."""
    if job.run is None or (job.run / "report.html").is_file():
        return
    if importlib.util.find_spec("matplotlib") is None:
        say(f"no report.html: recipe report {job.run.name}, on any machine with the whole environment, makes it")
        return
    ended(recipe("report", str(job.run)), 120, job.out / "report.txt")


def lighten(job: Job) -> Iterator[str]:
    """Move the largest files of OUT to a folder beside it until ROOM_MB are not exceeded; say which."""
    files = sorted((path for path in job.out.rglob("*") if path.is_file()), key=size, reverse=True)
    total = sum(map(size, files))
    for path in files:
        if total <= ROOM_MB * 1e6:
            return
        place = aside(job) / path.relative_to(job.out)
        place.parent.mkdir(parents=True, exist_ok=True)
        path.rename(place)
        total -= size(place)
        yield f"{path.relative_to(job.out)} ({size(place) / 1e6:.0f} MB, now in {place.parent})"


def aside(job: Job) -> Path:
    """Beside OUT, on the same disk."""
    return job.out.with_name(f"{job.out.name}.left-out")


def size(path: Path) -> int:
    return path.lstat().st_size
