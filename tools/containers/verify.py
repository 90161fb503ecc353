"""`recipe image verify`: that an image can be made again bit for bit, and that it holds what the lock says."""

from __future__ import annotations

import json
import re
import shutil
import tempfile
from collections.abc import Callable, Iterator
from pathlib import Path

from common.errors import MachineError, UsageError, VerificationError
from common.hardware import Hardware
from common.paths import ROOT
from tools.containers.build import Inputs, build, build_variables, commit_of, fill_wheelhouse
from tools.containers.docker import docker, find_image, lock_of, present
from tools.containers.images import Image, Json, pins_of, read_lock
from tools.git import git

Say = Callable[[str], None]
# What an image's Python has installed, as JSON; run in the image, which need not be of this version of the code.
INSTALLED = (
    "import importlib.metadata as m, json; "
    "print(json.dumps({d.metadata['Name']: d.version for d in m.distributions()}))"
)
LOCKED = re.compile(r"^([A-Za-z0-9._-]+)==(\S+)", re.MULTILINE)


def verify_contents(hw: Hardware, container: str | None, say: Say, image: Image | None = None) -> None:
    """Compare the board's image, or a container that runs from it, with the lock; `image` where another one is meant.

    Raises MachineError where there is no image, VerificationError where something differs.
    """
    lock = read_lock()
    image = image or find_image(hw)
    described = present(image)
    if container and (runs := docker("inspect", "--format", "{{.Image}}", container).strip()) != described["Id"]:
        raise VerificationError(
            f"the container {container} runs from another image, {runs}",
            where=image.reference,
            todo="stop it and launch again, so that it starts from this one",
        )
    alone = ["run", "--rm", "--network", "none", "--entrypoint", "python", image.reference]
    python = ["exec", container, "python"] if container else alone
    wrong = list(differences(image, described, pins_of(lock, hw.image), json.loads(docker(*python, "-c", INSTALLED))))
    if wrong:
        raise VerificationError(
            f"the image of {hw.name} is not what the lock says\n    " + "\n    ".join(wrong),
            where=image.reference,
            todo=f"make image HW={hw.name}",
        )
    what = f"container {container}" if container else "image"
    say(f"{what}: the {image} holds the lock's packages, at their versions; never root")


def differences(image: Image, described: Json, pins: Json, installed: dict[str, str]) -> Iterator[str]:
    """In words, what of an image is not as its pins say."""
    if (labelled := lock_of(described)) != image.lock_sha256:
        yield f"it was built from the pins {labelled}, today's are {image.lock_sha256}"
    if described["Config"]["User"] in ("", "0", "root") or described["Config"]["User"].startswith(("0:", "root:")):
        yield "it runs as root"
    locked = dict(pair for name in pins["python"] for pair in LOCKED.findall((ROOT / name).read_text("utf-8")))
    found = {normal(name): version for name, version in installed.items()}
    for name, version in locked.items():
        if found.get(normal(name)) != version:
            yield f"{name} is {found.get(normal(name), 'missing')}, the lock has {version}"
    for name in sorted(found.keys() - {normal(name) for name in locked}):
        yield f"{name} {found[name]} is not in the lock"


def normal(name: str) -> str:
    return re.sub(r"[-_.]+", "-", name).lower()


def verify_layers(hw: Hardware, inputs: Inputs, say: Say) -> list[str]:
    """Build twice, without a cache, from two clones at different paths; compare the layers and return them.

    Raises VerificationError where they differ. Both builds are of the commit, not of what is changed beside it.
    """
    lock = read_lock()
    target = hw.image
    commit = commit_of(ROOT)
    if commit.endswith("-dirty"):
        raise UsageError(
            "clones hold what is committed, and this checkout has changes beside it",
            where=str(ROOT),
            todo="commit or stash them, or only compare what the image holds: recipe image verify --no-rebuild",
        )
    variables = build_variables(lock, target, inputs)
    wheels = fill_wheelhouse(lock, target, inputs.wheelhouse, ROOT / "docker" / "wheelhouse", say)
    layers = []
    for name in ("first", "at-another-path/second"):
        with tempfile.TemporaryDirectory() as folder:
            clone = Path(folder) / name
            _clone(clone, wheels)
            say(f"building {target} without a cache in {clone}")
            layers.append(build(target, variables, context=clone, no_cache=True, tag="verify")["RootFS"]["Layers"])
            docker("image", "rm", f"recipes-{target}:verify")
    if layers[0] != layers[1]:
        pairs = [f"{index}: {pair[0]} and {pair[1]}" for index, pair in enumerate(zip(*layers, strict=True))]
        raise VerificationError(
            f"two builds of {target} have different layers\n    " + "\n    ".join(pairs),
            where="docker/Dockerfile",
            todo="what differs was made from the time, the path, or the order of something",
        )
    say(f"two builds of {target} from {commit}: the same {len(layers[0])} layers, {' '.join(layers[0])}")
    return list(layers[0])


def _clone(into: Path, wheels: list[Path]) -> None:
    into.parent.mkdir(parents=True, exist_ok=True)
    done = git("clone", "--quiet", str(ROOT), str(into))
    if done.returncode:
        raise MachineError(f"could not clone the checkout: {done.stderr.strip()[-200:]}", where=str(ROOT))
    for wheel in wheels:
        shutil.copy2(wheel, into / "docker" / "wheelhouse")
