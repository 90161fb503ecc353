"""Downloads by hash, and putting what was made of them in its place."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

from common.errors import MachineError


def pip_download(requirement: str, sha256: str, into: Path, *, what: str, source: bool = False) -> Path:
    """Download one package file by its hash with pip, which knows this machine's index and proxies; return it.

    `source` asks for the sdist. `what` names, in the error, what it is for. Raises MachineError.
    """
    pins = into / "pins.txt"
    pins.write_text(f"{requirement} --hash=sha256:{sha256}\n", encoding="utf-8")
    command = [sys.executable, "-m", "pip", "download", "--quiet", "--no-deps", "--require-hashes"]
    # pip asks an sdist's own setup.py for its metadata; with what is installed here, so that nothing else is fetched
    command += ["--no-binary", ":all:", "--no-build-isolation"] if source else ["--only-binary", ":all:"]
    done = subprocess.run([*command, "-r", str(pins), "-d", str(into)], capture_output=True, text=True, check=False)
    files = list(into.glob("*.tar.gz" if source else "*.whl"))
    if done.returncode or not files:
        reason = [line for line in done.stderr.splitlines() if line.startswith("ERROR")] or [done.stderr.strip()[-300:]]
        raise MachineError(
            f"could not download {requirement}: {reason[0]}",
            where=what,
            todo="check the network (it is needed once), or name a local file or folder in the config instead",
        )
    return files[0]


def move_into_place(made: Path, folder: Path) -> None:
    """Rename a finished folder; where another process was first, its copy is as good."""
    try:
        made.rename(folder)
    except OSError:
        if not folder.is_dir():
            raise
