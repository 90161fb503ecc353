"""What a container is given, what it is told, and the one message of each thing that can go wrong with an engine.

Without an engine: tests/containers runs the same on one.
"""

from __future__ import annotations

import functools
import json
import os
import shlex
import shutil
import signal
import sys
import tempfile
import threading
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from common import hardware
from common.errors import MachineError, TrainingError
from common.paths import ROOT
from common.train.launch import Launch
from tests.doubles.machines import MACHINES, fake_host
from tests.doubles.tiny_recipe import FINE_TUNE as RECIPE
from tools.cli import main
from tools.containers import docker, images, launcher, ownership
from tools.containers import spec as container
from tools.containers.images import Image
from tools.containers.spec import arguments_of, errand_of, spec_of
from tools.launch import dry_run
from tools.launch.resolve import resolve
from tools.launch.run import run

IMAGE = Image("n150", "sha256:" + "ab" * 32, "local", "cd" * 32)


@pytest.fixture(autouse=True)
def place(tmp_path, monkeypatch) -> Path:
    """A home, a cache and a machine of the test's own; nothing of the caller's tt-metal."""
    for name in [name for name in os.environ if name.startswith("TT_")] + [*container.HANDED_OVER, "HF_HOME"]:
        monkeypatch.delenv(name, raising=False)
    for name in ("RECIPES_LAUNCH", "RECIPES_CONTAINER"):
        monkeypatch.delenv(name, raising=False)
    monkeypatch.setenv("HOME", str(tmp_path / "home/me"))
    monkeypatch.setenv("RECIPES_HOME", str(tmp_path / "home/me/cache"))
    monkeypatch.setenv("RECIPES_SYSFS_ROOT", str(tmp_path / "machine"))
    return tmp_path


def run_on(board: str, **asked: Any) -> Launch:
    return launcher.with_image(resolve(RECIPE, hw=board, require_present=False, **asked), IMAGE)


def said(spec: container.Spec, flag: str) -> list[str]:
    """The values that `docker create` is given with one of its flags."""
    words = arguments_of(spec)
    return [words[at + 1] for at, word in enumerate(words) if word == flag]


def spec_on(board: str, **asked: Any) -> container.Spec:
    return spec_of(errand_of(run_on(board, **asked)))


def targets(spec: container.Spec) -> dict[str, bool]:
    """Where in the container something is mounted, and whether it may be written to."""
    return {str(mount.inside or mount.path): mount.writable for mount in spec.mounts}


# --- what it is given -----------------------------------------------------------------------------------------------


@pytest.mark.parametrize("board", MACHINES)
def test_a_board_s_container_has_its_nodes_and_no_other(place, board):
    fake_host(place / "machine", board)
    spec = spec_on(board)
    count = hardware.get(board).nodes
    outside = str(place / "machine/dev/tenstorrent")
    assert spec.devices == tuple((f"{outside}/{index}", f"/dev/tenstorrent/{index}") for index in range(count))
    assert said(spec, "--device") == [f"{outside}/{index}:/dev/tenstorrent/{index}:rw" for index in range(count)]
    assert said(spec, "--ulimit") == ["memlock=-1"]
    assert spec.environment["ARCH_NAME"] == hardware.get(board).arch


def test_one_card_of_two_leaves_the_other_alone(place):
    fake_host(place / "machine", "qb2")
    assert [inside for _, inside in spec_on("p300c").devices] == ["/dev/tenstorrent/0", "/dev/tenstorrent/1"]


def test_what_tt_visible_devices_names_is_given_and_the_variable_itself_is_not(place, monkeypatch):
    fake_host(place / "machine", "t3k")
    monkeypatch.setenv("TT_VISIBLE_DEVICES", "0000:03:00.0,1")
    spec = spec_on("n300x2")
    assert [inside for _, inside in spec.devices] == ["/dev/tenstorrent/1", "/dev/tenstorrent/2"]
    assert "TT_VISIBLE_DEVICES" not in spec.environment, "inside, 0 and 1 are all there is"
    assert spec.labels["training-recipes.cards"] == "0000:02:00.0,0000:03:00.0"


