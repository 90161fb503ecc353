"""What a container is: one description, as the arguments of `docker create` and of the `docker run` of a dry run.

Host paths are container paths: checkout, recipe, runs and RECIPES_HOME are mounted where they are, so a config, a
manifest and a message mean the same on both sides, and a run goes on in and out of the container.
"""

from __future__ import annotations

import csv
import io
import json
import os
import sys
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path

from common.errors import SECRET
from common.hardware import Hardware
from common.paths import ROOT
from common.paths import home as cache
from common.train.launch import Launch
from engines.ttml.mesh import DESCRIPTOR
from tools.machine import host
from tools.machine.detect import VISIBLE, system_root
from tools.runs.folder import run_of

LABEL = "training-recipes."
LABELS = ("run", "hw", "cards", "launcher", "lent")  # of every container; labels_of gives them their values
NOT_BUILT = "<not built>"
USER = 1000  # what a root caller's run is inside: a container never runs as root
MEMLOCK = -1  # without an end: what a card reads and writes by DMA is locked in memory
STOP_SECONDS = 120  # what a step, a checkpoint and the closing of a device may take before the engine kills
LOG = {"max-size": "50m", "max-file": "2"}
# A folder in memory, which ends with the container. As a volume, because the --tmpfs of older engines gives it the mode
# of the image's folder there: 0700 for /root, which keeps everyone out of what is mounted below it.
SCRATCH = {"type": "tmpfs", "device": "tmpfs", "o": "mode=1777,nosuid,nodev"}
# Of the caller's environment, besides TT_*: the rest of it has no business in there.
HANDED_OVER = (
    *("HF_TOKEN", "HF_ENDPOINT", "HF_HUB_OFFLINE", "WANDB_API_KEY", "WANDB_MODE", "WANDB_BASE_URL", "WANDB_ENTITY"),
    *("PIP_INDEX_URL", "PIP_EXTRA_INDEX_URL", "PIP_TRUSTED_HOST", "OMP_NUM_THREADS"),
    *("HTTP_PROXY", "HTTPS_PROXY", "NO_PROXY", "http_proxy", "https_proxy", "no_proxy", "TERM", "COLORTERM", "TZ"),
)
OF_THE_HOST = (
    *("TT_METAL_HOME", "TT_METAL_RUNTIME_ROOT"),  # the host's tt-metal is not the image's
    VISIBLE,  # chose the nodes that are handed in; inside, where there are no others, its numbers would count anew
)


@dataclass(frozen=True)
class Errand:
    """What `recipe WORDS` is to do in a container: on which nodes of a board, and what it may read and write there.

    `launch` is the Launch of a run, as JSON; anything else has none. `image` is what docker takes; None: not built.
    """

    name: str
    hw: Hardware
    nodes: tuple[str, ...]
    image: str | None
    words: tuple[str, ...]
    readable: tuple[Path, ...] = ()
    writable: tuple[Path, ...] = ()
    launch: str = ""


def errand_of(run: Launch) -> Errand:
    """Return what a run does in its container: it is handed the launch, and writes its runs and the caches."""
    return Errand(
        name=run.run,
        hw=run.hw,
        nodes=run.nodes,
        image=run.image["reference"] if run.image else None,
        words=(*(["--debug"] if run.debug else []), "run", str(run.recipe_dir)),
        readable=(run.recipe_dir, *named_paths(run)),
        writable=(run.out,),
        launch=run.to_json(),
    )


@dataclass(frozen=True)
class Mount:
    """A file or folder, in the container where it is outside (`inside`: elsewhere)."""

    path: Path
    writable: bool = False
    inside: Path | None = None


@dataclass(frozen=True)
class Spec:
    """A container, before any engine is asked. `environment` is printed, `secret` are names of variables."""

    name: str
    image: str
    words: tuple[str, ...]
    user: tuple[int, int]
    mounts: tuple[Mount, ...]
    scratch: tuple[Path, ...]
    environment: Mapping[str, str]
    secret: tuple[str, ...]
    labels: Mapping[str, str] = field(default_factory=dict)
    devices: tuple[tuple[str, str], ...] = ()  # outside, inside
    cpus: str | None = None
    terminal: bool = False


