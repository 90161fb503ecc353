"""`recipe image build`: from the pins of the lock to an image of this machine's engine, and a record of it."""

from __future__ import annotations

import os
import re
import shutil
import subprocess
import sys
import tempfile
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

from common.errors import MachineError, UsageError
from common.files import sha256_file, utc_now
from common.paths import ROOT
from tools.containers.docker import bake, inspect_image, lock_of
from tools.containers.images import LOCK, Json, pins_of, pins_sha256, record_local, requirements_of, unknown_pins
from tools.containers.tt_metal import mirror
from tools.git import git

Say = Callable[[str], None]
LOCAL_BASE = "recipes-base:bookworm"  # what ci/engine.sh makes
TORCH_INDEX = "https://download.pytorch.org/whl/cpu"
TORCH = re.compile(r"^torch==(?:.*\\\n)*.*\n", re.MULTILINE)
# What an image's glibc can run: it is 2.35 or newer. pip takes manylinux2014 for the older names, too.
PLATFORMS = (*(f"manylinux_2_{minor}_x86_64" for minor in range(34, 4, -1)), "manylinux2014_x86_64")


@dataclass(frozen=True)
class Inputs:
    """What a builder may bring: a base instead of the lock's, a folder of wheels, certificates for the build."""

    base_image: str | None = None
    wheelhouse: Path | None = None
    ca_bundle: Path | None = None

    @classmethod
    def of_environment(cls) -> Inputs:
        """Return what BASE_IMAGE, WHEELHOUSE and CA_BUNDLE name: for a build that a run asks for.

        Raises UsageError for a file or folder that is not there.
        """
        values = {name: os.environ.get(name) or None for name in ("BASE_IMAGE", "WHEELHOUSE", "CA_BUNDLE")}
        paths = {name: Path(value) for name, value in values.items() if value and name != "BASE_IMAGE"}
        for name, path in paths.items():
            if not path.exists():
                raise UsageError(f"{name} names what is not there", where=str(path))
        return cls(values["BASE_IMAGE"], paths.get("WHEELHOUSE"), paths.get("CA_BUNDLE"))


def build_and_record(target: str, lock: Json, inputs: Inputs, say: Say, *, no_cache: bool = False) -> None:
    """Build `target` in this checkout and remember it in docker/images.local.json.

    Raises MachineError where a pin is unknown, a wheel is missing, or the engine cannot build.
    """
    variables = build_variables(lock, target, inputs)
    fill_wheelhouse(lock, target, inputs.wheelhouse, ROOT / "docker" / "wheelhouse", say)
    image = build(target, variables, context=ROOT, no_cache=no_cache)
    record_local(
        target,
        {
            "id": image["Id"],
            "lock_sha256": pins_sha256(lock, target),
            "base": variables[base_variable(target)],
            "commit": variables["COMMIT"],
            "created": utc_now(),
        },
    )
    say(f"{target}: {image['Id']}, {image['Size'] / 1e6:.0f} MB")


def build(target: str, variables: dict[str, str], *, context: Path, no_cache: bool = False, tag: str = "local") -> Json:
    """Run one `docker buildx bake` of `target` with `context` as the checkout; return the engine's image.

    Raises MachineError where the build fails, and where the engine has no image of it: the name may be an older one's.
    """
    name = f"recipes-{target}:{tag}"
    options = ["--no-cache"] if no_cache else []
    # A builder of the driver docker-container, which may be the user's default, keeps what it makes unless it is told.
    bake(target, variables, *options, "--load", "--set", f"{target}.tags={name}", context=context)
    image = inspect_image(name)
    if image is None or lock_of(image) != variables["LOCK_SHA256"]:
        has = "no image of that name" if image is None else f"one of the pins {lock_of(image)}"
        raise MachineError(
            f"the build of {target} ended well, but its image did not reach the engine, which has {has}",
            where=f"{name}, pins {variables['LOCK_SHA256']}",
            todo="BUILDX_BUILDER=default takes the engine's own builder; docker buildx ls marks the one that was used",
        )
    return image


# --- what the bake file is told -------------------------------------------------------------------------------------


def base_variable(target: str) -> str:
    """The bake variable that holds a target's base image."""
    return "CPU_BASE" if target == "cpu" else "TTML_BASE"