def test_huge_pages_are_given_only_where_no_iommu_translates(place):
    fake_host(place / "machine", "n150", hugepages=1, mounted=True)
    assert "/dev/hugepages-1G" not in targets(spec_on("n150"))
    (place / "machine/sys/devices/0000:01:00.0/iommu_group/type").write_text("identity\n")
    assert targets(spec_on("n150"))["/dev/hugepages-1G"] is True
    (place / "machine/proc/mounts").write_text("")
    with pytest.raises(MachineError, match="no IOMMU translates the cards' DMA"):
        run(run_on("n150"), container=True)


def test_a_container_may_write_to_runs_and_the_cache_alone(place):
    (place / "elsewhere").mkdir()
    rows = place / "rows.jsonl"
    rows.touch()
    spec = spec_on("cpu", out=place / "elsewhere", overrides=(f"data_config.source={rows}",))
    assert targets(spec) == {
        str(ROOT): False,
        str(rows): False,
        str(place / "elsewhere"): True,
        str(place / "home/me/cache"): True,
    }
    assert spec.devices == ()
    assert said(spec, "--ulimit") == []


def test_no_container_runs_as_root(monkeypatch):
    for uid, user in ((0, "1000:1000"), (1234, "1234:55")):
        monkeypatch.setattr(os, "getuid", lambda uid=uid: uid)
        monkeypatch.setattr(os, "getgid", lambda: 55)
        assert said(spec_on("cpu"), "--user") == [user]


def test_a_container_has_no_right_that_it_does_not_need(place):
    fake_host(place / "machine", "p300c")
    spec = spec_on("p300c", overrides=("training_config.seed=1",))
    words = arguments_of(spec)
    assert {"--init", "--read-only"} <= set(words)
    assert (said(spec, "--cap-drop"), said(spec, "--security-opt")) == (["ALL"], ["no-new-privileges"])
    assert "--privileged" not in words
    assert said(spec, "--stop-timeout") == ["120"], "ten seconds are too few for a checkpoint"
    assert words[words.index(spec.image) + 1 :] == list(spec.words)


def test_a_path_with_a_comma_is_one_path(place):
    (place / "a,b").mkdir()
    assert f'type=bind,"source={place}/a,b","target={place}/a,b"' in said(spec_on("cpu", out=place / "a,b"), "--mount")


def test_what_the_user_has_set_of_tt_metal_wins_and_the_host_s_own_tree_stays_outside(place, monkeypatch):
    fake_host(place / "machine", "n150")
    for name, value in (("TT_METAL_OPERATION_TIMEOUT_SECONDS", "7"), ("TT_METAL_HOME", "/opt/tt"), ("SECRET", "x")):
        monkeypatch.setenv(name, value)
    environment = said(spec_on("n150"), "--env")
    assert "TT_METAL_OPERATION_TIMEOUT_SECONDS=7" in environment
    assert not {"TT_METAL_HOME", "SECRET"} & {line.partition("=")[0] for line in environment}


def test_a_descriptor_that_the_user_named_is_there_inside(place, monkeypatch):
    fake_host(place / "machine", "n300")
    (place / "mine.textproto").touch()
    monkeypatch.chdir(place)
    monkeypatch.setenv("TT_MESH_GRAPH_DESC_PATH", "mine.textproto")
    spec = spec_on("n300")
    assert spec.environment["TT_MESH_GRAPH_DESC_PATH"] == str(place / "mine.textproto")
    assert targets(spec)[str(place / "mine.textproto")] is False


def test_kernels_are_kept_apart_by_image_architecture_and_card(place):
    fake_host(place / "machine", "qb2")
    one = spec_on("p300c").environment["TT_METAL_CACHE"]
    assert one.endswith("/kernels/abababababab-blackhole-0000-01-00.0")
    other = launcher.with_image(run_on("p300c"), Image("p300c", "sha256:" + "cd" * 32, "local", ""))
    assert spec_of(errand_of(other)).environment["TT_METAL_CACHE"] != one


def test_secrets_are_handed_over_and_never_printed(monkeypatch):
    monkeypatch.setenv("HF_TOKEN", "hf_secret")
    spec = spec_on("cpu")
    assert "HF_TOKEN" in said(spec, "--env"), "docker has the value from its own environment"
    assert "hf_secret" not in " ".join(arguments_of(spec))


