"""What a container is given, what it is told, and the one message of each thing that can go wrong with an engine.

Without an engine: tests/containers runs the same on one.
"""

from __future__ import annotations

import contextlib
import json
import os
import shlex
import signal
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import docker.errors
import pytest
import requests
from docker.client import DockerClient

from common import hardware
from common.errors import EngineLost, MachineError, TrainingError
from common.paths import ROOT
from tests.common.test_hardware import MACHINES
from tests.hosts import fake_host
from tests.tiny_recipe import FINE_TUNE as RECIPE
from tools.cli import main
from tools.containers import engine, images, launcher, ownership
from tools.containers import spec as container
from tools.containers.images import Image
from tools.containers.spec import Run, command_line, configuration, host_settings, spec_of
from tools.launch import dry_run

IMAGE = Image("n150", "sha256:" + "ab" * 32, "local", "cd" * 32)
ASKED: dict[str, Any] = {"hw": None, "overrides": (), "steps": None, "stop_at": None, "resume": "auto"}
ASKED |= {"accept_changes": False, "out": ROOT / "runs"}


@pytest.fixture(autouse=True)
def place(tmp_path, monkeypatch) -> Path:
    """A home, a cache and a machine of the test's own; nothing of the caller's tt-metal."""
    for name in [name for name in os.environ if name.startswith("TT_")] + [*container.HANDED_OVER, "HF_HOME"]:
        monkeypatch.delenv(name, raising=False)
    monkeypatch.delenv("RECIPES_LAUNCH", raising=False)
    monkeypatch.setenv("HOME", str(tmp_path / "home/me"))
    monkeypatch.setenv("RECIPES_HOME", str(tmp_path / "home/me/cache"))
    monkeypatch.setenv("RECIPES_SYSFS_ROOT", str(tmp_path / "machine"))
    return tmp_path


def run_on(board: str, **asked: Any) -> Run:
    choice = hardware.choose(board, require_present=False)
    return launcher.described(RECIPE, choice, {**ASKED, **asked}, IMAGE)


def arguments(spec: container.Spec) -> dict[str, Any]:
    """All that the engine is told of a container."""
    return {**configuration(spec), **host_settings(spec)}


def spec_on(board: str, **asked: Any) -> container.Spec:
    return spec_of(run_on(board, **asked))


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
    assert arguments(spec)["devices"] == [f"{outside}/{index}:/dev/tenstorrent/{index}:rw" for index in range(count)]
    assert arguments(spec)["ulimits"][0] == {"Name": "memlock", "Soft": -1, "Hard": -1}
    assert spec.environment["ARCH_NAME"] == hardware.get(board).arch


def test_one_card_of_two_leaves_the_other_alone(place):
    fake_host(place / "machine", "qb2")
    assert [inside for _, inside in spec_on("p300c").devices] == ["/dev/tenstorrent/0", "/dev/tenstorrent/1"]


def test_huge_pages_are_given_only_where_no_iommu_translates(place):
    fake_host(place / "machine", "n150", hugepages=1, mounted=True)
    assert "/dev/hugepages-1G" not in targets(spec_on("n150"))
    (place / "machine/sys/devices/0000:01:00.0/iommu_group/type").write_text("identity\n")
    assert targets(spec_on("n150"))["/dev/hugepages-1G"] is True
    (place / "machine/proc/mounts").write_text("")
    with pytest.raises(MachineError, match="needs 1 GiB huge pages"):
        launcher.refuse_no_memory(run_on("n150"))


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
    assert arguments(spec)["ulimits"] == []


def test_no_container_runs_as_root(monkeypatch):
    for uid, user in ((0, "1000:1000"), (1234, "1234:55")):
        monkeypatch.setattr(os, "getuid", lambda uid=uid: uid)
        monkeypatch.setattr(os, "getgid", lambda: 55)
        assert arguments(spec_on("cpu"))["user"] == user