def build_variables(lock: Json, target: str, inputs: Inputs) -> dict[str, str]:
    """The bake variables of a target. Raises MachineError naming every pin that is null and that nothing replaces."""
    pins = pins_of(lock, target)
    check_python_pins(pins)
    unknown = [line for line in unknown_pins(lock, target) if not (inputs.base_image and line.startswith("base."))]
    if unknown:
        todo = "recipe lock, on a machine with the network: it fills each of these, or says of each why it cannot"
        if any(line.startswith("base.") for line in unknown):
            todo += f"; or name a base: BASE_IMAGE=image@sha256:..., or {LOCAL_BASE}, which ci/engine.sh makes"
        raise MachineError(
            f"{target} cannot be built: not every pin is known\n    " + "\n    ".join(unknown),
            where=str(LOCK),
            todo=todo,
        )
    for name in ("APT_MIRROR", "GITHUB_MIRROR"):  # which the bake file takes from the environment
        mirror(name)
    base = pins["base"]
    variables = {
        base_variable(target): _checked_base(inputs.base_image) or f"{base['image']}@{base['digest']}",
        "LOCK_SHA256": pins_sha256(lock, target),
        "COMMIT": commit_of(ROOT),
        "CA_BUNDLE": str(inputs.ca_bundle.absolute()) if inputs.ca_bundle else "",
    }
    if target != "cpu":
        variables |= {
            "APT_SNAPSHOT": pins["apt_snapshot"]["timestamp"],
            "TT_METAL_TAG": pins["tt_metal"]["tag"],
            "TT_METAL_COMMIT": pins["tt_metal"]["commit"],
            "SFPI_VERSION": pins["sfpi"]["version"],
            "SFPI_SHA256": pins["sfpi"]["deb_sha256"],
            "OPENMPI_VERSION": pins["openmpi"]["version"],
            "OPENMPI_SHA256": pins["openmpi"]["deb_sha256"],
        }
    return variables


def _checked_base(base_image: str | None) -> str | None:
    """A base that somebody named: an image of this engine, or one by digest. A tag may be another image tomorrow."""
    if base_image and not re.search(r"@sha256:[0-9a-f]{64}$", base_image) and inspect_image(base_image) is None:
        raise UsageError(
            f"the base {base_image} is neither an image of this engine nor named by digest",
            where="BASE_IMAGE / --base-image",
            todo=f"name it as image@sha256:..., or make {LOCAL_BASE} with ci/engine.sh",
        )
    return base_image


def check_python_pins(pins: Json) -> None:
    """Raise MachineError if a requirements file is not the one that the image lock pins."""
    for name, sha256 in requirements_of(pins).items():
        if sha256_file(ROOT / name) != sha256:
            raise MachineError(f"{name} has changed since the image lock was made", where=str(LOCK), todo="recipe lock")


def commit_of(root: Path) -> str:
    """The checkout's commit, `-dirty` where files differ from it; for a label."""
    return git("describe", "--always", "--abbrev=40", "--exclude=*", "--dirty", root=root).stdout.strip() or "unknown"


# --- wheels ---------------------------------------------------------------------------------------------------------


def fill_wheelhouse(lock: Json, target: str, source: Path | None, into: Path, say: Say) -> list[Path]:
    """Put the wheels of a target's requirements into `into`: from a folder, else by this machine's own pip.

    pip's settings - index, proxy, credentials, certificates - are used here and never reach the build. What is in the
    folder stays there: the build takes only files with the hashes of the lock. Returns the wheels.
    """
    given = sorted(source.glob("*.whl")) if source else []
    if source and not given:
        raise UsageError("there are no wheels in the folder", where=str(source), todo="WHEELHOUSE=a folder of *.whl")
    if source and source.resolve() == into.resolve():
        return given
    if source:
        for wheel in given:
            shutil.copy2(wheel, into)
    else:
        for name in requirements_of(pins_of(lock, target)):
            say(f"the wheels of {name} -> {into.relative_to(ROOT)}")
            _download(ROOT / name, into)
    return sorted(into.glob("*.whl"))


def _download(requirements: Path, into: Path) -> None:
    """torch first and alone, from PyTorch's CPU index, as ci/setup.sh does; then the rest, from pip's own index."""
    text = requirements.read_text(encoding="utf-8")
    python = re.search(r"-(3)\.(\d+)\.txt$", requirements.name)
    assert python, requirements
    command = [sys.executable, "-m", "pip", "download", "--quiet", "--disable-pip-version-check", "--no-input"]
    command += ["--no-deps", "--require-hashes", "--only-binary", ":all:", "--implementation", "cp"]
    command += ["--python-version", f"{python[1]}.{python[2]}", "--dest", str(into), "--find-links", str(into)]
    command += [word for platform in PLATFORMS for word in ("--platform", platform)]
    with tempfile.TemporaryDirectory() as folder:
        if torch := TORCH.search(text):
            alone = Path(folder) / "torch.txt"
            alone.write_text(torch[0], encoding="utf-8")
            index = os.environ.get("TORCH_INDEX", TORCH_INDEX)
            where = ["--extra-index-url", index] if index else []
            _pip([*command, "--retries", "1", "--timeout", "10", *where, "-r", str(alone)], requirements)
        _pip([*command, "-r", str(requirements)], requirements)


def _pip(command: list[str], requirements: Path) -> None:
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    if done.returncode:
        lines = [line for line in done.stderr.splitlines() if line.startswith("ERROR")] or done.stderr.splitlines()[-1:]
        raise MachineError(
            f"could not collect the wheels: {lines[0] if lines else 'pip gave no reason'}",
            where=str(requirements),
            todo="check pip's index (TORCH_INDEX for torch), or name a folder that has them: WHEELHOUSE=folder",
        )
