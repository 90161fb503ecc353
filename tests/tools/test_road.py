"""From a machine with a board to a training step: what `recipe doctor` still misses, and a run that builds its image.

The `docker` command is a double, the board a faked one; `make test-containers` does the same on an engine.
"""

from __future__ import annotations

import copy
import json
import os
import pty
import re
import select
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest

from common.paths import ROOT
from tests.doubles.machines import bare_environment, fake_host
from tests.doubles.tiny_recipe import FROM_SCRATCH
from tools.containers import images

DIGEST = "sha256:" + "a" * 64
ID = "sha256:" + "b" * 64
SECONDS = 60


def lock_of_today(**target: Any) -> dict[str, Any]:
    """The lock of this repository; `target` are facts of n150's published image."""
    lock = copy.deepcopy(images.read_lock())
    lock["targets"]["n150"] |= target
    return lock


@dataclass
class Bench:
    """A machine with an n150, an engine that has no image, and a recipe that needs no download."""

    folder: Path

    @property
    def double(self) -> Path:
        """What the double of docker is told, and what it was asked."""
        return self.folder / "double"

    @property
    def log(self) -> str:
        return (self.folder / "build-n150.log").read_text()

    def asked(self, verb: str) -> list[str]:
        calls = self.double / "calls"
        return [line for line in calls.read_text().splitlines() if line.startswith(verb)] if calls.exists() else []

    def command(self, *words: str) -> list[str]:
        run = ["run", str(FROM_SCRATCH), "--hw", "n150", "--out", str(self.folder / "runs")]
        return self.recipe(*run, "--set", f"data_config.corpus={self.folder / 'corpus.txt'}", *words)

    def recipe(self, *words: str) -> list[str]:
        return [sys.executable, "-m", "tests.support.own_images", str(self.folder), *words]

    def environment(self) -> dict[str, str]:
        return bare_environment() | {
            "PATH": f"{ROOT / 'tests/doubles'}{os.pathsep}{os.environ['PATH']}",
            "DOUBLE": str(self.double),
            "RECIPES_SYSFS_ROOT": str(self.folder / "machine"),
            "RECIPES_HOME": str(self.folder / "home"),
            "PYTHONPATH": str(ROOT),
        }

    def run(self, *words: str) -> subprocess.CompletedProcess[str]:
        """Run it as a script would: nobody is at a terminal."""
        return self.done(self.command(*words))

    def done(self, command: list[str]) -> subprocess.CompletedProcess[str]:
        return subprocess.run(
            command, cwd=ROOT, env=self.environment(),
            stdin=subprocess.DEVNULL, capture_output=True, text=True, check=False, timeout=SECONDS,
        )  # fmt: skip

    def road(self, *words: str) -> list[dict[str, str]]:
        """Return the road of `recipe doctor --json`, which must be the one that it prints as text."""
        words = ("--hw", "n150", *words)
        steps: list[dict[str, str]] = json.loads(self.done(self.recipe("doctor", "--json", *words)).stdout)["road"]
        said = self.done(self.recipe("doctor", *words)).stdout.partition("the road to a training step on n150:\n")[2]
        numbered = [f"  {at}. {step['id']}: {step['why']}\n     {step['do']}" for at, step in enumerate(steps, 1)]
        assert said.splitlines() == "\n".join(numbered).splitlines()
        return steps

    def at_a_terminal(self, answer: str, command: list[str] | None = None) -> tuple[int, str]:
        """Run it on a terminal and answer the first question; its exit code and what the screen had."""
        process, terminal = pty.fork()
        if not process:
            os.chdir(ROOT)
            os.execve(sys.executable, command or self.command(), self.environment())
        said, answer_at, deadline = "", 0.0, time.monotonic() + SECONDS
        while time.monotonic() < deadline:
            if select.select([terminal], [], [], 0.1)[0]:
                try:
                    said += os.read(terminal, 65536).decode()
                except OSError:  # the process has ended
                    break
            # Again after a while: a Ctrl-C that comes between the question and the reading of its answer is not heard.
            if "[y/N]" in said and time.monotonic() > answer_at:
                os.write(terminal, answer.encode())
                answer_at = time.monotonic() + 5
        else:
            os.kill(process, signal.SIGKILL)
        code = os.waitstatus_to_exitcode(os.waitpid(process, 0)[1])
        os.close(terminal)
        return code, said


