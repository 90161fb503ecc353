"""`recipe lock`: fills what docker/images.lock.json does not know and renews what it does, where this machine can.

A pin is written only where it agrees with the others: SFPI, OpenMPI and ttnn must be those of the tag of tt-metal, and
Ubuntu's packages must not be older than the base that they are installed on, or apt would have to downgrade.
"""

from __future__ import annotations

import datetime
import hashlib
import ssl
import urllib.request
from collections.abc import Callable
from pathlib import Path

from common.errors import MachineError
from common.files import sha256_file, utc_now, write_json
from common.paths import ROOT
from tools.containers import registry, tt_metal
from tools.containers.images import LOCK, WORDS, Json, read_lock, unknown_pins

TIME = "%Y%m%dT%H%M%SZ"  # of a snapshot, UTC
MIDNIGHT = "%Y%m%dT000000Z"
# The service has every time since March 2023 (documentation.ubuntu.com/server, "snapshot service"): a week back, the
# archive of that day is complete everywhere.
AGE = datetime.timedelta(days=7)
SECONDS = 60
Say = Callable[[str], None]


def renew(say: Say, *, upgrade: bool = False, ca: Path | None = None) -> None:
    """Write the hashes of today's requirements, and what is unknown where it can be read now.

    `upgrade` also reads again what is known: a tag may have moved. `ca` is the PEM file of the authorities to go by.
    What cannot be read stays as it is. Raises MachineError, and writes nothing, where a pin contradicts another;
    UsageError where `ca` has no certificate.
    """
    trust = registry.authorities(ca)
    lock = read_lock()
    board = lock["pins"]["ttml"]
    base = board["base"]["digest"]
    for pins in lock["pins"].values():
        for files in (pins["python"], pins.get("build_python", {})):
            files.update({name: sha256_file(ROOT / name) for name in files})
    for pin in (*(pins["base"] for pins in lock["pins"].values()), *lock["tools"].values()):
        if pin["digest"] is None or upgrade:
            _read_digest(pin, trust, say, dated=pin is board["base"])
    _follow_tag(board, say, upgrade, ca)
    if board["openmpi"]["deb_sha256"] is None:
        _hash_openmpi(board["openmpi"], trust, say)
    if board["apt_snapshot"]["timestamp"] is None or upgrade or board["base"]["digest"] != base:
        _learn("apt_snapshot", board["apt_snapshot"], {"timestamp": snapshot(board)}, "chosen", say)
    refuse_contradictions(board)
    before = LOCK.read_bytes()
    write_json(LOCK, lock)
    for line in sorted({line for target in lock["targets"] for line in unknown_pins(lock, target)}):
        say(f"still unknown: {line}")
    say(f"{LOCK}: {'unchanged' if LOCK.read_bytes() == before else 'written'}")


def snapshot(board: Json) -> str:
    """Return a time of Ubuntu's archive for the board images: a week back at midnight, never before the base's build.

    Nor before the time that is pinned: packages are not to become older. But no time that is yet to come.
    """
    week_back = (_now() - AGE).strftime(MIDNIGHT)
    others = (_after_base(board["base"]), board["apt_snapshot"]["timestamp"])
    return max([week_back, *(time for time in others if time and not _is_to_come(time))])


def refuse_contradictions(board: Json) -> None:
    """Raise MachineError where pins of the board images cannot belong together; asks no network."""
    tag, ttnn = board["tt_metal"]["tag"], board["ttnn"]["version"]
    if tag != f"v{ttnn}":
        raise MachineError(
            f"ttnn {ttnn} is not of tt-metal's tag {tag}",
            where=f"{LOCK}: pins.ttml",
            todo="name one version in tt_metal.tag, ttnn.version and requirements/ttnn.in, then make lock UPGRADE=1",
        )
    time, earliest = board["apt_snapshot"]["timestamp"], _after_base(board["base"])
    if time and earliest and time < earliest:
        raise MachineError(
            f"the packages of {time} are older than the base, which was built on {board['base']['created']}",
            where=f"{LOCK}: pins.ttml.apt_snapshot",
            todo=f"recipe lock --upgrade, at {earliest} or later",
        )


