"""Runs in containers on this machine's Docker engine: numbers, owners, signals, leases, and what can go wrong.

The CPU's image trains the tiny recipe. Boards are device files and the double of ttml in that same image: this shows
what the launcher does, nothing about a card.
"""

from __future__ import annotations

import json
import os
import pty
import signal
import subprocess
import sys
import time
from collections.abc import Iterator
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import pytest

from common.errors import MachineError
from common.paths import ROOT
from common.train import metrics
from tests.containers.conftest import docker
from tests.doubles.machines import DRIVER, FIRMWARE, fake_host, pci, real_nodes
from tests.doubles.tiny_recipe import make_tiny_recipe
from tests.support.runs import folders, manifest, outcome
from tools.containers import launcher
from tools.containers.docker import check_engine
from tools.containers.images import Image
from tools.containers.spec import LABEL, process
from tools.machine import lease

SECONDS = 90  # until something must have happened


@pytest.fixture(scope="session")
def image(cpu_image) -> Image:
    try:
        check_engine()
    except MachineError as error:
        pytest.skip(f"no container can be started here: {error.what}")
    return cpu_image


@pytest.fixture(scope="session")
def board_image(image) -> Iterator[Image]:
    """The same image, in which a double stands for ttml."""
    entrypoint = json.dumps(["python", "-m", "tests.containers.on_double", "1"])
    source = docker("create", image.reference)
    made = docker("commit", "--change", f"ENTRYPOINT {entrypoint}", source)
    docker("rm", source)
    yield Image("n150", made, "local", image.lock_sha256)
    docker("image", "rm", "--force", made)


@dataclass
class Launched:
    """A `recipe` command in a process of its own, which prints to a file."""

    process: subprocess.Popen[bytes]
    screen: Path

    @property
    def said(self) -> str:
        return self.screen.read_text("utf-8")

    def until(self, words: str) -> None:
        deadline = time.monotonic() + SECONDS
        while words not in self.said:
            assert self.process.poll() is None, self.said
            assert time.monotonic() < deadline, self.said
            time.sleep(0.02)

    def end(self) -> int:
        return self.process.wait(SECONDS)


@dataclass
class Bench:
    """A recipe, a folder of runs and a machine; `start` launches a command there."""

    folder: Path
    recipe: Path
    environment: dict[str, str]

    @property
    def runs(self) -> Path:
        return self.folder / "runs"

    def start(self, image: Image, *words: str, **environment: str) -> Launched:
        screen = self.folder / f"screen-{time.monotonic_ns()}.txt"
        command = [sys.executable, "-m", "tests.containers.launch", image.reference, image.lock_sha256, *words]
        with screen.open("wb") as file:
            values = os.environ | self.environment | environment
            process = subprocess.Popen(command, cwd=ROOT, env=values, stdout=file, stderr=subprocess.STDOUT)
        return Launched(process, screen)

    def run(self, image: Image, *words: str, **environment: str) -> Launched:
        return self.start(image, "run", str(self.recipe), "--out", str(self.runs), *words, **environment)

    def done(self, image: Image, *words: str, code: int = 0, **environment: str) -> str:
        started = self.run(image, *words, **environment)
        assert started.end() == code, started.said
        return started.said


@pytest.fixture
def bench(tmp_path, tiny_base) -> Iterator[Bench]:
    for path in (tmp_path, tiny_base / "model.safetensors"):  # private ones, and a root caller's run is another user's
        path.chmod(0o755)
    values = {"RECIPES_HOME": str(tmp_path / "home"), "RECIPES_SYSFS_ROOT": str(tmp_path / "machine")}
    yield Bench(tmp_path, make_tiny_recipe(tmp_path / "tiny", tiny_base), values)
    for container in ours(tmp_path):  # of a test that failed
        docker("rm", "--force", "--volumes", container.name)


def ours(folder: Path) -> list[launcher.Container]:
    """The containers of the test with this folder that are still there."""
    return [item for item in launcher.ours() if str(folder) in json.dumps(attributes(item.name)["Mounts"])]