@pytest.fixture
def bench(tmp_path: Path) -> Bench:
    bench = Bench(tmp_path)
    fake_host(tmp_path / "machine", "n150")
    (tmp_path / "corpus.txt").write_text("to be or not to be\n" * 400)
    bench.double.mkdir()
    info = {"ServerVersion": "28.0", "SecurityOptions": [], "DockerRootDir": "/on/another/machine"}
    (bench.double / "info").write_text(json.dumps(info))
    lock = lock_of_today()
    (tmp_path / "images.lock.json").write_text(json.dumps(lock))
    (bench.double / "build").write_text(image(images.pins_sha256(lock, "n150")))
    (bench.double / "end").write_text("0")
    return bench


def image(pins: str) -> str:
    """What `docker image inspect` prints of an image built from these pins."""
    return json.dumps([{"Id": ID, "RepoDigests": [], "Size": 4e9, "Config": {"Labels": {"recipes.lock": pins}}}])


NO_IMAGE = "no image for n150: none is published, none was built here"


def test_without_a_terminal_nothing_is_built_and_the_word_is_named(bench: Bench) -> None:
    done = bench.run()
    assert done.returncode == 4
    assert f"error: {NO_IMAGE}, and nobody is at a terminal" in done.stderr
    for words in (
        "tt-metal v0.81.1",
        "11 minutes on 32 cores, without tt-train (reported",
        "10 GB",
        "BUILD=1 (--build)",
    ):
        assert words in done.stderr
    assert not bench.asked("buildx bake")


def test_the_word_builds_it_and_trains_by_one_command(bench: Bench) -> None:
    done = bench.run("--build")
    assert done.returncode == 0, done.stderr
    assert f"{NO_IMAGE}: it is built now" in done.stdout
    assert "#9 [ttml-builder 2/2] RUN compile" in done.stderr, "its progress is seen"
    assert "#9 DONE 1.0s" in bench.log
    assert len(bench.asked("buildx bake")) == len(bench.asked("start")) == 1
    assert ID in bench.asked("create")[0]
    again = bench.run()
    assert again.returncode == 0, again.stderr
    assert len(bench.asked("buildx bake")) == 1, "what was built is taken"


def test_a_person_is_asked_once(bench: Bench) -> None:
    code, said = bench.at_a_terminal("n\n")
    assert (code, bench.asked("buildx bake")) == (4, [])
    assert "expect an hour or more" in said.partition("[y/N]")[0], "before the question, not after it"
    assert "nothing was built" in said
    code, said = bench.at_a_terminal("y\n")
    assert (code, said.count("[y/N]")) == (0, 1), said
    assert len(bench.asked("start")) == 1


def test_ctrl_c_at_the_question_is_no(bench: Bench) -> None:
    code, said = bench.at_a_terminal("\x03")
    assert (code, bench.asked("buildx bake")) == (130, []), said


def ignoring(name: str, command: list[str]) -> list[str]:
    """The command, started as by `nohup` (HUP) or the `&` of a script (INT): it ignores that signal from its start."""
    return ["bash", "-c", f"trap '' {name}; exec \"$@\"", "-", *command]


def building(bench: Bench, command: list[str]) -> subprocess.Popen[bytes]:
    """Start it, and wait until the engine builds; it goes on with that until the file `hold` is gone."""
    (bench.double / "hold").touch()
    with (bench.folder / "screen").open("w") as screen:
        process = subprocess.Popen(command, cwd=ROOT, env=bench.environment(), stdout=screen, stderr=subprocess.STDOUT)
    deadline = time.monotonic() + SECONDS
    while not (bench.double / "building").exists():
        assert time.monotonic() < deadline
        assert process.poll() is None, (bench.folder / "screen").read_text()
        time.sleep(0.02)
    return process


