"""End a run whose step does not end, with its likely cause and code 5; the same command goes on from the checkpoint.

A hung native call cannot be interrupted from Python, so the process is left at once. A thread watches, and where the
call keeps Python's own lock, so that no thread of Python runs, a timer of the kernel does it a little later. Only steps
are watched: evaluation and saving may take what they take, and a first step may compile for minutes.
"""

from __future__ import annotations

import ctypes
import faulthandler
import os
import signal
import statistics
import sys
import threading
import time
from collections import deque
from collections.abc import Callable
from typing import TextIO

from common.errors import TrainingError

FIRST_STEP = 1800.0  # seconds: a board compiles its kernels, a CPU its graph
AT_LEAST = 120.0  # seconds, for any later step, so that a machine that swaps or is shared raises no alarm
TIMES_MEDIAN = 20  # generous: an alarm too many ends a run that was well, one too late costs some minutes
TICK = 1.0  # seconds: time is counted in ticks of the thread's own, so that a stopped process does not age
LOCKED_GRACE = 60.0  # seconds after which the kernel's timer takes it that the thread cannot run


class Watchdog:
    """Watches from `begin` to `end`. `stalled` is told what happened, on another thread, before the process ends.

    `device` is what steps run on, in the singular: "device", "CPU process". `fixed`, in seconds, is what any step may
    take in place of the rule in `allowed`; 0 watches nothing.
    """

    def __init__(
        self,
        stalled: Callable[[str], None],
        devices: int,
        device: str = "device",
        log: TextIO | None = None,
        fixed: float | None = None,
    ) -> None:
        self.stalled, self.log = stalled, log
        self.devices = f"{devices} {device}{'' if devices == 1 else 'es' if device.endswith('s') else 's'}"
        self.fixed = fixed
        self.seconds: deque[float] = deque(maxlen=50)  # of the last steps of this process: a run may slow down for good
        self.begun = 0
        self.step: int | None = None  # the one that goes on
        self.dumps_after: float | None = None  # the seconds allowed to the step for which a dump was asked, at `armed`
        self.armed = 0.0  # seconds of time.monotonic
        self.closed = threading.Event()
        self.timer = KernelTimer()
        if self.fixed != 0:
            threading.Thread(target=self._watch, name="watchdog", daemon=True).start()

    @property
    def allowed(self) -> float:
        """Return the seconds that the step may take."""
        if self.fixed is not None:
            return self.fixed
        if not self.seconds:
            return FIRST_STEP
        return max(AT_LEAST, TIMES_MEDIAN * statistics.median(self.seconds))

    def begin(self, step: int) -> None:
        """Watch `step` from now."""
        self.begun, self.step = self.begun + 1, step
        if self.fixed != 0:
            allowed, now = self.allowed, time.monotonic()
            self.timer.start(allowed + LOCKED_GRACE)
            # Before the timer ends the process, a thread of C's writes which call it was: no Python may run any more.
            # To start one and end the one before takes longer than all else of a short step, so it is done once a tick,
            # and what is written may be written a tick early.
            if allowed != self.dumps_after or now - self.armed > TICK:
                faulthandler.dump_traceback_later(allowed + LOCKED_GRACE / 2, file=self.log or sys.stderr)
                self.dumps_after, self.armed = allowed, now

    def end(self, seconds: float | None = None) -> None:
        """Watch no longer: the step is over, after `seconds`, or something begins that may take what it takes."""
        self.step = None
        self.timer.start(0)
        if seconds is not None:  # the next step begins at once
            self.seconds.append(seconds)
            return
        faulthandler.cancel_dump_traceback_later()
        self.dumps_after = None

    def close(self) -> None:
        """End the watching for good. Closing twice is harmless."""
        self.end()
        self.closed.set()

    def _watch(self) -> None:
        watched, waited = None, 0.0
        while not self.closed.wait(TICK):
            step = self.step
            watched, waited = step, waited + TICK if step is not None and step == watched else 0.0
            if waited > self.allowed:
                which = f"step {step} (number {self.begun} of this process, {self.devices})"
                self._leave(f"stalled in {which}: no end after {waited:.0f} s, {self.allowed:.0f} were allowed")

    def _leave(self, what: str) -> None:
        try:
            self.stalled(what)
            faulthandler.dump_traceback(self.log or sys.stderr)
            sys.stdout.flush()
        finally:
            os._exit(TrainingError.code)


class KernelTimer:
    """A timer of the kernel that ends this process with code 5, whatever Python is doing.

    The handler of its signal is C's `_exit`, which is called with the signal's number: SIGTRAP is 5, the code of a
    training that failed. Nothing of Python runs, so a native call that keeps the interpreter's lock is left, too.

    Nothing simpler gives that code: `faulthandler.dump_traceback_later(exit=True)` leaves such a call with code 1,
    which means a bug of ours; a signal's default action, or a process that kills this one, ends it with 128 and more;
    a handler of Python's never gets to run; and the signals of `setitimer` have other numbers.
    """

    CLOCK_MONOTONIC = 1

    def __init__(self) -> None:
        assert int(signal.SIGTRAP) == TrainingError.code
        self.libc, self.timer = ctypes.CDLL(None), ctypes.c_void_p()
        # struct sigevent (timer_create(2)), 64 bytes: a value, the signal's number, and SIGEV_SIGNAL, which is 0
        event = (ctypes.c_uint64 * 8)(0, int(signal.SIGTRAP))
        self.works = hasattr(self.libc, "timer_create") and not self.libc.timer_create(
            self.CLOCK_MONOTONIC, event, ctypes.byref(self.timer)
        )
        if self.works:
            self.libc.signal(int(signal.SIGTRAP), self.libc._exit)

    def start(self, seconds: float) -> None:
        """End the process in so many seconds from now; 0: do not."""
        if self.works:
            whole, rest = divmod(seconds, 1)
            wait = (ctypes.c_long * 4)(0, 0, int(whole), int(rest * 1e9))  # struct itimerspec: no repetition
            self.libc.timer_settime(self.timer, 0, wait, None)