def arguments_of(spec: Spec) -> list[str]:
    """Return what follows `docker create` or `docker run`; docker takes the values of `secret` from its environment."""
    words = ["--name", spec.name, "--user", "{}:{}".format(*spec.user), "--workdir", str(ROOT), "--init", "--read-only"]
    words += ["--cap-drop", "ALL", "--security-opt", "no-new-privileges"]
    words += ["--ipc", "host"]  # tt-umd's locks between processes lie in /dev/shm
    words += [word for outside, inside in spec.devices for word in ("--device", f"{outside}:{inside}:rw")]
    words += ["--ulimit", f"memlock={MEMLOCK}"] if spec.devices else []
    for mount in spec.mounts:
        bind = ["type=bind", f"source={mount.path}", f"target={mount.inside or mount.path}"]
        words += ["--mount", csv_line(bind if mount.writable else [*bind, "readonly"])]
    for path in spec.scratch:
        options = [f"volume-opt={key}={value}" for key, value in SCRATCH.items()]
        words += [
            "--mount",
            csv_line(["type=volume", f"target={path}", "volume-nocopy", "volume-driver=local", *options]),
        ]
    words += [word for name, value in spec.environment.items() for word in ("--env", f"{name}={value}")]
    words += [word for name in spec.secret for word in ("--env", name)]
    words += [word for name, value in spec.labels.items() for word in ("--label", f"{name}={value}")]
    words += ["--cpuset-cpus", spec.cpus] if spec.cpus else []
    words += ["--tty"] if spec.terminal else []
    words += ["--stop-timeout", str(STOP_SECONDS)]
    words += ["--log-driver", "local", *(word for item in LOG.items() for word in ("--log-opt", "=".join(item)))]
    return [*words, spec.image, *spec.words]


def csv_line(fields: Sequence[str]) -> str:
    """Return the fields as docker reads those of `--mount`: a path with a comma is quoted."""
    line = io.StringIO()
    csv.writer(line, lineterminator="").writerow(fields)
    return line.getvalue()


def spec_of(errand: Errand, lent: Sequence[Path] = ()) -> Spec:
    """Return the container of an errand. `lent` are its user's only while it runs."""
    outside = os.environ
    user = caller()
    kernels = cache() / "kernels" / kernels_name(errand)
    environment = {
        "HOME": str(home()),
        "USER": "recipe",  # a user id without a name has none to look up
        "RECIPES_HOME": str(cache()),
        "HF_HOME": str(Path(outside["HF_HOME"]).absolute() if outside.get("HF_HOME") else cache() / "hub"),
        "MPLCONFIGDIR": "/tmp/matplotlib",  # below HOME, .cache is the engine's: a parent of what is mounted there
        "PYTHONDONTWRITEBYTECODE": "1",
        "PYTHONUNBUFFERED": "1",
        **(board_environment(errand.hw, kernels) if not errand.hw.is_cpu else {}),
        **users_environment(),
        host.CONTAINER: errand.name,
        **({host.LAUNCH: errand.launch} if errand.launch else {}),
    }
    mounts = tuple(mounts_of(errand))
    scratch = dict.fromkeys([Path("/tmp"), home(), *([Path("/root")] if behind_root(errand) else [])])
    return Spec(
        name=f"recipes-{errand.name}",
        image=errand.image or NOT_BUILT,
        words=errand.words,
        user=user,
        mounts=mounts,
        scratch=tuple(path for path in scratch if path not in {mount.path for mount in mounts}),
        environment=environment,
        secret=tuple(name for name in (*HANDED_OVER, *tt_metal_variables(secret=True)) if outside.get(name)),
        labels=labels_of(errand, lent),
        devices=tuple((str(below_root(node)), node) for node in errand.nodes),
        cpus=cpus(),
        terminal=sys.stdout.isatty() and sys.stderr.isatty(),
    )


def caller() -> tuple[int, int]:
    """Whom a run's files belong to: the caller, or user 1000 where that is root."""
    return (os.getuid(), os.getgid()) if os.getuid() else (USER, USER)


def home() -> Path:
    """The caller's home, so that `~` means the same inside; it is empty there but for what is mounted."""
    return Path.home() if Path.home() != Path("/") else Path("/tmp")


def behind_root(errand: Errand) -> bool:
    """Whether a mount lies in /root, whose mode in an image keeps every other user out."""
    return any(Path("/root") in path.parents for path in (ROOT, cache(), *errand.readable, *errand.writable))