@pytest.mark.parametrize(
    ("number", "ignored"), [(signal.SIGINT, "USR1"), (signal.SIGTERM, "USR1"), (signal.SIGTERM, "INT")]
)
def test_a_signal_ends_the_build_and_the_next_call_goes_on(bench: Bench, number: int, ignored: str) -> None:
    process = building(bench, ignoring(ignored, bench.command("--build")))
    process.send_signal(number)
    assert process.wait(SECONDS) == 130
    assert (bench.double / "ended").read_text() == "cancelled\n", "the build was told, and waited for"
    assert "goes on with the steps that are done" in (bench.folder / "screen").read_text()
    assert not bench.asked("create")
    (bench.double / "hold").unlink()
    assert bench.run("--build").returncode == 0


def test_under_nohup_it_outlives_its_terminal(bench: Bench) -> None:
    process = building(bench, ignoring("HUP", bench.command("--build")))
    process.send_signal(signal.SIGHUP)
    (bench.double / "hold").unlink()
    assert process.wait(SECONDS) == 0, (bench.folder / "screen").read_text()


# What `watched` starts sends it a signal at once, before anything else of ours goes on.
AT_ONCE = """
import os, subprocess, sys
from pathlib import Path
from tools.containers.progress import watched

class Quick(subprocess.Popen):
    def __init__(self, *words, **options):
        super().__init__(*words, **options)
        os.kill(os.getpid(), int(sys.argv[1]))

subprocess.Popen = Quick
watched(["sleep", "600"], Path(), os.environ, Path(sys.argv[2]), "pins")
"""


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM, signal.SIGHUP])
def test_no_signal_is_lost_between_the_start_of_a_build_and_hearing(tmp_path: Path, number: int) -> None:
    command = [sys.executable, "-c", AT_ONCE, str(int(number)), str(tmp_path / "log")]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, check=False, timeout=SECONDS)
    assert "the build was interrupted" in done.stderr
    assert done.returncode == -signal.SIGINT, "as Python ends by a KeyboardInterrupt"


@pytest.mark.parametrize(
    ("last_words", "means"),
    [
        ("curl: (60) SSL certificate problem: unable to get local issuer certificate", "CA_BUNDLE=file"),
        ("write /var/lib/docker/x: no space left on device", "docker system df"),
        ("something that nobody has heard of", "the build of n150 failed: something that nobody has heard of"),
    ],
)
def test_a_build_that_fails_says_where_its_log_is_and_what_is_known(bench: Bench, last_words: str, means: str) -> None:
    (bench.double / "broken").write_text(f"#9 12.3 {last_words}\n#9 ERROR: exit code: 1\n")
    done = bench.run("--build")
    assert done.returncode == 4
    assert (str(bench.folder / "build-n150.log") in done.stderr, last_words in bench.log) == (True, True)
    assert last_words in done.stderr
    assert means in done.stderr.partition("error: ")[2]
    assert not bench.asked("create")


@pytest.fixture
def small(bench: Bench) -> Iterator[Path]:
    """A disk of 1 MB: tell the engine's double that it is the engine's by `info`."""
    folder = bench.folder / "small"
    folder.mkdir()
    if subprocess.run(["mount", "-t", "tmpfs", "-o", "size=1m", "small", str(folder)], check=False).returncode:
        pytest.skip("only root can mount a small disk")
    yield folder
    subprocess.run(["umount", str(folder)], check=True)


def info(bench: Bench, **facts: Any) -> None:
    """Have the engine say so of itself."""
    before = json.loads((bench.double / "info").read_text())
    (bench.double / "info").write_text(json.dumps(before | facts))


def test_a_disk_that_is_too_small_is_said_before_anything_is_asked(bench: Bench, small: Path) -> None:
    info(bench, DockerRootDir=str(small))
    done = bench.run("--build")
    assert done.returncode == 4
    assert "to build the image of n150 takes 26 GB of disk: 0 GB are free" in done.stderr
    assert str(small) in done.stderr
    assert not bench.asked("buildx bake")


