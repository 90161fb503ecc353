"""How far a long piece of work is, for who waits at a terminal: a bar a piece, with the time that is left."""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterable, Iterator
from typing import Any

# Gives back the items that it is given, and shows how many of `total` (None: unknown) were taken, under a name.
Watch = Callable[[Iterable[Any], str, "int | None"], Iterable[Any]]


def unwatched(items: Iterable[Any], _doing: str, _total: int | None) -> Iterable[Any]:
    """Return the items, and show nothing."""
    return items


@contextlib.contextmanager
def bars() -> Iterator[Watch]:
    """Yield what shows work on stderr inside of the block, and leaves nothing there; `unwatched` off a terminal.

    What the block writes to stderr stands above the bars. What goes to stdout is for after the block.
    """
    from rich import progress
    from rich.console import Console

    console = Console(stderr=True)
    if not console.is_terminal:
        yield unwatched
        return
    columns = (
        progress.TextColumn("{task.description}"),
        progress.BarColumn(),
        progress.MofNCompleteColumn(),
        progress.TimeRemainingColumn(elapsed_when_finished=True),
    )
    with progress.Progress(*columns, console=console, transient=True, redirect_stdout=False) as shown:

        def watch(items: Iterable[Any], doing: str, total: int | None) -> Iterator[Any]:
            task = shown.add_task(doing, total=total)
            yield from shown.track(items, task_id=task, total=total)
            shown.remove_task(task)

        yield watch