def attributes(name: str) -> dict[str, Any]:
    described: list[dict[str, Any]] = json.loads(docker("container", "inspect", name))
    return described[0]


def owners(folder: Path) -> set[int]:
    return {path.lstat().st_uid for path in (folder, *folder.rglob("*"))}


LONG = ("--steps", "2000", "--set", "checkpoint_config.every=0", "--set", "eval_config.every=0")


# --- the same run ---------------------------------------------------------------------------------------------------


def test_a_run_is_the_native_one_value_for_value_and_goes_on_in_and_out_of_its_container(bench, image):
    bench.done(image, "--hw", "cpu", "--no-container", "--resume", "never")
    bench.done(image, "--hw", "cpu", "--container", "--stop-at", "2", "--resume", "never", code=75)
    native, run = folders(bench.runs)
    first = {"target": "cpu", "reference": image.reference, "source": "local", "pins_sha256": image.lock_sha256}
    assert (manifest(run)["image"], manifest(native)["image"]) == (first, None)
    same = ("git_commit", "git_dirty", "host", "config_digest", "training_digest", "tokenizer_sha256", "recipe_dir")
    assert {name: manifest(run)[name] for name in same} == {name: manifest(native)[name] for name in same}
    assert owners(run) == {os.getuid()}, "what a run made belongs to its caller"
    bench.done(image, "--hw", "cpu", "--no-container", "--stop-at", "4", code=75)
    assert "resuming" in bench.done(image, "--hw", "cpu", "--container")
    assert [(event["step"], event["image"]) for event in manifest(run)["resumed"]] == [(2, None), (4, first)]
    assert outcome(run) == outcome(native)
    assert owners(bench.runs) == {os.getuid()}


@pytest.fixture
def inspected(bench, image) -> Iterator[dict[str, Any]]:
    started = bench.run(image, "--hw", "cpu", "--container", *LONG)
    started.until("grad norm")
    (container,) = ours(bench.folder)
    yield attributes(container.name)
    started.process.send_signal(signal.SIGTERM)
    assert started.end() == 75, started.said


def test_a_container_has_no_right_that_it_does_not_need(inspected):
    host, config = inspected["HostConfig"], inspected["Config"]
    assert config["User"].split(":")[0] not in ("", "0", "root")
    assert host["CapDrop"] == ["ALL"]
    assert "no-new-privileges" in host["SecurityOpt"]
    assert host["Privileged"] is False
    assert host["ReadonlyRootfs"] is True
    assert host["Devices"] in (None, [])
    assert host["LogConfig"] == {"Type": "local", "Config": {"max-size": "50m", "max-file": "2"}}
    writable = {mount["Destination"] for mount in inspected["Mounts"] if mount["RW"] and mount["Type"] == "bind"}
    assert {Path(path).name for path in writable} == {"runs", "home"}
    status = docker("exec", inspected["Id"], "grep", "-E", "CapEff|NoNewPrivs|Uid", "/proc/1/status")
    assert "CapEff:\t0000000000000000" in status
    assert "NoNewPrivs:\t1" in status
    assert "Uid:\t0" not in status


# --- signals --------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM, signal.SIGHUP])
def test_a_signal_saves_and_ends_with_75(bench, image, number):
    started = bench.run(image, "--hw", "cpu", "--container", *LONG)
    started.until("grad norm")
    started.process.send_signal(number)
    assert started.end() == 75, started.said
    assert ours(bench.folder) == [], "the container is gone"
    (folder,) = folders(bench.runs)
    assert manifest(folder)["exit_reason"].startswith("stopped")
    last = outcome(folder)["step"]
    assert [record["step"] for record in metrics.read(folder / "metrics.jsonl") if "loss" in record][-1] == last
    assert owners(folder) == {os.getuid()}


