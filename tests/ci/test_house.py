"""The locks, the Makefile and the set-up script: what a fresh clone stands on."""

from __future__ import annotations

import importlib.metadata
import os
import re
import shutil
import subprocess
from pathlib import Path

import pytest

from ci import lock as lock_tool
from tests.support.stops import STOP_AT, all_ended, end_of

ROOT = Path(__file__).resolve().parents[2]
LOCKS = sorted((ROOT / "requirements").glob("*.txt"), key=lambda path: path.name)
OF_THE_BENCH = [ROOT / f"bench/requirements-{peer}.txt" for peer in ("serving", "trl")]
OF_READERS = sorted((ROOT / "requirements/readers").glob("*.txt"))
PYTHONS = ("3.10", "3.11", "3.12")


def requirements(path: Path) -> dict[str, list[str]]:
    """Each `name==version` of a lock with its hashes."""
    found: dict[str, list[str]] = {}
    for line in path.read_text().splitlines():
        if re.match(r"[A-Za-z0-9]", line):
            current = found.setdefault(line.split()[0], [])
        elif line.lstrip().startswith("--hash=sha256:"):
            current.append(line.split("sha256:")[1].removesuffix(" \\"))
        else:
            assert line.startswith(("#", "    #")), f"{path.name}: what is this? {line}"
    return found


def names(path: Path) -> set[str]:
    return {requirement.split("==")[0] for requirement in requirements(path)}


# --- locks ----------------------------------------------------------------------------------------


def test_every_lock_is_there() -> None:
    assert [path.name for path in LOCKS] == [
        "board-3.10.txt",
        "browser.txt",
        *(f"cpu-{python}.txt" for python in PYTHONS),
        "launcher.txt",
        "tools.txt",
        "ttml-build-3.10.txt",
        "ttnn-3.10.txt",
        "ttnn-3.12.txt",
    ]


@pytest.mark.parametrize("path", [*LOCKS, *OF_THE_BENCH, *OF_READERS], ids=lambda path: path.name)
def test_every_requirement_is_pinned_by_hash(path: Path) -> None:
    for requirement, hashes in requirements(path).items():
        assert re.fullmatch(r"[a-z0-9-]+==[0-9][\w.+]*", requirement), requirement
        assert hashes, f"{requirement} has no hash"
        assert all(re.fullmatch(r"[0-9a-f]{64}", digest) for digest in hashes), requirement


@pytest.mark.parametrize("path", [*LOCKS, *OF_THE_BENCH, *OF_READERS], ids=lambda path: path.name)
def test_a_lock_says_what_and_never_where_from(path: Path) -> None:
    text = path.read_text()
    for sign in (
        r"\w+://",
        r"\.(?:org|com|io|net)\b",
        r"(?:^|[\s=@])(?:/|\.\./|~)",
        r"^\s*-(?:i|f|-index|-find)",
    ):
        assert not re.search(sign, text, re.MULTILINE), f"{path.name} holds {sign}"


def test_a_reader_s_lock_has_torch_as_its_cpu_build_or_not_at_all() -> None:
    for path in OF_READERS:
        found = names(path)
        assert not {name for name in found if re.match(r"nvidia|cuda", name)}, path.name  # triton: by xgrammar
        asked = re.search(r"^torch$", path.with_suffix(".in").read_text(), re.MULTILINE)
        torch = [line for line in requirements(path) if line.startswith("torch==")]
        assert torch == ([lock_tool_torch()] if asked else []), path.name


@pytest.mark.parametrize("python", PYTHONS)
def test_a_cpu_lock_brings_no_cuda(python: str) -> None:
    path = ROOT / f"requirements/cpu-{python}.txt"
    assert not {name for name in names(path) if re.match(r"nvidia|triton|cuda|torch.+", name)}
    torch = [line for line in requirements(path) if line.startswith("torch==")]
    assert torch in ([lock_tool_torch()], [])
    if python == "3.11":
        assert torch
    if not torch:
        assert f"# {lock_tool_torch()} is left out" in path.read_text()


def lock_tool_torch() -> str:
    pin = re.search(r"^torch==\S+", (ROOT / "requirements/cpu.in").read_text(), re.MULTILINE)
    assert pin
    return f"{pin[0]}+cpu"


def test_a_board_host_needs_no_torch_and_no_numpy() -> None:
    assert not names(ROOT / "requirements/launcher.txt") & {
        "torch",
        "numpy",
        "transformers",
        "pyarrow",
        "docker",
        "requests",
    }