def test_a_build_that_goes_on_is_told_of_its_disk_and_not_refused(bench: Bench, small: Path) -> None:
    (bench.double / "broken").write_text("#9 CANCELED\n")
    assert bench.run("--build").returncode == 4
    (bench.double / "broken").unlink()
    info(bench, DockerRootDir=str(small))
    pins, _, steps = bench.log.partition("\n")
    for other in (f"pins {'0' * 64}\n{steps}", pins + steps.replace("#8 DONE 1.0s", "#8 CANCELED")):
        (bench.folder / "build-n150.log").write_text(other)
        assert "takes 26 GB of disk" in bench.run("--build").stderr, "steps of other pins, or none that ended"
    (bench.folder / "build-n150.log").write_text(f"{pins}\n{steps}")
    done = bench.run("--build")
    assert done.returncode == 0, done.stderr
    assert f"disk: 0 GB are free on {small}, a build takes 26, less what an earlier one left here" in done.stdout


def test_the_image_of_another_board_leaves_little_to_build(bench: Bench, small: Path) -> None:
    info(bench, DockerRootDir=str(small))
    pins = images.pins_sha256(images.read_lock(), "n300")
    built = {"id": ID, "lock_sha256": pins, "created": "2026-11-01T00:00:00Z"}
    (bench.folder / "images.local.json").write_text(json.dumps({"format": 1, "images": {"n300": built}}))
    assert "takes 26 GB of disk" in bench.run("--build").stderr, "the engine has lost it, and its steps perhaps, too"
    (bench.double / "image").write_text(image(pins))
    done = bench.run("--build")
    assert done.returncode == 0, done.stderr
    assert "less what an earlier one left here" in done.stdout


def test_a_store_whose_folder_the_engine_does_not_name_is_not_judged(bench: Bench, small: Path) -> None:
    info(bench, DockerRootDir=str(small), DriverStatus=[["driver-type", "io.containerd.snapshotter.v1"]])
    done = bench.run("--build")
    assert done.returncode == 0, done.stderr
    assert "disk: it cannot be seen from here; a build takes 26 GB" in done.stdout


def test_an_image_of_other_pins_is_built_anew(bench: Bench) -> None:
    built = {"id": "sha256:old", "lock_sha256": "0" * 64, "created": "2026-11-01T00:00:00Z"}
    (bench.folder / "images.local.json").write_text(json.dumps({"format": 1, "images": {"n150": built}}))
    assert "was built here on 2026-11-01T00:00:00Z from other pins" in bench.run().stderr
    done = bench.run("--build")
    assert done.returncode == 0, done.stderr
    assert json.loads((bench.folder / "images.local.json").read_text())["images"]["n150"]["id"] == ID


def test_a_builder_that_keeps_what_it_makes_is_told_to_hand_it_over(bench: Bench) -> None:
    (bench.double / "keeps").touch()
    done = bench.run("--build")
    assert done.returncode == 0, done.stderr


def test_an_older_image_of_the_same_name_is_not_taken_for_what_was_built(bench: Bench) -> None:
    (bench.double / "build").write_text(image("0" * 64))
    done = bench.run("--build")
    assert done.returncode == 4
    assert f"its image did not reach the engine, which has one of the pins {'0' * 64}" in done.stderr
    assert "docker buildx ls" in done.stderr
    assert not (bench.folder / "images.local.json").exists(), "nothing is remembered by a name that is not its own"
    assert not bench.asked("create")


def test_an_image_that_the_engine_has_lost_is_built_again(bench: Bench) -> None:
    assert bench.run("--build").returncode == 0
    (bench.double / "image").unlink()
    assert "the image of n150 is gone from the Docker engine" in bench.run().stderr
    assert bench.run("--build").returncode == 0