def test_a_terminal_has_its_live_line(bench, image):
    """And Ctrl-C typed on it ends the run as it should."""
    child, terminal = pty.fork()
    if child == 0:
        os.chdir(ROOT)
        words = ["run", str(bench.recipe), "--out", str(bench.runs), "--hw", "cpu", "--container", *LONG]
        command = [sys.executable, "-m", "tests.containers.launch", image.reference, image.lock_sha256, *words]
        os.execve(sys.executable, command, os.environ | bench.environment | {"TERM": "xterm"})
    said, deadline = b"", time.monotonic() + SECONDS
    while "━".encode() not in said and time.monotonic() < deadline:
        said += os.read(terminal, 65536)
    os.write(terminal, b"\x03")
    while True:
        try:
            said += os.read(terminal, 65536)
        except OSError:  # its end
            break
    assert os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]) == 75, said.decode()
    assert b"saving as soon as this step is over" in said


def test_a_reader_that_goes_away_lets_the_run_save(bench, image):
    command = [sys.executable, "-m", "tests.containers.launch", image.reference, image.lock_sha256]
    process = subprocess.Popen(
        [*command, "run", str(bench.recipe), "--hw", "cpu", "--container", "--out", str(bench.runs), *LONG],
        cwd=ROOT,
        env=os.environ | bench.environment,
        stdout=subprocess.PIPE,
        stderr=subprocess.DEVNULL,
    )
    assert process.stdout is not None
    while b"grad norm" not in process.stdout.readline():
        assert process.poll() is None
    process.stdout.close()
    assert process.wait(SECONDS) == 75
    assert ours(bench.folder) == []


# --- boards ---------------------------------------------------------------------------------------------------------


@pytest.fixture
def board(the_only_board, bench) -> Bench:
    """A machine with one n150 whose node an engine can give away."""
    if not real_nodes(fake_host(bench.folder / "machine", "n150")):
        pytest.skip("only root can make device nodes")
    return bench


SMALL = ("--set", "training_config.precision=bf16", "--set", "model_config.lora=null")


def test_a_board_runs_in_its_image_by_itself(board, board_image):
    said = board.done(board_image, "--hw", "n150", *SMALL)
    (folder,) = folders(board.runs)
    assert manifest(folder)["backend"]["backend"] == "ttml"
    facts = manifest(folder)["host"]
    assert facts["driver"] == DRIVER
    assert facts["pci"] == [pci(0)]
    assert facts["firmware"] == [FIRMWARE]
    assert "in a container, on n150" in said
    assert lease.path_of(pci(0)).name == "recipes-0000:01:00.0.lock"


def test_a_board_is_brought_up_in_its_image(board, board_image):
    """Line by line, over the double: whoever has the image alone can look before he trusts."""
    looked = board.start(board_image, "verify", "board", "--hw", "n150")
    assert looked.end() == 0, looked.said
    assert "gradient" in looked.said
    assert ours(board.folder) == []
    names = board.start(board_image, "doctor", "--ttml", "--json", "--no-device")
    assert names.end() == 0, names.said
    line, _, report = names.said.partition("\n")  # the first is of stderr
    assert line.startswith("it runs in the local image sha256:")
    assert json.loads(report)["hw"] == "n150"


@pytest.fixture
def occupied(board, board_image) -> Iterator[Launched]:
    started = board.run(board_image, "--hw", "n150", *LONG, *SMALL)
    started.until("grad norm")
    yield started
    if started.process.poll() is None:
        started.process.kill()
        started.process.wait()


def test_a_second_run_on_a_board_is_told_who_has_it(board, board_image, occupied):
    (container,) = ours(board.folder)
    assert attributes(container.name)["HostConfig"]["Devices"] == [
        {
            "PathOnHost": str(board.folder / "machine/dev/tenstorrent/0"),
            "PathInContainer": "/dev/tenstorrent/0",
            "CgroupPermissions": "rw",
        }
    ]
    for how in ((), ("--no-container",)):
        said = board.done(board_image, "--hw", "n150", *SMALL, *how, code=4)
        assert f"n150 is in use by process {occupied.process.pid} with the run " in said
        assert f"in the container {container.name}, since 2" in said
        assert "recipe stop --hw n150" in said
    stopped = board.start(board_image, "stop", "--hw", "n150")
    assert stopped.end() == 0, stopped.said
    assert occupied.end() == 75, "the run that was stopped saved and said so"
    assert board.done(board_image, "--hw", "n150", *SMALL), "the board is free again"


