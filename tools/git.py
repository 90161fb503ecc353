"""git, asked about a checkout."""

from __future__ import annotations

import os
import subprocess
from collections.abc import Mapping
from pathlib import Path
from types import MappingProxyType

from common.paths import ROOT


def git(
    *words: str, root: Path | None = None, seconds: float = 120, environment: Mapping[str, str] = MappingProxyType({})
) -> subprocess.CompletedProcess[str]:
    """Run git in the checkout `root` (default: this one), with `environment` over this process's own.

    Return output and code, 127 if it is not here or too slow. It asks nobody for a name and a password: a server that
    wants them is answered with git's own error.
    """
    command = ["git", "-C", str(root or ROOT), *words]
    variables = os.environ | {"GIT_TERMINAL_PROMPT": "0"} | dict(environment)
    try:
        return subprocess.run(command, env=variables, capture_output=True, text=True, check=False, timeout=seconds)
    except (OSError, subprocess.TimeoutExpired) as error:
        return subprocess.CompletedProcess(command, 127, "", str(error))


def head() -> tuple[str | None, bool | None]:
    """Return the commit that is checked out here, and whether the tree has changes; None where git cannot say."""
    commit, status = git("rev-parse", "HEAD"), git("status", "--porcelain")
    if commit.returncode or status.returncode:
        return None, None
    return commit.stdout.strip(), bool(status.stdout.strip())
