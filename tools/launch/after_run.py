"""`recipe run` in the process that trains: the training, and then what the recipe wants made of the run's folder.

A recipe's train.py names these steps in `AFTER_RUN`, by the names in `STEPS`. They take the folder alone, so that a run
which was killed before its end goes on with them when the same command is given again.
"""

from __future__ import annotations

import contextlib
import shlex
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path

from common import config as configs
from common import recipe
from common.errors import MachineError, RecipeError, Stopped, UsageError
from common.train.console import LEVELS, Console
from common.train.ending import catch_signals, record_end, recorded_end
from common.train.launch import Launch
from common.train.manifest import Manifest
from tools.export.before_after import write_card
from tools.export.export import alone_with, export
from tools.export.record import read_record
from tools.export.unmoved import report_unmoved
from tools.report.pages import write_at_end
from tools.runs import trained
from tools.runs.folder import is_run
from tools.runs.trained import TrainedRun

ENDING = "ending as soon as this is over; once more to end at once"
STEPS: dict[str, Callable[[TrainedRun, Manifest, Console], object]] = {
    "export": lambda run, manifest, console: export(run, manifest, console.say),
    "before_after": lambda run, _manifest, console: write_card(run, console.say),
    "never_moved": report_unmoved,
}


def train_here(launch: Launch) -> None:
    """Train the recipe in this process, do what it names in AFTER_RUN, and write the run's page, however it ended."""
    script = recipe.load(launch.recipe_dir, "train")
    names = known_steps(getattr(script, "AFTER_RUN", ()), where=f"AFTER_RUN in {launch.recipe_dir / 'train.py'}")
    try:
        script.train(launch)
        folder = locked_by(launch.run, launch.out)
        if folder is None:
            raise MachineError(
                "the run's folder was taken over by another process",
                where=str(launch.out),
                todo="the same command does what is left to do",
            )
        after_run(folder, names)
    finally:
        write_page(launch)
    if "export" in names:
        say_next(folder)


def write_page(launch: Launch) -> None:
    """Write the page of the launch's run, where it came to be one. What fails here never hides how the run ended."""
    with contextlib.suppress(OSError, RecipeError):
        folder = locked_by(launch.run, launch.out)
        if folder and is_run(folder):
            with console_of(folder) as console:
                write_at_end(folder, console.say)


def say_next(folder: Path) -> None:
    """Say the command that talks to what the run made of its model, where its export can be served."""
    record = read_record(folder / "export")
    if record is None or not record["verified"]:
        return
    command = f"make serve RUN={shlex.quote(str(folder))} BASE=1"
    # The run is done, whether the disk takes the line or not.
    with contextlib.suppress(OSError), console_of(folder) as console:
        console.say(f"talk to it in a browser, before and after side by side: {command}")


def locked_by(run: str, out: Path) -> Path | None:
    """Return the folder in `out` that the launch of `run` trained in, new or resumed; None if it came to none."""
    for path in out.glob("*/.lock"):
        with contextlib.suppress(OSError, ValueError):  # another user's, who keeps it shut
            if path.read_text(encoding="utf-8").split()[1:] == [run]:
                return path.parent
    return None


def known_steps(names: Sequence[str], where: str) -> Sequence[str]:
    """Return the names of steps after a run. Raises UsageError where one is not known."""
    if unknown := [name for name in names if name not in STEPS]:
        raise UsageError(f"no step after a run is called {unknown[0]!r}; known: {', '.join(STEPS)}", where=where)
    return names


def after_run(folder: Path, names: Sequence[str]) -> None:
    """Do these steps with the run in `folder`, then write into its manifest that it is done.

    Raises Stopped where a signal came before a step, VerificationError when the export does not compute what the run
    computed.
    """
    with alone_with(folder), console_of(folder) as console, catch_signals(console, ENDING) as asked:
        manifest = Manifest.load(folder)
        with recorded_end(manifest, folder, console):
            if manifest.trained is None:
                raise UsageError(
                    "train() ended before the training did",
                    where=f"{manifest.recipe_dir}/train.py",
                    todo="let its last line be run.finish()",
                )
            run = trained.read(folder, console.say)
            for name in names:
                if asked:
                    what = f"stopped by {asked[0]} after the last step, before the step {name!r}"
                    raise Stopped(what, where=str(folder), todo="the same command goes on from here")
                console.status(f"{name} ...")
                STEPS[name](run, manifest, console)
            record_end(manifest, folder, console, "done", None)


@contextlib.contextmanager
def console_of(folder: Path) -> Iterator[Console]:
    """Open a console that says as much as the run's config has it, and writes all of it into the run's train.log."""
    with contextlib.closing(Console()) as console:
        console.level = LEVELS[configs.load_resolved(folder / "config.resolved.yaml").logging.log_level]
        console.open_log(folder / "train.log")
        yield console
