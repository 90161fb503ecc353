"""Stop a shell script of ours at any of its commands, and see whether anything that it started goes on."""

from __future__ import annotations

import contextlib
import os
import signal
import subprocess
import time
from pathlib import Path

# For BASH_ENV: SIGINT to the script alone before its command number AT, or before the one that ends with the words
# BEFORE, in a subshell too. A line "stop COMMAND" in the file SEEN says that it was sent.
STOP_AT = """\
unset BASH_ENV
set -T
trap '{ [ -n "${AT:-}" ] && [ "$BASHPID $((++COMMANDS))" = "$$ $AT" ]; } ||
      { [ -n "${BEFORE:-}" ] && [[ $BASH_COMMAND = *"$BEFORE" ]]; } && {
    echo "stop $BASH_COMMAND" >>"$SEEN"
    kill -INT $$
} || true' DEBUG
"""


def end_of(script: subprocess.Popen[bytes]) -> int:
    """Return the exit code of a script that leads a session. Kills the session where a minute is too short."""
    try:
        return script.wait(60)
    except subprocess.TimeoutExpired:
        for line in still_there(script.pid):
            os.kill(int(line.split()[0]), signal.SIGKILL)
        raise


def still_there(session: int) -> list[str]:
    """Return the processes of a session that have not ended, as /proc/PID/stat has them."""
    lines = []
    for path in Path("/proc").glob("[0-9]*/stat"):
        with contextlib.suppress(OSError):  # it has ended meanwhile
            lines.append(path.read_text())
    facts = [line.rpartition(") ")[2].split() for line in lines]
    return [
        line
        for line, (state, _parent, _group, of, *_) in zip(lines, facts, strict=True)
        if of == str(session) and state not in "ZX"
    ]


def all_ended(session: int) -> bool:
    """Return whether every process of a session ends within half a minute: one that was told to may take a moment."""
    for _ in range(300):
        if not still_there(session):
            return True
        time.sleep(0.1)
    return False