def test_threads_are_those_of_a_native_run(monkeypatch):
    assert len(os.sched_getaffinity(0)) <= (os.cpu_count() or 1)
    monkeypatch.setattr(os, "cpu_count", lambda: 64)
    monkeypatch.setattr(os, "sched_getaffinity", lambda pid: {3, 1})
    assert said(spec_on("cpu"), "--cpuset-cpus") == ["1,3"]


# --- the same command inside ----------------------------------------------------------------------------------------


@pytest.fixture
def launched(monkeypatch) -> Callable[..., Any]:
    """What `recipe WORDS` would launch natively: the Launch that the training processes get."""

    def run(*words: str) -> Launch:
        seen: list[Launch] = []
        monkeypatch.setattr("tools.launch.run.in_processes", lambda launch, _job, _say: seen.append(launch))
        monkeypatch.setattr("tools.launch.run.fetch_pinned", lambda *_: None)
        monkeypatch.setattr(sys, "argv", ["recipe", *words])
        with pytest.raises(SystemExit) as ended:
            main.main()
        assert not ended.value.code
        return seen[0]

    return run


def test_inside_it_is_the_launch_that_was_resolved_outside(place, launched, monkeypatch):
    """Another working directory, no board in sight: nothing is asked again."""
    fake_host(place / "machine", "n150")
    words = ["run", str(RECIPE), "--hw", "n150", "--steps", "7", "--stop-at", "3", "--out", "here/runs"]
    words += ["--set", "training_config.seed=1", "--set", "eval_config.prompts=[What is it]"]
    words += ["--resume", "some/run", "--accept-changes"]
    monkeypatch.chdir(place)
    outside = launcher.with_image(launched(*words, "--no-container"), IMAGE)
    spec = spec_of(errand_of(outside))
    for name in ("RECIPES_LAUNCH", "RECIPES_CONTAINER"):
        monkeypatch.setenv(name, spec.environment[name])
    monkeypatch.setenv("RECIPES_SYSFS_ROOT", str(place / "nothing"))
    monkeypatch.chdir("/")
    assert launched(*spec.words) == outside
    assert (outside.out, outside.resume) == (place / "here/runs", str(place / "some/run"))
    assert outside.image is not None
    assert outside.image["reference"] == IMAGE.reference


def test_debug_reaches_the_container():
    assert spec_of(errand_of(run_on("cpu", debug=True))).words == ("--debug", "run", str(RECIPE))


def test_a_board_goes_into_its_container_by_itself_and_no_further(monkeypatch):
    assert [launcher.wanted(None, hardware.get(board)) for board in ("n150", "cpu", "qb2")] == [True, False, True]
    assert [launcher.wanted(said, hardware.get("cpu")) for said in (True, False)] == [True, False]
    assert launcher.wanted(False, hardware.get("n150")) is False
    monkeypatch.setenv("RECIPES_CONTAINER", "a run")
    assert launcher.wanted(None, hardware.get("n150")) is False


@pytest.mark.parametrize("board", MACHINES)
def test_a_dry_run_prints_the_whole_line_for_a_board_that_is_not_here(board, monkeypatch):
    monkeypatch.setattr(dry_run, "check_engine", lambda: "1")
    lines = list(dry_run.describe(resolve(RECIPE, hw=board, require_present=False), None))
    (line,) = (line for line in lines if line.startswith("in the container: docker run "))
    words = shlex.split(line.partition(": ")[2])
    given = [words[at + 1] for at, word in enumerate(words) if word == "--device"]
    table = hardware.get(board).device_nodes
    assert [word.split(":")[1] for word in given] == list(table)
    assert "<not built>" in words
    assert words[words.index("<not built>") + 1 :][:2] == ["run", str(RECIPE)]
    assert "  " + hardware.get(board).name in "".join(lines[lines.index("a real run would lack:") :])


def test_a_dry_run_names_the_image_where_it_is_built_and_a_lack_of_an_engine(monkeypatch):
    def none() -> None:
        raise MachineError("no Docker engine answers here")

    monkeypatch.setattr(dry_run, "check_engine", none)
    monkeypatch.setattr(dry_run, "image_for", lambda hw: IMAGE)
    lines = list(dry_run.describe(resolve(RECIPE, hw="cpu"), True))
    assert any(f" {IMAGE.reference} run " in line for line in lines)
    assert "  no Docker engine answers here" in lines


