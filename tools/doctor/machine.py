"""`recipe doctor`: what is wrong with this machine for the board asked for; nothing is changed, opened or reset."""

from __future__ import annotations

import dataclasses
import importlib.metadata
import importlib.util
import re
import shutil
import sys
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path

from common import config as configs
from common.errors import MachineError, RecipeError
from common.hardware import Hardware
from common.paths import ROOT, home
from engines.ttml.mesh import check_descriptor, find_descriptor
from tools.containers import launcher, offer
from tools.containers.build import check_python_pins
from tools.containers.docker import check_engine, find_image
from tools.containers.images import image_for, pins_of, read_lock, requirements_of
from tools.data.fetch import missing
from tools.doctor import findings, road
from tools.doctor.findings import Diagnosis
from tools.machine import detect, host, lease
from tools.machine.detect import Choice
from tools.recipes import RECIPES

MINIMUM_DRIVER = "2.0.0"  # tt-umd does not open a device with an older one (its support matrix)
# Said by libtt_metal.so of ttnn 0.81.1 where a board does not come up. tt-umd asks for less: 18.3, 18.5 on Blackhole.
MINIMUM_FIRMWARE = "18.10.0"
FIRST_OLD_BUNDLE = 80  # bundles of this number and above are from before 18 (tt-umd's support matrix)
TTNN_PYTHONS = ((3, 10), (3, 12))  # that ttnn 0.81.1 has wheels for
ROOM_GB = 5  # TinyLlama's base (2.2 GB) and the checkpoints of a LoRA run, twice over
PIN = re.compile(r"^([\w.-]+)==([\w.+!-]+)( *;)?", re.MULTILINE)  # the last part: only for some Pythons
INSTALLER = "run Tenstorrent's tt-installer (driver, firmware, huge pages, tt-smi); ci/runner/README.md names versions"


@dataclass(frozen=True)
class Machine:
    """What the checks look at: the board asked for, its nodes here, and whether its runs go into a container."""

    hw: Hardware
    nodes: tuple[str, ...]
    contained: bool

    @property
    def cards(self) -> tuple[host.Card, ...]:
        return host.cards(self.nodes)


Check = Callable[[Machine], Iterator[Diagnosis]]


def print_diagnosis(hw: str | None, container: bool | None, as_json: bool, say: Callable[[str], None]) -> None:
    """Print every diagnosis of this machine, and the road from there to a training step.

    Raises MachineError, with all of them, where something is wrong.
    """
    choice = detect.choose(hw, require_present=False)
    found = examine(choice, container)
    way = road.steps(found, choice.hardware, launcher.wanted(container, choice.hardware))
    if as_json:
        facts = {"why": choice.reason, "host": host.facts(choice.nodes), "road": [*map(dataclasses.asdict, way)]}
        say(findings.as_json(found, hw=choice.hardware.name, **facts))
    else:
        lines = (line for finding in found for line in finding.lines())
        for line in (choice.reason, *lines, *road.lines(way, choice.hardware)):
            say(line)
    findings.end(found)


def examine(choice: Choice, container: bool | None = None) -> list[Diagnosis]:
    """Return every diagnosis for a board that need not be here; `container` as for a run: where its runs would go."""
    machine = Machine(choice.hardware, choice.nodes, launcher.wanted(container, choice.hardware))
    checks = (*(BOARD if not choice.hardware.is_cpu else ()), *ANY)
    return [finding for check in checks for finding in check(machine)]


def refuse_unready(hw: Hardware, nodes: tuple[str, ...]) -> None:
    """Raise MachineError, with every finding, where a board's nodes, driver, firmware or memory for DMA do not do."""
    if not hw.is_cpu:
        machine = Machine(hw, nodes, contained=True)
        findings.end([finding for check in HOST for finding in check(machine)])


def attempt(id: str, look: Callable[[], str], untold: bool = False) -> Diagnosis:
    """Return the diagnosis of `look`: what it returns, or the error it raises; `untold` where that is no fault."""
    try:
        return Diagnosis(id, True, look())
    except RecipeError as error:
        return Diagnosis(id, None if untold else False, error.what, error.todo)


# --- the board ------------------------------------------------------------------------------------------------------