@pytest.fixture
def published(bench: Bench) -> str:
    """What the lock names as the published image of n150, and the registry has: repository@digest."""
    pins = images.pins_sha256(images.read_lock(), "n150")
    reference = f"registry.example/recipes@{DIGEST}"
    of = {"repository": "registry.example/recipes", "digest": DIGEST, "date": "2026-11-30", "lock_sha256": pins}
    (bench.folder / "images.lock.json").write_text(json.dumps(lock_of_today(**of)))
    (bench.double / "registry").write_text(json.dumps([json.loads(image(pins))[0] | {"RepoDigests": [reference]}]))
    return reference


def test_a_published_image_is_pulled_by_its_digest_and_nothing_is_built(bench: Bench, published: str) -> None:
    done = bench.run()
    assert done.returncode == 0, done.stderr
    assert f"it runs in the published image {published}" in done.stdout
    assert bench.asked("pull") == [f"pull --quiet {published} "]
    assert not bench.asked("buildx")


@pytest.mark.parametrize(
    ("says", "means", "cure"),
    [
        ("pull access denied for recipes, may require 'docker login': denied: x", "refuses to give", "`docker login`"),
        ("dial tcp: lookup registry.example: no such host", "the registry cannot be reached", "network and proxy"),
    ],
)
def test_a_published_image_that_cannot_be_pulled_can_be_built(
    bench: Bench, published: str, says: str, means: str, cure: str
) -> None:
    (bench.double / "pull").write_text(f"Error response from daemon: {says}")
    refused = bench.run()
    assert refused.returncode == 4
    assert re.search(rf"error: the published image of n150 cannot be fetched: .*{means}", refused.stderr)
    assert re.search(rf"to do: .*{cure}.*; or build it here: make image HW=n150; or BUILD=1", refused.stderr)
    assert says in refused.stderr
    done = bench.run("--build")
    assert done.returncode == 0, done.stderr
    assert f"it runs in the local image {ID}" in done.stdout
    pulls = len(bench.asked("pull"))
    assert bench.run().returncode == 0
    assert len(bench.asked("pull")) == pulls, "what was built asks no registry"


def test_a_published_image_takes_the_place_of_one_that_the_engine_has_lost(bench: Bench, published: str) -> None:
    assert bench.done(bench.recipe("image", "build", "n150")).returncode == 0
    (bench.double / "image").unlink()
    done = bench.run()
    assert done.returncode == 0, done.stderr
    assert f"it runs in the published image {published}" in done.stdout


def test_what_looks_at_a_board_asks_whether_to_build_its_image(bench: Bench) -> None:
    look = bench.recipe("verify", "board", "--hw", "n150", "--json")
    refused = bench.done(look)
    assert refused.returncode == 4
    assert f"error: {NO_IMAGE}, and nobody is at a terminal" in refused.stderr
    assert ("make image HW=n150" in refused.stderr, "BUILD=1" in refused.stderr) == (True, False)
    code, said = bench.at_a_terminal("y\n", look)
    assert (code, said.count("[y/N]")) == (0, 1), said
    assert (len(bench.asked("buildx bake")), len(bench.asked("start"))) == (1, 1)


def test_a_host_that_is_not_ready_is_said_before_an_hour_of_building(bench: Bench) -> None:
    shutil.rmtree(bench.folder / "machine/sys/module")
    done = bench.run("--build")
    assert done.returncode == 4
    assert "the kernel module tenstorrent is not loaded" in done.stderr
    assert "where: board.driver" in done.stderr
    assert not bench.asked("buildx")


def test_a_dry_run_says_what_would_be_built(bench: Bench) -> None:
    done = bench.run("--dry-run")
    assert done.returncode == 0, done.stderr
    assert "its image would be built first: asked at a terminal, else by BUILD=1 (--build)\n  to build: tt-metal" in (
        done.stdout
    )
    assert f"  {NO_IMAGE}" in done.stdout
    assert not bench.asked("buildx")


# --- what doctor says of the road -----------------------------------------------------------------------------------


def ids(road: list[dict[str, str]]) -> list[str]:
    """What is on a road that this Python has no part in."""
    return [step["id"] for step in road if not step["id"].startswith(("python.", "disk."))]