# --- a root caller's folders ----------------------------------------------------------------------------------------


@pytest.fixture
def owned(monkeypatch) -> dict[str, int]:
    """Owners of files as a root caller's kernel would keep them; chown is only written down."""
    owners: dict[str, int] = {}
    real = os.stat

    def called(path: Any, folder: int | None) -> str:
        if isinstance(path, int):  # an open file
            return str(path)
        around = Path(path).parent if folder is None else Path(f"/proc/self/fd/{folder}")
        # Where the kernel would look, through links; Path.resolve would ask `look`.
        return os.path.normpath(f"{os.path.realpath(around)}/{Path(path).name}")

    def look(path: Any, *, dir_fd: int | None = None, follow_symlinks: bool = True) -> Any:
        values = list(real(path, dir_fd=dir_fd, follow_symlinks=follow_symlinks))
        values[4] = owners.get(called(path, dir_fd), 0)
        return os.stat_result(values)

    def give(path: Any, uid: int, gid: int, *, dir_fd: int | None = None, follow_symlinks: bool = True) -> None:
        owners[called(path, dir_fd)] = uid

    monkeypatch.setattr(os, "stat", look)
    monkeypatch.setattr(os, "chown", give)
    return owners


def test_what_is_lent_is_given_back_and_nothing_else_is_touched(place, owned):
    out = place / "runs"
    for name, reason, recipe in (
        ("open", "stopped: x", "r"),
        ("done", "done", "r"),
        ("else", "running", "e"),
        ("theirs", "running", "r"),
        ("../elsewhere", "running", "r"),
    ):
        (out / name / "checkpoints").mkdir(parents=True)
        (out / name / "manifest.json").write_text(json.dumps({"recipe": recipe, "exit_reason": reason}))
    owned[str(out / "theirs")] = 4711
    (out / "a link").symlink_to(place / "elsewhere")

    def of(user: int) -> set[str]:
        return {str(Path(path).relative_to(out)) for path, uid in owned.items() if uid == user and str(out) in path}

    def run() -> None:
        with ownership.lent(ownership.candidates(out, "new", "r")):
            assert of(1000) == {"new", "open", "open/checkpoints", "open/manifest.json"}
            (out / "open/made inside").touch()
            owned[str(out / "open/made inside")] = 1000
            raise KeyError("whatever ended the run")

    with pytest.raises(KeyError):
        run()
    assert of(1000) == set()
    assert of(4711) == {"theirs"}
    assert not (out / "new").exists(), "nothing came into it"
    with pytest.raises(ownership.EngineLost), ownership.lent(ownership.candidates(out, "new", "r")):
        raise ownership.EngineLost("and its container may write on")
    assert "open/manifest.json" in of(1000), "until the container is cleared away"
    assert not [path for path in owned if "elsewhere" in path], "a link leads out of the folder of runs"


def test_a_folder_that_becomes_a_link_while_it_is_handed_over_leads_nowhere(place, owned, monkeypatch):
    """Its new owner may put a link to anywhere in the place of a folder: what is handed over was opened before."""
    run, victim = place / "runs/x", place / "victim"
    for folder in (run / "checkpoints", victim):
        folder.mkdir(parents=True)
        for name in ("passwd", "shadow"):  # after the first of them the folder is another one
            (folder / name).touch()
    write_down = os.chown

    def give(path: Any, uid: int, gid: int, **how: Any) -> None:
        write_down(path, uid, gid, **how)
        if (run / "checkpoints").exists() and not (run / "checkpoints").is_symlink():
            (run / "checkpoints").rename(run / "moved")
            (run / "checkpoints").symlink_to(victim)

    monkeypatch.setattr(os, "chown", give)
    ownership.give(run, 0, 1000)
    assert not [path for path in owned if str(victim) in path]
    assert owned[str(run)] == 1000


