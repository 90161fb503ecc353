"""Real processes through `recipe run`: what a run of several leaves, how it ends when one dies, how it goes on.

One command costs seconds, most of them for importing torch in three processes, so each test asks much of few, and most
are slow ones: `make test-processes` runs them all.
"""

from __future__ import annotations

import os
import shutil
import signal
import socket
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from pathlib import Path

import numpy as np
import pytest

pytest.importorskip("torch", reason="the CPU engine is torch")

from common.errors import MachineError, Stopped, UsageError
from common.train import metrics
from common.train.launch import Hosts
from tests.doubles.tiny_recipe import make_tiny_recipe, without_after_run
from tests.support.runs import folders, log, manifest, outcome, run_tiny
from tools.launch.processes import answers, meeting_of

pytestmark = pytest.mark.usefixtures("home")
ROOT = Path(__file__).resolve().parents[2]
LONG = ("training_config.max_steps=3000", "eval_config.every=3000", "checkpoint_config.every=40")


@pytest.fixture(scope="module")
def recipe(tmp_path_factory, tiny_base) -> Path:
    return without_after_run(make_tiny_recipe(tmp_path_factory.mktemp("recipe") / "tiny", tiny_base))


@pytest.fixture
def start(recipe, tmp_path) -> Callable[..., subprocess.Popen[str]]:
    """Start `recipe run` on `world` processes of this host; options by keyword."""

    def run(*overrides: str, world: int = 2, prefix: tuple[str, ...] = (), out: str = "out", **options: object):
        words = [sys.executable, "-m", "tools.cli", "run", str(recipe), "--hw", "cpu-x2", "--out", str(tmp_path / out)]
        words += ["--world", str(world)]
        for name, value in options.items():
            words += [f"--{name.replace('_', '-')}", str(value)]
        for override in overrides:
            words += ["--set", override]
        pipe = subprocess.PIPE
        return subprocess.Popen([*prefix, *words], cwd=ROOT, stdout=pipe, stderr=subprocess.STDOUT, text=True)

    return run


def end(process: subprocess.Popen[str], code: int, *texts: str, seconds: float = 90) -> str:
    """Wait for the end; it has this code and said these texts."""
    said = process.communicate(timeout=seconds)[0]
    assert process.returncode == code, said
    for text in texts:
        assert text in said, said
    assert "Traceback" not in said
    assert "bug:" not in said
    return said


def rank(process: subprocess.Popen[str], wanted: int) -> int:
    """The process id of a rank of the run."""
    children = Path(f"/proc/{process.pid}/task/{process.pid}/children").read_text().split()
    for child in children:
        if f"RANK={wanted}" in Path(f"/proc/{child}/environ").read_text().split("\0"):
            return int(child)
    raise AssertionError(f"no rank {wanted} among {children}")


def wait_for_steps(out: Path, steps: int) -> Path:
    """Until a run in `out` has recorded so many steps; return its folder."""
    deadline = time.monotonic() + 60
    while time.monotonic() < deadline:
        for path in out.glob("*/metrics.jsonl"):
            if path.read_text().count('"loss"') >= steps:
                return path.parent
        time.sleep(0.02)
    raise AssertionError(f"no run in {out} made {steps} steps")


def losses(folder: Path) -> list[float]:
    return [record["loss"] for record in metrics.read(folder / "metrics.jsonl") if "loss" in record]


def test_two_processes_then_a_stop_then_the_rest_is_the_unbroken_run_bit_for_bit(recipe, start, tmp_path):
    said = end(start(out="unbroken"), 0, "2 processes share every batch")
    (unbroken,) = folders(tmp_path / "unbroken")
    assert said.count("held-out loss after step 6") == 1, "rank 0 alone speaks"
    assert manifest(unbroken)["backend"]["world"] == 2
    assert manifest(unbroken)["exit_reason"] == "done"
    assert manifest(unbroken)["command"][-2:] == ["--world", "2"], "as it was typed"
    alone = run_tiny(recipe, tmp_path / "alone", "device_config.mesh_shape=[1,1]", export=False)
    assert losses(unbroken) == pytest.approx(losses(alone), rel=1e-5)
    two, one = ([record["nll"] for record in outcome(run)["evaluations"]] for run in (unbroken, alone))
    assert np.allclose(two, one, rtol=1e-4)
    assert manifest(unbroken)["training_digest"] == manifest(alone)["training_digest"]

    end(start("checkpoint_config.every=100", stop_at=4), 75, "stopped by --stop-at 4", "the same command")
    end(start("checkpoint_config.every=100"), 0, "resuming", "after step 4")
    (folder,) = folders(tmp_path / "out")
    assert outcome(folder) == outcome(unbroken)


