"""The stages of a board's image, built by the engine from stand-ins of all that they take from outside.

The base is Debian's with Python 3.11, the packages are empty and nothing is compiled (tests/doubles/upstream). What is
tested is what docker/Dockerfile and docker/apt-install.sh themselves do, and say where something is not as pinned.
"""

from __future__ import annotations

import json
import os
import re
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

from tests.containers.conftest import ROOT, docker
from tests.doubles import upstream
from tests.doubles.upstream import Upstream
from tools.containers.build import LOCAL_BASE

PLACES = upstream.PLACES


@pytest.fixture(scope="module")
def standing(base_image: str, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Upstream]:
    with upstream.serve(tmp_path_factory.mktemp("upstream"), torch=False) as served:
        served.make_base(LOCAL_BASE)
        yield served


@pytest.fixture(scope="module")
def clone(standing: Upstream, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A checkout whose lock pins what the stand-ins have."""
    folder = tmp_path_factory.mktemp("clone") / "recipes"
    subprocess.run(["git", "clone", "--quiet", str(ROOT), str(folder)], check=True)
    standing.prepare(folder, upstream.BASE)
    return folder


def build(clone: Path, standing: Upstream, board: str = "n150", **environment: str) -> subprocess.CompletedProcess[str]:
    """What a user gets of `recipe image build`, with the stand-ins named as mirrors are."""
    command = [sys.executable, "-m", "tools.cli", "image", "build", board, "--base-image", upstream.BASE]
    variables = os.environ | standing.environment() | {"PYTHONPATH": str(clone)} | environment
    return subprocess.run(command, cwd=clone, env=variables, capture_output=True, text=True, check=False)


def image_of(clone: Path, board: str = "n150") -> str:
    built = json.loads((clone / "docker/images.local.json").read_text())["images"]
    return str(built[board]["id"])


@pytest.mark.parametrize("place", [*PLACES, "build_Release/somewhere/else"])
def test_ttml_is_found_where_a_build_leaves_it(place: str, clone: Path, standing: Upstream) -> None:
    standing.leave_ttml_in(place)
    standing.prepare(clone, upstream.BASE)
    done = build(clone, standing)
    assert done.returncode == 0, done.stdout + done.stderr
    script = "import _ttml, importlib.util as u; print(u.find_spec('_ttml').origin)".replace(
        "import _ttml, ", "import "
    )
    found = docker("run", "--rm", "--network=none", "--entrypoint=python", image_of(clone), "-c", script)
    assert found == f"/opt/tt-metal/{place.replace('build_Release', 'build')}/_ttml.abi3.so"


def test_the_image_holds_what_runs_and_nothing_of_the_builders_network(clone: Path, standing: Upstream) -> None:
    standing.leave_ttml_in(PLACES[0])
    standing.prepare(clone, upstream.BASE)
    done = build(clone, standing, CA_BUNDLE=str(standing.ca))
    assert done.returncode == 0, done.stdout + done.stderr
    line = standing.ca.read_text().splitlines()[1]
    script = (
        "id -u",
        "echo $HW $ARCH_NAME",
        "ls /opt/tt-metal",
        "test -e /opt/mgd/t3k_1x8.textproto && echo mesh",
        "ls -A /run /downloads /certificates 2>/dev/null",
        "grep -c . /etc/apt/sources.list",
        "command -v pip || echo no pip",
        f"grep -rlsF '{line}' /etc /opt /usr/local /usr/share || echo no certificate",
        "python -c 'import ttnn, ttml; print(ttml.__file__)'",
    )
    said = docker(
        "run", "--rm", "--network=none", "--entrypoint=sh", image_of(clone), "-c", ";".join(script)
    ).splitlines()
    assert said == [
        "1000",
        "n150 wormhole_b0",
        *("build", "runtime", "tt-train", "tt_metal", "ttnn"),
        "mesh",
        "/run:",
        "1",
        "no pip",
        "no certificate",
        "/opt/tt-metal/tt-train/sources/ttml/ttml/__init__.py",
    ]


def test_a_build_that_has_no_ttml_ends_with_a_sentence(clone: Path, standing: Upstream) -> None:
    standing.leave_ttml_in(None)
    standing.prepare(clone, upstream.BASE)
    done = build(clone, standing)
    assert (done.returncode, "left no _ttml*.so below /opt/tt-metal/build" in done.stderr) == (4, True), done.stderr


def test_a_tag_that_was_moved_is_refused(clone: Path, standing: Upstream) -> None:
    standing.leave_ttml_in("build/pinned")
    standing.prepare(clone, upstream.BASE)
    pinned = standing.pins()["tt_metal"]["commit"]
    standing.leave_ttml_in("build/moved")
    done = build(clone, standing)
    now = standing.pins()["tt_metal"]["commit"]
    assert done.returncode == 4
    assert f"tag v0.81.1 is commit {now}; docker/images.lock.json pins {pinned}" in done.stderr


def test_an_sfpi_of_another_tag_is_refused(clone: Path, standing: Upstream) -> None:
    """The release file has the hash of the lock, and the tag asks for another one."""
    standing.prepare(clone, upstream.BASE)
    own = standing.folder / "tt-metal/tt_metal/sfpi-version"
    text = own.read_text()
    own.write_text(text.replace("7.89.0", "7.90.0"))
    standing.leave_ttml_in(PLACES[0])
    own.write_text(text)
    standing.prepare(clone, upstream.BASE)
    done = build(clone, standing)
    assert done.returncode == 4
    assert "an SFPI that is not this tag's: tt_metal/sfpi-version lacks sfpi_version='7.89.0'" in done.stderr


def test_a_release_file_of_another_hash_is_refused(clone: Path, tmp_path: Path, standing: Upstream) -> None:
    with upstream.serve(tmp_path, torch=False) as other:
        other.prepare(clone, upstream.BASE)
        other.make_base(LOCAL_BASE)
        other.spoil_sfpi()
        done = build(clone, other)
        standing.make_base(LOCAL_BASE)
    assert done.returncode == 4
    assert "sfpi_7.89.0_x86_64_debian.deb is not the file that docker/images.lock.json pins" in done.stderr


def test_an_archive_of_an_unknown_authority_needs_the_builders_own(
    clone: Path, tmp_path: Path, standing: Upstream
) -> None:
    """It sends http on to https: refused with one sentence, in seconds; with CA_BUNDLE apt, curl and git go through."""
    with upstream.serve(tmp_path, known=False, torch=False) as private:
        private.prepare(clone, upstream.BASE)
        private.make_base(LOCAL_BASE)
        refused = build(clone, private)
        done = build(clone, private, CA_BUNDLE=str(private.ca))
        standing.make_base(LOCAL_BASE)
    assert refused.returncode == 4
    assert "signed by no authority that this build knows" in refused.stderr
    assert "CA_BUNDLE=ca.pem" in refused.stderr
    assert done.returncode == 0, done.stdout + done.stderr


def test_an_archive_without_its_lists_is_said_before_anything_is_installed(
    clone: Path, tmp_path: Path, standing: Upstream
) -> None:
    with upstream.serve(tmp_path, torch=False) as broken:
        broken.prepare(clone, upstream.BASE)
        broken.make_base(LOCAL_BASE)
        (broken.folder / "snapshot/dists/bookworm/main/binary-amd64/Packages").unlink()
        done = build(clone, broken)
        standing.make_base(LOCAL_BASE)
    assert done.returncode == 4
    assert "the archive gives no complete package lists: http://" in done.stderr
    assert "APT_MIRROR=URL" in done.stderr


def test_the_lock_learns_from_the_tag_over_the_same_network(clone: Path, standing: Upstream) -> None:
    """By the builder's own authorities; without them git and the download go through to nobody, which is said."""
    standing.prepare(clone, upstream.BASE)
    known = json.loads((clone / "docker/images.lock.json").read_text())
    asked = json.loads(json.dumps(known))
    for name, key in (("tt_metal", "commit"), ("openmpi", "deb_sha256")):
        asked["pins"]["ttml"][name] |= {key: None, "built": False, "reason": "nobody read it"}
    (clone / "docker/images.lock.json").write_text(json.dumps(asked))
    lacking = recipe_lock(clone, standing)
    assert re.search(r"its repository does not answer: .*certificate verification failed", lacking)
    assert "still unknown: tt_metal.commit: nobody read it" in lacking
    assert "openmpi.deb_sha256: https://" in lacking
    said = recipe_lock(clone, standing, CA_BUNDLE=str(standing.ca))
    assert "still unknown" not in said
    found = json.loads((clone / "docker/images.lock.json").read_text())["pins"]["ttml"]
    assert found["tt_metal"]["commit"] == known["pins"]["ttml"]["tt_metal"]["commit"]
    assert found["openmpi"]["deb_sha256"] == known["pins"]["ttml"]["openmpi"]["deb_sha256"]


def recipe_lock(clone: Path, standing: Upstream, **environment: str) -> str:
    words = [sys.executable, "-m", "tools.cli", "lock"]
    public = {"CA_BUNDLE": "", "GIT_SSL_CAINFO": "/etc/ssl/certs/ca-certificates.crt"}
    variables = os.environ | standing.environment() | {"PYTHONPATH": str(clone)} | public | environment
    done = subprocess.run(words, cwd=clone, env=variables, capture_output=True, text=True, check=True)
    return done.stdout


@pytest.mark.slow  # two and a half minutes on two busy cores
def test_two_builds_of_a_board_have_the_same_layers(clone: Path, standing: Upstream) -> None:
    standing.leave_ttml_in(PLACES[0])
    standing.prepare(clone, upstream.BASE)
    git = ("git", "-C", str(clone), "-c", "user.name=a", "-c", "user.email=a@b.c")
    subprocess.run([*git, "add", "--all", "--force", "requirements", "docker/images.lock.json"], check=True)
    subprocess.run([*git, "commit", "--quiet", "--allow-empty", "--message", "the stand-ins' pins"], check=True)
    assert build(clone, standing).returncode == 0
    words = [sys.executable, "-m", "tools.cli", "image", "verify", "n150", "--base-image", upstream.BASE]
    variables = os.environ | standing.environment() | {"PYTHONPATH": str(clone)}
    done = subprocess.run(words, cwd=clone, env=variables, capture_output=True, text=True, check=False)
    assert (done.returncode, "the same 2 layers" in done.stdout) == (0, True), done.stdout + done.stderr
