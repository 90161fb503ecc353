"""A board's runner: its hooks on a fake machine, one job from one configuration, and the set-up below a folder."""

from __future__ import annotations

import fcntl
import hashlib
import os
import signal
import subprocess
import tarfile
import time
from dataclasses import dataclass
from pathlib import Path

import pytest

from tests.support.stops import STOP_AT, all_ended, end_of

ROOT = Path(__file__).resolve().parents[2]
RUNNER = ROOT / "ci/runner"
OURS = "o/r/.github/workflows/hardware.yml"


def run(name: str, *words: str, **environment: str) -> subprocess.CompletedProcess[str]:
    clean = {key: os.environ[key] for key in ("PATH", "HOME")}
    command = ["bash", "-e", str(RUNNER / name), *words]  # as the runner starts its hooks
    return subprocess.run(command, env=clean | environment, capture_output=True, text=True, timeout=60, check=False)


# --- before a job -----------------------------------------------------------------------------------------------------


@pytest.fixture
def machine(tmp_path: Path) -> Path:
    """Two nodes that nobody holds, one lease that nobody has."""
    for node in "01":
        (tmp_path / f"proc/driver/tenstorrent/{node}").mkdir(parents=True)
        (tmp_path / f"proc/driver/tenstorrent/{node}/pids").write_text("\n")
    (tmp_path / "run/lock").mkdir(parents=True)
    (tmp_path / "run/lock/recipes-0000:01:00.0.lock").write_text("")
    return tmp_path


def started(machine: Path, **changed: str) -> subprocess.CompletedProcess[str]:
    given = {
        "RECIPES_SYSFS_ROOT": str(machine),
        "RECIPES_QUARANTINE": str(machine / "quarantine"),
        "RECIPES_RUNNER_WORKFLOW": OURS,
        "GITHUB_WORKFLOW_REF": f"{OURS}@refs/heads/main",
        "GITHUB_EVENT_NAME": "schedule",
    }
    return run("job-started.sh", **given | changed)


def test_a_free_machine_takes_a_job(machine: Path) -> None:
    done = started(machine)
    assert (done.returncode, done.stdout) == (0, "free: no quarantine, no holder, no lease\n"), done.stderr


@pytest.mark.parametrize(
    "changed",
    [
        {"GITHUB_WORKFLOW_REF": f"{OURS}@refs/pull/7/merge"},
        {"GITHUB_WORKFLOW_REF": "o/r/.github/workflows/ci.yml@refs/heads/main"},
        {"GITHUB_WORKFLOW_REF": f"x/r/{OURS[4:]}@refs/heads/main"},
        {"GITHUB_EVENT_NAME": "pull_request"},
        {"GITHUB_EVENT_NAME": ""},
    ],
)
def test_another_workflow_or_event_is_refused(machine: Path, changed: dict[str, str]) -> None:
    done = started(machine, **changed)
    assert (done.returncode, "takes no job" in done.stderr) == (4, True)


def test_a_machine_in_quarantine_is_refused_until_the_file_is_gone(machine: Path) -> None:
    (machine / "quarantine").write_text("board: n300\nwhy: three resets did not help\n")
    done = started(machine)
    assert (done.returncode, "three resets did not help" in done.stderr, "remove that file" in done.stderr) == (
        4,
        True,
        True,
    )
    (machine / "quarantine").unlink()
    assert started(machine).returncode == 0


def test_a_board_that_is_held_or_leased_is_refused(machine: Path) -> None:
    pids = machine / "proc/driver/tenstorrent/1/pids"
    pids.write_text("4242\n17\n")
    done = started(machine)
    assert (done.returncode, "node 1 is held by the processes 4242 17" in done.stderr) == (4, True)
    pids.write_text("\n")
    with (machine / "run/lock/recipes-0000:01:00.0.lock").open("r+") as lease:
        lease.write('{"board": "n300"}')
        lease.flush()
        fcntl.flock(lease, fcntl.LOCK_EX)
        done = started(machine)
        assert (done.returncode, '{"board": "n300"}' in done.stderr) == (4, True)
    assert started(machine).returncode == 0, "a lease ends with its process"


