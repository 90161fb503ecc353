"""Records the golden runs of `make golden` anew, each with the band of two runs that may stray; minutes.

    python -m ci.golden_record --check   code 6 where a recorded figure is of another lock or image than today's
    python -m ci.golden_record           from a clean tree: runs, records, shows each change, makes the tables

A new lock can bring other bits, so goldens change in the same pull request as the lock, where their change is read.
Figures of a board are recorded on that board, by `recipe grade RUN --record`.
"""

from __future__ import annotations

import tempfile
from collections.abc import Iterator
from pathlib import Path

import click

from ci import docs
from ci.command import run
from ci.golden import golden_runs, recipe
from common import hardware
from common.errors import VerificationError
from common.files import sha256_file
from tools.containers import images
from tools.results.schema import Measured
from tools.runs.folder import runs_in

STRAYS = ("device_config.threads=2", "training_config.precision=bf16-mixed")  # what the band of a golden is taken from


def stale(root: Path = docs.ROOT) -> Iterator[str]:
    """Each measured entry whose bits are of other packages, or whose image is not the board's of today."""
    locks = {sha256_file(path) for path in (root / "requirements").glob("cpu-*.txt")}
    targets = images.read_lock()["targets"]
    for folder, results in docs.recipes(root).items():
        for entry in results.numbers:
            if not isinstance(entry, Measured):
                continue
            name, digest = (
                f"{folder.name} on {entry.board}, {entry.what}",
                targets[hardware.get(entry.board).image]["digest"],
            )
            if entry.exact and entry.exact.lock_sha256 not in locks:
                yield f"{name}: recorded with the lock {entry.exact.lock_sha256[:12]}, which is none of today's"
            if entry.image and digest and not entry.image.endswith(digest):
                yield f"{name}: recorded in {entry.image}, today's image is {digest}"


def check() -> None:
    """Say which figures must be recorded again. Raises VerificationError where there are any."""
    found = list(stale())
    for line in found:
        click.echo(f"- {line}")
    if found:
        raise VerificationError(
            f"of another lock or image than today's: {len(found)}",
            where="recipes/*/results.yaml",
            todo="python -m ci.golden_record for the CPU's; for a board's, a run there and `recipe grade RUN --record`",
        )
    click.echo("every recorded figure is of today's lock and images")


def record(scratch: Path) -> None:
    """Run every golden and its strays, then write them into results.yaml and the tables."""
    for number, (name, words) in enumerate(golden_runs(docs.ROOT)):
        runs = []
        for place, stray in enumerate(("", *STRAYS)):
            out = scratch / f"{number:02d}-{place}"
            recipe("run", name, *words, *(("--set", stray) if stray else ()), "--resume", "never", "--out", str(out))
            runs.append(str(next(runs_in(out)).folder))
        golden, *others = runs
        recipe("grade", golden, "--record", *(word for other in others for word in ("--band-from", other)))
    docs.main()


@click.command()
@click.option("--check", "only_check", is_flag=True, help="Only say what must be recorded again.")
def main(only_check: bool) -> None:
    """Record the goldens anew, or say which must be."""
    if only_check:
        check()
        return
    with tempfile.TemporaryDirectory(prefix="golden-") as scratch:
        record(Path(scratch))


if __name__ == "__main__":
    run(main)