def users_environment() -> dict[str, str]:
    """What the caller has set of tt-metal's variables: it wins. A path in them is the same inside.

    It is printed; a secret by its name is handed over like HF_TOKEN, and is not in here.
    """
    values = {name: os.environ[name] for name in tt_metal_variables(secret=False)}
    return values | {name: str(Path(values[name]).absolute()) for name in (DESCRIPTOR,) if name in values}


def tt_metal_variables(*, secret: bool) -> list[str]:
    """The names of the caller's TT_* variables that are handed over: those that hold a secret, or the others."""
    names = (name for name in os.environ if name.startswith("TT_") and name not in OF_THE_HOST)
    return [name for name in names if bool(SECRET.search(name)) == secret]


def board_environment(hw: Hardware, kernels: Path) -> dict[str, str]:
    """What tt-metal reads. Its operations may take minutes while kernels are compiled, but not for ever."""
    return {
        "ARCH_NAME": hw.arch,
        "TT_METAL_CACHE": str(kernels),
        "TT_METAL_LOGS_PATH": "/tmp",
        "TT_METAL_OPERATION_TIMEOUT_SECONDS": "300",
    }


def kernels_name(errand: Errand) -> str:
    """A folder of compiled kernels for one image and architecture, and one card: two writers at once spoil it."""
    image = errand.image.rpartition("sha256:")[2][:12] if errand.image else "image"
    keys = [card.key for card in host.cards(errand.nodes)] or ["none"]
    return f"{image}-{errand.hw.arch}-{keys[0].replace(':', '-')}"


def mounts_of(errand: Errand) -> Iterator[Mount]:
    """Read-only what is read, writable what is written; a folder inside another comes after it."""
    readable = [ROOT, *errand.readable]
    mounts = {path: Mount(path) for path in readable} | {path: Mount(path, True) for path in writable_of(errand)}
    for path in sorted(mounts):
        covered = [mounts[parent] for parent in path.parents if parent in mounts]
        if not covered or (mounts[path].writable and not covered[0].writable):
            yield mounts[path]
    if needs_hugepages(errand.nodes):
        yield Mount(below_root(str(host.HUGEPAGES)), True, host.HUGEPAGES)


def writable_of(errand: Errand) -> list[Path]:
    """What a container writes to: its own folders, the caches, and a Hub cache where the caller has named one."""
    return [*errand.writable, cache(), *([Path(os.environ["HF_HOME"]).absolute()] if os.environ.get("HF_HOME") else [])]


def named_paths(run: Launch) -> Iterator[Path]:
    """What else the command line, the config and the environment name that is here and is to be read."""
    config, resume = run.config, run.resume
    named = [config.model.base, config.data.source, config.data.corpus, users_environment().get(DESCRIPTOR)]
    if resume not in ("auto", "never"):
        named.append(str(run_of(Path(resume))))  # of a checkpoint, its run's records, too
    named += [config.eval.prompts] if isinstance(config.eval.prompts, str) else []
    for name in named:
        path = (run.recipe_dir / Path(name).expanduser()) if name else None
        if path is not None and path.exists():
            yield path.absolute()


def needs_hugepages(nodes: Sequence[str]) -> bool:
    """Whether a card's DMA is not translated by an IOMMU, and the pages for that are mounted."""
    untranslated = any(card.translated is not True for card in host.cards(nodes))
    return untranslated and host.hugepages().mounted


def below_root(path: str) -> Path:
    """A path of the machine below RECIPES_SYSFS_ROOT, as everything of a board is looked up."""
    return system_root() / path.lstrip("/")


def cpus() -> str | None:
    """The processors this process may use, where that is not all: threads decide the bits of a CPU run."""
    mine = sorted(os.sched_getaffinity(0))
    return ",".join(map(str, mine)) if len(mine) < (os.cpu_count() or 1) else None


def labels_of(errand: Errand, lent: Sequence[Path]) -> dict[str, str]:
    """How a container is found again: by its board's cards, and by who launched it."""
    values = {
        "run": errand.name,
        "hw": errand.hw.name,
        "cards": ",".join(card.key for card in host.cards(errand.nodes)),
        "launcher": process(os.getpid()),
        "lent": json.dumps([str(path) for path in lent]),
    }
    return {LABEL + name: value for name, value in values.items()}


def process(pid: int) -> str:
    """A process of this machine, told from a later one of the same number by its start: `pid@ticks`."""
    try:
        ticks = Path(f"/proc/{pid}/stat").read_text("utf-8").rpartition(")")[2].split()[19]
    except OSError:
        ticks = "gone"
    return f"{pid}@{ticks}"
