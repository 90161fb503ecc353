"""Programs of this machine that make a stand-in's content: git, openssl, gpg, dpkg-deb."""

from __future__ import annotations

import os
import subprocess
from pathlib import Path

from common.errors import MachineError


def run(*words: str, cwd: Path | None = None, **environment: str) -> str:
    """Return what a command prints, without the last newline. Raises MachineError with its words where it fails."""
    try:
        done = subprocess.run(words, cwd=cwd, env=os.environ | environment, capture_output=True, text=True, check=False)
    except FileNotFoundError as error:
        raise MachineError(f"no {words[0]} on this machine", todo=f"apt-get install {words[0]}") from error
    if done.returncode:
        raise MachineError(f"{words[0]} {words[1]} failed: {done.stderr.strip()[-500:]}", where=" ".join(words))
    return done.stdout.strip()
