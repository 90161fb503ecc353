"""`make rehearse ROAD=1 [FAULT=old-firmware]`: from a clean clone to a saved checkpoint with one command, or a refusal.

The command is the one of the README, typed in a clone of this checkout's commit: it makes the clone's own .venv, builds
the image of an n150 by docker/Dockerfile, and trains in it. What it meets is made here, in a temporary folder: device
files of the board, and stand-ins of all that the build takes from outside (tests/doubles/upstream), of which tt-metal's
installs the doubles of ttml and ttnn. A fault is planted in these surroundings, never in what is tested.
"""

from __future__ import annotations

import contextlib
import json
import os
import re
import shutil
import subprocess
import sys
import tempfile
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from ci.hardware.job import say
from common.errors import MachineError, UsageError
from common.files import write_json
from common.paths import ROOT
from tests.doubles import machines, upstream
from tests.doubles.upstream import Upstream
from tools.containers.build import LOCAL_BASE
from tools.containers.docker import docker, inspect_image
from tools.git import git
from tools.verify.tiny_base import write_tiny_base

BOARD, STEPS = "n150", 2
# The fine-tuning recipe as it is, but for a base of seconds and fewer answers.
SET = ("training_config.batch_size=4", "eval_config.max_rows=4", "eval_config.max_new_tokens=8")
OF_MAKE = ("MAKEFLAGS", "MAKEOVERRIDES", "MFLAGS", "MAKELEVEL")  # this may have been called by make itself
OF_THIS = ("PYTHONPATH", "VIRTUAL_ENV", "HW", "ROAD", "FAULT", "OUT", "STEPS", "SET", "BASE_IMAGE", "CA_BUNDLE")
# Stands before docker. It keeps the engine's disk from being judged, as nothing is compiled here; and does not ask for
# locked memory without a limit, which an engine that runs in a container itself may not give: these files lock none.
DOCKER = """#!/bin/bash
words=()
for word in "$@"; do
    if [ "$word" = memlock=-1 ]; then unset 'words[-1]'; else words+=("$word"); fi
done
[ "$1" = info ] || exec {docker} "${{words[@]}}"
{docker} "$@" | sed 's#"DockerRootDir":"[^"]*"#"DockerRootDir":"/on/another/machine"#'
"""
TT_SMI = "#!/bin/sh\necho '{\"device_info\": []}'\n"
PROVEN = (
    "proven here: what a user types does it all, or refuses in one message; every stage of docker/Dockerfile runs, and"
    "\n  what it downloads is held to the lock; the image trains through the backend of boards and saves"
)
NOT_PROVEN = (
    "not proven: anything about a card, or what compiling tt-metal takes. Devices are files, ttml is a double; base,"
    "\n  archive and GitHub are stand-ins on this machine, and the base is Debian with Python 3.11 in place of Ubuntu."
    "\n  The engine's disk is not judged, and its limit of locked memory not lifted"
)


@dataclass
class Place:
    """Where a rehearsal takes place: a clone, a machine with a board, and the stand-ins while they are served."""

    folder: Path
    standing: Upstream

    @property
    def clone(self) -> Path:
        return self.folder / "clone"

    @property
    def machine(self) -> Path:
        return self.folder / "machine"

    @property
    def checkpoints(self) -> list[Path]:
        """The checkpoints that were saved, in the clone's runs."""
        return sorted(self.clone.glob("runs/*/checkpoints/step-*/state.json"))

    def change_lock(self, change: Callable[[dict[str, Any]], object]) -> None:
        """Change the clone's lock of images."""
        path = self.clone / "docker/images.lock.json"
        lock = json.loads(path.read_text("utf-8"))
        change(lock)
        write_json(path, lock)


@dataclass(frozen=True)
class Break:
    """Something planted, and what must come of it: a training all the same, or a refusal that has `answer` in it.

    stand_ins: arguments of upstream.serve. plant: changes the place. environment: of the command, by the place.
    published: the image is in the registry, by the lock, and nobody says BUILD=1. asks: `recipe` is asked this in place
    of training, and `answer` is in what it says.
    """

    says: str
    answer: str = ""
    stand_ins: Mapping[str, Any] = field(default_factory=dict)
    plant: Callable[[Place], object] = lambda _place: None
    environment: Callable[[Place], Mapping[str, str]] = lambda _place: {}
    published: bool = False
    asks: str = ""

    def command(self, place: Place) -> list[str]:
        """Return what a user types in the clone."""
        if self.asks:
            return ["make", "do", f"ARGS={self.asks}"]
        settings = " ".join((f"model_config.base={place.folder / 'model'}", *SET))
        build = [] if self.published else ["BUILD=1"]
        return ["make", "recipe-finetune", f"HW={BOARD}", *build, f"STEPS={STEPS}", f"SET={settings}"]