def test_on_a_healthy_machine_one_command_is_left_and_what_it_sees_to(bench: Bench) -> None:
    road = bench.road()
    assert ids(road) == ["engine.image", "data.fetched", "run"]
    assert road[-1] == {
        "id": "run",
        "why": "it trains, and sees to the image and the downloads first",
        "do": "make recipe-finetune HW=n150 BUILD=1",
    }
    assert bench.run("--build").returncode == 0
    road = bench.road()
    assert (ids(road), road[-1]["do"]) == (["data.fetched", "run"], "make recipe-finetune HW=n150")


def test_every_step_that_is_missing_stands_in_the_order_it_is_done_in(bench: Bench) -> None:
    machine = bench.folder / "machine"
    shutil.rmtree(machine / "sys/module")
    (machine / "sys/class/tenstorrent/tenstorrent!0/tt_fw_bundle_ver").write_text("80.17.0.0\n")
    (machine / "sys/devices/0000:01:00.0/iommu_group/type").unlink()
    down = "Cannot connect to the Docker daemon at unix:///x. Is the docker daemon running?"
    (bench.double / "info").write_text(json.dumps({"ServerErrors": [down]}))
    road = bench.road()
    before = ["board.driver", "board.firmware", "board.memory", "engine.answers"]
    assert ids(road) == [*before, "engine.image", "data.fetched", "run"]
    said = {step["id"]: step["do"] for step in road}
    assert "tt-installer" in said["board.driver"]
    assert "hugepages=4" in said["board.memory"]
    assert "systemctl start docker" in said["engine.answers"]
    assert said["engine.image"] == "make image HW=n150"


def test_a_driver_comes_before_the_node_that_it_makes(bench: Bench) -> None:
    shutil.rmtree(bench.folder / "machine")
    (bench.folder / "machine").mkdir()
    road = bench.road()
    assert ids(road)[:3] == ["board.driver", "board.nodes", "engine.image"]
    assert "found none" in road[1]["why"]


def test_a_run_refuses_in_the_words_of_the_road(bench: Bench) -> None:
    file = bench.folder / "machine/sys/class/tenstorrent/tenstorrent!0/tt_fw_bundle_ver"
    file.write_text("80.17.0.0\n")
    step = bench.road()[0]
    refused = bench.run("--build")
    assert refused.returncode == 4
    assert f"error: {step['why']}\n  where: {step['id']}\n  to do: {step['do']}\n" in refused.stderr


def test_what_an_engine_lacks_for_a_build_is_on_the_road_until_there_is_an_image(bench: Bench) -> None:
    lock = lock_of_today()
    lock["pins"]["ttml"]["tt_metal"] |= {"commit": None, "built": False, "reason": "nobody read it"}
    (bench.folder / "images.lock.json").write_text(json.dumps(lock))
    step = bench.road()[0]
    assert (step["id"], "tt_metal.commit: nobody read it" in step["why"]) == ("engine.builds", True)
    assert "recipe lock" in step["do"]
    built = {"id": ID, "lock_sha256": images.pins_sha256(lock, "n150"), "created": "2026-11-01T00:00:00Z"}
    (bench.folder / "images.local.json").write_text(json.dumps({"format": 1, "images": {"n150": built}}))
    (bench.double / "image").write_text(image(built["lock_sha256"]))
    assert ids(bench.road()) == ["data.fetched", "run"]


def test_an_image_that_the_engine_has_lost_is_on_the_road_again(bench: Bench) -> None:
    assert bench.run("--build").returncode == 0
    (bench.double / "image").unlink()
    (step,) = (step for step in bench.road() if step["id"] == "engine.image")
    assert step["why"] == "the image of n150 is gone from the Docker engine"
    assert step["do"] == "make image HW=n150"


def test_without_a_container_the_road_has_no_image_and_a_ttml(bench: Bench) -> None:
    road = bench.road("--no-container")
    assert "engine.image" not in ids(road)
    assert "python.ttml" in [step["id"] for step in road]
    assert road[-1]["do"] == "make recipe-finetune HW=n150 CONTAINER=0"
