"""`recipe lock`: reads again what docker/images.lock.json pins, where this machine can reach it."""

from __future__ import annotations

import re
from collections.abc import Callable

from common.errors import MachineError
from common.files import sha256_file, utc_now, write_json
from common.paths import ROOT
from tools.containers.docker import docker
from tools.containers.images import LOCK, WORDS, Json, read_lock
from tools.git import git

TT_METAL = "https://github.com/tenstorrent/tt-metal.git"
SECONDS = 60
Say = Callable[[str], None]


def renew(say: Say, *, upgrade: bool = False) -> None:
    """Write the hashes of today's requirements, and what is unknown where it can be read now.

    `upgrade` also reads again the digests that are known, of bases and of tools: their tags may have moved. What cannot
    be read stays as it is, with its reason.
    """
    lock = read_lock()
    for pins in lock["pins"].values():
        for files in (pins["python"], pins.get("build_python", {})):
            files.update({name: sha256_file(ROOT / name) for name in files})
        if "tt_metal" in pins and pins["tt_metal"]["commit"] is None:
            _learn(pins["tt_metal"], "commit", commit_of_tag(pins["tt_metal"]["tag"]), say)
    for pin in (*(pins["base"] for pins in lock["pins"].values()), *lock["tools"].values()):
        if pin["digest"] is None or upgrade:
            _learn(pin, "digest", base_digest(pin["image"]), say)
    before = LOCK.read_bytes()
    write_json(LOCK, lock)
    say(f"{LOCK}: {'unchanged' if LOCK.read_bytes() == before else 'written'}")


def _learn(pin: Json, key: str, value: str | None, say: Say) -> None:
    name = pin.get("image") or pin.get("tag")
    if value is None:
        say(f"{name}: its {key} cannot be read from here; {'kept' if pin[key] else 'still unknown'}")
        return
    pin[key] = value
    for word in WORDS:
        pin.pop(word, None)
    pin["source"] = f"read by `recipe lock` on {utc_now()[:10]}"
    say(f"{name}: {key} {value}")


def base_digest(image: str) -> str | None:
    """The digest that a registry has for `image` now, or None where none answers."""
    try:
        said = docker("buildx", "imagetools", "inspect", image, seconds=SECONDS)
    except MachineError:
        return None
    found = re.search(r"^Digest:\s+(sha256:[0-9a-f]{64})$", said, re.MULTILINE)
    return found[1] if found else None


def commit_of_tag(tag: str) -> str | None:
    """The commit that a tag of tt-metal names, or None where the repository does not answer."""
    said = git("ls-remote", TT_METAL, f"refs/tags/{tag}", f"refs/tags/{tag}^{{}}", seconds=SECONDS).stdout
    commits = re.findall(r"^([0-9a-f]{40})\t", said, re.MULTILINE)
    return commits[-1] if commits else None  # an annotated tag lists itself first, its commit second