@pytest.mark.parametrize("lock", lock_tool.LOCKS, ids=lambda lock: lock.name)
def test_a_lock_holds_everything_that_was_asked_for(lock: lock_tool.Lock) -> None:
    path = ROOT / lock.path
    lines = [line for name in lock.inputs for line in (ROOT / lock.folder / name).read_text().splitlines()]
    wanted = {re.split(r"==|\[", line)[0] for line in lines if re.match(r"\w", line)} - {"torch"}
    assert wanted <= names(path)


def test_the_build_backend_is_the_locked_one() -> None:
    pin = re.search(r'^requires = \["(setuptools==\S+)"\]', (ROOT / "pyproject.toml").read_text(), re.MULTILINE)
    assert pin
    for lock in lock_tool.LOCKS:
        if "build.in" in lock.inputs:
            assert pin[1] in requirements(ROOT / lock.path), lock.name


def test_what_the_resolver_is_told_about_torch_is_true() -> None:
    try:
        said = importlib.metadata.requires("torch") or []
    except importlib.metadata.PackageNotFoundError:
        pytest.skip("no torch on this Python")
    block = re.search(r'name = "torch"\nrequires-dist = \[(.*?)\n\]', (ROOT / "pyproject.toml").read_text(), re.DOTALL)
    assert block
    assert set(re.findall(r'"([^"]+)"', block[1])) == {line for line in said if "extra ==" not in line}


CUDA_LOCK = f"sympy==1 \\\n    --hash=sha256:{'a' * 64}\ntorch==2.13.0 \\\n    --hash=sha256:{'b' * 64} \\\n"
CUDA_LOCK += f"    --hash=sha256:{'c' * 64}\n    # via peft\ntqdm==4 \\\n    --hash=sha256:{'d' * 64}\n"
CPU_LOCK = CUDA_LOCK.replace("torch==2.13.0", "torch==2.13.0+cpu")


@pytest.mark.parametrize(
    ("old", "resolved", "has_torch"),
    [
        ("", CUDA_LOCK, False),
        ("", CPU_LOCK, True),
        (CPU_LOCK, CUDA_LOCK, True),
        (CUDA_LOCK, CUDA_LOCK, False),
    ],
    ids=["CUDA build left out", "CPU build taken", "old CPU line kept", "old CUDA line not kept"],
)
def test_make_lock_never_writes_a_cuda_build(
    old: str, resolved: str, has_torch: bool, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "requirements").mkdir()
    (tmp_path / "requirements/cpu.in").write_text("torch==2.13.0\n")
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(lock_tool, "compile_lock", lambda lock, old, cpu_index: resolved)
    lock = next(lock for lock in lock_tool.LOCKS if lock.name == "cpu-3.12.txt")
    text = lock_tool.make(lock, old, cpu_index=False)
    (tmp_path / "made.txt").write_text(text)
    expected = ["sympy==1", *(["torch==2.13.0+cpu"] if has_torch else []), "tqdm==4"]
    assert list(requirements(tmp_path / "made.txt")) == expected
    assert ("is left out" in text) is not has_torch


# --- make -----------------------------------------------------------------------------------------


@pytest.fixture
def house(tmp_path: Path) -> Path:
    """The Makefile and ci/, with a set-up that does nothing and a `recipe` that writes down its arguments."""
    shutil.copy(ROOT / "Makefile", tmp_path)
    shutil.copytree(ROOT / "ci", tmp_path / "ci")
    script(tmp_path / "ci/setup.sh", "exit 0")
    script(
        tmp_path / ".venv/bin/recipe",
        'for word in "$@"; do printf "%s\\0" "$word"; done >arguments; exit "${CODE:-0}"',
    )
    return tmp_path


def script(path: Path, body: str) -> Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(f"#!/bin/bash\n{body}\n")
    path.chmod(0o755)
    return path


def make(folder: Path, *arguments: str, **environment: str) -> subprocess.CompletedProcess[str]:
    clean = {key: os.environ[key] for key in ("PATH", "HOME") if key in os.environ}
    return subprocess.run(
        ["make", *arguments], cwd=folder, env=clean | environment, capture_output=True, text=True, timeout=60
    )


def recipe_arguments(folder: Path, *arguments: str, **environment: str) -> list[str]:
    done = make(folder, *arguments, **environment)
    assert done.returncode == 0, done.stderr
    return (folder / "arguments").read_text().split("\0")[:-1]


def test_help_lists_every_target() -> None:
    targets = set(re.findall(r"^([a-z][a-z-]*):", (ROOT / "Makefile").read_text(), re.MULTILINE))
    phony = re.search(r"^\.PHONY: (.*)$", (ROOT / "Makefile").read_text(), re.MULTILINE)
    assert phony
    assert set(phony[1].split()) == targets
    shown = make(ROOT).stdout  # plain `make` is `make help`
    assert targets == set(re.findall(r"^  make ([a-z-]+) +\S", shown, re.MULTILINE))


