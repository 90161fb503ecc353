"""`recipe run` in its container: launched, watched, told of signals, and cleared away when it has ended."""

from __future__ import annotations

import contextlib
import errno
import json
import os
import secrets
import select
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from types import FrameType

from common.errors import MachineError, TrainingError
from common.files import disk_errors
from common.hardware import Hardware
from common.signals import handled
from common.train.launch import Launch
from tools.containers import offer, ownership
from tools.containers.docker import ANSWER_SECONDS, check_engine, docker, explained, fetch, find_image
from tools.containers.images import Image, Json, NoImage
from tools.containers.spec import (
    LABEL,
    LABELS,
    USER,
    Errand,
    Spec,
    arguments_of,
    errand_of,
    process,
    spec_of,
    users_environment,
    writable_of,
)
from tools.data.fetch import fetch_pinned
from tools.machine import host, lease
from tools.machine.lease import Owner

Say = Callable[[str], None]
FORWARDED: dict[int, str] = {signal.SIGINT: "SIGINT", signal.SIGTERM: "SIGTERM", signal.SIGHUP: "SIGTERM"}
PATIENCE = 3  # signals: the first saves, the second ends without saving, the third kills what does not listen
LOOK_SECONDS = 0.1  # how late a signal may be handed on: less than a person notices


def wanted(container: bool | None, hw: Hardware) -> bool:
    """Return whether a run goes into a container: as said, else for a board that is not already in one of ours."""
    if host.in_container():
        return False
    return not hw.is_cpu if container is None else container


def launch(found: Launch, say: Say, *, build: bool = False) -> int:
    """Run a launch in its board's image, which is built first where there is none; return the exit code.

    `build` says yes to that build; without it a person at a terminal is asked, once.

    What refuses a run before its container starts, in this order: the board is not here (tools/machine/detect.py, in
    `resolve`), several hosts and a host that is not ready (tools/launch/run.py), no engine that can be used
    (`check_engine`), an image that is not the locked one (`fetch`), none to be had and none to be built (offer.py), a
    base or corpus that cannot be fetched, a build that fails, a board in use (lease.py, `refuse_orphan`), a folder that
    the run's user cannot write (`folders`; of a root caller: ownership.py). What Docker itself says then is explained
    by common/known_errors.yaml.
    """
    say(f"{found.recipe_dir.name} in a container, on {found.reason}")
    for name, value in users_environment().items():
        say(f"as you have set it: {name}={value}")
    check_engine()
    image = image_or_consent(found.hw, build, say)
    fetch_pinned(found.config, found.recipe_dir, say)  # this machine knows its index, proxies and keys; no image does
    image = image or offer.build_it(found.hw, say)
    say(f"it runs in the {image}")
    errand = errand_of(with_image(found, image))
    with taken(errand), folders(errand, found.config.recipe) as lent:
        return follow(spec_of(errand, lent))


def run_words(words: Sequence[str], hw: Hardware, nodes: Sequence[str], say: Say, readable: Sequence[Path] = ()) -> int:
    """Run `recipe WORDS` in the board's image, as a run would be; return the exit code.

    For what looks at a board and leaves no file: it writes nothing but the caches of RECIPES_HOME, and reads the
    checkout and `readable`. Where there is no image a person at a terminal is asked whether to build it. Raises
    MachineError as `launch` does.
    """
    check_engine()
    image = image_or_consent(hw, None, say) or offer.build_it(hw, say)
    say(f"it runs in the {image}")
    name = f"{'-'.join(word for word in words[:2] if word.isalnum())}-{secrets.token_hex(2)}"
    errand = Errand(name, hw, tuple(nodes), image.reference, tuple(words), tuple(readable))
    with taken(errand):
        ownership.share_caches()
        return follow(spec_of(errand))


@contextlib.contextmanager
def taken(errand: Errand) -> Iterator[None]:
    """Have the board's cards until the block ends. Raises MachineError where one is not to be had."""
    keys = [card.key for card in host.cards(errand.nodes)]
    with lease.taken(keys, Owner(errand.hw.name, os.getpid(), errand.name, f"recipes-{errand.name}")):
        remove_ended()
        refuse_orphan(errand.hw.name, keys)
        yield