def nodes(machine: Machine) -> Iterator[Diagnosis]:
    yield attempt("board.nodes", lambda: detect.choose(machine.hw.name).reason)


def driver(machine: Machine) -> Iterator[Diagnosis]:
    version, validated = host.driver(), machine.hw.validated_driver
    if version is None:
        yield Diagnosis("board.driver", False, "the kernel module tenstorrent is not loaded", INSTALLER)
        return
    evidence = f"driver {version}, at least {MINIMUM_DRIVER} is needed"
    if numbers(version) < numbers(MINIMUM_DRIVER):
        yield Diagnosis("board.driver", False, evidence, INSTALLER)
    elif validated and numbers(version) < numbers(validated):
        yield untested("board.driver", evidence, machine.hw, validated)
    else:
        yield Diagnosis("board.driver", True, evidence)


def firmware(machine: Machine) -> Iterator[Diagnosis]:
    told = {card.node: card.firmware for card in machine.cards}
    versions = {node: version for node, version in told.items() if version}
    validated = machine.hw.validated_firmware or MINIMUM_FIRMWARE
    needed = f"tt-metal 0.81.1 asks for at least {MINIMUM_FIRMWARE}"
    here = f"firmware {', '.join(sorted(set(versions.values())))}, {needed}"
    if old := [node for node, version in versions.items() if bundle(version) < bundle(MINIMUM_FIRMWARE)]:
        which = ", ".join(f"{node} has {versions[node]}" for node in old)
        ancient = any(numbers(versions[node]) >= (FIRST_OLD_BUNDLE,) for node in old)
        order = f" ({FIRST_OLD_BUNDLE}.x is older than 18)" if ancient else ""
        yield Diagnosis("board.firmware", False, f"{which}{order}; {needed}", INSTALLER)
    elif not told or None in told.values():
        yield Diagnosis("board.firmware", None, "the driver does not say which firmware the cards have", INSTALLER)
    elif any(bundle(version) < bundle(validated) for version in versions.values()):
        yield untested("board.firmware", here, machine.hw, validated)
    else:
        yield Diagnosis("board.firmware", True, here)


def untested(id: str, evidence: str, hw: Hardware, validated: str) -> Diagnosis:
    """Return the warning for what is new enough to run and older than what upstream names for the board."""
    evidence = f"{evidence}; untested: upstream names {validated} for {hw.name}"
    return Diagnosis(id, True, evidence, INSTALLER, warning=True)


def memory(machine: Machine) -> Iterator[Diagnosis]:
    """Look at what DMA takes: ordinary memory behind an IOMMU that translates, else huge pages of 1 GiB."""
    states, pages = {card.translated for card in machine.cards}, host.hugepages()
    needed = host.PAGES_PER_NODE * len(machine.nodes)
    if not states or None in states:
        yield Diagnosis("board.memory", None, "it cannot be read whether an IOMMU translates the cards' DMA")
    elif len(states) > 1:
        cure = "set one mode for all PCIe devices on the kernel's command line (iommu=)"
        yield Diagnosis("board.memory", False, "an IOMMU translates the DMA of some cards and not of others", cure)
    elif True in states:
        yield Diagnosis("board.memory", True, "an IOMMU translates the cards' DMA: no huge pages are needed")
    else:
        evidence = (
            f"no IOMMU translates the cards' DMA (off, or iommu=pt); {pages.count} huge pages of 1 GiB, {needed} are"
            f" needed, {host.PAGES_PER_NODE} for each of {len(machine.nodes)} nodes"
        )
        where = "mounted" if pages.mounted else "not mounted"
        cure = f"kernel parameters hugepagesz=1G hugepages={needed}, and hugetlbfs with pagesize=1G on {host.HUGEPAGES}"
        ok = pages.mounted and pages.count >= needed
        yield Diagnosis("board.memory", ok, f"{evidence}; {host.HUGEPAGES} is {where}", f"{cure}; or turn the IOMMU on")


def owner(machine: Machine) -> Iterator[Diagnosis]:
    """Look for who has a card: a run of ours by its lease, or any process that has its node open."""
    leases = [str(owner) for card in machine.cards if (owner := lease.held(card.key))]
    others = [f"{card.node} by {host.holder(pid)}" for card in machine.cards for pid in card.holders]
    if found := [*dict.fromkeys(leases), *others]:
        cure = f"wait, or end it: recipe stop --hw {machine.hw.name} for a run of ours"
        yield Diagnosis("board.owner", False, f"in use: {'; '.join(found)}", cure)
    else:
        yield Diagnosis("board.owner", True, "nobody has the board")


