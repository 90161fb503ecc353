"""A private authority, the certificate of the stand-ins that it signed, and another authority that signed nothing."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

from tests.doubles.upstream.tools import run

KEY = ("-newkey", "ec", "-pkeyopt", "ec_paramgen_curve:prime256v1", "-nodes")


def make(folder: Path, addresses: Sequence[str]) -> None:
    """Write ca.pem, server.pem and server.key, for these IP addresses, and stranger.pem; good for ten days."""
    for name in ("ca", "stranger"):
        authority(folder, name)
    run("openssl", "req", *KEY, "-keyout", "server.key", "-out", "server.csr", "-subj", "/CN=stand-in", cwd=folder)
    names = ",".join(f"IP:{address}" for address in dict.fromkeys(addresses))
    (folder / "server.ext").write_text(f"subjectAltName={names}\nextendedKeyUsage=serverAuth\n")
    issuer = ("-CA", "ca.pem", "-CAkey", "ca.key", "-CAcreateserial", "-extfile", "server.ext")
    run("openssl", "x509", "-req", "-days", "10", "-in", "server.csr", "-out", "server.pem", *issuer, cwd=folder)


def authority(folder: Path, name: str) -> None:
    files = ("-keyout", f"{name}.key", "-out", f"{name}.pem")
    run("openssl", "req", "-x509", "-days", "10", *KEY, *files, "-subj", f"/CN={name} of the stand-ins", cwd=folder)
