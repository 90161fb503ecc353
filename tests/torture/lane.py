"""`python -m tests.torture.lane FOLDER`: lives, one after the other, in forks of this process; asked for line by line.

Everything that a victim needs is imported before the first of them that is hit; nothing is computed here, and no
thread is started, so that a fork is what a process of its own would be.
"""

from __future__ import annotations

import dataclasses
import importlib
import json
import os
import sys
from pathlib import Path
from typing import Any

from tests.torture import victim, watch
from tests.torture.life import Fault, Profile, Subject, live, unbroken
from tests.torture.planted import FAULTS

LEFT_OUT = ("__main__", "ttml", "ttnn")


def main() -> None:
    """Read what to do from standard input, one JSON object a line; answer each with one."""
    place = Path(sys.argv[1])
    plan = json.loads((place.parent / "plan.json").read_text(encoding="utf-8"))
    subjects = {subject["name"]: Subject(**subject) for subject in plan["subjects"]}
    profiles: dict[str, Profile] = {}
    library = os.environ.pop("LD_PRELOAD", None)  # it is in this process and its forks; what they execute needs none
    if plan["watched"] and not watch.loaded():
        raise SystemExit(f"{library} was not loaded: set TMPDIR to a folder whose file system is not mounted noexec")
    answers, sys.stdout = sys.stdout, sys.stderr
    victim.mark_phases()
    victim.fork_ranks()
    if plan["fault"]:
        FAULTS[plan["fault"]]()
    for line in sys.stdin:
        task: dict[str, Any] = json.loads(line)
        subject = subjects[task["subject"]]
        kept = place.parent / f"{subject.name.replace('/', '-')}.json"
        warm(place.parent / "modules.txt")
        if "life" not in task:
            answer = profiled(subject, place, kept)
        else:
            if subject.name not in profiles:
                profiles[subject.name] = Profile(**json.loads(kept.read_text(encoding="utf-8")))
            answer = live(subject, task["life"], plan["seed"], profiles[subject.name], place / "life").to_json()
        print(json.dumps(answer), file=answers, flush=True)


def profiled(subject: Subject, place: Path, kept: Path) -> dict[str, Any]:
    """Train `subject` unbroken, and keep what came of it."""
    victim.MODULES = place.parent / "modules.txt"
    try:
        profile = unbroken(subject, place / "life")
    except Fault as fault:
        screen = (place / "life" / "calls.screen").read_text(encoding="utf-8", errors="replace")
        return {"subject": subject.name, "fault": f"{fault}\n{screen[-4000:]}"}
    finally:
        victim.MODULES = None
    kept.write_text(json.dumps(dataclasses.asdict(profile)), encoding="utf-8")
    return {"subject": subject.name, "fault": None}


def warm(names: Path) -> None:
    """Import what earlier victims had imported at their ends."""
    for name in dict.fromkeys(names.read_text(encoding="utf-8").split() if names.is_file() else []):
        if name not in sys.modules and name.partition(".")[0] not in LEFT_OUT:
            try:
                importlib.import_module(name)
            except BaseException:  # a recipe's own, say, which no path leads to
                continue
    threads = len(list(Path("/proc/self/task").iterdir()))
    assert threads == 1, f"{threads} threads before a fork"


if __name__ == "__main__":
    main()