@pytest.mark.slow
def test_a_signal_to_the_command_saves_and_stops_the_run(start, tmp_path):
    process = start(*LONG)
    folder = wait_for_steps(tmp_path / "out", 10)
    process.send_signal(signal.SIGTERM)
    end(process, 75, "stopped by SIGTERM after step")
    assert outcome(folder)["step"] == len(losses(folder))


@pytest.mark.slow
def test_a_signal_before_the_first_step_ends_it_with_nothing_saved(start):
    process = start(*LONG)
    assert process.stdout is not None
    while "parameters; torch-cpu on" not in process.stdout.readline():
        assert process.poll() is None
    process.send_signal(signal.SIGINT)
    end(process, 130, "interrupted")


@pytest.mark.parametrize(("parent", "code"), [("getppid", 0), ("getpid", -signal.SIGINT)])
def test_a_rank_whose_command_is_gone_already_begins_nothing(parent, code):
    script = f"import os; from tools.launch.rank import stop_with; stop_with(os.{parent}())"
    assert subprocess.run([sys.executable, "-c", script], cwd=ROOT, stderr=subprocess.DEVNULL).returncode == code


@pytest.mark.slow
def test_rank_1_killed_rank_0_saves_its_last_step_and_one_process_goes_on(recipe, start, tmp_path):
    process = start(*LONG)
    folder = wait_for_steps(tmp_path / "out", 50)
    began = time.monotonic()
    os.kill(rank(process, 1), signal.SIGKILL)
    end(process, 5, "rank 1 of 2", "was killed by SIGKILL", "another process of this run is gone", "which is saved")
    assert time.monotonic() - began < 60
    done = losses(folder)
    assert outcome(folder)["step"] == len(done) > 40, "more than the last periodic checkpoint had"
    assert manifest(folder)["exit_reason"].startswith("failed: another process")

    until = len(done) + 5
    end(start(*LONG, world=1, stop_at=until), 75, "mesh_shape: [1, 2] -> [1, 1]", "not bit-exact from here")
    assert losses(folder)[: len(done)] == done, "in the same folder"
    with pytest.raises(Stopped):
        run_tiny(recipe, tmp_path / "alone", *LONG, stop_at=until, export=False)
    (alone,) = folders(tmp_path / "alone")
    assert losses(folder) == pytest.approx(losses(alone), rel=0.02), "the same rows at every step"


@pytest.mark.slow
def test_rank_0_killed_the_last_periodic_checkpoint_stands_and_four_go_on(start, tmp_path):
    process = start(*LONG)
    folder = wait_for_steps(tmp_path / "out", 50)
    began = time.monotonic()
    os.kill(rank(process, 0), signal.SIGKILL)
    said = end(process, 5, "rank 0 of 2", "was killed by SIGKILL", "goes on from the newest checkpoint")
    assert time.monotonic() - began < 60
    assert said.count("error:") == 1
    step = outcome(folder)["step"]
    assert step % 40 == 0
    assert step > 0
    before = losses(folder)
    end(start(*LONG, world=4, stop_at=step + 5), 75, f"after step {step}", "not bit-exact from here")
    assert outcome(folder)["step"] == step + 5
    both = min(len(before), step + 5)
    assert losses(folder)[:both] == pytest.approx(before[:both], rel=0.02), "the same rows at every step"


def free_port() -> int:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return int(probe.getsockname()[1])


