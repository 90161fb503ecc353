"""make golden: every short run on a CPU that a recipe recorded bit for bit, trained again and graded; seconds.

On the kind of CPU that an entry of results.yaml is of, with its lock, every bit must be the same; elsewhere the entry's
band decides; code 6 where a figure fails. OUT is the folder of the runs (default: a temporary one).

An entry becomes one of these by `recipe run NAME --hw cpu --steps 20 ...`, then `recipe grade RUN --record`.
"""

from __future__ import annotations

import os
import shlex
import subprocess
import sys
import tempfile
from collections.abc import Iterator
from pathlib import Path

from ci.docs import ROOT, recipes
from common import hardware
from tools.results.schema import Measured
from tools.runs.folder import runs_in

LONGEST = 50  # steps


def golden_runs(root: Path) -> Iterator[tuple[str, list[str]]]:
    """Each recipe's name, with the words after `recipe run NAME` that its entry was recorded with."""
    for folder, results in recipes(root).items():
        for entry in results.entries:
            if not isinstance(entry, Measured) or not entry.exact or not hardware.get(entry.board).is_cpu:
                continue
            if entry.steps and entry.steps <= LONGEST:
                sets = [word for override in entry.overrides for word in ("--set", override)]
                yield folder.name, ["--hw", entry.board, "--steps", str(entry.steps), *sets]


def recipe(*words: str) -> None:
    """`recipe WORDS`; ends this process with its code where that is not 0."""
    print("+ recipe", shlex.join(words), flush=True)
    code = subprocess.run([sys.executable, "-m", "tools.cli", *words], cwd=ROOT, check=False).returncode
    if code:
        raise SystemExit(code)


def main(out: Path) -> None:
    found = list(golden_runs(ROOT))
    for number, (name, words) in enumerate(found):
        here = out / f"{number:02d}-{name}"
        recipe("run", name, *words, "--resume", "never", "--out", str(here))
        recipe("grade", str(next(runs_in(here)).folder))
    if not found:
        print(f"no recipe here has recorded a run of at most {LONGEST} steps bit for bit: nothing to grade")


if __name__ == "__main__":
    with tempfile.TemporaryDirectory(prefix="golden-") as scratch:
        main(Path(os.environ.get("OUT") or scratch))
