"""How a run ends, and how its manifest and its log say so."""

from __future__ import annotations

import contextlib
import signal
from collections.abc import Callable, Iterator
from pathlib import Path
from types import FrameType

from common import known_errors
from common.errors import RankLost, RecipeError, Stopped, TrainingError, without_secrets
from common.files import utc_now
from common.signals import handled
from common.train.console import Console
from common.train.manifest import Manifest

BEGINS, ENDS = "run begins:", "run ends:"  # in train.log; without the second one, the process was killed


@contextlib.contextmanager
def recorded_end(manifest: Manifest, folder: Path, console: Console) -> Iterator[None]:
    """Record how the block ended, where that was before its end; see `record_end` for the end itself."""
    try:
        yield
    except Stopped as stop:
        record_end(manifest, folder, console, f"stopped: {stop.what}", None)
        raise
    except RecipeError as error:
        with contextlib.suppress(OSError):
            console.say(str(error), "DEBUG")
        record_end(manifest, folder, console, f"failed: {error.what}", str(error))
        raise
    except BaseException as error:  # KeyboardInterrupt and SystemExit, too: they end a run as well
        record_end(manifest, folder, console, f"failed: {type(error).__name__}: {without_secrets(str(error))}", None)
        raise


def record_end(manifest: Manifest, folder: Path, console: Console, reason: str, error: str | None) -> None:
    """Write how the run ended (done, `stopped: ...`, `failed: ...`) into its manifest and its log."""
    # A full disk must not hide why a run failed; one that it keeps from being recorded as done has failed by that.
    with contextlib.nullcontext() if reason == "done" else contextlib.suppress(OSError):
        console.say(f"{ENDS} {reason}", "DEBUG")
        manifest.exit_reason, manifest.error, manifest.end = reason, error, utc_now()
        manifest.save(folder)


def record_stall(manifest: Manifest, folder: Path, console: Console, what: str) -> None:
    """Record that a step did not end, and its likely cause.

    The watchdog calls it on its own thread and then leaves the process: no caller is left to explain the error.
    """
    known = known_errors.match(what)
    error = TrainingError(f"{what}; {known.means}" if known else what, todo=known.answer if known else None)
    console.say(str(error))
    record_end(manifest, folder, console, f"failed: {error.what}", str(error))


@contextlib.contextmanager
def saved_if_a_rank_dies(folder: Path, save: Callable[[], int]) -> Iterator[None]:
    """Have `save` called where another process of the run is lost; it saves the last step done and returns it.

    Nothing of what was trained is lost then: no update is done without all processes.
    """
    try:
        yield
    except RankLost as lost:
        step = save()
        where = f"{folder}, after step {step}{', which is saved' if step else ': nothing to save yet'}"
        raise RankLost(lost.what, where=where, todo="the same command goes on from there") from lost


@contextlib.contextmanager
def catch_signals(console: Console, what: str) -> Iterator[list[str]]:
    """Collect the name of a SIGTERM or SIGINT, and say `what` it leads to; a second one ends the process here."""
    names: list[str] = []

    def handler(number: int, _frame: FrameType | None) -> None:
        if names:
            raise KeyboardInterrupt
        names.append(signal.Signals(number).name)
        with contextlib.suppress(RuntimeError):  # the signal came while this very file was being written
            console.say(f"{names[0]}: {what}")

    with handled((signal.SIGTERM, signal.SIGINT), handler):
        yield names
