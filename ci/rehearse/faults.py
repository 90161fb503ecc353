"""What a rehearsal can plant, and what the job must make of it."""

from __future__ import annotations

import contextlib
import json
import os
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, field
from typing import Any

from ci.rehearse.ground import Ground
from common.paths import ROOT
from tests.doubles import machines

HOLD = """
import os, sys
from tools.machine import host, lease
from tools.machine.lease import Owner
keys = [card.key for card in host.cards(sys.argv[2:])]
with lease.taken(keys, Owner(sys.argv[1], os.getpid(), "somebody-elses-run")):
    print("taken", flush=True)
    sys.stdin.read()
"""


@dataclass(frozen=True)
class Fault:
    """Something planted, and what must come of it: the phase that fails with which code, resets, quarantine."""

    says: str
    phase: str
    code: int
    resets: int = 0
    quarantined: bool = False
    before: Callable[[Ground], object] = lambda _ground: None
    during: Callable[[Ground], contextlib.AbstractContextManager[None]] = lambda _ground: contextlib.nullcontext()
    switches: Mapping[str, Any] = field(default_factory=dict)  # of the double
    environment: Mapping[str, str] = field(default_factory=dict)
    in_training: Callable[[subprocess.Popen[bytes], Ground], None] | None = None  # once the first step is done

    @property
    def verdict(self) -> str:
        """What the summary must say."""
        return f"FAILED in {self.phase}" if self.phase else "pass"


@contextlib.contextmanager
def held(ground: Ground) -> Iterator[None]:
    """Another process has the board's leases and its nodes open."""
    command = [sys.executable, "-c", HOLD, ground.board.name, *ground.board.device_nodes]
    environment = os.environ | ground.machine()
    with subprocess.Popen(command, cwd=ROOT, env=environment, stdin=subprocess.PIPE, stdout=subprocess.PIPE) as process:
        assert process.stdout is not None
        assert process.stdout.readline() == b"taken\n"
        machines.write(ground.root / "proc/driver/tenstorrent/0/pids", f"{process.pid}\n")
        yield
        process.kill()


def old_firmware(ground: Ground) -> None:
    """Have the driver name a bundle of the numbers that came before 18 for the first card."""
    machines.write(ground.root / "sys/class/tenstorrent/tenstorrent!0/tt_fw_bundle_ver", "80.17.0.0\n")


def kill_the_run(_job: subprocess.Popen[bytes], ground: Ground) -> None:
    """As the kernel does where no memory is left: nothing of the run is asked."""
    number = json.loads((ground.out / "job.json").read_text("utf-8"))["process"].partition("@")[0]
    os.kill(int(number), signal.SIGKILL)


def cancel(job: subprocess.Popen[bytes], _ground: Ground) -> None:
    """As a runner does, to the step's process, which is the phase: two signals, though not seconds apart."""
    job.send_signal(signal.SIGINT)
    time.sleep(0.1)
    job.send_signal(signal.SIGTERM)


NOTHING = Fault("nothing", "", 0)
HANGS: Mapping[str, Any] = {"hang_at_step": 3}
IMPATIENT = {"RECIPES_STALL_SECONDS": "15"}
FAULTS: Mapping[str, Fault] = {
    "busy-card": Fault("another process has the board", "preflight", 4, during=held),
    "wrong-count": Fault(
        "a card has gone from the bus", "preflight", 4,
        before=lambda ground: machines.remove_card(ground.root, ground.board.nodes - 1),
    ),
    "old-firmware": Fault("firmware 80.17.0.0, which is older than 18", "preflight", 4, before=old_firmware),
    "failing-grade": Fault("the optimizer changes nothing", "grade", 6, switches={"no_update_from_step": 1}),
    "hung-step": Fault("step 3 never ends", "train", 5, resets=1, switches=HANGS, environment=IMPATIENT),
    "reset-fails": Fault(
        "step 3 never ends, and tt-smi cannot reset the board", "train", 5, resets=3, quarantined=True,
        before=lambda ground: machines.write(ground.folder / "reset-code", "1"), switches=HANGS, environment=IMPATIENT,
    ),
    "killed-launcher": Fault("kill -9 to the run", "train", 5, resets=1, switches=HANGS, in_training=kill_the_run),
    "cancelled": Fault("the runner cancels the job", "train", 75, environment={"STEPS": "5000"}, in_training=cancel),
}  # fmt: skip


def watch(job: subprocess.Popen[bytes], ground: Ground, act: Callable[[subprocess.Popen[bytes], Ground], None]) -> None:
    """Once the run has done a step, act; on a thread of its own."""

    def wait() -> None:
        while job.poll() is None:
            if any('"loss"' in path.read_text("utf-8") for path in ground.out.glob("runs/*/metrics.jsonl")):
                act(job, ground)
                return
            time.sleep(0.1)

    threading.Thread(target=wait, daemon=True).start()