def test_the_printed_line_is_what_the_engine_is_told(place, monkeypatch):
    fake_host(place / "machine", "p300c")
    monkeypatch.setattr(os, "sched_getaffinity", lambda pid: {1})
    spec = spec_on("p300c", overrides=("training_config.seed=1",))
    told, words = arguments(spec), shlex.split(command_line(spec))

    def said(flag: str) -> list[str]:
        return [words[at + 1] for at, word in enumerate(words) if word == flag]

    assert ("--init" in words, "--read-only" in words, "--tty" in words) == (
        told["init"],
        told["read_only"],
        told["tty"],
    )
    assert (said("--cap-drop"), said("--security-opt")) == (told["cap_drop"], told["security_opt"])
    assert (told["cap_drop"], told["read_only"], told["init"]) == (["ALL"], True, True)
    assert (said("--device"), len(said("--mount"))) == (told["devices"], len(told["mounts"]))
    assert (said("--user"), said("--ipc")) == ([told["user"]], [told["ipc_mode"]])
    assert said("--stop-timeout") == [str(told["stop_timeout"])] == ["120"], "ten seconds are too few for a checkpoint"
    assert (said("--workdir"), said("--cpuset-cpus")) == ([told["working_dir"]], [told["cpuset_cpus"]])
    assert dict(line.split("=", 1) for line in said("--env")) == told["environment"]
    assert dict(line.split("=", 1) for line in said("--label")) == told["labels"]
    assert words[words.index(spec.image) :] == [told["image"], *told["command"]]
    assert "privileged" not in command_line(spec) + str(told)


def test_what_the_user_has_set_of_tt_metal_wins_and_the_host_s_own_tree_stays_outside(place, monkeypatch):
    fake_host(place / "machine", "n150")
    for name, value in (("TT_METAL_OPERATION_TIMEOUT_SECONDS", "7"), ("TT_METAL_HOME", "/opt/tt"), ("SECRET", "x")):
        monkeypatch.setenv(name, value)
    environment = arguments(spec_on("n150"))["environment"]
    assert environment["TT_METAL_OPERATION_TIMEOUT_SECONDS"] == "7"
    assert not {"TT_METAL_HOME", "SECRET"} & set(environment)


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
    run = run_on("p300c")
    other = Run(**{**vars(run), "image": Image("p300c", "sha256:" + "cd" * 32, "local", "")})
    assert spec_of(other).environment["TT_METAL_CACHE"] != one


def test_secrets_are_handed_over_and_never_printed(monkeypatch):
    monkeypatch.setenv("HF_TOKEN", "hf_secret")
    spec = spec_on("cpu")
    assert arguments(spec)["environment"]["HF_TOKEN"] == "hf_secret"
    assert "hf_secret" not in command_line(spec)
    assert "--env HF_TOKEN " in command_line(spec)
    assert "hf_secret" not in json.dumps(dict(spec.labels)) + spec.environment["RECIPES_LAUNCH"]


def test_threads_are_those_of_a_native_run(monkeypatch):
    assert len(os.sched_getaffinity(0)) <= (os.cpu_count() or 1)
    monkeypatch.setattr(os, "cpu_count", lambda: 64)
    monkeypatch.setattr(os, "sched_getaffinity", lambda pid: {3, 1})
    assert arguments(spec_on("cpu"))["cpuset_cpus"] == "1,3"


# --- the same command inside ----------------------------------------------------------------------------------------


@pytest.fixture
def launched(monkeypatch) -> Callable[..., Any]:
    """What `recipe WORDS` would launch natively: the Launch that the recipe's train script gets."""

    def run(*words: str) -> Any:
        seen: list[Any] = []
        script = type("Script", (), {"train": staticmethod(seen.append)})
        monkeypatch.setattr("common.recipe.load", lambda folder, name: script)
        monkeypatch.setattr(sys, "argv", ["recipe", *words])
        with pytest.raises(SystemExit) as ended:
            main.main()
        assert not ended.value.code
        return seen[0]

    return run


