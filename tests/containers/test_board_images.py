"""The stages of a board's image, built by the engine from stand-ins of all that they take from outside.

The base is Debian's with Python 3.11, the packages are empty and nothing is compiled (tests/doubles/upstream). What is
tested is what docker/Dockerfile and docker/apt-install.sh themselves do, and say where something is not as pinned.
"""

from __future__ import annotations

import contextlib
import json
import re
import shutil
import subprocess
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest

from tests.containers.conftest import ROOT, docker, recipe
from tests.doubles import upstream
from tests.doubles.upstream import Upstream

PLACES = upstream.PLACES


@dataclass(frozen=True)
class Place:
    """Stand-ins, their base, and a checkout whose lock pins both."""

    standing: Upstream
    base: str
    clone: Path

    def prepare(self) -> None:
        """Pin what the stand-ins have now."""
        self.standing.prepare(self.clone, self.base)

    def leave_ttml_in(self, folder: str | None) -> None:
        """Have the build of a new commit leave _ttml there, and pin that commit."""
        self.standing.leave_ttml_in(folder)
        self.prepare()

    def recipe(self, *words: str, **environment: str) -> subprocess.CompletedProcess[str]:
        """Return what a user gets of these words in the checkout, with the stand-ins named as mirrors are."""
        variables = self.standing.environment() | {"BASE_IMAGE": self.base} | environment
        return recipe(*words, folder=self.clone, **variables)

    def build(self, **environment: str) -> subprocess.CompletedProcess[str]:
        """Return what came of building the image of n150."""
        return self.recipe("image", "build", "n150", **environment)

    @property
    def image(self) -> str:
        """The id of the image that was built last."""
        built = json.loads((self.clone / "docker/images.local.json").read_text())["images"]
        return str(built["n150"]["id"])


@contextlib.contextmanager
def stood_up(folder: Path, base_image: str, **options: Any) -> Iterator[Place]:
    clone = folder / "recipes"
    subprocess.run(["git", "clone", "--quiet", str(ROOT), str(clone)], check=True)
    with upstream.serve(folder / "upstream", torch=False, **options) as standing:
        place = Place(standing, standing.make_base(base_image), clone)
        place.prepare()
        try:
            yield place
        finally:
            docker("image", "rm", place.base)


@pytest.fixture(scope="module")
def place(base_image: str, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Place]:
    with stood_up(tmp_path_factory.mktemp("place"), base_image) as stands:
        yield stands


@pytest.mark.parametrize("folder", [PLACES[1], "build_Release/somewhere/else"])
def test_ttml_is_found_wherever_a_build_leaves_it(folder: str, place: Place) -> None:
    place.leave_ttml_in(folder)
    done = place.build()
    assert done.returncode == 0, done.stdout + done.stderr
    script = "import importlib.util as util; print(util.find_spec('_ttml').origin)"
    found = docker("run", "--rm", "--network=none", "--entrypoint=python", place.image, "-c", script)
    assert found == f"/opt/tt-metal/{folder.replace('build_Release', 'build')}/_ttml.abi3.so"


def test_the_image_holds_what_runs_and_nothing_of_the_builders_network(place: Place) -> None:
    place.leave_ttml_in(PLACES[0])
    done = place.build(CA_BUNDLE=str(place.standing.ca))
    assert done.returncode == 0, done.stdout + done.stderr
    line = place.standing.ca.read_text().splitlines()[1]
    script = (
        "id -u",
        "echo $HW $ARCH_NAME",
        "ls /opt/tt-metal",
        "test -e /opt/mgd/t3k_1x8.textproto && echo mesh",
        "ls -A /run /downloads /certificates 2>/dev/null",
        "grep -c . /etc/apt/sources.list",
        "command -v pip || echo no pip",
        f"grep -rlsF '{line}' /etc /opt /usr/local /usr/share || echo no certificate",
        "python -c 'import ttnn, ttml, importlib.util as util; print(ttml.__file__, util.find_spec(\"_ttml\").origin)'",
    )
    said = docker("run", "--rm", "--network=none", "--entrypoint=sh", place.image, "-c", ";".join(script))
    assert said.splitlines() == [
        "1000",
        "n150 wormhole_b0",
        *("build", "runtime", "tt-train", "tt_metal", "ttnn"),
        "mesh",
        "/run:",
        "1",
        "no pip",
        "no certificate",
        f"/opt/tt-metal/tt-train/sources/ttml/ttml/__init__.py /opt/tt-metal/{PLACES[0]}/_ttml.abi3.so",
    ]


def test_a_build_that_has_no_ttml_ends_with_a_sentence(place: Place) -> None:
    place.leave_ttml_in(None)
    done = place.build()
    assert (done.returncode, "left no _ttml*.so below /opt/tt-metal/build" in done.stderr) == (4, True), done.stderr


def test_a_tag_that_was_moved_is_refused(place: Place) -> None:
    place.leave_ttml_in("build/pinned")
    pinned = place.standing.pins()["tt_metal"]["commit"]
    place.standing.leave_ttml_in("build/moved")
    done = place.build()
    now = place.standing.pins()["tt_metal"]["commit"]
    assert done.returncode == 4
    assert f"tag v0.81.1 is commit {now}; docker/images.lock.json pins {pinned}" in done.stderr