def test_variables_become_flags(house: Path) -> None:
    every = ["HW=cpu", "STEPS=20", "RESUME=never", "STOP_AT=10", "OUT=x", "CONTAINER=0", "DRY=1"]
    flags = "--hw cpu --steps 20 --stop-at 10 --resume never --set a.b=1 --set c.d=[2,*] --no-container --dry-run"
    (house / "c.d=2").touch()  # what an unquoted [2,*] would turn into
    for arguments, command in (
        (["recipe-finetune", *every, "SET=a.b=1\tc.d=[2,*] "], f"run tinyllama-finetune {flags} --out x"),
        (["recipe", "NAME=other", "CONTAINER=1"], "run other --container"),
        (["new-recipe", "NAME=x"], "new x --from tinyllama-finetune"),
        (
            ["new-recipe", "NAME=x", "FROM=y", "DATA=a.csv", "MAP=p=a r=b"],
            "new x --from y --data a.csv --map p=a --map r=b",
        ),
        (["data", "HW=n150"], "data build tinyllama-finetune --hw n150"),
        (["image", "HW=cpu", "BASE_IMAGE=b", "WHEELHOUSE=w"], "image build --base-image b --wheelhouse w cpu"),
        (["image-verify"], "image verify"),
        (["serve", "RUN=runs/x", "BASE=1", "PORT=8001"], "serve runs/x --base --port 8001"),
        (["serve", "RUN=runs/x", "BASE=0"], "serve runs/x"),
        (["serve", "RUN=runs/x", "HW=t3k", "ROAD=vllm"], "serve runs/x --hw t3k --road vllm"),
        (["do"], "--help"),
        (["do", "ARGS=doctor --hw  n150", "HW=p150"], "doctor --hw n150"),
    ):
        assert recipe_arguments(house, *arguments) == command.split()


@pytest.mark.parametrize(
    "text",
    [
        "a;touch broken",
        "$(shell touch broken)",
        "`touch broken`",
        "$$(touch broken)",
        "' && touch broken '",
        '"$x $5 100% #',
    ],
)
def test_what_users_type_is_never_run(house: Path, text: str) -> None:
    assert recipe_arguments(house, "recipe-finetune", f"HW={text}") == [
        "run",
        "tinyllama-finetune",
        "--hw",
        text,
    ]
    assert recipe_arguments(house, "recipe-finetune", HW=text)[-1] == text
    assert recipe_arguments(house, "recipe", f"NAME={text}") == ["run", text]
    assert recipe_arguments(house, "do", f"ARGS={text}") == text.split()
    words = [word for item in text.split() for word in ("--set", item)]
    assert recipe_arguments(house, "recipe-scratch", f"SET={text}")[2:] == words
    assert make(house, "-n", "recipe-finetune", f"HW={text}").returncode == 0
    assert not (house / "broken").exists()


def test_names_that_desktops_export_are_not_taken_from_the_environment(house: Path) -> None:
    exported = {"NAME": "DESKTOP-1", "SET": "x", "ARGS": "%n", "HW": "cpu"}
    assert recipe_arguments(house, "recipe-finetune", **exported) == "run tinyllama-finetune --hw cpu".split()
    assert make(house, "recipe", **exported).returncode == 2


def test_a_rehearsal_is_told_its_board_and_its_fault_letter_for_letter(house: Path) -> None:
    script(house / ".venv/bin/python", 'printf "%s\\0" "$*" "$HW" "$FAULT" "${NAME-none}" >arguments')
    words = recipe_arguments(house, "rehearse", "HW=p150", "FAULT=$(shell touch broken)", NAME="DESKTOP-1")
    assert words == ["-m ci.rehearse", "p150", "$(shell touch broken)", "none"]
    assert not (house / "broken").exists()


def test_a_phase_of_the_hardware_job_is_its_python_s(house: Path) -> None:
    """`exec`: a signal to the script is one to the phase."""
    script(house / ".venv/bin/python", 'printf "%s\\0" "$*" "$$" >arguments; exit 5')
    with subprocess.Popen([house / "ci/hardware.sh", "train"], cwd="/") as phase:
        assert phase.wait(60) == 5
    assert (house / "arguments").read_text() == f"-m ci.hardware train\0{phase.pid}\0"


def test_make_prints_the_command_and_the_exact_code(house: Path) -> None:
    done = make(house, "recipe-finetune", "SET=a.b='x", CODE="75")
    assert r"+ .venv/bin/recipe run tinyllama-finetune --set a.b=\'x" in done.stdout
    assert done.returncode == 2
    assert "Error 75" in done.stderr


