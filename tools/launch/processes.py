"""Start the processes of a data-parallel run on CPUs with torchrun's agent, and end with the code that they end with.

The agent runs in this process: it starts `python -m tools.launch.rank ...` for each rank of this host and watches them.
A rank that ends by itself, whatever the outcome, leaves its exit code in a file and ends with 0; anything else is a
rank that died. Ctrl-C and SIGTERM are passed on to the host's first rank, which saves and stops as it does alone.
"""

from __future__ import annotations

import contextlib
import fcntl
import ipaddress
import json
import logging
import os
import signal
import socket
import struct
import sys
import tempfile
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from types import FrameType
from typing import Any

from common import config as configs
from common import hardware
from common.config import Config
from common.errors import MachineError, RankLost, UsageError
from common.paths import run_words
from common.signals import handled
from common.train.plan import Launch

Say = Callable[[str], None]
FOLDER = "RECIPES_RANKS"  # environment: where a rank leaves its pid and its exit code
SHUTDOWN_SECONDS = 40  # that rank 0 has for saving after another rank died; the whole end takes less than a minute
COMMAND = "RECIPES_COMMAND"  # environment: the words that a person typed, for the manifest
STARTED_BY_TORCHRUN = "LOCAL_RANK"  # environment, as torchrun sets it
SIOCGIFADDR = 0x8915  # linux/sockios.h: an interface's IPv4 address


@dataclass(frozen=True)
class Hosts:
    """Those that share a run's processes, and how they meet."""

    number: int = 1
    endpoint: str | None = None
    seconds_to_meet: int = 300

    def processes_of_each(self, world: int) -> int:
        """Of `world` processes. Raises UsageError."""
        if world % self.number:
            raise UsageError(
                f"{world} processes cannot be shared out to {self.number} hosts",
                where="--nnodes",
                todo=f"set --world to a multiple of {self.number}: it counts the processes of all hosts",
            )
        if (self.number > 1) != (self.endpoint is not None):
            raise UsageError(
                "several hosts need an address to meet at, and one host needs none",
                where="--nnodes and --rdzv-endpoint",
                todo="on every host: --nnodes 2 --rdzv-endpoint HOST:PORT, HOST being one of them",
            )
        return world // self.number


def in_processes(
    recipe_dir: Path, config: Config, arguments: Sequence[str], hosts: Hosts, lead: Callable[[], None], say: Say
) -> int:
    """Call `lead` here, or in rank 0 of as many processes as the mesh of a CPU's config has; return the exit code.

    Each of the processes runs `recipe` with `arguments`, and comes here again as a rank.
    """
    on_cpu = hardware.get(config.hw).is_cpu
    world = config.device.devices if on_cpu else 1
    here = hosts.processes_of_each(world)
    if STARTED_BY_TORCHRUN in os.environ:
        from tools.launch.rank import take_part

        return take_part(config, recipe_dir, lead)
    if world == 1:
        lead()
        return 0
    say(f"{world} processes share every batch{'' if hosts.number == 1 else f', {here} of them on this host'}")
    return run(arguments, here, hosts)


def train(launch: Launch, hosts: Hosts, lead: Callable[[], None], say: Say) -> int:
    """Call `lead`, which trains, in the processes that the launch asks for."""
    board = hardware.choose(launch.hw, require_present=False).hardware  # a real run asks again
    config = configs.load(launch.recipe_dir, board, launch.overrides, launch.steps)
    words = run_words(str(launch.recipe_dir), vars(launch))
    return in_processes(launch.recipe_dir, config, words, hosts, lead, say)


def typed() -> list[str]:
    """The command line as it was typed, also in the processes that were started for it."""
    return json.loads(os.environ.get(COMMAND) or "null") or list(sys.argv)


def run(arguments: Sequence[str], here: int, hosts: Hosts) -> int:
    """Run `recipe` with `arguments` in the `here` ranks of this host; return the exit code that rank 0 ended with.

    Raises RankLost when one died, MachineError when the hosts do not meet.
    """
    os.environ.setdefault("TORCH_CPP_LOG_LEVEL", "FATAL")  # what went wrong is said here, once; read as torch loads
    from torch.distributed.elastic.multiprocessing.api import DefaultLogsSpecs
    from torch.distributed.elastic.multiprocessing.errors import ChildFailedError
    from torch.distributed.elastic.rendezvous.api import RendezvousError
    from torch.distributed.launcher.api import LaunchConfig, elastic_launch

    logging.getLogger("torch.distributed").setLevel(logging.CRITICAL)
    meeting = meeting_of(hosts)
    with tempfile.TemporaryDirectory(prefix="recipe-ranks-") as name, passing_on_signals(Path(name)):
        os.environ |= {FOLDER: name, COMMAND: json.dumps(typed())}
        if meeting.interface:  # left alone, gloo takes the address of the host's name: often a loopback address
            os.environ.setdefault("GLOO_SOCKET_IFNAME", meeting.interface)
        config = LaunchConfig(
            min_nodes=hosts.number,
            max_nodes=hosts.number,
            nproc_per_node=here,
            run_id="recipe",
            rdzv_backend="c10d",
            rdzv_endpoint=hosts.endpoint or "127.0.0.1:0",
            rdzv_configs={"is_host": meeting.is_here, "join_timeout": hosts.seconds_to_meet},
            max_restarts=0,
            local_addr=meeting.address,
            logs_specs=DefaultLogsSpecs(log_dir=name),
            signals_to_handle="SIGQUIT",
            shutdown_timeout=SHUTDOWN_SECONDS,
        )
        try:
            elastic_launch(config, sys.executable)("-m", "tools.launch.rank", *arguments)
        except ChildFailedError as error:
            raise dead_rank(error, here * hosts.number) from None
        except (RendezvousError, OSError) as error:
            raise nobody_came(hosts, str(error)) from error
        return int((Path(name) / "0.code").read_text(encoding="ascii"))