@pytest.mark.skipif(os.getuid() != 0, reason="only root can become somebody else for a moment")
def test_a_folder_that_somebody_else_owns_is_refused_before_the_container_starts(launched, monkeypatch):
    with tempfile.TemporaryDirectory() as place:  # not tmp_path, into which only its owner may look
        Path(place).chmod(0o755)
        out = Path(place) / "runs"
        out.mkdir(mode=0o755)
        for name in ("home", "cache"):
            (Path(place) / name).mkdir()
            (Path(place) / name).chmod(0o777)
        monkeypatch.setenv("RECIPES_HOME", str(Path(place) / "home"))
        errand = errand_of(launched("run", str(RECIPE), "--hw", "cpu", "--no-container", "--out", str(out)))
        os.seteuid(65534)
        try:
            with pytest.raises(MachineError, match="Permission denied") as caught, launcher.folders(errand, "tiny"):
                pass
        finally:
            os.seteuid(0)
    assert caught.value.where == str(out)


# --- what can go wrong ----------------------------------------------------------------------------------------------


@pytest.fixture
def double(tmp_path, monkeypatch) -> Path:
    """tests/doubles/docker is the `docker` command; the folder of files by which it is told what to do."""
    (tmp_path / "double").mkdir()
    monkeypatch.setenv("DOUBLE", str(tmp_path / "double"))
    monkeypatch.setenv("PATH", f"{ROOT / 'tests/doubles'}{os.pathsep}{os.environ['PATH']}")
    return tmp_path / "double"


@pytest.mark.parametrize(
    ("said", "means"),
    [
        ("write /var/lib/docker/x: no space left on device", "the disk of the Docker engine is full"),
        ("something that nobody has heard of", "the Docker engine refused"),
    ],
)
def test_what_an_engine_says_is_one_message_with_a_cure(double, said, means):
    (double / "pull").write_text(f"Error response from daemon: {said}")
    with pytest.raises(MachineError, match=means) as caught:
        docker.docker("pull", "x")
    assert caught.value.where == f"docker pull: {said}"
    assert caught.value.todo


NOBODY = "Cannot connect to the Docker daemon at unix:///x. Is the docker daemon running?"
MINE = "permission denied while trying to connect to the Docker daemon socket at unix:///x"


@pytest.mark.parametrize(
    ("info", "what", "cure"),
    [
        ({"ServerErrors": [NOBODY]}, "no Docker engine answers here", "--no-container"),
        ({"ServerErrors": [MINE]}, "no permission on the Docker engine's socket", "group"),
        (
            {"ServerVersion": "1", "SecurityOptions": ["name=seccomp", "name=rootless"]},
            "runs without root",
            "--no-container",
        ),
        (
            {"ServerVersion": "1", "SecurityOptions": ["name=userns"]},
            "maps its containers' users to others",
            "--no-container",
        ),
        ({"host": {"security": {"rootless": True}}}, "is not Docker's", "Podman"),
    ],
)
def test_an_engine_that_cannot_be_used_is_one_message(double, info, what, cure):
    (double / "info").write_text(json.dumps(info))
    with pytest.raises(MachineError, match=what) as caught:
        docker.check_engine()
    assert cure in str(caught.value.todo)


def test_an_engine_that_answers_is_named_by_its_version(double):
    (double / "info").write_text(json.dumps({"ServerVersion": "20.10.24", "SecurityOptions": ["name=seccomp"]}))
    assert docker.check_engine() == "20.10.24"


@pytest.mark.skipif(shutil.which("docker") is None, reason="there is no docker command here")
def test_no_engine_at_a_socket_that_is_not_there(place, monkeypatch):
    """The real command, not a message we wrote."""
    monkeypatch.setenv("DOCKER_HOST", f"unix://{place}/none.sock")
    with pytest.raises(MachineError, match="no Docker engine answers here"):
        docker.check_engine()


def test_an_engine_that_hangs_is_not_waited_for(double, monkeypatch):
    os.mkfifo(double / "info")  # nobody writes to it
    monkeypatch.setattr(docker, "ANSWER_SECONDS", 0.2)
    with pytest.raises(MachineError, match="does not answer"):
        docker.check_engine()


PUBLISHED = Image("n150", "registry.example/recipes@sha256:" + "12" * 32, "published", IMAGE.lock_sha256)


def image_of(id: str, *digests: str, pins: str = IMAGE.lock_sha256) -> str:
    """What `docker image inspect` prints."""
    return json.dumps([{"Id": id, "RepoDigests": list(digests), "Config": {"Labels": {"recipes.lock": pins}}}])