def test_a_lease_that_cannot_be_opened_is_not_called_taken_nor_made(machine: Path) -> None:
    # A stand-in for a file that only its owner may open, as root may open every one.
    (machine / "run/lock/recipes-0000:02:00.0.lock").symlink_to(machine / "nowhere")
    done = started(machine)
    assert (done.returncode, "the lease recipes-0000:02:00.0.lock cannot be opened" in done.stderr) == (4, True)
    assert not (machine / "nowhere").exists(), "O_CREAT, which a kernel refuses for another user's file in /run/lock"


# --- after a job ------------------------------------------------------------------------------------------------------


OWN = f"{os.getuid()}:{os.getgid()}"


def docker(folder: Path, users: dict[str, str]) -> str:
    """A PATH with an engine that has these containers of these users."""
    folder.mkdir()
    asked = " ".join(f"{name}) echo {user} ;;" for name, user in users.items())
    listed = f'ps) echo "{" ".join(users)}" ;;'
    inspected = f"inspect) case $4 in {asked} *) exit 1 ;; esac ;;"
    body = f'[ "$1" = inspect ] || echo "$*" >>{folder}/calls; case $1 in {listed} {inspected} esac'
    (folder / "docker").write_text(f"#!/bin/sh\n{body}\n")
    (folder / "docker").chmod(0o755)
    return f"{folder}:{os.environ['PATH']}"


@pytest.mark.parametrize(
    ("users", "stopped"),
    [
        ({}, []),
        ({"abc": OWN, "def": OWN}, ["stop --time 120 abc def", "rm --force abc def"]),
        ({"abc": "4242:4242", "def": OWN}, ["stop --time 120 def", "rm --force def"]),
        ({"abc": "4242:4242"}, []),
    ],
)
def test_what_a_job_left_behind_is_stopped_then_removed_and_nobody_elses(
    users: dict[str, str], stopped: list[str], machine: Path, tmp_path: Path
) -> None:
    path = docker(tmp_path / "bin", users)
    done = run("job-completed.sh", RECIPES_SYSFS_ROOT=str(machine), PATH=path)
    assert done.returncode == 0, done.stderr
    calls = (tmp_path / "bin/calls").read_text().splitlines()
    assert calls == ["info", "ps --all --quiet --filter label=training-recipes.run", *stopped]


def test_a_board_that_is_still_held_after_a_job_is_said(machine: Path, tmp_path: Path) -> None:
    (machine / "proc/driver/tenstorrent/0/pids").write_text("99\n")
    done = run("job-completed.sh", RECIPES_SYSFS_ROOT=str(machine), PATH=docker(tmp_path / "bin", {}))
    assert (done.returncode, "node 0 by the processes 99" in done.stderr) == (4, True)


# --- one job ----------------------------------------------------------------------------------------------------------


def test_a_configuration_starts_one_runner_and_is_gone(tmp_path: Path) -> None:
    program, state = tmp_path / "program", tmp_path / "state"
    for folder in (program, state / "jit", state / "work"):
        folder.mkdir(parents=True)
    seen = tmp_path / "seen"
    (program / "run.sh").write_text(f'#!/bin/sh\necho "$ACTIONS_RUNNER_INPUT_JITCONFIG $# $PWD" >{seen}; touch left\n')
    (program / "run.sh").chmod(0o755)
    given = {"RECIPES_RUNNER_PROGRAM": str(program), "RECIPES_RUNNER_STATE": str(state)}
    (state / "jit/n300").write_text("once")
    assert run("run-once.sh", "n300", **given).returncode == 0
    config, arguments, home = seen.read_text().split()
    assert (config, arguments) == ("once", "0"), "in the environment, not on the command line"
    assert Path(home).parent == state / "work"
    assert {*state.rglob("*")} == {state / "jit", state / "work"}, "neither the configuration nor the job's files"
    assert not (program / "left").exists()
    (state / "quarantine").write_text("board: n300\n")
    (state / "jit/n300").write_text("again")
    assert run("run-once.sh", "n300", **given).returncode == 4
    assert (state / "jit/n300").exists()


@pytest.fixture
def unit(tmp_path: Path) -> Unit:
    """A runner that says when it has begun, and takes SIGINT as a cancellation, which takes it a moment."""
    made = Unit(tmp_path / "program", tmp_path / "state", tmp_path / "seen")
    for folder in (made.program, made.state / "jit", made.state / "work"):
        folder.mkdir(parents=True)
    (made.program / "run.sh").write_text(
        "#!/bin/bash\n"
        f"trap 'sleep 0.2; echo cancelled >>{made.seen}; exit 3' INT\n"
        f"echo begun >>{made.seen}\n"
        "for _ in $(seq 40); do sleep 0.1; done\n"
        f"echo ended >>{made.seen}\n"
    )
    (made.program / "run.sh").chmod(0o755)
    (made.state / "jit/n300").write_text("once")
    return made


