"""`recipe lock`, against a registry and a tt-metal of this machine: what it fills, renews, and refuses to write."""

from __future__ import annotations

import copy
import datetime
import hashlib
import json
import re
import shutil
import ssl
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from common.errors import MachineError, UsageError
from tests.doubles import machines
from tests.doubles.upstream import certificates, github
from tests.doubles.upstream.registry import Registry
from tests.doubles.upstream.tools import run
from tests.support.image_lock import unexplained
from tools.containers import images, lock, registry
from tools.containers.registry import MANIFESTS, find

LOCK = images.read_lock()
TAG, SFPI, OPENMPI = "v0.81.1", "7.89.0", "5.0.7"
BUILT = "2026-11-20T11:12:13.5Z"
INDEX, MANIFEST = registry.INDEXES[0], MANIFESTS[0]


def publish(place: Registry, name: str, created: str | None = BUILT) -> str:
    """Put an image of two platforms into a registry, under the tag 1; return the digest of its index."""
    entries = []
    for architecture in ("arm64", "amd64"):
        built = created if architecture == "amd64" else "2001-01-01T00:00:00Z"
        config = place.put(json.dumps({"architecture": architecture, "created": built}).encode())
        manifest = json.dumps({"mediaType": MANIFEST, "config": {"digest": config}, "layers": []}).encode()
        digest = place.put_manifest(name, f"sha256:{hashlib.sha256(manifest).hexdigest()}", MANIFEST, manifest)
        entries.append({"digest": digest, "platform": {"os": "linux", "architecture": architecture}})
    return place.put_manifest(name, "1", INDEX, json.dumps({"mediaType": INDEX, "manifests": entries}).encode())


@pytest.fixture
def served(tmp_path: Path) -> Iterator[Registry]:
    with Registry(tmp_path / "registry") as place:
        yield place


