"""Start the processes of a data-parallel run on CPUs with torchrun's agent, and end with the code that they end with.

The agent runs in this process: it starts `python -m tools.launch.rank FOLDER` for each rank of this host and watches
them. FOLDER holds the launch, and later the process id and exit code of the host's first rank. A rank that ends by
itself, whatever the outcome, ends with 0; anything else is a rank that died. Ctrl-C and SIGTERM are passed on to the
host's first rank, which saves and stops as it does alone.
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
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from types import FrameType
from typing import Any

from common.errors import MachineError, RankLost, UsageError
from common.signals import handled
from common.train.launch import Hosts, Launch

Say = Callable[[str], None]
Lead = Callable[..., None]  # gets the launch, then options by keyword, which are JSON
JOB, PID, CODE = "job.json", "0.pid", "0.code"  # in the folder of the ranks
SHUTDOWN_SECONDS = 40  # that rank 0 has for saving after another rank died; the whole end takes less than a minute
SIOCGIFADDR = 0x8915  # linux/sockios.h: an interface's IPv4 address


def in_processes(launch: Launch, lead: Lead, say: Say, **options: Any) -> int:
    """Call `lead(launch, **options)`, which trains, here or in rank 0 of as many processes as a CPU's mesh has.

    `lead` is a function of a module, which a rank imports. Return the exit code.
    """
    world = launch.config.device.devices if launch.hw.is_cpu else 1
    here = processes_of_each(launch.hosts, world)
    if world == 1:
        lead(launch, **options)
        return 0
    say(f"{world} processes share every batch{'' if launch.hosts.number == 1 else f', {here} of them on this host'}")
    return start(launch, lead, here, options)


def processes_of_each(hosts: Hosts, world: int) -> int:
    """Return how many of `world` processes each host starts. Raises UsageError."""
    if world % hosts.number:
        raise UsageError(
            f"{world} processes cannot be shared out to {hosts.number} hosts",
            where="--nnodes",
            todo=f"set --world to a multiple of {hosts.number}: it counts the processes of all hosts",
        )
    if (hosts.number > 1) != (hosts.endpoint is not None):
        raise UsageError(
            "several hosts need an address to meet at, and one host needs none",
            where="--nnodes and --rdzv-endpoint",
            todo="on every host: --nnodes 2 --rdzv-endpoint HOST:PORT, HOST being one of them",
        )
    return world // hosts.number


def start(launch: Launch, lead: Lead, here: int, options: dict[str, Any]) -> int:
    """Run `lead` in the `here` ranks of this host; return the exit code that rank 0 ended with.

    Raises RankLost when one died, MachineError when the hosts do not meet.
    """
    os.environ.setdefault("TORCH_CPP_LOG_LEVEL", "FATAL")  # what went wrong is said here, once; read as torch loads
    from torch.distributed.elastic.multiprocessing.api import DefaultLogsSpecs
    from torch.distributed.elastic.multiprocessing.errors import ChildFailedError
    from torch.distributed.elastic.rendezvous.api import RendezvousError
    from torch.distributed.launcher.api import LaunchConfig, elastic_launch

    logging.getLogger("torch.distributed").setLevel(logging.CRITICAL)
    hosts = launch.hosts
    meeting = meeting_of(hosts)
    job = {
        "launch": launch.to_json(),
        "lead": [lead.__module__, lead.__name__],
        "options": options,
        "agent": os.getpid(),
    }
    with tempfile.TemporaryDirectory(prefix="recipe-ranks-") as name, passing_on_signals(Path(name)):
        (Path(name) / JOB).write_text(json.dumps(job), encoding="utf-8")
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
            elastic_launch(config, sys.executable)("-m", "tools.launch.rank", name)
        except ChildFailedError as error:
            raise dead_rank(error, here * hosts.number) from None
        except (RendezvousError, OSError) as error:
            raise nobody_came(hosts, str(error)) from error
        return int((Path(name) / CODE).read_text(encoding="ascii"))


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
            first = int((folder / PID).read_text(encoding="ascii"))
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