def _now() -> datetime.datetime:
    return datetime.datetime.now(datetime.timezone.utc)


def _is_to_come(time: str) -> bool:
    return time > _now().strftime(TIME)


def _after_base(base: Json) -> str | None:
    """Return the first midnight (UTC) after a base was built; None where it does not say when."""
    if not (created := base.get("created")):
        return None
    return (datetime.datetime.strptime(created, registry.TIME) + datetime.timedelta(days=1)).strftime(MIDNIGHT)


def _read_digest(pin: Json, trust: ssl.SSLContext, say: Say, *, dated: bool) -> None:
    """Pin what the registry has for an image's tag; where it cannot be read or taken, say why it stays as it was.

    `dated`: its packages are to be of a time of Ubuntu's archive; an image that is too young for any is not taken.
    """
    try:
        found = registry.find(pin["image"], trust)
        built = {"created": found.created} if found.created else {}
        earliest = _after_base(built) if dated else None
        if earliest and _is_to_come(earliest):
            raise MachineError(
                f"what it is now was built on {found.created}, and no midnight of Ubuntu's archive is after that yet: "
                f"recipe lock --upgrade, at {earliest} or later"
            )
    except MachineError as error:
        say(f"{pin['image']}: {'kept' if pin['digest'] else 'still unknown'}: {error.what}")
        return
    pin.pop("created", None)
    _learn(pin["image"], pin, {"digest": found.digest, **built}, "read", say)


def _follow_tag(board: Json, say: Say, upgrade: bool, ca: Path | None) -> None:
    """Compare tt-metal's commit, SFPI and OpenMPI with what the tag's own files say, and take those where it is due."""
    tag = board["tt_metal"]["tag"]
    try:
        told = tt_metal.read_tag(tag, ca)
    except MachineError as error:
        say(f"tt-metal {tag}: not checked: that commit, SFPI and OpenMPI are the tag's: {error.what}")
        return
    for name in ("tt_metal", "sfpi", "openmpi"):
        pin = board[name]
        if name not in told:
            say(f"{name}: not checked: tt-metal {tag} does not say it in a form that is known here")
            continue
        others = {key: value for key, value in told[name].items() if pin[key] != value}
        if not others:
            continue
        if not upgrade and any(pin[key] is not None for key in others):
            differences = ", ".join(f"{key} {pin[key]}, the tag has {value}" for key, value in others.items())
            raise MachineError(
                f"the pin {name} does not belong to tt-metal {tag}: {differences}",
                where=f"{LOCK}: pins.ttml.{name}",
                todo="recipe lock --upgrade takes what the tag says; look at why it differs before you commit that",
            )
        if name == "openmpi":
            pin["deb_sha256"] = None  # of another version
        _learn(name, pin, others, f"read in tt-metal {tag}", say)


def _hash_openmpi(pin: Json, trust: ssl.SSLContext, say: Say) -> None:
    """Hash OpenMPI's release file: upstream names no hash of it, so the first download is trusted, by its https."""
    url = tt_metal.openmpi_url(pin["version"])
    digest = hashlib.sha256()
    try:
        with urllib.request.urlopen(url, timeout=SECONDS, context=trust) as answer:
            while piece := answer.read(1 << 20):
                digest.update(piece)
    except registry.NETWORK as error:
        pin.update({"built": False, "reason": f"{url} could not be read: {getattr(error, 'reason', error)}"})
        pin.pop("source", None)
        return
    _learn("openmpi", pin, {"deb_sha256": digest.hexdigest()}, f"computed of {url}", say)


def _learn(name: str, pin: Json, values: Json, how: str, say: Say) -> None:
    """Write values into a pin, with how they came about, and say those that are new."""
    if all(pin.get(key) == value for key, value in values.items()):
        return
    pin.update(values)
    for word in WORDS - values.keys():
        pin.pop(word, None)
    pin["source"] = f"{how} by `recipe lock` on {utc_now()[:10]}"
    say(f"{name}: " + ", ".join(f"{key} {value}" for key, value in values.items()))
