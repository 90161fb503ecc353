"""An image that a run needs and this machine lacks: what building it would take, the one question, and the build."""

from __future__ import annotations

import sys
from collections.abc import Callable
from dataclasses import dataclass

import click

from common.errors import MachineError
from common.hardware import Hardware
from tools.containers import docker
from tools.containers.build import Inputs, build_and_record, build_variables
from tools.containers.images import Image, NoImage, image_for, log_of, pins_of, pins_sha256, read_local, read_lock
from tools.containers.progress import left_steps

Say = Callable[[str], None]


@dataclass(frozen=True)
class Cost:
    """What a build takes, in words, and the gigabytes of the engine's disk without which it is not begun."""

    time: str
    disk: str
    gigabytes: int


# Measured here: docker/README.md, "The same layers twice". The build keeps the packages' stage beside the image.
CPU = Cost("one to two minutes on two cores, once its packages are downloaded", "an image of 1.5 GB", 6)
# None of it measured by us; who reported what: docker/README.md, "What the build of a board takes". The disk is made of
# upstream's images of 12.7 GB (the whole tree) and 4.3 GB (libraries alone): our builder's stage is like the first, and
# what runs, like the second, is there three times while it is put together: 12.7 + 3 x 4.3.
BOARD = Cost(
    "11 minutes on 32 cores, without tt-train (reported by others; never timed by us); on few cores: not reported, "
    "expect an hour or more",
    "a tree of about 10 GB and an image of 4 to 5 (reported)",
    26,
)


def cost_of(hw: Hardware) -> Cost:
    """Return what building a board's image takes, with nothing of it done yet."""
    return CPU if hw.is_cpu else BOARD


def outlook(hw: Hardware) -> list[str]:
    """Return in words what a build of the board's image would make, of what, how long that takes and how much disk."""
    pins, cost = pins_of(read_lock(), hw.image), cost_of(hw)
    packages = f"the packages of {', '.join(pins['python'])}"
    source = f"tt-metal {pins['tt_metal']['tag']} with tt-train, from source" if "tt_metal" in pins else packages
    return [
        f"to build: {source}, by the pins of docker/images.lock.json (target {hw.image} of docker/docker-bake.hcl)",
        f"how long: {cost.time}; less where an earlier build, or another board's, left its steps",
        f"how much: {cost.disk}; {cost.gigabytes} GB free are asked for",
    ]


def accept(hw: Hardware, lack: NoImage, build: bool | None, say: Say) -> None:
    """Return where the board's image is to be built: by `build`, or by a person at this terminal, who is asked.

    `build` is None of a verb that has no such word. Raises MachineError where its pins or the engine's disk do not do,
    where the answer is no, and where nobody can be asked.
    """
    try:
        disk = able(hw)
    except MachineError as error:
        raise MachineError(f"{lack.what}, and {error.what}", where=error.where, todo=error.todo) from error
    lines = [*outlook(hw), f"disk: {disk}"]
    if build:
        say(f"{lack.what}: it is built now")
    elif sys.stdin.isatty() and sys.stdout.isatty():
        say(lack.what)
    else:
        raise MachineError(
            "\n    ".join([f"{lack.what}, and nobody is at a terminal to be asked", *lines]),
            where=lack.where,
            todo=lack.todo if build is None else f"{lack.todo}; or BUILD=1 (--build), which builds it and goes on",
        )
    for line in lines:
        say(f"  {line}")
    if not build and not click.confirm("build it now, and go on?", err=True):
        raise MachineError("nothing was built", where=lack.where, todo=lack.todo)


def able(hw: Hardware) -> str:
    """Return in words that the engine here can build the board's image.

    Raises MachineError where a pin is unknown, where the engine has no buildx, and where its disk has less than a build
    takes and no step of it is here yet. A disk that cannot be seen from here is not judged.
    """
    build_variables(read_lock(), hw.image, Inputs.of_environment())
    docker.docker("buildx", "version")
    disk, needed = docker.disk(), cost_of(hw).gigabytes
    if disk is None:
        return f"it cannot be seen from here; a build takes {needed} GB"
    folder, free = disk
    words = f"{free / 1e9:.0f} GB are free on {folder}, a build takes {needed}"
    if free >= needed * 1e9:
        return words
    if begun(hw):
        return f"{words}, less what an earlier one left here: docker system df, should it not be enough"
    raise MachineError(
        f"to build the image of {hw.name} takes {needed} GB of disk: {free / 1e9:.0f} GB are free",
        where=f"{folder}, where the Docker engine keeps its layers",
        todo="make room there (docker system df shows what takes it), or build on another machine and publish: "
        f"recipe image publish {hw.name} --to REPOSITORY",
    )


def begun(hw: Hardware) -> bool:
    """Return whether a part of the build is here: an image of another board from the same pins, or steps that a build
    from them ended, by its log. What was pruned since is not known: a disk is then judged too mildly, never too hard.
    """
    lock = read_lock()
    pins = pins_sha256(lock, hw.image)
    siblings = [built["id"] for built in read_local().values() if built["lock_sha256"] == pins]
    return any(docker.inspect_image(id) for id in siblings) or any(
        left_steps(log_of(target), pins) for target in lock["targets"]
    )


def build_it(hw: Hardware, say: Say) -> Image:
    """Build the board's image and return it. Raises MachineError where that fails, with the log's path."""
    build_and_record(hw.image, read_lock(), Inputs.of_environment(), say)
    return image_for(hw)