@dataclass(frozen=True)
class Unit:
    program: Path
    state: Path
    seen: Path

    def start(self, **environment: str) -> subprocess.Popen[bytes]:
        given = {"RECIPES_RUNNER_PROGRAM": str(self.program), "RECIPES_RUNNER_STATE": str(self.state)}
        given |= {"PATH": os.environ["PATH"], **environment}
        return subprocess.Popen(["bash", str(RUNNER / "run-once.sh"), "n300"], env=given, start_new_session=True)

    @property
    def left(self) -> set[Path]:
        return {*self.state.rglob("*")} - {self.state / "jit", self.state / "work"}


def test_a_stop_of_the_unit_cancels_the_job_and_waits_for_it(unit: Unit) -> None:
    with unit.start() as started:
        while not (unit.seen.exists() and unit.seen.read_text()):
            assert started.poll() is None, "it ended before its runner began"
            time.sleep(0.02)
        started.send_signal(signal.SIGINT)  # as systemd does: to the main process alone, by KillSignal and KillMode
        assert started.wait(timeout=20) == 3
    assert unit.seen.read_text() == "begun\ncancelled\n"
    assert unit.left == set()


PLACES = [{"AT": str(at)} for at in range(1, 19)]
PLACES += [{"BEFORE": words} for words in ("trap - INT TERM", "[ ! -e stopped ]", "exec ./run.sh")]


@pytest.mark.parametrize("place", PLACES, ids=lambda place: " ".join(place.values()))
def test_no_stop_is_lost_at_any_command_of_the_script(place: dict[str, str], unit: Unit, tmp_path: Path) -> None:
    """Wherever it comes, the job is not begun or it is cancelled, and nothing of it is left."""
    (tmp_path / "stop-at").write_text(STOP_AT)
    with unit.start(BASH_ENV=str(tmp_path / "stop-at"), SEEN=str(unit.seen), **place) as started:
        code = end_of(started)
    seen = unit.seen.read_text().splitlines()
    assert [line for line in seen if line.startswith("stop")], f"there is no such command: {place}"
    assert all_ended(session=started.pid), "the stop is lost, and the runner goes on by itself"
    assert "ended" not in seen, "the stop is lost"
    assert code in ((3,) if "cancelled" in seen else (-signal.SIGINT, 130)), seen
    assert unit.left <= {unit.state / "jit/n300"}
    assert place != PLACES[17] or "stop wait $runner" in seen, "the last one is when the runner is waited for"


# --- set-up -----------------------------------------------------------------------------------------------------------


@pytest.fixture
def tarball(tmp_path: Path) -> dict[str, str]:
    path = tmp_path / "runner.tgz"
    (tmp_path / "run.sh").write_text("#!/bin/sh\n")
    with tarfile.open(path, "w:gz") as file:
        file.add(tmp_path / "run.sh", "run.sh")
    sha256 = hashlib.sha256(path.read_bytes()).hexdigest()
    return {"RUNNER_TARBALL": str(path), "RUNNER_VERSION": "2.0.0", "RUNNER_SHA256": sha256, "RUNNER_REPOSITORY": "o/r"}


def files(folder: Path) -> dict[str, int]:
    return {str(path.relative_to(folder)): path.stat().st_mtime_ns for path in folder.rglob("*")}


def test_set_up_asks_first_then_sets_up_once(tmp_path: Path, tarball: dict[str, str]) -> None:
    place = tmp_path / "place"
    place.mkdir()
    asked = run("setup.sh", "--check", "n300", DESTDIR=str(place))
    assert (asked.returncode, files(place)) == (4, {}), "a look changes nothing"
    done = run("setup.sh", "n300", DESTDIR=str(place), **tarball)
    assert done.returncode == 0, done.stderr
    for name in ("job-started.sh", "job-completed.sh", "run-once.sh"):
        assert (place / "usr/local/lib/recipes-runner" / name).read_text() == (RUNNER / name).read_text()
    assert (
        place / "etc/recipes-runner.env"
    ).read_text() == f"RECIPES_RUNNER_WORKFLOW={OURS}\nRECIPES_RUNNER_BOARD=n300\n"
    assert (place / "opt/recipes-runner/current/run.sh").is_file()
    assert "enable --now recipes-runner@n300.path" in done.stdout
    assert (place / "var/lib/recipes-runner").stat().st_mode & 0o7777 == 0o1770
    before = files(place)
    again = run("setup.sh", "n300", DESTDIR=str(place))
    assert (again.returncode, again.stdout.splitlines()[-1], files(place)) == (0, "nothing to do", before)
    assert run("setup.sh", "--check", "n300", DESTDIR=str(place)).returncode == 0


