"""What a tag of tt-metal itself says that belongs to it: its commit, SFPI with its hashes, OpenMPI's version."""

from __future__ import annotations

import os
import re
import tempfile
from pathlib import Path

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
    """Return the address of GitHub, or of the mirror that a build would take instead."""
    return os.environ.get("GITHUB_MIRROR") or "https://github.com"


def read_tag(tag: str, ca: Path | None = None) -> dict[str, dict[str, str]] | None:
    """Return, by pin of the lock, what the tag's own files say of it; None where the repository does not answer.

    A pin whose file is not there or not of the known form is left out.
    """
    with tempfile.TemporaryDirectory() as folder:
        words = ["clone", "--quiet", "--depth=1", "--filter=tree:0", "--no-checkout", "--branch", tag]
        authorities = [f"--config=http.sslCAInfo={ca.absolute()}"] if ca else []
        clone = Path(folder) / "tt-metal"
        if git(*words, *authorities, f"{github()}/tenstorrent/tt-metal.git", str(clone), seconds=SECONDS).returncode:
            return None
        told = {"tt_metal": {"commit": git("rev-parse", "HEAD", root=clone).stdout.strip()}}
        text = git("show", f"HEAD:{SFPI_FILE}", root=clone).stdout
        found = {key: match[1] for key, pattern in SFPI.items() if (match := pattern.search(text))}
        if found.keys() == SFPI.keys():
            told["sfpi"] = found
        if match := OPENMPI.search(git("show", f"HEAD:{OPENMPI_FILE}", root=clone).stdout):
            told["openmpi"] = {"version": match[1]}
        return told


def openmpi_url(version: str) -> str:
    """Return the address of OpenMPI's release file, which docker/Dockerfile installs."""
    return f"{github()}/tenstorrent/ompi/releases/download/v{version}/openmpi-ulfm_{version}-1_amd64.deb"
