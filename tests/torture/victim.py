"""Start whole commands as forks of a process that has imported all they need, and follow them from outside.

A fork costs milliseconds where a command needs seconds to import torch. What it runs is `recipe run` to its last line:
in a process group of its own, its screen in a file, its calls watched. The ranks of several processes, which torchrun's
agent would start as commands, are forks of the agent here; agent, meeting, signals and ends are the real ones.
"""

from __future__ import annotations

import contextlib
import ctypes
import functools
import gc
import os
import runpy
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import IO, Any, cast

from tests.torture.watch import PHASES, Control, shared, watch

SECONDS = 300  # after which a run of a second or two has hung, however busy the machine is
PR_SET_CHILD_SUBREAPER = 36  # linux/prctl.h: ranks whose agent died are this process's children
KEPT = 900  # the descriptor of the log of calls, the one that a rank keeps of its agent's
MODULES: Path | None = None  # where a victim writes down, at its end, what it has imported
CONTROL = shared()  # one victim goes at a time


@dataclass
class Victim:
    """A command that goes on, its log of calls, and what is known of its end."""

    pid: int
    screen: Path
    control: Control

    def stop(self) -> None:
        """Stop every process of it where none is between a call and its line in the log."""
        while True:
            self.send(signal.SIGSTOP)
            self._settle()
            if self.control.busy == 0 or self.ended():
                return
            self.send(signal.SIGCONT)
            time.sleep(0.0002)

    def send(self, number: int, whom: int | None = None) -> None:
        """Send a signal to the command (0), a rank (1, 2) or all of them."""
        for pid in self.pids() if whom is None else [self.control.pids[whom]]:
            with contextlib.suppress(ProcessLookupError):
                os.kill(pid, number)

    def pids(self) -> list[int]:
        """Return the process ids of the command and its ranks, those that there are."""
        return [pid for pid in self.control.pids if pid]

    def ended(self) -> bool:
        """Return whether the command, not its ranks, has ended."""
        return state(self.pid) in "ZX"

    def _settle(self) -> None:
        for pid in self.pids():
            while state(pid) not in "TZX":
                time.sleep(0.0001)

    def end(self) -> int | None:
        """Wait for the end of all of it; return the command's code, negative for a signal, or None if it hangs."""
        deadline = time.monotonic() + SECONDS
        code = None
        while True:
            try:
                pid, status = os.waitpid(-1, os.WNOHANG)
            except ChildProcessError:
                return code
            if pid == self.pid:
                code = os.waitstatus_to_exitcode(status)
            if pid == 0:
                if time.monotonic() > deadline:
                    self.send(signal.SIGKILL)
                    while True:
                        try:
                            os.waitpid(-1, 0)
                        except ChildProcessError:
                            return None
                time.sleep(0.002)


def state(pid: int) -> str:
    """Return a process's state as /proc has it: R, S, D, T (stopped), Z (dead); X for none."""
    try:
        return Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0]
    except OSError:
        return "X"


def start(
    words: Sequence[str],
    environment: Mapping[str, str],
    root: Path,
    log: Path,
    arm: Callable[[Control], None],
    within: Callable[[], contextlib.AbstractContextManager[Any]] = contextlib.nullcontext,
) -> Victim:
    """Fork a process that runs `recipe WORDS` in the context `within`; `arm` asks for a strike, if any."""
    ctypes.CDLL(None).prctl(PR_SET_CHILD_SUBREAPER, 1)
    screen = log.with_suffix(".screen")
    ctypes.memset(ctypes.byref(CONTROL), 0, ctypes.sizeof(CONTROL))
    CONTROL.since, CONTROL.visits[0] = time.monotonic(), 1
    arm(CONTROL)
    sys.stdout.flush()
    pid = os.fork()
    if pid == 0:
        begin(screen)
        CONTROL.pids[0] = os.getpid()
        os.environ.update(environment)
        os.dup2(os.open(log, os.O_WRONLY | os.O_APPEND), KEPT)
        with within():
            watch(root, KEPT, CONTROL)
            as_program("tools.cli", ["recipe", *words])
    CONTROL.pids[0] = pid
    return Victim(pid, screen, CONTROL)


def begin(screen: Path | None) -> None:
    """Make a fork what a process of its own would be: group, signals, screen, nothing of its parent's to clear away."""
    os.setsid()
    gc.freeze()
    for number in (signal.SIGTERM, signal.SIGHUP, signal.SIGCHLD):
        signal.signal(number, signal.SIG_DFL)
    signal.signal(signal.SIGINT, signal.default_int_handler)
    signal.pthread_sigmask(signal.SIG_SETMASK, ())
    if screen:
        output = os.open(screen, os.O_WRONLY | os.O_CREAT | os.O_APPEND, 0o644)
        os.dup2(output, 1)
        os.dup2(output, 2)