def image_or_consent(hw: Hardware, build: bool | None, say: Say) -> Image | None:
    """Return the board's image, which the engine then has, or None where there is none and it is to be built.

    `build` as in `offer.accept`. Raises MachineError.
    """
    try:
        image = find_image(hw)
        fetch(image, say)
    except NoImage as lack:
        offer.accept(hw, lack, build, say)
        return None
    return image


def with_image(found: Launch, image: Image | None) -> Launch:
    """Return the launch as it is to run in `image`; None: it is not built, and a dry run says so."""
    if image is None:
        return found
    facts = {"target": image.target, "reference": image.reference, "source": image.source}
    return replace(found, image={**facts, "pins_sha256": image.lock_sha256})


@contextlib.contextmanager
def folders(errand: Errand, recipe: str) -> Iterator[list[Path]]:
    """Have the folders that a run of `recipe` writes to, writable for its user; yield those that are only lent."""
    (out,) = errand.writable
    with disk_errors("make the folders of a run", out):
        for folder in (*writable_of(errand), *ownership.caches()):
            folder.mkdir(parents=True, exist_ok=True)
            if not os.access(folder, os.W_OK, effective_ids=True):  # a folder that was there may be somebody else's
                raise PermissionError(errno.EACCES, os.strerror(errno.EACCES), str(folder))
    if os.getuid() != 0:
        yield []
        return
    lent = ownership.candidates(out, errand.name, recipe)
    with ownership.lent(lent):
        yield lent


# --- containers of ours ---------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Container:
    """A container that a launcher of this repository made, as the engine lists it; what follows `status` are labels."""

    name: str
    status: str
    run: str
    hw: str
    cards: str
    launcher: str
    lent: str

    @property
    def running(self) -> bool:
        return self.status in ("running", "restarting", "paused", "removing")

    @property
    def orphaned(self) -> bool:
        """Whether the launcher that waits for it is gone."""
        return process(int(self.launcher.partition("@")[0] or 0)) != self.launcher

    def __str__(self) -> str:
        return f"{self.run} ({self.hw}, container {self.name})"

    def end(self, now: bool) -> None:
        """Ask its run to save and end, or kill it `now`."""
        docker("kill", "--signal", "SIGKILL" if now else "SIGTERM", self.name)

    def ended(self) -> bool:
        """Return whether it has ended by now. Where nobody waits for it any more, it is then cleared away."""
        goes_on = any(container.running for container in ours() if container.name == self.name)
        if not goes_on:
            remove_ended()
        return not goes_on


def ours() -> list[Container]:
    """Return all containers of ours, ended ones too. Raises MachineError."""
    labels = ", ".join(f'"{name}": {{{{json (.Label "{LABEL}{name}")}}}}' for name in LABELS)
    line = f'{{"name": {{{{json .Names}}}}, "status": {{{{json .State}}}}, {labels}}}'
    said = docker("ps", "--all", "--filter", f"label={LABEL}run", "--format", line, seconds=ANSWER_SECONDS)
    return [Container(**json.loads(item)) for item in said.splitlines()]


def remove_ended() -> None:
    """Clear away ended containers of ours whose launcher was killed, and give back what was lent to them."""
    for container in ours():
        if container.running or not container.orphaned:
            continue
        with contextlib.suppress(MachineError):  # somebody else removes it just now; what stays is found again
            docker("rm", "--volumes", container.name)
        if os.getuid() == 0:
            for folder in json.loads(container.lent or "[]"):
                ownership.give(Path(folder), USER, 0)


def refuse_orphan(board: str, keys: Sequence[str]) -> None:
    """Raise MachineError where a container still has a card though its launcher was killed: a lease ends with that."""
    for container in ours():
        if container.running and set(keys) & set(container.cards.split(",")):
            raise lease.busy(board, f"the container {container.name}, whose launcher is gone")


# --- one container, from start to end -------------------------------------------------------------------------------


def follow(spec: Spec) -> int:
    """Start the container, show what it prints, hand signals on, wait for its end; return its exit code.

    Raises MachineError where it cannot be started, EngineLost, TrainingError where something killed it.
    """
    signals = Signals(spec.name)
    with handled((*FORWARDED, signal.SIGWINCH), signals.hear):
        docker("create", *arguments_of(spec))
        try:
            with beside("start", "--attach", spec.name) as shown:
                wait_for_start(shown, spec.name)
                attend(shown, signals)
            while state_of(spec.name)["Running"]:  # and nobody reads what it prints any more: it is to save
                if not signals.told:
                    signals.hear(signal.SIGTERM)
                with beside("wait", spec.name, stdout=subprocess.DEVNULL) as waiting:
                    attend(waiting, signals)
            return judged(spec.name)
        finally:
            with contextlib.suppress(MachineError):  # one that runs on without us is left, and found by its labels
                docker("rm", "--volumes", spec.name, seconds=ANSWER_SECONDS)