def test_inside_the_same_command_is_resolved(place, launched, monkeypatch):
    fake_host(place / "machine", "n150")
    words = ["run", str(RECIPE), "--hw", "n150", "--steps", "7", "--stop-at", "3", "--out", "here/runs"]
    words += [
        "--set",
        "training_config.seed=1",
        "--set",
        "eval_config.prompts=[What is it]",
        "--resume",
        "some/run",
        "--accept-changes",
    ]
    monkeypatch.chdir(place)
    native = launched(*words, "--no-container")
    asked = {name: getattr(native, name) for name in ASKED}
    run = Run("id", native.recipe_dir, run_on("n150").config, hardware.get("n150"), (), asked, IMAGE)
    monkeypatch.setenv("RECIPES_LAUNCH", json.dumps(container.said_of(run)))
    inside_words = container.words_of(run)
    monkeypatch.chdir("/")
    inside = launched(*inside_words)
    same = ("recipe_dir", "hw", "overrides", "steps", "stop_at", "accept_changes", "command")
    assert {name: getattr(inside, name) for name in same} == {name: getattr(native, name) for name in same}
    assert (inside.out, inside.resume) == (place / "here/runs", str(place / "some/run"))


def test_a_board_goes_into_its_container_by_itself_and_no_further(monkeypatch):
    assert [launcher.wanted(None, board) for board in ("n150", "cpu", "qb2")] == [True, False, True]
    assert [launcher.wanted(said, "cpu") for said in (True, False)] == [True, False]
    assert launcher.wanted(False, "n150") is False
    monkeypatch.setenv("RECIPES_LAUNCH", '{"run": "x"}')
    assert launcher.wanted(None, "n150") is False


@pytest.mark.parametrize("board", MACHINES)
def test_a_dry_run_prints_the_whole_line_for_a_board_that_is_not_here(board, monkeypatch):
    monkeypatch.setattr(dry_run, "connect", lambda: None)
    lines = list(dry_run.describe(RECIPE, RECIPE.name, {**ASKED, "hw": board}, None))
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

    monkeypatch.setattr(dry_run, "connect", none)
    monkeypatch.setattr(dry_run, "image_for", lambda hw: IMAGE)
    lines = list(dry_run.describe(RECIPE, RECIPE.name, {**ASKED, "hw": "cpu"}, True))
    assert any(f" {IMAGE.reference} run " in line for line in lines)
    assert "  no Docker engine answers here" in lines


# --- a root caller's folders ----------------------------------------------------------------------------------------


@pytest.fixture
def owned(monkeypatch) -> dict[str, int]:
    """Owners of files as a root caller's kernel would keep them; chown is only written down."""
    owners: dict[str, int] = {}
    real = os.lstat

    def look(path: Any, **_: Any) -> Any:
        values = list(real(path))
        values[4] = owners.get(str(path), 0)
        return os.stat_result(values)

    monkeypatch.setattr(Path, "lstat", look)
    monkeypatch.setattr(Path, "stat", look)
    monkeypatch.setattr(os, "chown", lambda path, uid, gid, **_: owners.__setitem__(str(path), uid))
    return owners


def test_what_is_lent_is_given_back_and_nothing_else_is_touched(place, owned):
    out = place / "runs"
    for name, reason, recipe in (
        ("open", "stopped: x", "r"),
        ("done", "done", "r"),
        ("else", "running", "e"),
        ("theirs", "running", "r"),
    ):
        (out / name / "checkpoints").mkdir(parents=True)
        (out / name / "manifest.json").write_text(json.dumps({"recipe": recipe, "exit_reason": reason}))
    owned[str(out / "theirs")] = 4711

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
    with pytest.raises(EngineLost), ownership.lent(ownership.candidates(out, "new", "r")):
        raise EngineLost("and its container may write on")
    assert "open/manifest.json" in of(1000), "until the container is cleared away"


# --- what can go wrong ----------------------------------------------------------------------------------------------


def api_error(text: str) -> Exception:
    error: Exception = docker.errors.APIError("500 Server Error", explanation=text)
    return error


SAYINGS = {
    "write /var/lib/docker/x: no space left on device": "the disk of the Docker engine is full",
    "error gathering device information while adding custom device": "a device node of the board",
    "setting rlimits for ready process: error setting rlimit type 8": "locked memory",
    'exec: "docker-init": executable file not found': "no docker-init",
    "invalid mount config: bind source path does not exist: /x": "not on the engine's machine",
    "manifest unknown": "no image of the locked digest",
    "error pulling image: does not match digest": "no image of the locked digest",
    "pull access denied: unauthorized": "refuses to give the image",
    "dial tcp: lookup ghcr.io: no such host": "cannot be reached",
    "something that nobody has heard of": "the Docker engine refused",
}


