"""What a job leaves behind: everything about its run and its machine but what is large."""

from __future__ import annotations

import os
import shutil
from collections.abc import Iterator
from pathlib import Path

from ci.hardware.commands import kernel_log, snapshot
from ci.hardware.job import Job, say
from ci.hardware.own import end_own
from ci.hardware.preflight import examine
from ci.hardware.summary import add, summary
from common.errors import RecipeError
from common.files import utc_now

ROOM_MB = 200  # that OUT may have; weights of a fine-tuned model alone are gigabytes


def collect(job: Job) -> str:
    """Gather, write summary.md, move aside what makes OUT too large. What cannot be had is said, and fails nothing."""
    for what, gather in GATHERED.items():
        try:
            gather(job)
        except (RecipeError, OSError) as error:
            say(f"without {what}: {error}")
    left_out = list(lighten(job))
    add(job, list(summary(job, left_out)))
    return f"{job.out / 'summary.md'}" + (f"; left out: {'; '.join(left_out)}" if left_out else "")


def rest(job: Job) -> None:
    """A run that goes on would still change its files. What `recover` could not end, nobody can."""
    if "recover" not in job.phases:
        end_own(job)


def machine(job: Job) -> None:
    """The kernel's log, what doctor finds, and the cards."""
    kernel_log(job.out / "dmesg.txt")
    examine(job, "after")
    snapshot(job.out / "tt-smi-after.json")


GATHERED = {"the run's end": rest, "the machine": machine}


def lighten(job: Job) -> Iterator[str]:
    """Move the largest files of OUT elsewhere until ROOM_MB are not exceeded; say which, and where they are."""
    folder, stays = aside(job)
    sizes = {path: path.lstat().st_size for path in job.out.rglob("*") if path.is_file()}
    total = sum(sizes.values())
    for path, size in sorted(sizes.items(), key=lambda each: each[1], reverse=True):
        if total <= ROOM_MB * 1e6:
            return
        name = path.relative_to(job.out)
        place = folder / name
        try:
            place.parent.mkdir(parents=True, exist_ok=True)
            shutil.move(path, place)
        except OSError as error:
            yield f"{name} is too large, and cannot be moved to {place.parent}: {os.strerror(error.errno or 0)}"
            return
        total -= size
        yield f"{name} ({size / 1e6:.0f} MB, now in {place.parent}{stays})"


def aside(job: Job) -> tuple[Path, str]:
    """Where large files go, a folder for this job alone; and how long they stay."""
    if named := os.environ.get("RECIPES_LEFT_OUT"):
        began = utc_now().replace(":", "")
        return Path(named).expanduser().absolute() / f"{job.board.name}-{began}", ""
    return job.out.with_name(f"{job.out.name}.left-out"), ", and only as long as this checkout is kept"
