"""An apt archive of empty packages with the names that docker/Dockerfile installs, signed by a key of its own."""

from __future__ import annotations

import hashlib
import re
import shutil
import tempfile
from collections.abc import Mapping, Sequence
from email.utils import formatdate
from pathlib import Path

from common.paths import ROOT
from tests.doubles.upstream.tools import run

AUTHORITIES = "usr/share/ca-certificates/mozilla/stand-in.crt"
IN_THE_BASE = ("curl", "git", "python3", "python3-venv")  # really
BUNDLE = "etc/ssl/certs/ca-certificates.crt"  # which the real package's update-ca-certificates makes of those


def make(folder: Path, suite: str, authority: Path) -> None:
    """Write the archives `live` and `snapshot` below `folder`, and archive.gpg, the key that signed them.

    Both have a ca-certificates that holds the one PEM file `authority`.
    """
    with tempfile.TemporaryDirectory() as home:  # a short path: gpg-agent's socket lies there
        gpg = ("gpg", "--batch", "--quiet", "--homedir", home)
        run(*gpg, "--passphrase", "", "--quick-generate-key", "stand-in", "ed25519", "sign", "10d")
        run(*gpg, "--output", str(folder / "archive.gpg"), "--export", "stand-in")
        try:
            live, snapshot = folder / "live", folder / "snapshot"
            for name in names():
                package(live / "pool", name)
            text = authority.read_bytes()
            package(live / "pool", "ca-certificates", {AUTHORITIES: text, BUNDLE: text})
            index(live, suite, gpg)
            shutil.copytree(live, snapshot)
        finally:
            run("gpgconf", "--homedir", home, "--kill", "all")


def names() -> list[str]:
    """Return the packages that docker/Dockerfile installs by name and the base lacks, files aside."""
    text = (ROOT / "docker/Dockerfile").read_text("utf-8").replace("\\\n", " ")
    words = [word for call in re.findall(r"\s/run/apt-install\.sh ([^;\n]*)", text) for word in call.split()]
    return sorted({word for word in words if "/" not in word} - {"ca-certificates", *IN_THE_BASE})


def package(folder: Path, name: str, files: Mapping[str, bytes] | None = None) -> Path:
    """Write NAME.deb with these files, by path from the root; return its path.

    Its version is higher than any real one: what a base has may break with an older one.
    """
    folder.mkdir(parents=True, exist_ok=True)
    path = folder / f"{name}.deb"
    with tempfile.TemporaryDirectory() as root:
        for place, content in (files or {}).items():
            (Path(root) / place).parent.mkdir(parents=True, exist_ok=True)
            (Path(root) / place).write_bytes(content)
        (Path(root) / "DEBIAN").mkdir()
        control = (
            f"Package: {name}\nVersion: 99999999\nArchitecture: amd64\nMaintainer: nobody\nDescription: a stand-in\n"
        )
        (Path(root) / "DEBIAN/control").write_text(control)
        Path(root).chmod(0o755)
        run("dpkg-deb", "--root-owner-group", "--build", root, str(path))
    return path


def index(archive: Path, suite: str, gpg: Sequence[str]) -> None:
    """Write the lists of an archive, with the hashes of its packages, and their signature."""
    entries = []
    for path in sorted(archive.glob("pool/*.deb")):
        content = path.read_bytes()
        control = run("dpkg-deb", "--field", str(path))
        where = f"Filename: {path.relative_to(archive)}\nSize: {len(content)}\nSHA256: {digest(content)}"
        entries.append(f"{control}\n{where}\n")
    packages = "\n".join(entries).encode()
    place = "main/binary-amd64/Packages"
    lists = archive / "dists" / suite
    (lists / place).parent.mkdir(parents=True)
    (lists / place).write_bytes(packages)
    release = [f"Suite: {suite}", f"Codename: {suite}", "Components: main", "Architectures: amd64"]
    release += [f"Date: {formatdate(usegmt=True)}", "SHA256:", f" {digest(packages)} {len(packages)} {place}"]
    (lists / "Release").write_text("\n".join(release) + "\n")
    run(*gpg, "--clearsign", "--output", str(lists / "InRelease"), str(lists / "Release"))


def digest(content: bytes) -> str:
    return hashlib.sha256(content).hexdigest()
