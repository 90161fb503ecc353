"""Every short run on a CPU that a recipe recorded bit for bit, trained again; minutes.

    python -m ci.golden             grade each (`make golden`); OUT is the folder of the runs, else a temporary one
    python -m ci.golden --record    from a clean tree: record each anew, with the band of two runs that may stray
    python -m ci.golden --check     code 6 where a recorded figure is of another lock or image than today's

On the kind of CPU that an entry of results.yaml is of, with its lock, every bit must be the same; elsewhere the entry's
band decides; code 6 where a figure fails. An entry becomes one of these by `recipe run NAME --hw cpu --steps 20 ...`,
then `recipe grade RUN --record`; so are figures of a board, on that board.

A new lock can bring other bits, so goldens change in the same pull request as the lock, where their change is read.
"""

from __future__ import annotations

import os
import shlex
import subprocess
import sys
import tempfile
from collections.abc import Iterator
from pathlib import Path

import click

from ci import docs
from ci.command import run
from common import hardware
from common.errors import VerificationError
from common.files import sha256_file
from common.paths import ROOT
from tools.containers import images
from tools.results.schema import Measured
from tools.runs.folder import runs_in

LONGEST = 50  # steps
STRAYS = ("device_config.threads=2", "training_config.precision=bf16-mixed")  # what the band of a golden is taken from


def measured(root: Path) -> Iterator[tuple[str, Measured]]:
    """Each recipe's name with each entry that a run of this repository made."""
    for folder, results in docs.recipes(root).items():
        yield from ((folder.name, entry) for entry in results.entries if isinstance(entry, Measured))


def golden_runs(root: Path) -> Iterator[tuple[str, list[str]]]:
    """Each recipe's name, with the words after `recipe run NAME` that its entry was recorded with."""
    for name, entry in measured(root):
        if entry.exact and hardware.get(entry.board).is_cpu and entry.steps and entry.steps <= LONGEST:
            sets = [word for override in entry.overrides for word in ("--set", override)]
            yield name, ["--hw", entry.board, "--steps", str(entry.steps), *sets]


def recipe(*words: str) -> None:
    """`recipe WORDS`; ends this process with its code where that is not 0."""
    print("+ recipe", shlex.join(words), flush=True)
    code = subprocess.run([sys.executable, "-m", "tools.cli", *words], cwd=ROOT, check=False).returncode
    if code:
        raise SystemExit(code)


def train(out: Path, name: str, *words: str) -> str:
    """Train a golden; the run's folder, which `recipe grade` takes."""
    recipe("run", name, *words, "--resume", "never", "--out", str(out))
    return str(next(runs_in(out)).folder)


def grade(out: Path) -> None:
    """Train every golden and hold it against what is recorded."""
    found = list(golden_runs(ROOT))
    for number, (name, words) in enumerate(found):
        recipe("grade", train(out / f"{number:02d}-{name}", name, *words))
    if not found:
        print(f"no recipe here has recorded a run of at most {LONGEST} steps bit for bit: nothing to grade")


def record(out: Path) -> None:
    """Train every golden and its strays, then write them into results.yaml and the tables."""
    for number, (name, words) in enumerate(golden_runs(ROOT)):
        golden = train(out / f"{number:02d}-{name}", name, *words)
        others = [train(out / f"{number:02d}-{stray}", name, *words, "--set", stray) for stray in STRAYS]
        recipe("grade", golden, "--record", *(word for other in others for word in ("--band-from", other)))
    docs.main()


def stale(root: Path) -> Iterator[str]:
    """Each measured entry whose bits are of other packages, or whose image is not the board's of today."""
    locks = {sha256_file(path) for path in (root / "requirements").glob("cpu-*.txt")}
    targets = images.read_lock()["targets"]
    for name, entry in measured(root):
        what, digest = f"{name} on {entry.board}, {entry.what}", targets[hardware.get(entry.board).image]["digest"]
        if entry.exact and entry.exact.lock_sha256 not in locks:
            yield f"{what}: recorded with the lock {entry.exact.lock_sha256[:12]}, which is none of today's"
        if entry.image and digest and not entry.image.endswith(digest):
            yield f"{what}: recorded in {entry.image}, today's image is {digest}"


def check() -> None:
    """Say which figures must be recorded again. Raises VerificationError where there are any."""
    found = list(stale(ROOT))
    for line in found:
        click.echo(f"- {line}")
    if found:
        raise VerificationError(
            f"of another lock or image than today's: {len(found)}",
            where="recipes/*/results.yaml",
            todo="python -m ci.golden --record; for a board's, a run there and `recipe grade RUN --record`",
        )
    click.echo("every recorded figure is of today's lock and images")


@click.command()
@click.option("--record", "recording", is_flag=True, help="Record the goldens anew.")
@click.option("--check", "checking", is_flag=True, help="Only say what must be recorded again.")
def main(recording: bool, checking: bool) -> None:
    """Train the goldens again and grade them."""
    if checking:
        check()
        return
    with tempfile.TemporaryDirectory(prefix="golden-") as scratch:
        (record if recording else grade)(Path(os.environ.get("OUT") or scratch))


if __name__ == "__main__":
    run(main)
