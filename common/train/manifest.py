"""manifest.json: what ran, not what was asked."""

from __future__ import annotations

import hashlib
import resource
import secrets
import subprocess
import sys
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from common.files import write_json
from common.hardware import cpu_class
from tools.machine import host

FORMAT = 1
ROOT = Path(__file__).resolve().parents[2]


class Manifest:
    """The record of a run, rewritten whole whenever it grows."""

    def __init__(self, path: Path, values: dict[str, Any]) -> None:
        self.path = path
        self.values = {"format": FORMAT, **values}

    def update(self, **values: Any) -> None:
        self.values.update(values)
        write_json(self.path, self.values)

    def append(self, key: str, value: Any) -> None:
        self.update(**{key: [*self.values.get(key, []), value]})


def utc_now() -> str:
    return time.strftime("%Y-%m-%dT%H:%M:%SZ", time.gmtime())


def run_name(recipe: str, hw: str) -> str:
    """A run's folder: <utc>-<recipe>-<hw>-<id>."""
    return f"{time.strftime('%Y%m%dT%H%M%SZ', time.gmtime())}-{recipe}-{hw}-{secrets.token_hex(2)}"


def code_facts(nodes: Sequence[str] = ()) -> dict[str, Any]:
    """The repository's commit, whether it differs from it, the lock file's hash, the image, and the machine.

    An image has no git, and sees little of the machine: there, what the launcher said is what holds.
    """
    lock, said = ROOT / "requirements" / f"cpu-{sys.version_info[0]}.{sys.version_info[1]}.txt", host.launched()
    return {
        **({name: said[name] for name in ("git_commit", "git_dirty")} if said else _commit()),
        "lock_sha256": hashlib.sha256(lock.read_bytes()).hexdigest() if lock.is_file() else None,
        "image": said.get("image"),
        "host": host.facts(nodes),
        "cpu_class": cpu_class(),
    }


def _commit() -> dict[str, Any]:
    status = _git("status", "--porcelain")
    return {"git_commit": _git("rev-parse", "HEAD"), "git_dirty": None if status is None else bool(status)}


def peak_memory_mib() -> int:
    """The most memory of the host that this process has held, MiB; a device's own memory is not in it."""
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss // 1024


def _git(*arguments: str) -> str | None:
    try:
        done = subprocess.run(
            ["git", "-C", str(ROOT), *arguments], capture_output=True, text=True, check=False, timeout=10
        )
    except (OSError, subprocess.TimeoutExpired):
        return None
    return done.stdout.strip() if done.returncode == 0 else None