def test_a_killed_launcher_leaves_a_container_that_is_found_and_stopped(board, board_image, occupied):
    occupied.process.kill()
    occupied.process.wait()
    (container,) = ours(board.folder)
    assert container.status == "running"
    said = board.done(board_image, "--hw", "n150", *SMALL, code=4)
    assert f"n150 is in use by the container {container.name}, whose launcher is gone" in said
    assert "recipe stop --hw n150" in said
    stopped = board.start(board_image, "stop", "--hw", "n150")
    assert stopped.end() == 0, stopped.said
    assert ours(board.folder) == []
    (folder,) = folders(board.runs)
    assert manifest(folder)["exit_reason"].startswith("stopped")
    assert owners(folder) == {os.getuid()}, "what was lent is given back though its launcher was killed"
    assert board.done(board_image, "--hw", "n150", *SMALL, "--resume", "never"), "the board is free again"


def test_only_ended_containers_of_dead_launchers_are_cleared_away(bench, board_image, image):
    def made(verb: str, **labels: str) -> str:
        words = [word for key, value in labels.items() for word in ("--label", f"{LABEL}{key}={value}")]
        return docker(*verb.split(), *words, "--entrypoint", "sleep", image.reference, "600")

    dead = made("create", run="x", launcher="1@0")
    alive = made("run --detach", run="x", launcher="1@0")
    waited = made("create", run="x", launcher=process(os.getpid()))
    foreign = made("create")
    try:
        launcher.remove_ended()
        there = docker("ps", "--all", "--quiet", "--no-trunc").split()
        assert dead not in there
        assert {alive, waited, foreign} <= set(there)
    finally:
        docker("rm", "--force", "--volumes", alive, waited, foreign)


# --- what can go wrong ----------------------------------------------------------------------------------------------


def test_a_full_disk_in_the_container_is_one_message(bench, image):
    bench.runs.mkdir()
    mounted = subprocess.run(["mount", "-t", "tmpfs", "-o", "size=600k", "small", str(bench.runs)], check=False)
    if mounted.returncode:
        pytest.skip("only root can mount a small disk")
    try:
        said = bench.done(image, "--hw", "cpu", "--container", code=4)
        assert "No space left on device" in said
        assert "Traceback" not in said
        assert ours(bench.folder) == []
    finally:
        subprocess.run(["umount", str(bench.runs)], check=True)


def test_a_killed_container_says_so_and_its_run_goes_on(bench, image):
    saving = ("--hw", "cpu", "--container", "--steps", "2000", "--set", "eval_config.every=0")
    started = bench.run(image, *saving)
    started.until("step    4/")
    (container,) = ours(bench.folder)
    docker("kill", container.name)
    assert started.end() == 5
    assert "the run was killed from outside" in started.said
    again = bench.run(image, *saving)
    again.until("resuming")
    again.process.send_signal(signal.SIGTERM)
    assert again.end() == 75, again.said


@pytest.mark.parametrize(
    ("change", "text"),
    [
        ({"reference": "sha256:" + "0" * 64}, "is gone from the Docker engine"),
        ({"lock_sha256": "0" * 64}, "is not the locked one: its label recipes.lock is "),
    ],
)
def test_an_image_that_is_not_the_recorded_one_is_one_message(bench, image, change, text):
    said = bench.done(replace(image, **change), "--hw", "cpu", "--container", code=4)
    assert text in said
    assert "make image" in said
    assert not list(bench.runs.glob("*")), "nothing was begun"


def test_a_node_that_is_no_device_is_one_message(bench, board_image):
    fake_host(bench.folder / "machine", "n150")
    said = bench.done(board_image, "--hw", "n150", *SMALL, code=4)
    assert "a device node of the board cannot be given to a container" in said
    assert not list(bench.runs.glob("*"))