@pytest.mark.slow
def test_hosts_that_were_started_differently_are_refused(start, tmp_path):
    port = free_port()
    meet = {"nnodes": 2, "rdzv_endpoint": f"127.0.0.1:{port}", "rdzv_timeout": 60}
    first = start("training_config.seed=1", **meet)
    while not answers("127.0.0.1", port, 1):  # two on one host would both offer the place to meet
        assert first.poll() is None
    for process in (start("training_config.seed=2", out="other", **meet), first):
        end(process, 2, "rank 1 was not started as rank 0 was: training_config.seed")
    assert not folders(tmp_path / "out")
    assert not folders(tmp_path / "other")


def test_a_host_that_waits_in_vain_says_so(start):
    meet = {"nnodes": 2, "rdzv_endpoint": f"127.0.0.1:{free_port()}", "rdzv_timeout": 2}
    end(start(**meet), 4, "2 hosts did not meet within 2 s", "start the same command on every host")


def test_an_address_that_nobody_answers_is_named(monkeypatch):
    monkeypatch.setattr(socket, "gethostbyname", lambda name: "127.0.0.9")  # another host, as far as anyone here knows
    with pytest.raises(MachineError, match="2 hosts did not meet within 1 s: nobody answers") as refused:
        meeting_of(Hosts(2, f"trainer.example:{free_port()}", 1))
    assert "trainer.example" in str(refused.value)


@pytest.mark.parametrize("endpoint", ["trainer", "trainer:", ":29500", "trainer:http"])
def test_an_endpoint_is_host_and_port(endpoint):
    with pytest.raises(UsageError, match="is no HOST:PORT"):
        meeting_of(Hosts(2, endpoint))


def test_processes_and_hosts_must_fit(start):
    end(start(world=4, nnodes=3, rdzv_endpoint="trainer:29500"), 2, "4 processes cannot be shared out to 3 hosts")
    end(start(nnodes=2), 2, "--rdzv-endpoint HOST:PORT")
    end(start(world=3), 2, "does not divide by the 3 devices of cpu-x2")


@pytest.fixture
def two_hosts() -> Iterator[tuple[str, str]]:
    """Two network namespaces with an address each, joined by a cable."""
    if os.geteuid() != 0 or shutil.which("ip") is None:
        pytest.skip("network namespaces need root and the command `ip` (iproute2)")
    names = [f"recipes-{os.getpid()}-{side}" for side in "ab"]

    def ip(*words: str) -> bool:
        return subprocess.run(["ip", *words], check=False, capture_output=True).returncode == 0

    try:
        if not all(ip("netns", "add", name) for name in names):
            pytest.skip("this kernel or container gives no network namespaces")
        assert ip("link", "add", "left", "netns", names[0], "type", "veth", "peer", "name", "right", "netns", names[1])
        for number, (name, cable) in enumerate(zip(names, ("left", "right"), strict=True), 1):
            assert ip("-n", name, "addr", "add", f"10.99.0.{number}/24", "dev", cable)
            assert ip("-n", name, "link", "set", cable, "up")
            assert ip("-n", name, "link", "set", "lo", "up")
        yield names[0], names[1]
    finally:
        for name in names:
            ip("netns", "del", name)


@pytest.mark.slow
def test_two_hosts_give_the_losses_of_one_value_for_value(start, two_hosts, tmp_path):
    end(start(out="single"), 0)
    meet = {"nnodes": 2, "rdzv_endpoint": "10.99.0.1:29500", "rdzv_timeout": 60}
    first, second = (start(prefix=("ip", "netns", "exec", name), out=name, **meet) for name in two_hosts)
    end(first, 0, "1 of them on this host")
    end(second, 0, "rank 1 of 2 works here; rank 0, with the run's folder, is on")
    (single,), (several,) = folders(tmp_path / "single"), folders(tmp_path / two_hosts[0])
    assert outcome(several) == outcome(single)
    assert not folders(tmp_path / two_hosts[1]), "rank 0 alone writes"
    assert "held-out loss after step 6" in log(several)