def nobody_came(hosts: Hosts, why: str) -> MachineError:
    return MachineError(
        f"{hosts.number} hosts did not meet within {hosts.seconds_to_meet} s: {why or 'one of them did not come'}",
        where=f"--rdzv-endpoint {hosts.endpoint}",
        todo="start the same command on every host; HOST is the address of one of them, PORT free and not blocked",
    )


def dead_rank(error: Any, world: int) -> RankLost:
    """What to say of the rank that died first."""
    first = min(error.failures.items(), key=lambda item: (item[1].exitcode == -signal.SIGTERM, item[1].timestamp))
    rank, failure = first  # SIGTERM is what the agent sends to the others
    code = failure.exitcode
    how = f"was killed by {signal.Signals(-code).name}" if code < 0 else f"ended with code {code}"
    todo = "the same command goes on from the newest checkpoint, or starts anew where none was saved"
    return RankLost(f"rank {rank} of {world} (process {failure.pid}) {how}", todo=todo)


@contextlib.contextmanager
def passing_on_signals(folder: Path) -> Iterator[None]:
    """SIGINT and SIGTERM go to this host's first rank; the agent then waits for all of them."""

    def pass_on(number: int, _frame: FrameType | None) -> None:
        try:
            first = int((folder / "0.pid").read_text(encoding="ascii"))
        except (OSError, ValueError):  # the hosts have not met yet
            raise KeyboardInterrupt from None
        with contextlib.suppress(ProcessLookupError):  # it is over
            os.kill(first, number)

    with handled((signal.SIGINT, signal.SIGTERM), pass_on):
        yield


@dataclass(frozen=True)
class Meeting:
    """Where the hosts meet, seen from this one: its own address there, and whether it is the place itself."""

    address: str = "127.0.0.1"
    is_here: bool = True
    interface: str | None = None


def meeting_of(hosts: Hosts) -> Meeting:
    """Look the meeting place up, and wait until it answers where it is not here."""
    if hosts.endpoint is None:
        return Meeting()
    name, _, port = hosts.endpoint.rpartition(":")
    if not name or not port.isdecimal():
        raise UsageError(f"{hosts.endpoint!r} is no HOST:PORT", where="--rdzv-endpoint", todo="such as 192.0.2.1:29500")
    try:
        place = socket.gethostbyname(name)
        with socket.socket(socket.AF_INET, socket.SOCK_DGRAM) as probe:
            probe.connect((place, int(port)))  # sends nothing: it asks the routing table
            mine = str(probe.getsockname()[0])
    except OSError as error:
        raise nobody_came(hosts, f"there is no way to {name} ({error.strerror})") from error
    interface = next((found for found, address in addresses() if address == mine), None)
    is_here = place == mine and not answers(place, int(port), 1)
    if not is_here:
        wait_for(place, int(port), hosts)
    return Meeting(mine, is_here, interface)


def wait_for(place: str, port: int, hosts: Hosts) -> None:
    deadline = time.monotonic() + hosts.seconds_to_meet
    while not answers(place, port, max(0.1, deadline - time.monotonic())):
        if time.monotonic() > deadline:
            raise nobody_came(hosts, f"nobody answers at {place}")
        time.sleep(0.5)


def answers(place: str, port: int, seconds: float) -> bool:
    with contextlib.suppress(OSError), socket.create_connection((place, port), timeout=seconds):
        return True
    return False


def addresses() -> Iterator[tuple[str, str]]:
    """Interfaces of this host with their IPv4 addresses."""
    with socket.socket(socket.AF_INET, socket.SOCK_DGRAM) as asking:
        for _, name in socket.if_nameindex():
            with contextlib.suppress(OSError):  # it has none
                answer = fcntl.ioctl(asking, SIOCGIFADDR, struct.pack("256s", name.encode()))
                yield name, str(ipaddress.ip_address(answer[20:24]))
