"""What a person sees while a run goes on: lines on the screen, the same lines in train.log, and one live line."""

from __future__ import annotations

import contextlib
import sys
import time
from collections import deque
from pathlib import Path
from typing import TextIO

from rich.console import Console as Screen
from rich.live import Live
from rich.text import Text

from common.engine import StepStats
from common.errors import without_secrets
from common.files import named

LEVELS = {"DEBUG": 0, "INFO": 1, "WARNING": 2}


class Console:
    """The screen and train.log. What is said before the log is opened is kept and written there, too."""

    def __init__(self, level: str = "INFO") -> None:
        self.level = LEVELS[level]
        self.screen = Screen(highlight=False, soft_wrap=True)
        self.early: list[str] = []
        self.log: TextIO | None = None
        self.live: Live | None = None

    def open_log(self, path: Path) -> None:
        """Append to the log at `path` from here on, beginning with the lines said so far."""
        self.log = path.open("a", encoding="utf-8")
        for line in self.early:
            self._write(line)
        self.early = []

    def say(self, text: str, level: str = "INFO") -> None:
        """Write a line to the log and, at or above the console's level, to the screen."""
        text = without_secrets(text)
        if LEVELS[level] >= self.level:
            style = "yellow" if level == "WARNING" else None
            self.screen.print(Text(text, style=style or ""))
        self._write(text)

    def warn(self, text: str) -> None:
        self.say(text, "WARNING")

    def _write(self, text: str) -> None:
        if self.log is None:
            self.early.append(text)
        else:
            with named(Path(self.log.name)):
                self.log.write(time.strftime("%Y-%m-%dT%H:%M:%SZ ", time.gmtime()) + text + "\n")
                self.log.flush()

    def status(self, text: str) -> None:
        """Show the one live line. Without a terminal there is none: whatever matters is said as lines, too."""
        if not self.screen.is_terminal or self.level > LEVELS["INFO"]:
            return
        if self.live is None:
            self.live = Live(console=self.screen, transient=True, refresh_per_second=4)
            self.live.start()
        self.live.update(Text(text, no_wrap=True, overflow="ellipsis"))

    def close(self) -> None:
        """End the live line and the log."""
        if self.live:
            self.live.stop()
            self.live = None
        if self.log:
            with contextlib.suppress(OSError):  # of lines that did not go out, which was an error where they were said
                self.log.close()
            self.log = None
        sys.stdout.flush()


class Progress:
    """The training line: step, loss, tokens/s over the last steps, time to go."""

    def __init__(self, console: Console, total: int, log_every: int) -> None:
        self.console, self.total, self.log_every = console, total, log_every
        self.recent: deque[StepStats] = deque(maxlen=20)  # long enough to be steady, short enough to forget compiling

    def update(self, step: int, stats: StepStats) -> None:
        """Show the line of `step`; print it, too, at every `log_every`-th step, the first and the last."""
        self.recent.append(stats)
        seconds = sum(one.seconds for one in self.recent)
        rate = sum(one.tokens for one in self.recent) / seconds
        line = (
            f"step {step:>{len(str(self.total))}}/{self.total}  loss {stats.loss:.4f}  "
            f"grad norm {stats.grad_norm:.3f}  lr {stats.learning_rate:.2e}  {rate:,.0f} tokens/s  "
            f"{clock((self.total - step) * seconds / len(self.recent))} to go"
        )
        done = int(20 * step / self.total)
        self.console.status(f"{'━' * done}{'╌' * (20 - done)} {line}")
        if step % self.log_every == 0 or step in (1, self.total):
            self.console.say(line)


def clock(seconds: float) -> str:
    """Return a duration as people say it: `1h05m`, `3m07s`."""
    minutes, rest = divmod(round(seconds), 60)
    hours, minutes = divmod(minutes, 60)
    return f"{hours}h{minutes:02d}m" if hours else f"{minutes}m{rest:02d}s"