@dataclass(frozen=True)
class Arrival:
    """What came of the command: the exit code of `recipe` (make has 2 for every failure), its output, checkpoints."""

    code: int
    said: str
    checkpoints: int

    def is_that_of(self, planted: Break) -> bool:
        """Return whether it came to what it must: a checkpoint, or one message with the cure and nothing begun."""
        if planted.asks:
            return planted.answer in self.said
        if not planted.answer:
            built = "[ttml-builder" in self.said
            return self.code == 0 and self.checkpoints > 0 and built is not planted.published
        messages = re.findall(r"^error: (?:.*\n)(?:(?:  ).*\n)*", self.said, re.MULTILINE)
        return self.code == 4 and not self.checkpoints and len(messages) == 1 and planted.answer in messages[0]


def base_of_another(place: Place) -> None:
    """Have the lock name a digest of the base that the registry has not."""
    place.change_lock(lambda lock: lock["pins"]["ttml"]["base"].update(digest="sha256:" + "0" * 64))


def too_few_pages(place: Place) -> None:
    """Take the IOMMU away, and leave one huge page of the four."""
    shutil.rmtree(place.machine)
    machines.fake_host(place.machine, BOARD, dma=None, hugepages=1, mounted=True)
    machines.real_nodes(place.machine)


def firmware(version: str) -> Callable[[Place], object]:
    """Have the driver say so of the card."""
    path = "sys/class/tenstorrent/tenstorrent!0/tt_fw_bundle_ver"
    return lambda place: machines.write(place.machine / path, f"{version}\n")


NOTHING = Break("nothing")
BREAKS: Mapping[str, Break] = {
    "other-base": Break(
        "the lock names a digest of the base that is no image of the registry", "recipe lock", plant=base_of_another
    ),
    "http-archive": Break(
        "the archive is named by http, and sends on to https",
        environment=lambda place: {"APT_MIRROR": f"{place.standing.sites.http}/snapshot"},
    ),
    "unknown-authority": Break(
        "an authority that nobody knows has signed for the archive", "CA_BUNDLE=", stand_ins={"known": False}
    ),
    "own-authority": Break(
        "the same, and CA_BUNDLE names that authority",
        stand_ins={"known": False},
        environment=lambda place: {"CA_BUNDLE": str(place.standing.ca)},
    ),
    "ttml-elsewhere": Break("the build leaves _ttml in build_Release/ttml", stand_ins={"ttml": upstream.PLACES[1]}),
    "ttml-nowhere": Break("the build leaves no _ttml", "report it", stand_ins={"ttml": None}),
    "old-firmware": Break("firmware 80.17.0.0, which is from before 18", "tt-installer", plant=firmware("80.17.0.0")),
    "few-pages": Break("no IOMMU, and three huge pages too few", "hugepages=4", plant=too_few_pages),
    "published": Break("the image was built and published elsewhere", published=True),
    "no-tt-smi": Break(
        "no tt-smi on PATH, and doctor is asked",
        "warning: board.tt-smi: no tt-smi on PATH",
        plant=lambda place: (place.folder / "bin/tt-smi").unlink(),
        asks=f"doctor --hw {BOARD}",
    ),
}


def main() -> int:
    """Rehearse; 0 where the command came to what it must, 1 where it did not. Raises UsageError and MachineError."""
    name = os.environ.get("FAULT") or ""
    if name and name not in BREAKS:
        raise UsageError(f"no fault {name!r} on the road", where="FAULT", todo=f"one of {', '.join(BREAKS)}")
    planted = BREAKS.get(name, NOTHING)
    with tempfile.TemporaryDirectory(prefix="road-") as folder:
        arrival = travel(Path(folder), planted)
    say(f"\n{PROVEN}\n{NOT_PROVEN}")
    as_it_must = arrival.is_that_of(planted)
    must = f"words that have {planted.answer!r}" if planted.answer else "a checkpoint"
    say(f"planted: {planted.says}; it must come to: {must}")
    say(f"exit code {arrival.code}, {arrival.checkpoints} checkpoints: {'GREEN' if as_it_must else 'RED'}")
    return 0 if as_it_must else 1


def travel(folder: Path, planted: Break) -> Arrival:
    """Make the place in `folder`, type the command, and return what came of it. What it built is removed again.

    Raises MachineError where this machine has no engine, no local base (ci/engine.sh), or lacks a program.
    """
    if inspect_image(LOCAL_BASE) is None:
        raise MachineError(f"there is no {LOCAL_BASE} on this engine", where=LOCAL_BASE, todo="ci/engine.sh makes it")
    folder.chmod(0o755)  # who runs in a container is somebody else
    with upstream.serve(folder / "upstream", **planted.stand_ins) as standing:
        place = Place(folder, standing)
        prepare(place)
        planted.plant(place)
        commit(place)
        try:
            environment = environment_of(place, planted)
            if planted.published:
                publish(place, environment)
            command = planted.command(place)
            say(f"planted: {planted.says}\n$ git clone ...; cd clone\n$ LAUNCHER=1 {' '.join(command)}")
            code, said = typed(place, command, environment)
        finally:
            remove_images(place)
        return Arrival(code, said, len(place.checkpoints))