def test_an_sfpi_of_another_tag_is_refused(place: Place) -> None:
    """The release file has the hash of the lock, and the tag asks for another one."""
    own = place.standing.folder / "tt-metal/tt_metal/sfpi-version"
    text = own.read_text()
    own.write_text(text.replace("7.89.0", "7.90.0"))
    place.leave_ttml_in(PLACES[0])
    own.write_text(text)
    done = place.build()
    place.leave_ttml_in(PLACES[0])
    assert done.returncode == 4
    assert "an SFPI that is not this tag's: tt_metal/sfpi-version lacks sfpi_version='7.89.0'" in done.stderr


def test_a_release_file_of_another_hash_is_refused(base_image: str, tmp_path: Path) -> None:
    with stood_up(tmp_path, base_image) as place:
        place.standing.spoil_sfpi()
        done = place.build()
    assert done.returncode == 4
    assert "sfpi_7.89.0_x86_64_debian.deb is not the file that docker/images.lock.json pins" in done.stderr


def test_an_archive_of_an_unknown_authority_needs_the_builders_own(base_image: str, tmp_path: Path) -> None:
    """It sends http on to https: refused with one sentence, in seconds; with CA_BUNDLE apt, curl and git go through.

    An archive that is unavailable for a moment is asked again.
    """
    with stood_up(tmp_path, base_image, known=False) as place:
        refused = place.build()
        place.standing.sites.unavailable = 4
        done = place.build(CA_BUNDLE=str(place.standing.ca))
        assert place.standing.sites.unavailable == 0
    assert refused.returncode == 4
    assert "signed by no authority that this build knows" in refused.stderr
    assert "CA_BUNDLE=ca.pem" in refused.stderr
    assert done.returncode == 0, done.stdout + done.stderr


def test_without_the_internet_a_mirror_that_answers_by_http_is_enough(base_image: str, tmp_path: Path) -> None:
    """No certificate is needed then, and the live archive is not asked for any; else its silence is a sentence."""
    with stood_up(tmp_path, base_image) as place:
        shutil.rmtree(place.standing.folder / "live")
        refused = place.build()
        place.standing.sites.redirects = False
        done = place.build(GITHUB_MIRROR=f"{place.standing.sites.http}/github")
    assert refused.returncode == 4
    assert "its own archive does not give the package ca-certificates: without the internet" in refused.stderr
    assert "CA_BUNDLE=ca.pem" in refused.stderr
    assert done.returncode == 0, done.stdout + done.stderr


def test_an_archive_without_its_lists_is_said_before_anything_is_installed(base_image: str, tmp_path: Path) -> None:
    with stood_up(tmp_path, base_image) as place:
        (place.standing.folder / "snapshot/dists/bookworm/main/binary-amd64/Packages").unlink()
        done = place.build()
    assert done.returncode == 4
    assert "the archive gives no complete package lists: http://" in done.stderr
    assert "APT_MIRROR=URL" in done.stderr


def test_the_lock_learns_from_the_tag_over_the_same_network(place: Place) -> None:
    """By the builder's own authorities; without them neither git nor the download goes through, which is said."""
    place.prepare()
    path = place.clone / "docker/images.lock.json"
    known, asked = json.loads(path.read_text()), json.loads(path.read_text())
    for name, key in (("tt_metal", "commit"), ("openmpi", "deb_sha256")):
        asked["pins"]["ttml"][name] |= {key: None, "built": False, "reason": "nobody read it"}
    path.write_text(json.dumps(asked))
    public = "/etc/ssl/certs/ca-certificates.crt"
    lacking = place.recipe("lock", CA_BUNDLE="", GIT_SSL_CAINFO=public, SSL_CERT_FILE=public).stdout
    assert re.search(r"its repository does not answer: .*certificate verification failed", lacking)
    assert "still unknown: tt_metal.commit: nobody read it" in lacking
    assert "still unknown: openmpi.deb_sha256: https://" in lacking
    done = place.recipe("lock", CA_BUNDLE=str(place.standing.ca), GIT_SSL_CAINFO=public)
    assert (done.returncode, "still unknown" in done.stdout) == (0, False), done.stdout + done.stderr
    found = json.loads(path.read_text())["pins"]["ttml"]
    for name in ("tt_metal", "openmpi"):
        assert found[name] | {"source": ""} == known["pins"]["ttml"][name] | {"source": ""}


@pytest.mark.slow  # two and a half minutes on two busy cores
def test_two_builds_of_a_board_have_the_same_layers(place: Place) -> None:
    place.leave_ttml_in(PLACES[0])
    git = ("git", "-C", str(place.clone), "-c", "user.name=a", "-c", "user.email=a@b.c")
    subprocess.run([*git, "add", "--all", "--force", "requirements", "docker/images.lock.json"], check=True)
    subprocess.run([*git, "commit", "--quiet", "--allow-empty", "--message", "the stand-ins' pins"], check=True)
    assert place.build().returncode == 0
    done = place.recipe("image", "verify", "n150")
    assert (done.returncode, "the same 2 layers" in done.stdout) == (0, True), done.stdout + done.stderr
