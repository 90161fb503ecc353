"""What a tag of tt-metal itself says that belongs to it: its commit, SFPI with its hashes, OpenMPI's version."""

from __future__ import annotations

import os
import re
import tempfile
from functools import partial
from pathlib import Path

from common.errors import MachineError, UsageError, without_secrets
from tools.git import git

SECONDS = 300  # for the tag's commit and two files, not for its tree
SFPI_FILE, OPENMPI_FILE = "tt_metal/sfpi-version", "install_dependencies.sh"
# Lines of shell, as of 7.89.0: sfpi_version='7.89.0', sfpi_x86_64_debian_deb_hash='...'
SFPI = {
    "version": re.compile(r"^sfpi_version='([\w.-]+)'$", re.MULTILINE),
    "deb_sha256": re.compile(r"^sfpi_x86_64_debian_deb_hash='([0-9a-f]{64})'$", re.MULTILINE),
    "txz_sha256": re.compile(r"^sfpi_x86_64_debian_txz_hash='([0-9a-f]{64})'$", re.MULTILINE),
}
OPENMPI = re.compile(r"openmpi-ulfm_([\d.]+)-1_amd64\.deb")


def github() -> str:
    """Return the address of GitHub, or of the mirror that a build would take instead. Raises as `mirror`."""
    return mirror("GITHUB_MIRROR") or "https://github.com"


def mirror(name: str) -> str | None:
    """Return the address that a variable names; None: it is not set. Raises UsageError for one with a login in it.

    The lock says where a hash was read, and an image's history what its build was told: both are read by others.
    """
    address = os.environ.get(name)
    if address and without_secrets(address) != address:
        raise UsageError(
            "the address of a mirror has a login in it, which the lock and the image's history would show to everybody",
            where=name,
            todo="name a mirror that asks for none",
        )
    return address


def read_tag(tag: str, ca: Path | None = None) -> dict[str, dict[str, str]]:
    """Return, by pin of the lock, what the tag's own files say of it.

    A pin whose file is not there or not of the known form is left out. `ca` is the PEM file of the authorities to go
    by. Raises MachineError with git's own words where the repository does not answer or has no such tag.
    """
    with tempfile.TemporaryDirectory() as folder:
        environment = {"GIT_SSL_CAINFO": str(ca.absolute())} if ca else {}
        asked = partial(git, root=Path(folder), seconds=SECONDS, environment=environment)
        asked("init", "--quiet")
        asked("remote", "add", "origin", f"{github()}/tenstorrent/tt-metal.git")
        # By its whole name: what `clone --branch` takes first is a branch of that name.
        done = asked("fetch", "--quiet", "--depth=1", "--filter=tree:0", "origin", f"refs/tags/{tag}")
        if done.returncode:
            said = [line for line in done.stderr.splitlines() if line.startswith("fatal:")] or ["git gave no reason"]
            raise MachineError(f"its repository does not answer: {said[0]}")
        told = {"tt_metal": {"commit": asked("rev-parse", "FETCH_HEAD^{commit}").stdout.strip()}}
        text = asked("show", f"FETCH_HEAD:{SFPI_FILE}").stdout  # which fetches the file
        found = {key: match[1] for key, pattern in SFPI.items() if (match := pattern.search(text))}
        if found.keys() == SFPI.keys():
            told["sfpi"] = found
        if match := OPENMPI.search(asked("show", f"FETCH_HEAD:{OPENMPI_FILE}").stdout):
            told["openmpi"] = {"version": match[1]}
        return told


def openmpi_url(version: str) -> str:
    """Return the address of OpenMPI's release file, which docker/Dockerfile installs."""
    return f"{github()}/tenstorrent/ompi/releases/download/v{version}/openmpi-ulfm_{version}-1_amd64.deb"