def test_a_published_image_is_fetched_once_by_its_digest(double):
    lines: list[str] = []
    (double / "registry").write_text(image_of("sha256:34", PUBLISHED.reference))
    docker.fetch(PUBLISHED, lines.append)
    docker.fetch(PUBLISHED, lines.append)
    assert lines == [f"fetching {PUBLISHED.reference} (once)"]


def test_a_fetch_that_breaks_off_says_why(double):
    (double / "pull").write_text("write /var/lib/docker/tmp/1: no space left on device")
    with pytest.raises(MachineError, match="the disk of the Docker engine is full"):
        docker.fetch(PUBLISHED, print)


@pytest.mark.parametrize(
    ("here", "registry", "image", "words"),
    [
        (None, None, IMAGE, "is gone from the Docker engine"),
        (image_of("sha256:other"), None, IMAGE, "is not the locked one: it has sha256:other"),
        (image_of(IMAGE.reference, pins="0" * 64), None, IMAGE, "is not the locked one: its label recipes.lock is 000"),
        (None, image_of("sha256:34", "registry.example/recipes@sha256:5"), PUBLISHED, "is not the locked one: it has"),
    ],
)
def test_an_image_of_another_digest_is_refused(double, here, registry, image, words):
    for name, text in (("image", here), ("registry", registry)):
        if text:
            (double / name).write_text(text)
    with pytest.raises(MachineError, match=words):
        docker.fetch(image, print)


def test_an_image_that_is_not_in_the_lock_is_named(monkeypatch, place, double):
    fake_host(place / "machine", "n150")
    (double / "info").write_text('{"ServerVersion": "1"}')
    lock = images.read_lock()
    lock["targets"].pop("n150", None)
    monkeypatch.setattr(images, "read_lock", lambda: lock)
    with pytest.raises(MachineError, match="'n150' is not in the lock"):
        launcher.launch(resolve(RECIPE, hw="n150"), print)


@pytest.mark.parametrize(
    ("words", "node"),
    [
        (("verify", "board", "--hw", "n150"), "/dev/tenstorrent/0"),
        (("doctor", "--ttml", "--hw", "n150"), "/dev/tenstorrent/0"),
        (("doctor", "--ttml", "--hw", "n150", "--no-device"), None),
    ],
)
def test_what_looks_at_a_board_does_so_in_its_image(words, node, double, place, monkeypatch):
    """As a run: the same words on the board's nodes, nothing to write but the caches, the container's exit code."""
    fake_host(place / "machine", "n150")
    monkeypatch.setattr(launcher, "find_image", lambda hw: IMAGE)
    for name, text in (("info", '{"ServerVersion": "1"}'), ("image", image_of(IMAGE.reference)), ("end", "6")):
        (double / name).write_text(text)
    monkeypatch.setattr(sys, "argv", ["recipe", *words])
    with pytest.raises(SystemExit) as ended:
        main.main()
    assert ended.value.code == 6
    created = shlex.split(calls(double, "create")[0])
    assert created[created.index(IMAGE.reference) + 1 :] == list(words)
    assert [word for word in created if word.startswith("RECIPES_LAUNCH")] == []
    assert [word.partition("=")[2] for word in created if word.startswith("RECIPES_CONTAINER=")] != []
    devices = [created[at + 1] for at, word in enumerate(created) if word == "--device"]
    assert devices == ([f"{place}/machine{node}:{node}:rw"] if node else [])
    mounts = [word.split(",") for word in created if word.startswith("type=bind")]
    assert [mount[1] for mount in mounts if "readonly" not in mount] == [f"source={place}/home/me/cache"]


def test_without_an_image_it_names_the_command_that_builds_one(double, place, monkeypatch, capsys):
    fake_host(place / "machine", "n150")
    (double / "info").write_text('{"ServerVersion": "1"}')
    monkeypatch.setattr(sys, "argv", ["recipe", "verify", "board"])
    with pytest.raises(SystemExit) as ended:
        main.main()
    assert ended.value.code == 4
    said = capsys.readouterr().err
    assert "no image for n150" in said
    assert "make image HW=n150" in said
    assert calls(double, "create") == []


# --- watching one ---------------------------------------------------------------------------------------------------


def follow() -> int:
    return launcher.follow(spec_on("cpu"))


def calls(double: Path, verb: str) -> list[str]:
    """The calls of the `docker` command that begin with `verb`."""
    return [line for line in (double / "calls").read_text().splitlines() if line.startswith(verb)]


