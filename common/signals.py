"""Handle signals for as long as something goes on."""

from __future__ import annotations

import contextlib
import signal
from collections.abc import Callable, Iterable, Iterator
from types import FrameType


@contextlib.contextmanager
def handled(numbers: Iterable[int], handler: Callable[[int, FrameType | None], None]) -> Iterator[None]:
    """Call `handler` for these signals within the block, and whatever was called before from its end on.

    A SIGHUP that this process was started to ignore stays ignored: what `nohup` started outlives its terminal.
    """
    heard = (it for it in numbers if (it, signal.getsignal(it)) != (signal.SIGHUP, signal.SIG_IGN))
    before = {number: signal.signal(number, handler) for number in heard}
    try:
        yield
    finally:
        for number, previous in before.items():
            signal.signal(number, previous)
