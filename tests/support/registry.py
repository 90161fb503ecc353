"""A registry on this machine: Debian's package docker-registry, unpacked in a folder and run from there."""

from __future__ import annotations

import contextlib
import socket
import subprocess
import time
import urllib.request
from collections.abc import Iterator
from pathlib import Path

CONFIG = """version: 0.1
storage: {{filesystem: {{rootdirectory: {folder}/store}}}}
http: {{addr: "127.0.0.1:{port}"}}
"""


class NoRegistry(Exception):
    """This machine's package sources have none, or cannot be reached."""


@contextlib.contextmanager
def running(folder: Path) -> Iterator[str]:
    """Have one answer at `localhost:PORT`, which Docker takes without TLS. Raises NoRegistry."""
    command = ["apt-get", "-qq", "-o", "APT::Sandbox::User=root", "download", "docker-registry"]
    with contextlib.suppress(FileNotFoundError):  # no apt here
        subprocess.run(command, cwd=folder, capture_output=True, check=False)
    if not (packages := list(folder.glob("docker-registry_*.deb"))):
        raise NoRegistry("no docker-registry in this machine's package sources")
    subprocess.run(["dpkg-deb", "-x", str(packages[0]), str(folder / "unpacked")], check=True)
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    (folder / "config.yml").write_text(CONFIG.format(folder=folder, port=port))
    with (folder / "log").open("wb") as log:
        program = [str(folder / "unpacked/usr/bin/docker-registry"), "serve", str(folder / "config.yml")]
        process = subprocess.Popen(program, stdout=log, stderr=log)
    try:
        wait_for(f"http://127.0.0.1:{port}/v2/", process, folder / "log")
        yield f"localhost:{port}"
    finally:
        process.kill()
        process.wait()


def wait_for(address: str, process: subprocess.Popen[bytes], log: Path) -> None:
    deadline = time.monotonic() + 30
    while True:
        with contextlib.suppress(OSError), urllib.request.urlopen(address, timeout=5):
            return
        assert process.poll() is None, log.read_text()
        assert time.monotonic() < deadline, log.read_text()
        time.sleep(0.1)