@pytest.mark.parametrize("said", SAYINGS)
def test_what_an_engine_says_is_one_message_with_a_cure(said):
    with pytest.raises(MachineError, match=SAYINGS[said]) as caught, engine.explained("launching"):
        raise api_error(said)
    assert said in str(caught.value)
    assert caught.value.todo


@pytest.mark.parametrize(
    ("reason", "what", "cure"),
    [
        (
            "FileNotFoundError(2, 'No such file or directory')",
            "no Docker engine answers here",
            "systemctl start docker",
        ),
        ("ConnectionRefusedError(111, 'Connection refused')", "no Docker engine answers here", "--no-container"),
        ("PermissionError(13, 'Permission denied')", "no permission on the Docker engine's socket", "group docker"),
    ],
)
def test_no_engine_and_no_permission_are_told_apart(monkeypatch, reason, what, cure):
    def none() -> None:
        raise docker.errors.DockerException(
            f"Error while fetching server API version: ('Connection aborted.', {reason})"
        )

    monkeypatch.setattr(DockerClient, "from_env", none)
    with pytest.raises(MachineError, match=what) as caught:
        engine.connect()
    assert cure in str(caught.value.todo)


def test_no_engine_at_a_socket_that_is_not_there(place, monkeypatch):
    """The real SDK, not a message we wrote."""
    monkeypatch.setenv("DOCKER_HOST", f"unix://{place}/none.sock")
    with pytest.raises(MachineError, match="no Docker engine answers here"):
        engine.connect()


@pytest.mark.parametrize(
    ("option", "words"), [("name=rootless", "without root"), ("name=userns", "maps its containers")]
)
def test_an_engine_whose_users_are_others_is_refused(monkeypatch, option, words):
    client = type("Client", (), {"info": lambda self: {"SecurityOptions": ["name=seccomp", option]}})
    monkeypatch.setattr(DockerClient, "from_env", client)
    with pytest.raises(MachineError, match=words):
        engine.connect()


class Found:
    def __init__(self, id: str, *digests: str, pins: str = IMAGE.lock_sha256) -> None:
        self.id, self.attrs, self.labels = id, {"RepoDigests": list(digests)}, {"recipes.lock": pins}


class Store:
    """The images of an engine, and what its registry gives."""

    def __init__(self, here: Found | None, registry: Found | None = None) -> None:
        self.here, self.registry, self.images, self.api = here, registry, self, self
        self.trouble: list[dict[str, str]] = []

    def get(self, reference: str) -> Found:
        if self.here is None:
            raise docker.errors.ImageNotFound("none")
        return self.here

    def pull(self, reference: str, stream: bool, decode: bool) -> list[dict[str, str]]:
        assert stream
        assert decode
        self.here = self.registry
        return [{"status": "Pulling"}, *self.trouble]


PUBLISHED = Image("n150", "registry.example/recipes@sha256:" + "12" * 32, "published", IMAGE.lock_sha256)


def test_a_published_image_is_fetched_once_by_its_digest():
    said: list[str] = []
    store = Store(None, Found("sha256:34", PUBLISHED.reference))
    engine.fetch(store, PUBLISHED, said.append)
    engine.fetch(store, PUBLISHED, said.append)
    assert said == [f"fetching {PUBLISHED.reference} (once)"]


def test_a_fetch_that_breaks_off_says_why():
    store = Store(None)
    store.trouble = [{"error": "write /var/lib/docker/tmp/1: no space left on device"}]
    with pytest.raises(MachineError, match="the disk of the Docker engine is full"):
        engine.fetch(store, PUBLISHED, [].append)