class Signals:
    """The signals that this process gets, to be handed on to a container."""

    def __init__(self, container: str) -> None:
        self.container = container
        self.heard: list[int] = []
        self.told = 0

    def hear(self, number: int, _frame: FrameType | None = None) -> None:
        """Note a signal, in place of its usual end."""
        self.heard.append(number)

    def hand_on(self, client: subprocess.Popen[bytes]) -> None:
        """Tell the container what was heard, and the client that the terminal has another size.

        By `docker kill`: the signals that a client itself proxies are lost while it starts, and newer clients end at
        the third.
        """
        while self.heard:
            number = self.heard.pop(0)
            if number == signal.SIGWINCH:
                client.send_signal(number)
                continue
            self.told += 1
            name = "SIGKILL" if self.told >= PATIENCE else FORWARDED[number]
            with contextlib.suppress(MachineError):  # it has just ended, or the engine is gone: so does the client
                docker("kill", "--signal", name, self.container, seconds=ANSWER_SECONDS)


@contextlib.contextmanager
def beside(*arguments: str, stdout: int | None = None) -> Iterator[subprocess.Popen[bytes]]:
    """Have `docker ARGUMENTS` run during the block, in a session of its own: a Ctrl-C typed here is not for it.

    What it says of an engine that went away is left out: `state_of` says that.
    """
    command = ["docker", "--log-level", "fatal", *arguments]
    with subprocess.Popen(
        command, stdin=subprocess.DEVNULL, stdout=stdout, stderr=subprocess.PIPE, start_new_session=True
    ) as client:
        try:
            yield client
        finally:
            client.kill()  # it has ended, unless something was raised


def wait_for_start(client: subprocess.Popen[bytes], name: str) -> None:
    """Wait until the container runs, or has. Raises MachineError where it could not be started."""
    while True:
        over = client.poll() is not None  # asked first, so that what comes then is the last word
        state = state_of(name)
        if state["Status"] != "created":
            return
        if over:
            raise explained(state["Error"], "starting the container")
        time.sleep(LOOK_SECONDS)


def attend(client: subprocess.Popen[bytes], signals: Signals) -> None:
    """Hand signals on, and show the container's stderr, until the client ends: it writes to our stdout by itself.

    The stderr comes through here because the client's own words do too, and those of a failed start are not shown.
    """
    assert client.stderr is not None
    while True:
        signals.hand_on(client)
        if not select.select([client.stderr], [], [], LOOK_SECONDS)[0]:
            continue
        data = os.read(client.stderr.fileno(), 65536)
        if not data:
            return
        try:
            sys.stderr.buffer.write(data)
            sys.stderr.flush()
        except OSError:  # our reader went away
            return


def state_of(name: str) -> Json:
    """Return the engine's State of a container that was started. Raises EngineLost where it does not say."""
    try:
        said = docker("container", "inspect", "--format", "{{json .State}}", name, seconds=ANSWER_SECONDS)
    except MachineError as error:
        raise ownership.EngineLost(
            "the Docker engine went away while the run was on; its container may run on",
            where=f"container {name}: {error.where}",
            todo="start the engine again; recipe stop ends the run if it is still there; then the same command "
            "goes on from the last checkpoint",
        ) from error
    state: Json = json.loads(said)
    return state


def judged(name: str) -> int:
    """Return the exit code, which the run itself has explained. Raises TrainingError for what it could not say."""
    state = state_of(name)
    if state["OOMKilled"]:
        raise TrainingError(
            "the run was killed: no memory was left",
            where=name,
            todo="a smaller training_config.micro_batch_size; the same command goes on",
        )
    code: int = state["ExitCode"]
    if code == 128 + signal.SIGKILL:
        raise TrainingError(
            "the run was killed from outside",
            where=name,
            todo="the same command goes on from the last checkpoint; on a board, `recipe doctor` first",
        )
    return code