def prepare(place: Place) -> None:
    """Clone this commit with a lock of the stand-ins, push the base to their registry, fake a machine with a board."""
    done = git("clone", "--quiet", str(ROOT), str(place.clone))
    if done.returncode:
        raise MachineError(f"could not clone the checkout: {done.stderr.strip()[-200:]}", where=str(ROOT))
    name = place.standing.make_base(LOCAL_BASE, f"{place.standing.registry.host}/ubuntu:22.04")
    pushed = docker("push", name)
    docker("image", "rm", name)
    place.standing.prepare(place.clone, name, re.findall(r"digest: (sha256:[0-9a-f]{64})", pushed)[0])
    machines.fake_host(place.machine, BOARD)
    if not machines.real_nodes(place.machine):
        raise MachineError("only root can make device nodes", todo="run it as root, in a container of its own")
    model = write_tiny_base(place.folder / "model")
    for path in (model, *model.iterdir()):
        path.chmod(0o755 if path.is_dir() else 0o644)
    write_programs(place)


def write_programs(place: Place) -> None:
    """Write a tt-smi, and the docker that stands before this machine's own."""
    for name, text in (("tt-smi", TT_SMI), ("docker", DOCKER.format(docker=shutil.which("docker")))):
        machines.write(place.folder / "bin" / name, text)
        (place.folder / "bin" / name).chmod(0o755)


def commit(place: Place) -> None:
    """Commit what was changed in the clone: an image is of a commit."""
    who = ("-c", "user.name=rehearsal", "-c", "user.email=rehearsal@example.org")
    git("add", "--all", root=place.clone)
    done = git(*who, "commit", "--quiet", "--message", "The pins of the stand-ins", root=place.clone)
    if done.returncode:
        raise MachineError(f"could not commit: {done.stderr.strip()[-200:]}", where=str(place.clone))


def publish(place: Place, environment: Mapping[str, str]) -> None:
    """Build the image, publish it to the registry, commit the lock, and forget the image, as if it were another's.

    Raises MachineError where that fails.
    """
    repository = f"{place.standing.registry.host}/recipes-{BOARD}"
    words = ["image", "publish", BOARD, "--to", repository, "--no-attestations", "--no-rebuild"]
    for command in (["make", "image", f"HW={BOARD}"], [".venv/bin/recipe", *words]):
        if typed(place, command, environment)[0]:
            raise MachineError("the image could not be published", where=" ".join(command))
    remove_images(place)
    (place.clone / "docker/images.local.json").unlink()
    commit(place)


def environment_of(place: Place, planted: Break) -> dict[str, str]:
    """Return the variables of what is typed: stand-ins for mirrors, the faked machine, nothing of this process's."""
    bare = machines.bare_environment()
    return {key: value for key, value in bare.items() if key not in (*OF_MAKE, *OF_THIS)} | {
        **place.standing.environment(),
        "APT_MIRROR": f"{place.standing.sites.https}/snapshot",
        "PATH": f"{place.folder / 'bin'}{os.pathsep}{os.environ['PATH']}",
        "RECIPES_SYSFS_ROOT": str(place.machine),
        "RECIPES_HOME": str(place.folder / "home"),
        "LAUNCHER": "1",
        **planted.environment(place),
    }


def typed(place: Place, command: Sequence[str], environment: Mapping[str, str]) -> tuple[int, str]:
    """Run a command in the clone, its output on this screen; return `recipe`'s exit code and all of the output."""
    said = []
    with subprocess.Popen(
        command, cwd=place.clone, env=environment, text=True, errors="replace",
        stdin=subprocess.DEVNULL, stdout=subprocess.PIPE, stderr=subprocess.STDOUT,
    ) as process:  # fmt: skip
        assert process.stdout is not None
        for line in process.stdout:
            said.append(line)
            sys.stdout.write(line)
            sys.stdout.flush()
    text = "".join(said)
    ended = re.findall(r"^make: \*\*\* .* Error (\d+)$", text, re.MULTILINE)
    return (int(ended[-1]) if ended else process.returncode), text


def remove_images(place: Place) -> None:
    """Remove the image that the clone has built, or pulled: nothing else uses it."""
    path = place.clone / "docker/images.local.json"
    built = json.loads(path.read_text("utf-8"))["images"] if path.exists() else {}
    target = json.loads((place.clone / "docker/images.lock.json").read_text("utf-8"))["targets"][BOARD]
    for name in (*(image["id"] for image in built.values()), f"{target['repository']}@{target['digest']}"):
        with contextlib.suppress(MachineError):
            docker("image", "rm", "--force", name)