def asked(double: Path) -> list[str]:
    """The signals that the container got."""
    return (double / "asked").read_text().split() if (double / "asked").exists() else []


def later(act: Callable[[], None]) -> threading.Thread:
    """`act` beside a launcher, which has this thread."""
    thread = threading.Thread(target=act)
    thread.start()
    return thread


def until(happened: Callable[[], object]) -> None:
    deadline = time.monotonic() + 20
    while not happened():
        assert time.monotonic() < deadline
        time.sleep(0.01)


def test_the_exit_code_and_what_was_said_come_through(double, capfd, monkeypatch):
    monkeypatch.setenv("HF_TOKEN", "hf_secret")
    (double / "end").write_text("3")
    assert follow() == 3
    assert capfd.readouterr() == ("said\n", "warned\n")
    assert "HF_TOKEN=hf_secret\n" in (double / "environment").read_text()
    assert "hf_secret" not in (double / "calls").read_text()
    assert calls(double, "rm") == [f"rm --volumes {calls(double, 'start')[0].split()[-1]} "]


@pytest.mark.parametrize(
    ("numbers", "names"),
    [
        ([signal.SIGINT], ["SIGINT"]),
        ([signal.SIGTERM], ["SIGTERM"]),
        ([signal.SIGHUP], ["SIGTERM"]),
        ([signal.SIGINT] * 3, ["SIGINT", "SIGINT", "SIGKILL"]),
    ],
)
def test_signals_are_handed_on_and_waited_for(double, numbers, names):
    def has_got(count: int) -> bool:
        return len(asked(double)) == count

    def send() -> None:
        until((double / "started").exists)
        try:
            for count, number in enumerate(numbers, 1):
                os.kill(os.getpid(), number)
                until(functools.partial(has_got, count))
        finally:
            (double / "end").write_text("75")

    before = signal.getsignal(signal.SIGINT)
    sender = later(send)
    assert follow() == 75
    sender.join()
    assert asked(double) == names
    assert signal.getsignal(signal.SIGINT) is before


def test_a_signal_that_comes_before_the_container_runs_is_handed_on_once(double):
    def send() -> None:
        until(lambda: (double / "calls").exists() and calls(double, "start"))
        os.kill(os.getpid(), signal.SIGTERM)
        try:
            until(lambda: asked(double))
            time.sleep(0.3)  # in which it would come a second time
        finally:
            (double / "end").write_text("75")

    (double / "slow").write_text("0.5")
    sender = later(send)
    assert follow() == 75
    sender.join()
    assert asked(double) == ["SIGTERM"]


def test_a_run_whose_output_nobody_reads_any_more_saves_and_ends(double):
    (double / "deaf").touch()
    assert follow() == 75
    assert asked(double) == ["SIGTERM"]


def test_a_ctrl_c_on_a_terminal_is_no_command_s_of_ours(double):
    """Every `docker` has a session of its own, so that the terminal's signal reaches the launcher alone."""
    (double / "end").write_text("0")
    follow()
    assert len(calls(double, "")) >= 4
    assert str(os.getsid(0)) not in (double / "sessions").read_text().split()


def test_an_engine_that_dies_in_the_middle_is_one_message(double, capfd):
    def die() -> None:
        until((double / "started").exists)
        time.sleep(0.3)
        (double / "gone").touch()

    dying = later(die)
    with pytest.raises(ownership.EngineLost, match="engine went away while the run was on") as caught:
        follow()
    dying.join()
    assert "recipe stop" in str(caught.value.todo)
    assert "Cannot connect" not in capfd.readouterr().err


def test_a_container_that_cannot_be_started_is_one_message(double, capfd):
    (double / "refused").write_text("setting rlimits for ready process: error setting rlimit type 8")
    with pytest.raises(MachineError, match="locked memory"):
        follow()
    assert capfd.readouterr().err == ""
    assert calls(double, "rm")


@pytest.mark.parametrize(("oom", "words"), [(True, "no memory was left"), (False, "from outside")])
def test_a_killed_run_is_said_to_be(double, oom, words):
    (double / "end").write_text("137")
    if oom:
        (double / "oom").touch()
    with pytest.raises(TrainingError, match=words):
        follow()