@pytest.mark.parametrize(
    ("store", "image", "words"),
    [
        (Store(None), IMAGE, "is gone from the Docker engine"),
        (Store(Found("sha256:other")), IMAGE, "is not the locked one: it has sha256:other"),
        (Store(Found(IMAGE.reference, pins="0" * 64)), IMAGE, "is not the locked one: its label recipes.lock is 000"),
        (
            Store(None, Found("sha256:34", "registry.example/recipes@sha256:" + "56" * 32)),
            PUBLISHED,
            "not the locked one",
        ),
    ],
)
def test_an_image_of_another_digest_is_refused(store, image, words):
    with pytest.raises(MachineError, match=words):
        engine.fetch(store, image, print)


def test_an_image_that_is_not_in_the_lock_is_named(monkeypatch, place):
    fake_host(place / "machine", "n150")
    lock = images.read_lock()
    lock["targets"].pop("n150", None)
    monkeypatch.setattr(images, "read_lock", lambda: lock)
    with pytest.raises(MachineError, match="'n150' is not in the lock"):
        launcher.launch(RECIPE, {**ASKED, "hw": "n150"}, print)


# --- watching one ---------------------------------------------------------------------------------------------------


class Box:
    """A container and its engine: what it prints and how it ends; `asked` are the signals it got."""

    name, id, status = "recipes-x", "1", "exited"

    def __init__(self, wait: Callable[[Box], int], oom: bool = False) -> None:
        self.waiting, self.oom, self.asked, self.removed = wait, oom, list[str](), False
        self.client = self.api = self.containers = self

    def create_host_config(self, **settings: Any) -> dict[str, Any]:
        return settings

    def create_container(self, **settings: Any) -> dict[str, str]:
        return {"Id": self.id}

    def get(self, id: str) -> Box:
        return self

    def attach(self, *_: Any, **__: Any) -> list[tuple[bytes | None, bytes | None]]:
        return [(b"said\n", None), (None, b"warned\n")]

    def wait(self, *_: Any, **__: Any) -> dict[str, int]:
        return {"StatusCode": self.waiting(self)}

    def inspect_container(self, id: str) -> dict[str, Any]:
        return {"State": {"OOMKilled": self.oom}}

    def kill(self, name: str) -> None:
        self.asked.append(name)

    def start(self) -> None: ...

    def reload(self) -> None: ...

    def remove(self, **_: Any) -> None:
        self.removed = True


def follow(box: Box) -> int:
    return launcher.follow(box, spec_on("cpu"))


def test_the_exit_code_and_what_was_said_come_through(capfdbinary):
    with contextlib.redirect_stdout(sys.__stdout__), contextlib.redirect_stderr(sys.__stderr__):
        box = Box(lambda box: 75)
        assert follow(box) == 75
    assert box.removed


@pytest.mark.parametrize(
    ("numbers", "asked"),
    [
        ([signal.SIGINT], ["SIGINT"]),
        ([signal.SIGTERM], ["SIGTERM"]),
        ([signal.SIGHUP], ["SIGTERM"]),
        ([signal.SIGINT] * 3, ["SIGINT", "SIGINT", "SIGKILL"]),
    ],
)
def test_signals_are_handed_on_and_waited_for(numbers, asked):
    def wait(box: Box) -> int:
        for count, number in enumerate(numbers, 1):
            os.kill(os.getpid(), number)
            while len(box.asked) < count:
                time.sleep(0.001)
        return 75

    before = signal.getsignal(signal.SIGINT)
    box = Box(wait)
    assert follow(box) == 75
    assert box.asked == asked
    assert signal.getsignal(signal.SIGINT) is before


def test_an_engine_that_dies_in_the_middle_is_one_message():
    def wait(box: Box) -> int:
        raise requests.ConnectionError("('Connection aborted.', RemoteDisconnected())")

    with pytest.raises(MachineError, match="engine went away while the run was on") as caught:
        follow(Box(wait))
    assert "recipe stop" in str(caught.value.todo)


@pytest.mark.parametrize(("code", "oom", "words"), [(137, True, "no memory was left"), (137, False, "from outside")])
def test_a_killed_run_is_said_to_be(code, oom, words):
    with pytest.raises(TrainingError, match=words):
        follow(Box(lambda box: code, oom))