@pytest.fixture(scope="module")
def github_com(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A GitHub whose tag has what the lock pins."""
    folder = tmp_path_factory.mktemp("github.com")
    for path in (github.sfpi(folder, SFPI), github.openmpi(folder, OPENMPI)):
        machines.write(path, path.name)
    github.make_repositories(folder, tag=TAG, sfpi_version=SFPI, openmpi_version=OPENMPI)
    return folder


@pytest.fixture
def home(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, served: Registry, github_com: Path) -> Path:
    """A lock of its own, whose images are in the registry, and a GitHub of its own."""
    folder = tmp_path / "github.com"
    shutil.copytree(github_com, folder)
    monkeypatch.setenv("GITHUB_MIRROR", f"file://{folder}/github")
    for module in (images, lock):
        monkeypatch.setattr(module, "LOCK", tmp_path / "images.lock.json")
    mine = copy.deepcopy(LOCK)
    for name, pin in {
        "cpu": mine["pins"]["cpu"]["base"],
        "ttml": mine["pins"]["ttml"]["base"],
        **mine["tools"],
    }.items():
        pin["digest"] = publish(served, name)
        pin["image"] = f"{served.host}/{name}:1"
    mine["pins"]["ttml"]["tt_metal"]["commit"] = github.commit(folder, TAG)
    mine["pins"]["ttml"]["openmpi"]["deb_sha256"] = sha256(github.openmpi(folder, OPENMPI))
    told = (folder / "tt-metal/tt_metal/sfpi-version").read_text()
    mine["pins"]["ttml"]["sfpi"] |= {
        "deb_sha256": sha256(github.sfpi(folder, SFPI)),
        "txz_sha256": re.findall(r"txz_hash='(\w+)'", told)[0],
    }
    write(mine)
    return folder


def sha256(path: Path) -> str:
    return hashlib.sha256(path.read_bytes()).hexdigest()


def write(content: Any) -> None:
    images.LOCK.write_text(json.dumps(content))


def pin(name: str) -> Any:
    return images.read_lock()["pins"]["ttml"][name]


def change(name: str, **values: Any) -> None:
    content = images.read_lock()
    content["pins"]["ttml"][name] |= values
    write(content)


def renew(**options: Any) -> list[str]:
    said: list[str] = []
    lock.renew(said.append, **options)
    return said


def day(back: int) -> str:
    return (datetime.datetime.now(datetime.timezone.utc) - datetime.timedelta(days=back)).strftime("%Y%m%dT000000Z")


# --- recipe lock ----------------------------------------------------------------------------------------------------


def test_what_is_known_stays_and_agrees(home: Path) -> None:
    before = images.read_lock()
    renew()
    assert images.read_lock() == before
    assert renew() == [f"{images.LOCK}: unchanged"]


@pytest.mark.parametrize(
    ("name", "key"),
    [
        ("base", "digest"),
        ("apt_snapshot", "timestamp"),
        ("tt_metal", "commit"),
        ("sfpi", "deb_sha256"),
        ("sfpi", "txz_sha256"),
        ("openmpi", "deb_sha256"),
    ],
)
def test_every_null_is_filled_in_one_go(name: str, key: str, home: Path) -> None:
    """Whatever `recipe image build` refuses for, one `recipe lock` ends: nobody is sent round in a circle."""
    known, packages = pin(name)[key], pin("apt_snapshot")["timestamp"]
    change(name, **{key: None, "built": False, "reason": "nobody read it"})
    assert images.unknown_pins(images.read_lock(), "n150") == [f"{name}.{key}: nobody read it"]
    renew()
    assert images.unknown_pins(images.read_lock(), "n150") == []
    assert pin(name)[key] == (day(back=7) if name == "apt_snapshot" else known)
    assert pin("apt_snapshot")["timestamp"] == (day(back=7) if name in ("base", "apt_snapshot") else packages)
    assert "by `recipe lock` on 20" in pin(name)["source"]
    assert list(unexplained(images.read_lock())) == []


def test_without_the_network_everything_is_kept_and_said(home: Path, served: Registry) -> None:
    shutil.rmtree(home / "github")
    shutil.rmtree(served.folder / "manifests")
    change("tt_metal", commit=None, built=False, reason="nobody read it")
    before = images.read_lock()
    said = renew(upgrade=True)
    time = pin("apt_snapshot")
    assert images.read_lock() == before | {
        "pins": before["pins"] | {"ttml": before["pins"]["ttml"] | {"apt_snapshot": time}}
    }
    assert [line for line in said if "kept" in line and "404" in line] == said[:4]
    assert "not checked: that commit, SFPI and OpenMPI are the tag's: its repository does not answer: fatal:" in said[4]
    assert "still unknown: tt_metal.commit: nobody read it" in said


def test_upgrade_takes_what_the_tags_are_now(home: Path, served: Registry) -> None:
    again = publish(served, "ttml", created="2026-11-21T00:00:00Z")
    own = home / "tt-metal/tt_metal/sfpi-version"
    own.write_text(own.read_text().replace(SFPI, "7.90.0").replace("'a", "'b"))
    machines.write(github.openmpi(home, "5.0.8"), "the newer one")
    script = home / "tt-metal/install_dependencies.sh"
    script.write_text(script.read_text().replace(OPENMPI, "5.0.8"))
    github.publish_tree(home, TAG, None)
    renew(upgrade=True)
    assert pin("base")["digest"] == again
    assert pin("tt_metal")["commit"] == github.commit(home, TAG)
    assert pin("sfpi")["version"] == "7.90.0"
    assert (pin("openmpi")["version"], pin("openmpi")["deb_sha256"]) == ("5.0.8", sha256(github.openmpi(home, "5.0.8")))
    assert images.unknown_pins(images.read_lock(), "n150") == []


@pytest.mark.parametrize(
    ("name", "values", "message"),
    [
        ("tt_metal", {"commit": "c" * 40}, rf"tt_metal does not belong to tt-metal {TAG}: commit c{{40}}, the tag has"),
        ("sfpi", {"version": "7.85.0"}, r"sfpi does not belong .*: version 7\.85\.0, the tag has 7\.89\.0"),
        ("sfpi", {"deb_sha256": "c" * 64}, r"sfpi does not belong .*: deb_sha256 c{64}, the tag has"),
        ("openmpi", {"version": "5.0.6"}, r"openmpi does not belong .*: version 5\.0\.6, the tag has 5\.0\.7"),
        ("ttnn", {"version": "0.80.0"}, r"ttnn 0\.80\.0 is not of tt-metal's tag v0\.81\.1"),
    ],
)
def test_pins_that_contradict_one_another_are_not_written(
    name: str, values: dict[str, str], message: str, home: Path
) -> None:
    change(name, **values)
    change("base", digest=None, built=False, reason="nobody read it")
    before = images.LOCK.read_bytes()
    with pytest.raises(MachineError, match=message):
        renew()
    assert images.LOCK.read_bytes() == before


def test_packages_older_than_the_base_are_refused_and_cured_by_upgrade(home: Path, served: Registry) -> None:
    change("base", created="2026-11-20T11:12:13Z")
    change("apt_snapshot", timestamp="20261120T000000Z")
    with pytest.raises(
        MachineError, match=r"packages of 20261120T000000Z are older than the base(?s:.*)recipe lock --upgrade"
    ):
        renew()
    renew(upgrade=True)
    assert pin("apt_snapshot")["timestamp"] == max(day(back=7), "20261121T000000Z")
    renew()


@pytest.mark.parametrize(
    ("pinned", "built", "chosen"),
    [
        ("20200101T000000Z", None, 7),
        ("20200101T000000Z", 3, 2),  # the base is younger than a week: the midnight after it
        ("20200101T000000Z", 1, 0),
        ("yesterday", None, 1),  # packages never become older
        ("tomorrow", None, 7),  # which the archive does not have
    ],
)
def test_the_time_of_the_packages_is_a_week_back_and_never_before_the_base(
    pinned: str, built: int | None, chosen: int, home: Path, served: Registry
) -> None:
    created = None
    if built is not None:
        created = datetime.datetime.now(datetime.timezone.utc) - datetime.timedelta(days=built)
    publish(served, "ttml", created=created.strftime("%Y-%m-%dT%H:%M:%S.123Z") if created else None)
    change("apt_snapshot", timestamp={"yesterday": day(back=1), "tomorrow": day(back=-1)}.get(pinned, pinned))
    renew(upgrade=True)
    assert pin("apt_snapshot")["timestamp"] == day(back=chosen)


@pytest.mark.parametrize("known", [True, False])
def test_a_base_that_was_built_today_waits_for_the_midnight_after_it(known: bool, home: Path, served: Registry) -> None:
    """No time of the archive is after it yet: the base that is pinned stays, with a time that exists."""
    if not known:
        change("base", digest=None, built=False, reason="nobody read it")
    before = pin("base")
    now = datetime.datetime.now(datetime.timezone.utc)
    publish(served, "ttml", created=now.strftime("%Y-%m-%dT%H:%M:%SZ"))
    (line,) = [line for line in renew(upgrade=True) if "no midnight of Ubuntu's archive is after that yet" in line]
    assert f"ttml:1: {'kept' if known else 'still unknown'}: what it is now was built on 20" in line
    assert pin("base") == before
    assert pin("apt_snapshot")["timestamp"] == day(back=7)


@pytest.mark.parametrize("created", ["2026-99-99T00:00:00Z", "9999-12-31T00:00:00Z", None])
def test_a_time_of_build_that_is_none_costs_no_pin(created: str | None, home: Path, served: Registry) -> None:
    again = publish(served, "ttml", created=created)
    renew(upgrade=True)
    assert (pin("base")["digest"], pin("base").get("created")) == (again, None)


def test_a_file_without_certificates_is_refused_by_its_name(tmp_path: Path, home: Path) -> None:
    wrong = tmp_path / "ca.pem"
    wrong.write_text("not PEM\n")
    before = images.LOCK.read_bytes()
    with pytest.raises(UsageError, match=rf"no certificate can be read there(?s:.*){re.escape(str(wrong))}"):
        renew(ca=wrong)
    assert images.LOCK.read_bytes() == before


def test_a_branch_that_is_named_like_the_tag_is_not_taken_for_it(home: Path) -> None:
    run("git", "update-ref", "-d", f"refs/tags/{TAG}", cwd=home / "github/tenstorrent/tt-metal.git")
    assert "its repository does not answer: fatal: couldn't find remote ref refs/tags/v0.81.1" in "\n".join(renew())


def test_a_repository_that_wants_a_password_is_no_question_at_the_terminal(
    home: Path, served: Registry, monkeypatch: pytest.MonkeyPatch
) -> None:
    for name in ("GIT_ASKPASS", "SSH_ASKPASS"):
        monkeypatch.delenv(name, raising=False)
    monkeypatch.setenv("GIT_CONFIG_GLOBAL", "/dev/null")
    monkeypatch.setenv("GITHUB_MIRROR", served.url)
    served.token = True
    assert "terminal prompts disabled" in "\n".join(renew())


# --- the registry ---------------------------------------------------------------------------------------------------


def test_a_digest_is_that_of_the_index_and_the_time_that_of_this_platform(served: Registry) -> None:
    digest = publish(served, "team/base")
    assert find(f"{served.host}/team/base:1") == registry.Found(digest, "2026-11-20T11:12:13Z")


def test_a_registry_that_gives_tokens_to_anybody_is_asked_for_one(served: Registry) -> None:
    digest = publish(served, "team/base")
    served.token = True
    assert find(f"{served.host}/team/base:1").digest == digest


@pytest.mark.parametrize(
    ("fault", "message"),
    [
        ("no-token", "it wants a login, and names no place that gives a token to anybody"),
        ("digest", r"it tells the digest sha256:0{64} and sends what has sha256:"),
        ("redirect", r"it answers 307 .*, to https://elsewhere\.example\.org/manifest"),
    ],
)
def test_a_wrong_answer_is_no_digest(fault: str, message: str, served: Registry) -> None:
    publish(served, "team/base")
    served.token = fault == "no-token"
    served.fault = fault
    with pytest.raises(MachineError, match=message):
        find(f"{served.host}/team/base:1")


def test_a_place_of_content_that_cannot_be_reached_costs_the_time_and_not_the_pin(home: Path, served: Registry) -> None:
    """A registry sends to another host for what is not a manifest; some networks let only the registry through."""
    again = publish(served, "ttml")
    served.fault = "content-elsewhere"
    renew(upgrade=True)
    assert (pin("base")["digest"], pin("base").get("created")) == (again, None)


def test_what_is_no_answer_of_http_is_one_sentence(served: Registry) -> None:
    publish(served, "team/base")
    served.fault = "no-http"
    with pytest.raises(MachineError, match=rf"^{served.host} does not answer: "):
        find(f"{served.host}/team/base:1")


def test_what_a_registry_does_not_have_is_said(served: Registry) -> None:
    with pytest.raises(MachineError, match=r"asked for team/none:1: it answers 404"):
        find(f"{served.host}/team/none:1")


def test_a_registry_is_asked_by_https_and_the_authorities_that_are_given(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    if shutil.which("openssl") is None:
        pytest.skip("no openssl here to make an authority with")
    monkeypatch.setattr(registry, "_is_loopback", lambda host: False)
    certificates.make(tmp_path, ["127.0.0.1"])
    context = ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER)
    context.load_cert_chain(tmp_path / "server.pem", tmp_path / "server.key")
    with Registry(tmp_path / "registry", context) as place:
        digest = publish(place, "team/base")
        place.token = True
        assert find(f"{place.host}/team/base:1", registry.authorities(tmp_path / "ca.pem")).digest == digest
        for ca in (None, tmp_path / "stranger.pem"):
            with pytest.raises(MachineError, match=r"does not answer: .*CERTIFICATE_VERIFY_FAILED"):
                find(f"{place.host}/team/base:1", registry.authorities(ca))


@pytest.mark.parametrize(
    ("image", "url"),
    [
        ("ubuntu:22.04", "https://registry-1.docker.io/v2/library/ubuntu"),
        ("moby/buildkit:buildx-stable-1", "https://registry-1.docker.io/v2/moby/buildkit"),
        ("ghcr.io/owner/name:v1", "https://ghcr.io/v2/owner/name"),
        ("localhost:5000/a/b:1", "http://localhost:5000/v2/a/b"),
    ],
)
def test_a_name_is_read_as_docker_reads_it(image: str, url: str) -> None:
    assert registry.place_of(image).url == url


@pytest.mark.parametrize("image", ["ubuntu", "ubuntu@sha256:" + "a" * 64, "../a:1?x", "https://a.b/c:1"])
def test_what_is_no_name_with_a_tag_is_refused(image: str) -> None:
    with pytest.raises(MachineError, match="not an image's name with a tag"):
        registry.place_of(image)