@pytest.mark.parametrize(
    ("changed", "code", "says"),
    [
        ({"RUNNER_SHA256": "0" * 64}, 4, "is not what was named"),
        ({"RUNNER_SHA256": ""}, 4, "RUNNER_SHA256= the hash"),
        ({"RUNNER_VERSION": "latest"}, 4, "RUNNER_VERSION= the version"),
        ({"RUNNER_TARBALL": ""}, 4, "none is fetched by itself"),
        ({"RUNNER_REPOSITORY": ""}, 4, "whose hardware.yml"),
        ({"RUNNER_REPOSITORY": "o/r/../x"}, 4, "no owner/name"),
    ],
)
def test_set_up_touches_nothing_before_it_has_all(
    changed: dict[str, str], code: int, says: str, tmp_path: Path, tarball: dict[str, str]
) -> None:
    place = tmp_path / "place"
    place.mkdir()
    done = run("setup.sh", "n300", DESTDIR=str(place), **tarball | changed)
    assert (done.returncode, says in done.stderr, files(place)) == (code, True, {}), done.stderr


def test_set_up_again_keeps_the_users_lines_and_the_files_mode(tmp_path: Path, tarball: dict[str, str]) -> None:
    place = tmp_path / "place"
    settings = place / "etc/recipes-runner.env"
    settings.parent.mkdir(parents=True)
    settings.write_text("# ours\nHTTPS_PROXY=http://a:b@proxy:3128\nRECIPES_RUNNER_WORKFLOW=x/y\n")
    settings.chmod(0o600)
    for _ in range(2):
        assert run("setup.sh", "n300", DESTDIR=str(place), **tarball).returncode == 0
        assert settings.read_text().splitlines() == [
            f"RECIPES_RUNNER_WORKFLOW={OURS}",
            "RECIPES_RUNNER_BOARD=n300",
            "# ours",
            "HTTPS_PROXY=http://a:b@proxy:3128",
        ]
        assert settings.stat().st_mode & 0o777 == 0o600


def test_a_machine_is_the_runner_of_one_board(tmp_path: Path, tarball: dict[str, str]) -> None:
    place = tmp_path / "place"
    place.mkdir()
    both = run("setup.sh", "n300", "n150", DESTDIR=str(place), **tarball)
    assert (both.returncode, "the runner of one" in both.stderr, files(place)) == (2, True, {})
    assert run("setup.sh", "n300", DESTDIR=str(place), **tarball).returncode == 0
    before = files(place)
    second = run("setup.sh", "n150", DESTDIR=str(place), **tarball)
    assert (second.returncode, "is the runner of n300" in second.stderr, files(place)) == (4, True, before)


@pytest.mark.parametrize("board", ["n30", "cpu", "cpu-x2", "n300; id", "-", ""])
def test_set_up_is_for_boards_of_the_table(board: str, tmp_path: Path) -> None:
    assert run("setup.sh", "--check", board, DESTDIR=str(tmp_path)).returncode == 2


def test_set_up_knows_every_board_of_the_table(tmp_path: Path) -> None:
    for board in ("n150", "galaxy-cf"):
        done = run("setup.sh", "--check", board, DESTDIR=str(tmp_path))
        assert (done.returncode, f"recipe doctor --hw {board}" in done.stdout) == (4, True), done.stderr


def test_the_units_and_the_set_up_name_the_same_paths() -> None:
    units = "".join(path.read_text() for path in RUNNER.glob("recipes-*"))
    setup = (RUNNER / "setup.sh").read_text()
    assert "ConditionPathExists=!/var/lib/recipes-runner/quarantine" in units
    for path in ("jit", "home"):
        assert f"/var/lib/recipes-runner/{path}" in units
        assert f"folder /var/lib/recipes-runner/{path}" in setup
    for path in ("/usr/local/lib/recipes-runner", "/etc/recipes-runner.env"):
        assert path in units
        assert path in setup
