"""Stand-ins for all that a board's image is built from, on this machine: apt archive, GitHub, base image, registry.

    with upstream.serve(folder) as up:  # MachineError names a program that this machine lacks
        base = up.make_base("recipes-base:bookworm")  # a local image: its archive is the stand-in's
        up.prepare(checkout, base)  # the checkout's lock then pins what the stand-ins have
        environment = os.environ | up.environment() | {"BASE_IMAGE": base}
        subprocess.run(["make", "image", "HW=n150"], cwd=checkout, env=environment)

They behave as the real ones are known to: the archive sends http on to https and is signed; its certificate is of an
authority that only the package ca-certificates of the live archive knows (`known=False`: nobody; then CA_BUNDLE must be
`up.ca`), and the base has no certificates; tt-metal is a tag of a git repository with a submodule, whose build_metal.sh
leaves the doubles of ttnn and ttml where a build leaves the real ones. Packages are empty; what the build itself runs
(curl, git, strip) is in the base. Nothing here compiles, so nothing here shows that the real tag does.
"""

from __future__ import annotations

import contextlib
import json
import re
import shutil
import ssl
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from common.files import sha256_file, write_json
from tests.doubles.upstream import archive, certificates, github
from tests.doubles.upstream.registry import Registry
from tests.doubles.upstream.site import Sites
from tests.doubles.upstream.tools import run

SUITE = "bookworm"  # of the base that ci/engine.sh makes
PYTHON = "3.11"  # of that base
TAG, SFPI, OPENMPI = "v0.81.1", "7.89.0", "5.0.7"
PLACES = ("build/tt-train/sources/ttml", "build_Release/ttml")  # where builds are known to leave _ttml*.so
# What the steps of docker/Dockerfile run, of the base's own archive; then neither certificates nor another archive are
# left, as ubuntu:22.04 has none. The base is Debian 12, as debootstrap makes it or with Docker Hub's Python on top.
BASE_FILE = """\
FROM {base}
RUN apt-get update && \
    apt-get install --yes --no-install-recommends binutils curl git python3 python3-venv && \
    rm -rf /var/lib/apt/lists/* /etc/apt/sources.list.d/* /etc/ssl/certs/* /usr/share/ca-certificates/*
COPY sources.list /etc/apt/sources.list
COPY archive.gpg /etc/apt/trusted.gpg.d/archive.gpg
"""


@dataclass
class Upstream:
    """The stand-ins while they are served."""

    folder: Path
    sites: Sites
    registry: Registry
    ca: Path  # PEM file of the authority that signed the archive's and GitHub's certificate
    torch: bool  # whether the doubles train, for which they need torch

    def environment(self) -> dict[str, str]:
        """Return the variables of a build that name the stand-ins; they go to whatever runs `make image`."""
        return {
            "APT_MIRROR": f"{self.sites.http}/snapshot",  # which sends on to https, as Ubuntu's service does
            "GITHUB_MIRROR": f"{self.sites.https}/github",
        }

    def make_base(self, on: str, tag: str | None = None) -> str:
        """Make the base of boards on a Debian image of SUITE that is here; return its name, which only these have.

        Needs an engine, and Debian's archive as that image names it.
        """
        tag = tag or f"recipes-upstream-base:{self.sites.https.rpartition(':')[2]}"
        context = self.folder / "base"
        context.mkdir(exist_ok=True)
        (context / "Dockerfile").write_text(BASE_FILE.format(base=on))
        (context / "sources.list").write_text(f"deb {self.sites.http}/live {SUITE} main\n")
        shutil.copy(self.folder / "archive.gpg", context)
        run("docker", "build", "--quiet", "--tag", tag, str(context))
        return tag

    def leave_ttml_in(self, place: str | None) -> None:
        """Have tt-metal's tag name a new commit, whose build leaves _ttml*.so in that folder of its tree, or nowhere.

        A lock that was prepared before then has another commit than the tag: what a tag that was moved looks like.
        """
        github.publish_tree(self.folder, TAG, place)

    def spoil_sfpi(self) -> None:
        """Have SFPI's release file be another one than was pinned."""
        path = github.sfpi(self.folder, SFPI)
        path.write_bytes(path.read_bytes() + b"one byte more")

    def pins(self) -> dict[str, Any]:
        """Return the pins `ttml` of a lock that belong to the stand-ins, all but those of base and requirements."""
        return {
            "apt_snapshot": {"timestamp": "20261008T000000Z", "source": "a stand-in"},
            "tt_metal": {"tag": TAG, "commit": github.commit(self.folder, TAG), "source": "a stand-in"},
            "sfpi": {
                "version": SFPI,
                "deb_sha256": sha256_file(github.sfpi(self.folder, SFPI)),
                "txz_sha256": "a" * 64,
                "source": "a stand-in",
            },
            "openmpi": {
                "version": OPENMPI,
                "deb_sha256": sha256_file(github.openmpi(self.folder, OPENMPI)),
                "source": "a stand-in",
            },
        }

    def prepare(self, checkout: Path, base: str, digest: str = "sha256:" + "0" * 64) -> None:
        """Make a checkout's lock pin what the stand-ins have, for the base `image@digest`, and that base's Python.

        A base that is in no registry is given to the build as BASE_IMAGE. The packages of boards are then those of the
        CPU image, as the doubles compute by torch; one small package where they need not.
        """
        names = {f"requirements/board-{PYTHON}.txt": f"cpu-{PYTHON}.txt"}
        tools = {f"requirements/ttml-build-{PYTHON}.txt": "ttml-build-3.10.txt"}
        for name, source in (names | tools).items():
            text = (checkout / "requirements" / source).read_text("utf-8")
            if not self.torch and (click := re.search(r"^click==(?:.*\\\n)*.*\n", text, re.MULTILINE)):
                text = click[0]
            (checkout / name).write_text(text, encoding="utf-8")
        lock = json.loads((checkout / "docker/images.lock.json").read_text("utf-8"))
        lock["pins"]["ttml"] |= self.pins() | {
            "base": {"image": base, "digest": digest, "source": "a stand-in"},
            "python": {name: sha256_file(checkout / name) for name in names},
            "build_python": {name: sha256_file(checkout / name) for name in tools},
        }
        write_json(checkout / "docker/images.lock.json", lock)


@contextlib.contextmanager
def serve(
    folder: Path, address: str | None = None, *, ttml: str | None = PLACES[0], known: bool = True, torch: bool = True
) -> Iterator[Upstream]:
    """Make the stand-ins below `folder` and serve them until the end of the block.

    address: of this machine, as builds reach it; default: the gateway of Docker's bridge network. ttml: the folder of
    tt-metal's tree where the build leaves _ttml*.so, None for a build that has none. known: the live archive's
    ca-certificates has the authority of the stand-ins. torch: the doubles train; else they can only be imported.
    """
    address = address or run("docker", "network", "inspect", "bridge", "--format", "{{(index .IPAM.Config 0).Gateway}}")
    folder.mkdir(parents=True, exist_ok=True)
    certificates.make(folder, [address, "127.0.0.1"])
    github.make_releases(folder, SFPI, OPENMPI)
    github.make_repositories(folder, tag=TAG, sfpi_version=SFPI, openmpi_version=OPENMPI, ttml=ttml, torch=torch)
    archive.make(folder, SUITE, authority=folder / ("ca.pem" if known else "stranger.pem"))
    context = ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER)
    context.load_cert_chain(folder / "server.pem", folder / "server.key")
    with Sites(folder, address, context) as sites, Registry(folder / "registry") as registry:
        yield Upstream(folder, sites, registry, folder / "ca.pem", torch)