def smi(_machine: Machine) -> Iterator[Diagnosis]:
    """Look for tt-smi: no run needs it, and a board that hangs is reset with nothing else."""
    if program := host.tt_smi():
        yield Diagnosis("board.tt-smi", True, program)
    else:
        evidence = "no tt-smi on PATH, nor in tt-installer's environment: a board that hangs could not be reset"
        yield Diagnosis("board.tt-smi", True, evidence, INSTALLER, warning=True)


def descriptor(machine: Machine) -> Iterator[Diagnosis]:
    mesh = machine.hw.mesh_shape
    if mesh == (1, 1):
        return
    try:
        path = find_descriptor(machine.hw, mesh)
    except MachineError as error:
        name = f"{machine.hw.mesh_graph_descriptor} is tt-metal's own: a run looks for it in its image"
        yield Diagnosis("board.descriptor", None if machine.contained else False, name, error.todo)
        return

    def look() -> str:
        check_descriptor(path, mesh)
        return f"{path} has dims {list(mesh)}"

    yield attempt("board.descriptor", look)


# --- containers -----------------------------------------------------------------------------------------------------


def engine(machine: Machine) -> Iterator[Diagnosis]:
    """Look whether an engine answers and has the image, and where there is none yet, whether it could build one.

    An image that is not here yet is no fault of the machine.
    """
    answers = attempt("engine.answers", lambda: f"Docker {check_engine()} answers", untold=not machine.contained)
    yield answers
    find = find_image if answers.ok else image_for
    image = attempt("engine.image", lambda: f"the {find(machine.hw)}", untold=True)
    if answers.ok and not image.ok:
        yield attempt("engine.builds", lambda: offer.able(machine.hw), untold=not machine.contained)
    yield image


def pins(machine: Machine) -> Iterator[Diagnosis]:
    """Return whether the image's lock and the Python locks it names are of one time."""

    def look() -> str:
        found = pins_of(read_lock(), machine.hw.image)
        check_python_pins(found)
        return f"the image's pins and {', '.join(requirements_of(found))} agree"

    yield attempt("engine.pins", look)


# --- data, Python, and room -----------------------------------------------------------------------------------------


def data(machine: Machine) -> Iterator[Diagnosis]:
    """Look whether the bases and corpora of all recipes are here; a run fetches its own first, so none is no fault."""

    def look() -> str:
        folders = sorted(path.parent for path in RECIPES.glob("*/config.yaml"))
        lacks: dict[str, list[str]] = {}
        for folder in folders:
            for line in missing(configs.load(folder, machine.hw), folder):
                lacks.setdefault(line, []).append(folder.name)
        if lacks:
            lines = [f"{line} ({', '.join(names)})" for line, names in lacks.items()]
            raise MachineError(
                "; ".join(lines), todo="each run fetches its own, by hash; so does recipe data build NAME"
            )
        return f"the bases and corpora of {', '.join(folder.name for folder in folders)} are here"

    yield attempt("data.fetched", look, untold=True)


def disk(_machine: Machine) -> Iterator[Diagnosis]:
    yield room("disk.runs", ROOT / "runs")
    yield room("disk.home", home())


def room(id: str, folder: Path) -> Diagnosis:
    """Return whether there is room for a run in a folder that need not be there yet."""
    there = next(path for path in (folder, *folder.parents) if path.is_dir())
    free = shutil.disk_usage(there).free / 1e9
    evidence = f"{free:.0f} GB free for {folder}, {ROOM_GB} are wanted"
    cure = "make room (runs/ and RECIPES_HOME), or set RECIPES_HOME and --out to a larger disk"
    return Diagnosis(id, free >= ROOM_GB, evidence, cure)