def as_program(module: str, arguments: list[str]) -> None:
    """Run `python -m MODULE` here, end this process with its code."""
    code: Any = 1
    try:
        sys.argv = arguments
        runpy.run_module(module, run_name="__main__", alter_sys=False)
        code = 0
    except SystemExit as ended:
        code = ended.code if isinstance(ended.code, int) else int(ended.code is not None)
    except KeyboardInterrupt:  # before the command listens, as Python ends
        code = 130
    except BaseException:
        sys.excepthook(*sys.exc_info())
    finally:
        with contextlib.suppress(BaseException):
            enter(CONTROL.phase, back=True)
            sys.stdout.flush()
            sys.stderr.flush()
            if MODULES:
                with MODULES.open("a", encoding="utf-8") as file:
                    file.writelines(f"{name}\n" for name in list(sys.modules))
        os._exit(code)


# --- ranks ----------------------------------------------------------------------------------------------------------


class Forked:
    """A fork of this process that runs a command of Python's, with as much of Popen as torch's agent asks for."""

    def __init__(self, words: Sequence[str], environment: Mapping[str, str], out: IO[str] | None) -> None:
        self.args, self.returncode = words, cast("int | None", None)
        place = 1 + int(environment["LOCAL_RANK"])
        self.pid = os.fork()
        if self.pid == 0:
            CONTROL.pids[place] = os.getpid()
            begin(None)
            if out:
                os.dup2(out.fileno(), 1)
                os.dup2(out.fileno(), 2)
            os.closerange(3, KEPT)
            os.closerange(KEPT + 1, 4096)
            os.environ.update(environment)
            as_program(words[2], list(words[2:]))
        CONTROL.pids[place] = self.pid

    def poll(self) -> int | None:
        if self.returncode is None:
            pid, status = os.waitpid(self.pid, os.WNOHANG)
            if pid:
                self.returncode = os.waitstatus_to_exitcode(status)
        return self.returncode

    def wait(self, timeout: float | None = None) -> int:
        deadline = time.monotonic() + (SECONDS if timeout is None else timeout)
        while (code := self.poll()) is None:
            if time.monotonic() > deadline:
                raise subprocess.TimeoutExpired(list(self.args), timeout or SECONDS)
            time.sleep(0.002)
        return code


def fork_ranks() -> None:
    """Have torch's agent fork its ranks in place of starting them."""
    from torch.distributed.elastic.multiprocessing.subprocess_handler import subprocess_handler

    def forked(self: Any, args: Sequence[str], env: Mapping[str, str]) -> Forked:
        return Forked(args, env, self._stdout)

    subprocess_handler.SubprocessHandler._popen = forked  # type: ignore[method-assign,assignment]


# --- phases ---------------------------------------------------------------------------------------------------------


def mark_phases() -> None:
    """Have a run say where it stands: its calls are wrapped, in this process and its forks."""
    from common.data import tokens
    from common.train.run import Run
    from common.train.watchdog import Watchdog
    from tools.launch import after_run

    wrap(tokens, "write", "data")
    wrap(Watchdog, "begin", "step", stays=True)
    wrap(Run, "evaluate", "evaluation")
    wrap(Run, "save", "checkpoint")
    wrap(Run, "finish", "finish", stays=True)
    wrap(after_run, "write_page", "report")
    steps: Any = after_run.STEPS
    steps["export"] = phase("export")(steps["export"])
    steps["before_after"] = phase("card")(steps["before_after"])
    save: Any = Run.save

    def promised(run: Run, step: int) -> None:
        save(run, step)
        CONTROL.saved = run.saved_step

    Run.save = promised  # type: ignore[assignment,method-assign]


def wrap(owner: Any, name: str, label: str, stays: bool = False) -> None:
    setattr(owner, name, phase(label, stays)(getattr(owner, name)))


def phase(label: str, stays: bool = False) -> Callable[[Callable[..., Any]], Callable[..., Any]]:
    """Return a decorator: a call of the function is the phase `label`, and what follows, too, if it `stays`."""

    def decorate(function: Callable[..., Any]) -> Callable[..., Any]:
        @functools.wraps(function)
        def marked(*arguments: Any, **options: Any) -> Any:
            before = CONTROL.phase
            enter(PHASES.index(label))
            try:
                return function(*arguments, **options)
            finally:
                if not stays:
                    enter(before, back=True)

        return marked

    return decorate


def enter(number: int, back: bool = False) -> None:
    """Note the phase that begins, and what the one until now has cost; going back to the one around it is no visit."""
    now = time.monotonic()
    CONTROL.calls_in[CONTROL.phase] += CONTROL.calls - sum(CONTROL.calls_in)
    CONTROL.no_writes_in[CONTROL.phase] += CONTROL.no_writes - sum(CONTROL.no_writes_in)
    CONTROL.seconds_in[CONTROL.phase] += now - CONTROL.since
    CONTROL.since = now
    CONTROL.phase = number
    if not back:
        CONTROL.visits[number] += 1
