"""Which image a board's containers start from: published ones by repository digest, local builds by image id.

`docker/images.lock.json` holds every pin and the published digests; `docker/images.local.json`, which git ignores,
what was built on this machine. Neither says anything about the other's machine.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

from pydantic import BaseModel, ConfigDict, ValidationError, model_validator

from common.errors import MachineError
from common.files import read_json, write_json
from common.hardware import Hardware
from common.paths import ROOT

LOCK = ROOT / "docker" / "images.lock.json"
LOCAL = ROOT / "docker" / "images.local.json"
FORMAT = 1
# Of a pin: where it was read, why it is null, when that was built. Nothing that an image is made of.
WORDS = {"built", "reason", "source", "created"}
Json = dict[str, Any]


class NoImage(MachineError):
    """There is no image of a board for the pins of today; building one here ends that."""


@dataclass(frozen=True)
class Image:
    """An image to run. `reference` is what `docker run` takes: `repository@sha256:...` or a local image id."""

    target: str
    reference: str
    source: Literal["local", "published"]
    lock_sha256: str

    def __str__(self) -> str:
        return f"{self.source} image {self.reference}"


def image_for(hw: Hardware) -> Image:
    """Return the image of a board: the one built here from the pins of today, else the published one.

    Asks no engine and no network; `docker.find_image` asks the engine, too. Raises NoImage where there is none, or
    where the one that there is was made from other pins.
    """
    if found := images_of(hw):
        return found[0]
    local, entry = read_local().get(hw.image), target_of(read_lock(), hw.image)
    todo = f"make image HW={hw.name}"
    if local is not None:
        raise NoImage(
            f"the image of {hw.name} was built here on {local['created']} from other pins than today's",
            where=str(LOCAL),
            todo=todo,
        )
    if entry["digest"] is not None:
        raise NoImage(
            f"the image of {hw.name} was published on {entry['date']} from other pins than today's",
            where=str(LOCK),
            todo=todo,
        )
    raise NoImage(f"no image for {hw.name}: none is published, none was built here", where=hw.image, todo=todo)


def images_of(hw: Hardware) -> list[Image]:
    """Return the images of a board from the pins of today, the one to take first: built here, then published.

    What was built here goes first, so that a registry that is gone, or gives nothing, is in nobody's way.
    """
    return [image for image in (local_image(hw), published_image(hw)) if image]


def published_image(hw: Hardware) -> Image | None:
    """Return the published image of a board, if it is of the pins of today."""
    lock = read_lock()
    entry, pins = target_of(lock, hw.image), pins_sha256(lock, hw.image)
    if entry["digest"] is None or entry["lock_sha256"] != pins:
        return None
    return Image(hw.image, f"{entry['repository']}@{entry['digest']}", "published", pins)


def local_image(hw: Hardware) -> Image | None:
    """Return the image of a board that was built here from the pins of today, published or not; None: there is none."""
    pins = pins_sha256(read_lock(), hw.image)
    local = read_local().get(hw.image)
    return Image(hw.image, local["id"], "local", pins) if local and local["lock_sha256"] == pins else None


# --- the lock -------------------------------------------------------------------------------------------------------


def read_lock() -> Json:
    """The lock's JSON. Raises MachineError for an unknown format."""
    return _read(LOCK, _Lock)


def target_of(lock: Json, target: str) -> Json:
    """The lock's entry of one bake target. Raises MachineError if it has none."""
    try:
        entry: Json = lock["targets"][target]
    except KeyError as error:
        known = ", ".join(lock["targets"])
        raise MachineError(
            f"the image {target!r} is not in the lock", where=str(LOCK), todo=f"targets it has: {known}"
        ) from error
    return entry


def pins_of(lock: Json, target: str) -> Json:
    """The pins that fix a target's content, by name."""
    pins: Json = lock["pins"][target_of(lock, target)["pins"]]
    return pins


def requirements_of(pins: Json) -> dict[str, str]:
    """The requirement files of some pins, those that only building needs included, with their sha256."""
    return {**pins["python"], **pins.get("build_python", {})}


def pins_sha256(lock: Json, target: str) -> str:
    """Return one hash over all pins of a target, without the words on them: its image's label, in a run's manifest."""
    pins = {name: {key: pin[key] for key in pin if key not in WORDS} for name, pin in pins_of(lock, target).items()}
    text = json.dumps(pins, sort_keys=True, separators=(",", ":"))
    return hashlib.sha256(text.encode()).hexdigest()


def unknown_pins(lock: Json, target: str) -> list[str]:
    """`pin.key: reason` of every null among a target's pins."""
    return [f"{where}: {owner.get('reason', 'no reason is given')}" for where, owner in _nulls(pins_of(lock, target))]


def _nulls(value: Json, path: str = "") -> Iterator[tuple[str, Json]]:
    for key, inner in value.items():
        if inner is None:
            yield f"{path}{key}", value
        elif isinstance(inner, dict):
            yield from _nulls(inner, f"{path}{key}.")


# --- what was built here --------------------------------------------------------------------------------------------


def read_local() -> Json:
    """Images built on this machine by target: {id, lock_sha256, base, commit, created}."""
    images: Json = _read(LOCAL, _Local)["images"] if LOCAL.exists() else {}
    return images


def log_of(target: str) -> Path:
    """Return the file that has all the output of a target's last build."""
    return LOCAL.with_name(f"build-{target}.log")


def record_local(target: str, built: Json) -> None:
    """Remember the image that was just built for a target."""
    write_json(LOCAL, {"format": FORMAT, "images": {**read_local(), target: built}})


class _Shape(BaseModel):
    """What is relied on; other keys may be there."""

    model_config = ConfigDict(extra="allow", strict=True)


class _Pins(_Shape):
    base: _Pinned
    python: dict[str, str]
    build_python: dict[str, str] = {}
    __pydantic_extra__: dict[str, dict[str, str | bool | None]]


class _Pinned(_Shape):
    image: str
    digest: str | None


class _Target(_Shape):
    pins: str
    repository: str | None
    digest: str | None
    date: str | None
    lock_sha256: str | None = None


class _Lock(_Shape):
    format: Literal[1]
    pins: dict[str, _Pins]
    tools: dict[str, _Pinned]
    targets: dict[str, _Target]

    @model_validator(mode="after")
    def _has_what_it_names(self) -> _Lock:
        if lacking := [name for name, target in self.targets.items() if target.pins not in self.pins]:
            raise ValueError(f"targets.{lacking[0]}: there are no such pins")
        return self


class _Built(_Shape):
    id: str
    lock_sha256: str
    created: str


class _Local(_Shape):
    format: Literal[1]
    images: dict[str, _Built]


def _read(path: Path, shape: type[_Shape]) -> Json:
    content = read_json(path)
    if content.get("format") != FORMAT:
        raise MachineError(
            f"format {content.get('format')!r}; this version reads {FORMAT}",
            where=str(path),
            todo="update the checkout",
        )
    try:
        shape.model_validate(content)
    except ValidationError as error:
        first = error.errors(include_url=False)[0]
        key = ".".join(map(str, first["loc"]))
        todo = "put the file back as it was: git checkout, or of what was built here: make image"
        raise MachineError(f"{path.name}: {key}: {first['msg']}", where=str(path), todo=todo) from None
    return content