def python(machine: Machine) -> Iterator[Diagnosis]:
    here = sys.version_info[:2]
    name = f"Python {here[0]}.{here[1]}"
    yield Diagnosis("python.version", (3, 10) <= here <= (3, 12), name, "make setup PYTHON=python3.11")
    if machine.hw.is_cpu:
        torch, cure = installed("torch"), "make setup PYTHON=python3.11 (without LAUNCHER=1)"
        evidence = f"torch {torch}" if torch else "no torch here: the CPU twin runs in its image alone"
        yield Diagnosis("python.torch", True if torch else None, evidence, cure)
        return
    ttnn, numpy = installed("ttnn"), installed("numpy")
    if ttnn:
        fits = here in TTNN_PYTHONS and (numpy is None or numbers(numpy) < (2,))
        evidence = (
            f"ttnn {ttnn} on {name} with numpy {numpy}; its wheels are for 3.10 and 3.12 and ask for numpy below 2"
        )
        cure = "a tt-metal built here for this Python may do all the same: recipe doctor --ttml; the image has its own"
        yield Diagnosis("python.ttnn", True if fits else None, evidence, cure)


def lock(_machine: Machine) -> Iterator[Diagnosis]:
    """Return whether the packages here are those of the lock they were installed from."""
    python = f"{sys.version_info[0]}.{sys.version_info[1]}"
    # Of these three the launcher's has no numpy, and no board's has torch.
    kind = "cpu" if installed("torch") else "board" if installed("numpy") else "launcher"
    name = "launcher.txt" if kind == "launcher" else f"{kind}-{python}.txt"
    if not (ROOT / "requirements" / name).is_file():
        yield Diagnosis("python.lock", None, f"there is no requirements/{name}: these packages are held to no lock")
        return
    text = (ROOT / "requirements" / name).read_text("utf-8")
    wanted = {key: (version, bool(only)) for key, version, only in PIN.findall(text)}
    here = {key: installed(key) for key in wanted}
    other = [f"{key} {here[key]}, not {pin}" for key, (pin, _) in wanted.items() if here[key] not in (None, pin)]
    missing = [f"no {key}" for key, (_, only) in wanted.items() if not only and not here[key]]
    agree = f"{len(wanted)} packages are those of requirements/{name}"
    evidence = f"not as requirements/{name} has it: {', '.join([*other, *missing][:8])}" if other or missing else agree
    yield Diagnosis("python.lock", not (other or missing), evidence, "make setup")


def ttml(machine: Machine) -> Iterator[Diagnosis]:
    """Tell tt-train's ttml from PyPI's package of that name by its modules, unimported."""
    spec = importlib.util.find_spec("ttml")
    folders = [Path(folder) for folder in spec.submodule_search_locations or ()] if spec else []
    if spec is None:
        needed = "its image has it" if machine.contained or machine.hw.is_cpu else "training on a board here needs it"
        cure = (
            "build tt-metal with --build-tt-train for this Python (docs/board.md, Without Docker); "
            "its image has it: CONTAINER=1"
        )
        yield Diagnosis("python.ttml", machine.contained or machine.hw.is_cpu, f"no ttml here; {needed}", cure)
    elif any((folder / "models").is_dir() for folder in folders):
        yield Diagnosis("python.ttml", True, f"ttml in {folders[0]}; recipe doctor --ttml looks at its names")
    else:
        evidence = f"the ttml in {spec.origin} is another package of that name: it has no models"
        yield Diagnosis("python.ttml", False, evidence, "pip uninstall ttml; tt-train's is on no package index")


def installed(package: str) -> str | None:
    try:
        return importlib.metadata.version(package)
    except importlib.metadata.PackageNotFoundError:
        return None


def bundle(version: str) -> tuple[int, ...]:
    """Return a firmware bundle's version such that later bundles are larger: `80.17.0.0` came before `18.3.0`."""
    found = numbers(version)
    return (0, *found) if found >= (FIRST_OLD_BUNDLE,) else found


def numbers(version: str) -> tuple[int, ...]:
    """Return what of a version can be compared: `19.2.0-rc1` -> (19, 2, 0)."""
    found = re.match(r"\d{1,9}(?:\.\d{1,9})*", version)
    return tuple(int(part) for part in found[0].split(".")) if found else ()


HOST: tuple[Check, ...] = (nodes, driver, firmware, memory)
BOARD: tuple[Check, ...] = (*HOST, owner, smi, descriptor)
ANY: tuple[Check, ...] = (engine, pins, data, disk, python, lock, ttml)