def test_a_switch_takes_1_or_0(house: Path) -> None:
    done = make(house, "recipe-finetune", "DRY=yes")
    assert (done.returncode, "DRY=yes: say 1 or 0" in done.stderr) == (2, True)


# --- set-up ---------------------------------------------------------------------------------------

FAKE_PYTHON = """\
here=$(dirname "$0")
case "$*" in
*version_info*) echo 3.11 ;;
"-m venv --clear "*) mkdir -p .venv/bin && cp "$0" .venv/bin/python ;;
*" install "*)
    echo "$*" >>"$ROOT_OF_TEST/pip.log"
    case "$*" in *"$FAIL_ON"*) echo "no such wheel" && exit 1 ;; esac
    [ -z "${HOLD:-}" ] || exec sleep 600 ;;
esac
"""


class Setup:
    """ci/setup.sh in a folder of its own, over an interpreter that only writes down what pip is asked."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        shutil.copytree(ROOT / "requirements", folder / "requirements")
        shutil.copytree(ROOT / "ci", folder / "ci")
        shutil.copy(ROOT / "pyproject.toml", folder)
        script(folder / "python", FAKE_PYTHON)

    def run(self, *, fail_on: str = "nothing", **environment: str) -> subprocess.CompletedProcess[str]:
        (self.folder / "pip.log").write_text("")
        command = ["bash", str(self.folder / "ci/setup.sh")]
        env = self.environment(FAIL_ON=fail_on, **environment)
        return subprocess.run(command, cwd=self.folder, env=env, capture_output=True, text=True, timeout=60)

    def environment(self, **more: str) -> dict[str, str]:
        given = {"PATH": os.environ["PATH"], "PYTHON": "./python", "ROOT_OF_TEST": str(self.folder)}
        return given | {"FAIL_ON": "nothing"} | more

    @property
    def installs(self) -> list[str]:
        return (self.folder / "pip.log").read_text().splitlines()


@pytest.fixture
def setup(tmp_path: Path) -> Setup:
    return Setup(tmp_path)


def test_a_setup_that_breaks_off_leaves_no_stamp_and_the_next_one_goes_on(setup: Setup) -> None:
    broken = setup.run(fail_on="cpu-3.11.txt")
    assert broken.returncode == 4
    assert "no such wheel" in broken.stderr
    assert "run the same command again" in broken.stderr
    assert not (setup.folder / ".venv/setup.stamp").exists()
    assert (setup.run().returncode, len(setup.installs)) == (0, 3)
    assert (setup.run().stdout, setup.installs) == ("", []), "nothing changed"


@pytest.mark.parametrize("command", ["child=$!", 'kill -0 "$child" 2> /dev/null', "sleep 0.2"])
def test_a_ctrl_c_ends_what_a_setup_has_started_however_early(command: str, setup: Setup) -> None:
    (setup.folder / "stop-at").write_text(STOP_AT)
    stop = {"BASH_ENV": str(setup.folder / "stop-at"), "BEFORE": command, "SEEN": str(setup.folder / "seen")}
    begun = ["bash", str(setup.folder / "ci/setup.sh")]
    environment = setup.environment(HOLD="1", **stop)
    with subprocess.Popen(begun, cwd=setup.folder, env=environment, start_new_session=True) as process:
        assert end_of(process) == 130
    assert (setup.folder / "seen").read_text().startswith("stop ")
    assert all_ended(session=process.pid), "pip goes on"
    assert setup.run().returncode == 0, "and the next one finishes it"


def test_a_lock_without_torch_is_said_and_the_rest_installed(setup: Setup) -> None:
    path = setup.folder / "requirements/cpu-3.11.txt"
    path.write_text(lock_tool.TORCH_BLOCK.sub("", path.read_text()))
    done = setup.run()
    assert (done.returncode, "NO TORCH" in done.stdout, len(setup.installs)) == (0, True, 2)


def test_a_launcher_has_no_torch_and_is_completed_when_the_twin_is_wanted(setup: Setup) -> None:
    assert setup.run(LAUNCHER="1").returncode == 0
    assert [line.split()[-1] for line in setup.installs] == ["requirements/launcher.txt", "."]
    setup.run()
    assert len(setup.installs) == 3
    setup.run(LAUNCHER="1")
    assert setup.installs == []


def test_no_python_that_will_do_is_one_clear_message(setup: Setup) -> None:
    script(setup.folder / "python", "echo 3.13")
    done = setup.run()
    assert done.returncode == 4
    assert "./python: is Python 3.13" in done.stderr
    assert "apt install" in done.stderr
    script(setup.folder / "python", 'case "$*" in *ensurepip*) exit 1 ;; *) echo 3.12 ;; esac')
    assert "apt install python3.12-venv" in setup.run().stderr
