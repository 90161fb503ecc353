"""What a person sees of an image's build, which may take an hour: its steps, a sign of life, and a log of it all."""

from __future__ import annotations

import re
import signal
import subprocess
import sys
import time
from collections import deque
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from types import FrameType
from typing import TextIO

from common.signals import handled

SIGN_OF_LIFE = 30.0  # seconds: of an hour's build that is a page or two
LAST_WORDS = 40  # lines: BuildKit repeats the failing step's own end, and the lines of the Dockerfile
STEP = re.compile(r"#\d+ \[(?!internal\])")  # `#9 [ttml-builder 4/8] RUN ...`, as `--progress plain` prints it
FAILED = re.compile(r"#(\d+) ERROR: (.*\S)")
OF_BUILDER = re.compile(r"#\d+ \[(ttml-builder|cpu-packages) +\d+/\d+\] RUN")  # what takes long
KEPT = re.compile(r"#\d+ (DONE \d|CACHED)")
OVER = re.compile(r"#\d+ (DONE \d|CACHED|ERROR|CANCELED)")
WIDTH = 110


@dataclass(frozen=True)
class Ended:
    """How a build ended: its exit code, the end of its output, and the last line that the failing step itself said."""

    code: int
    last_words: str
    cause: str


def watched(command: Sequence[str], folder: Path, environment: Mapping[str, str], log: Path, pins: str) -> Ended:
    """Run a build in `folder`, its output in `log` and its steps on stderr; return how it ended.

    `pins` is the hash of what it builds from: the first line of the log, by which `left_steps` knows it.
    The first signal asks the build to end, and the third kills it; raises KeyboardInterrupt once it has.
    """
    heard: list[int] = []
    client: subprocess.Popen[str] | None = None

    def hear(number: int, _frame: FrameType | None) -> None:
        heard.append(number)
        if client is not None:
            hand_on(client, heard)

    last: deque[str] = deque(maxlen=LAST_WORDS)
    print(f"its whole output: {log}", file=sys.stderr, flush=True)
    # Heard before the build is started: no signal comes in between, and what we handle a program that we start has by
    # default. What we were told to ignore, as a shell's `command &` is of SIGINT, it would ignore too.
    with log.open("w", encoding="utf-8") as file, handled((signal.SIGINT, signal.SIGTERM, signal.SIGHUP), hear):
        file.write(f"pins {pins}\n")
        client = subprocess.Popen(
            command, cwd=folder, env=environment, start_new_session=True, text=True, encoding="utf-8", errors="replace",
            stdin=subprocess.DEVNULL, stdout=subprocess.PIPE, stderr=subprocess.STDOUT,
        )  # fmt: skip
        if heard:  # while it was being started
            hand_on(client, heard)
        screen = Screen(sys.stderr)
        with client:
            assert client.stdout is not None
            for line in client.stdout:
                file.write(line)
                file.flush()
                last.append(line)
                screen.show(line.rstrip("\n"))
        code = client.wait()
    if heard:
        print("the build was interrupted; the same command goes on with the steps that are done", file=sys.stderr)
        raise KeyboardInterrupt
    return Ended(code, "".join(last), cause_of(last))


def hand_on(client: subprocess.Popen[str], heard: list[int]) -> None:
    """Ask a build to end, as Ctrl-C would; kill it at the third signal that was heard."""
    client.send_signal(signal.SIGINT if len(heard) < 3 else signal.SIGKILL)


def left_steps(log: Path, pins: str) -> bool:
    """Return whether a log is of a build from these pins that ended a step of its own, which a builder then keeps."""
    lines = log.read_text("utf-8").splitlines() if log.is_file() else []
    steps = {line.partition(" ")[0] for line in lines if OF_BUILDER.match(line)}
    done = any(KEPT.match(line) and line.partition(" ")[0] in steps for line in lines)
    return done and lines[0] == f"pins {pins}"


def cause_of(lines: Sequence[str]) -> str:
    """Return what the step that failed said last, else what BuildKit says of it: of the end of its plain progress."""
    failed = next((found for line in lines if (found := FAILED.match(line))), None)
    said = [found[1] for line in lines if failed and (found := re.match(rf"#{failed[1]} \d+\.\d+ (.*\S)", line))]
    last = [line.strip() for line in lines if line.strip()] or ["it said nothing"]
    return (said or ([failed[2]] if failed else last))[-1]


class Screen:
    """The lines of a build that are worth a person's time: steps that begin and end, else one now and then."""

    def __init__(self, out: TextIO) -> None:
        self.out = out
        self.began = self.said = time.monotonic()
        self.steps: set[str] = set()

    def show(self, line: str) -> None:
        """Print a line of `--progress plain` if it begins or ends a step, or if nothing was printed for a while."""
        number = line.partition(" ")[0]
        if STEP.match(line):
            self.steps.add(number)
        elif not (OVER.match(line) and number in self.steps) and time.monotonic() - self.said < SIGN_OF_LIFE:
            return
        self.said = time.monotonic()
        minutes, seconds = divmod(int(self.said - self.began), 60)
        print(f"{minutes:3d}:{seconds:02d} {line[:WIDTH]}", file=self.out, flush=True)
