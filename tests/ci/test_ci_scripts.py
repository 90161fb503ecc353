"""What the workflows call, without GitHub and without an engine: a `gh` and a `docker` that write down their calls."""

from __future__ import annotations

import hashlib
import json
import os
import shutil
import subprocess
from pathlib import Path
from typing import Any

import pytest

from ci import golden, matrix
from common.errors import UsageError
from tests.support.stops import all_ended, end_of
from tools.containers import images

ROOT = Path(__file__).resolve().parents[2]
SHA = "0123456789abcdef" * 2 + "01234567"
DIGEST = "sha256:" + "a" * 64
CONFIG = """# Tiny.
training_config: {batch_size: 2, max_steps: 1, learning_rate: 1e-3}
model_config: {base: tinyllama-1.1b-chat}
data_config: {source: rows.jsonl}
eval_config: {every: 1, prompts: prompts.jsonl}
checkpoint_config: {every: 1}
"""


@pytest.fixture
def tools(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A folder before everything on PATH; `calls` beside it has a line for each call."""
    folder = tmp_path / "bin"
    folder.mkdir()
    monkeypatch.setenv("PATH", f"{folder}:{os.environ['PATH']}")
    return folder


def tool(folder: Path, name: str, body: str = "") -> None:
    (folder / name).write_text(
        f'#!/bin/bash\nprintf "%s " {name} "$@" >>{folder}/calls; echo >>{folder}/calls\n{body}\n'
    )
    (folder / name).chmod(0o755)


def write_recipe(root: Path) -> Path:
    folder = root / "recipes/tiny"
    folder.mkdir(parents=True)
    (folder / "config.yaml").write_text(CONFIG)
    return folder


def calls(folder: Path) -> list[str]:
    path = folder / "calls"
    return [line.strip() for line in path.read_text().splitlines()] if path.exists() else []


def script(name: str, *words: str, **environment: str) -> subprocess.CompletedProcess[str]:
    clean = {key: os.environ[key] for key in ("PATH", "HOME")}
    command = [str(ROOT / "ci" / name), *words]
    return subprocess.run(command, env=clean | environment, capture_output=True, text=True, timeout=60, check=False)


# --- .ci/run ----------------------------------------------------------------------------------------------------------

OF_CONTAINERS = ["make image HW=cpu", "make test-containers"]
OF_THE_REST = ["make lint", "make test", "make test-runs", "make test-processes", "make rehearse HW=n300"]
# Fails as the target FAILS, and where HOLDS is one that takes for ever; says which engine each would ask.
MAKE = """echo "$* was made, engine ${DOCKER_HOST:-of this machine}"
case "$*" in "$FAILS") exit 1 ;; "$HOLDS") sleep 600 ;; esac"""


@pytest.fixture
def clone(tools: Path, tmp_path: Path) -> Path:
    """A clone that has .ci/run alone; make, the base and .venv are stand-ins."""
    for name in (".ci", "ci", ".venv/bin"):
        (tmp_path / name).mkdir(parents=True)
    shutil.copy(ROOT / ".ci/run", tmp_path / ".ci")
    for path, body in (("ci/with-base.sh", 'exec "$@"'), (".venv/bin/python", "")):
        (tmp_path / path).write_text(f"#!/bin/bash\n{body}\n")
        (tmp_path / path).chmod(0o755)
    tool(tools, "make", MAKE)
    tool(tools, "ip")
    return tmp_path


def ci_run(clone: Path, fails: str = "nothing", holds: str = "nothing") -> tuple[int, str]:
    """Run it; its exit code and output. None of its processes is left."""
    env = {name: value for name, value in os.environ.items() if name != "DOCKER_HOST"}  # .ci/run has set one for us
    with subprocess.Popen(
        ["bash", ".ci/run"], cwd=clone, env=env | {"FAILS": fails, "HOLDS": holds}, start_new_session=True,
        stdin=subprocess.DEVNULL, stdout=subprocess.PIPE, stderr=subprocess.STDOUT,
    ) as process:  # fmt: skip
        code = end_of(process)
        assert all_ended(session=process.pid)
        assert process.stdout is not None
        return code, process.stdout.read().decode()


def test_all_of_ci_is_run_once_and_what_the_other_lane_said_comes_whole(clone: Path, tools: Path) -> None:
    code, said = ci_run(clone)
    assert code == 0, said
    assert sorted(line for line in calls(tools) if line.startswith("make")) == sorted(
        ["make setup", *OF_CONTAINERS, *OF_THE_REST]
    )
    lines = [line for line in said.splitlines() if " was made" in line]
    assert lines[-2:] == [f"{words[5:]} was made, engine of this machine" for words in OF_CONTAINERS]
    assert lines[1:-2] == [f"{words[5:]} was made, engine unix:///nobody" for words in OF_THE_REST]


@pytest.mark.parametrize("words", [*OF_CONTAINERS, *OF_THE_REST])
def test_whatever_fails_ends_ci_with_its_output(words: str, clone: Path) -> None:
    code, said = ci_run(clone, fails=words[5:])
    assert (code != 0, f"{words[5:]} was made" in said) == (True, True), said


def test_a_lane_that_fails_does_not_wait_for_the_other(clone: Path) -> None:
    code, said = ci_run(clone, fails="lint", holds="image HW=cpu")
    assert (code != 0, "test was made" in said) == (True, False), said


# --- whose code reaches a board ---------------------------------------------------------------------------------------


TRUSTED = {"GITHUB_REF": "refs/heads/main", "GITHUB_SHA": "f" * 40, "PROTECTED": "true", "BOARDS": "n150"}


@pytest.mark.parametrize(("asked", "gets"), [("", "f" * 40), (SHA, SHA), ("main", None), (SHA[:12], None)])
def test_boards_run_one_commit_by_all_its_digits(asked: str, gets: str | None) -> None:
    done = script("trust.sh", COMMIT=asked, **TRUSTED)
    assert (done.returncode, done.stdout) == ((0, f"commit={gets}\n") if gets else (2, ""))


@pytest.mark.parametrize(
    ("changed", "says"),
    [
        ({"BOARDS": ""}, "TT_BOARDS"),
        ({"PROTECTED": "false"}, "main is not protected"),
        ({"GITHUB_REF": "refs/heads/other"}, "not that of refs/heads/other"),
    ],
)
def test_who_asks_for_boards_is_told_what_is_missing(changed: dict[str, str], says: str) -> None:
    done = script("trust.sh", COMMIT=SHA, **TRUSTED | changed)
    assert (done.returncode, done.stdout, says in done.stderr) == (2, "", True), done.stderr


LABELLED = {"LABEL": "hardware:n150", "PULL": "7", "SHA": SHA, "SENDER": "ada", "REPOSITORY": "o/r"}
START = f"gh workflow run hardware.yml --repo o/r --ref main --field commit={SHA} --field board="


@pytest.mark.parametrize(
    ("permission", "changed", "starts", "says"),
    [
        ("write", {}, "n150", "on the word of ada"),
        ("admin", {"LABEL": "hardware"}, "", "every board in service"),
        ("read", {}, None, "takes 'write'"),
        ("triage", {}, None, "takes 'write'"),
        ("write", {"LABEL": "hardware-ideas"}, None, "no label for hardware"),
        ("write", {"LABEL": "hardware:n150 --ref other"}, None, "no label for hardware"),
        ("write", {"SHA": "main"}, None, "no commit"),
        ("write", {"SENDER": "../../x"}, None, "no name of a user"),
        ("write", {"PULL": "7/../8"}, None, "no number"),
    ],
)
def test_a_label_starts_a_run_on_its_commit(
    permission: str, changed: dict[str, str], starts: str | None, says: str, tools: Path
) -> None:
    tool(tools, "gh", f'case "$*" in *permission*) echo {permission} ;; esac')
    done = script("label.sh", **LABELLED | changed)
    started = [line for line in calls(tools) if line.startswith("gh workflow run")]
    assert started == ([] if starts is None else [(START + starts).strip()])
    assert done.returncode == (2 if starts is None else 0)
    assert says in done.stdout + done.stderr
    taken_off = [line for line in calls(tools) if "DELETE" in line]
    assert len(taken_off) == (0 if changed and starts is None else 1), "so that later commits need it again"


@pytest.mark.parametrize(("result", "state"), [("success", "success"), ("failure", "failure"), ("cancelled", "error")])
def test_a_commit_is_told_how_its_run_ended(result: str, state: str, tools: Path) -> None:
    tool(tools, "gh")
    assert script("commit-status.sh", COMMIT=SHA, RESULT=result, REPOSITORY="o/r", URL="u").returncode == 0
    assert f"state={state}" in calls(tools)[0]


# --- what runs where --------------------------------------------------------------------------------------------------


def test_recipes_are_found_and_stand_only_where_they_resolve(tmp_path: Path, capsys: Any) -> None:
    folder = write_recipe(tmp_path)
    rows = list(matrix.on_boards([folder], matrix.boards(["n300", "t3k"])))
    assert [(row["board"], row["recipe"]) for row in rows] == [("n300", "tiny")]
    assert "tiny is left out on t3k" in capsys.readouterr().err, "two rows are no batch of 8 chips"


@pytest.mark.parametrize(("board", "says"), [("cpu", "no runner has cpu"), ("n15", "did you mean n150")])
def test_what_is_no_board_is_refused(board: str, says: str) -> None:
    with pytest.raises(UsageError) as error:
        matrix.boards([board])
    assert says in str(error.value)


def test_of_anothers_matrix_only_names_on_asked_boards_are_taken() -> None:
    where = matrix.boards(["n300"])
    line = '{"include":[{"board":"n300","recipe":"tiny-2","labels":["self-hosted","other"]}]}'
    assert list(matrix.allowed(line, where)) == [{"board": "n300", "recipe": "tiny-2"}]
    for board, recipe in (("n150", "tiny"), ("n300", "../tiny"), ("n300", "Tiny"), ("n300", "tiny\n"), ("", "tiny")):
        with pytest.raises(UsageError, match="is not for a board"):
            list(matrix.allowed(json.dumps({"include": [{"board": board, "recipe": recipe}]}), where))
    for nothing in ("", "[]", '{"include":[1]}', '{"include":[{"board":"n300"}]}'):
        with pytest.raises(UsageError, match="no matrix"):
            list(matrix.allowed(nothing, where))


FIGURES = """  - board: {board}
    evidence: measured
    what: a run
    overrides: []
    {steps}date: 2026-11-23
    commit: "0123abc"
    machine: a CPU
    loss_at: {{1: 5.5}}
"""


@pytest.mark.parametrize(
    ("entries", "row"),
    [
        ([], ("cpu", "")),
        ([("cpu-x2", "steps: 8\n    ")], ("cpu-x2", "")),
        ([("cpu-x2", "steps: 8\n    "), ("cpu", "")], ("cpu", "1")),
    ],
)
def test_a_weekly_run_is_whole_whatever_was_measured(
    entries: list[tuple[str, str]], row: tuple[str, str], tmp_path: Path
) -> None:
    folder = write_recipe(tmp_path)
    figures = "".join(FIGURES.format(board=board, steps=steps) for board, steps in entries)
    (folder / "results.yaml").write_text(f"format: 1\nrecipe: tiny\nentries:{chr(10) + figures if figures else ' []'}")
    assert list(matrix.on_cpu([folder])) == [{"board": row[0], "recipe": "tiny", "grade": row[1]}]
    assert "STEPS" not in (ROOT / ".github/workflows/weekly.yml").read_text()


def test_weekly_runs_are_graded_where_figures_stand() -> None:
    rows = {row["recipe"]: row for row in matrix.on_cpu(matrix.recipes(""))}
    assert len(rows) == len(list((ROOT / "recipes").glob("*/config.yaml")))
    assert all(row["board"].startswith("cpu") for row in rows.values())
    assert {row["grade"] for row in rows.values()} <= {"1", ""}


# --- goldens and their lock -------------------------------------------------------------------------------------------

ENTRY = """format: 1
recipe: tiny
entries:
  - board: cpu
    evidence: measured
    what: a golden
    overrides: []
    date: 2026-11-23
    commit: "0123abc"
    machine: a CPU
    loss_at: {{1: 5.5}}
    exact: {{lock_sha256: {lock}, cpu_class: a, threads: 1, world: 1, compiled: false, tokens_sha256: {any},
            history_sha256: {any}, weights_sha256: {any}}}
"""


def test_a_golden_of_another_lock_is_named(tmp_path: Path) -> None:
    folder = write_recipe(tmp_path)
    shutil.copytree(ROOT / "requirements", tmp_path / "requirements")
    today = hashlib.sha256((ROOT / "requirements/cpu-3.11.txt").read_bytes()).hexdigest()
    for lock, found in ((today, 0), ("b" * 64, 1)):
        (folder / "results.yaml").write_text(ENTRY.format(lock=lock, any="c" * 64))
        assert len(list(golden.stale(tmp_path))) == found


@pytest.mark.parametrize(("there", "code"), [(True, 0), (False, 9)])
def test_a_lock_whose_pull_request_is_open_is_not_recorded_again(
    there: bool, code: int, tools: Path, tmp_path: Path
) -> None:
    home, origin = tmp_path / "home", tmp_path / "origin.git"
    for folder in ("ci", "docker", ".venv/bin"):
        (home / folder).mkdir(parents=True)
    shutil.copy(ROOT / "ci/lock-pull-request.sh", home / "ci")
    (home / "docker/images.lock.json").write_text("{}\n")
    tool(tools, "gh")
    tool(home / ".venv/bin", "recipe", "echo new >docker/images.lock.json")
    tool(home / ".venv/bin", "python", "exit 9")  # records goldens: far enough
    who = ["-c", "user.name=a", "-c", "user.email=a@b.c"]
    branch = "image-lock/" + hashlib.sha256(b"new\n").hexdigest()[:12]
    for words in (
        ["init", "-q"],
        ["add", "ci", "docker"],
        [*who, "commit", "-qm", "a"],
        ["init", "-q", "--bare", str(origin)],
        ["remote", "add", "origin", str(origin)],
        ["push", "-q", "origin", f"HEAD:refs/heads/{branch if there else 'main'}"],
    ):
        subprocess.run(["git", *words], cwd=home, check=True, capture_output=True)
    done = subprocess.run([home / "ci/lock-pull-request.sh"], capture_output=True, text=True, check=False)
    assert (done.returncode, f"{branch} is there already" in done.stdout) == (code, there), done.stderr
    assert bool([line for line in calls(home / ".venv/bin") if "golden" in line]) is not there


def test_what_was_pushed_is_looked_at_by_a_login_that_goes_with_the_script(tools: Path, tmp_path: Path) -> None:
    home = tmp_path / "home"
    for folder in ("ci", ".venv/bin"):
        (home / folder).mkdir(parents=True)
    shutil.copy(ROOT / "ci/lock-pull-request.sh", home / "ci")
    subprocess.run(["git", "init", "-q"], cwd=home, check=True)
    tool(tools, "docker", 'echo "$DOCKER_CONFIG" >>"$(dirname "$0")/where"; cat >"$(dirname "$0")/password"')
    tool(home / ".venv/bin", "recipe", f'echo "$DOCKER_CONFIG" >>{tools}/where; exit 6')
    facts = {"TARGET": "n150", "REPOSITORY": "ghcr.io/o/n150", "DIGEST": DIGEST, "ACTOR": "me", "GH_TOKEN": "secret"}
    done = subprocess.run(
        [home / "ci/lock-pull-request.sh"], env=os.environ | facts, capture_output=True, text=True, check=False
    )
    assert done.returncode == 6, done.stderr
    assert calls(tools) == ["docker login ghcr.io --username me --password-stdin"]
    assert (tools / "password").read_text() == "secret\n"
    login, pull = (tools / "where").read_text().split()
    assert (login == pull, Path(login).exists()) == (True, False)
    (called,) = calls(home / ".venv/bin")
    assert called == f"recipe image publish n150 --to ghcr.io/o/n150 --pushed {DIGEST} --replace"


# --- images -----------------------------------------------------------------------------------------------------------


def test_two_builders_are_compared() -> None:
    ours, other = '["sha256:a"]', '["sha256:b"]'
    for first, second, code in ((ours, ours, 0), (ours, other, 6), ("", "", 2), ("[]", "[]", 2), (ours, "", 2)):
        done = subprocess.run(
            [ROOT / "ci/same-layers.sh"], env=os.environ | {"FIRST": first, "SECOND": second}, capture_output=True
        )
        assert done.returncode == code, done.stderr


LOCAL = "recipes-base:bookworm"
LOCKED = f"python:3.11-slim-bookworm@{DIGEST}"


@pytest.mark.parametrize(
    ("digest", "given", "engine", "base"),
    [
        (None, "", "true", LOCAL),
        (None, "mine:1", "true", "mine:1"),
        (None, "mine:1", "false", LOCAL),
        (DIGEST, "mine:1", "true", "mine:1"),
        pytest.param(DIGEST, "", "true", LOCKED, id="the engine has it"),
        pytest.param(DIGEST, "", '[ "$1" != image ]', LOCKED, id="a registry has it"),
        pytest.param(DIGEST, "", '[ "$1" = info ]', LOCAL, id="no registry answers"),
    ],
)
def test_a_base_is_found_and_named(
    digest: str | None, given: str, engine: str, base: str, tools: Path, tmp_path: Path
) -> None:
    (tmp_path / "ci").mkdir()
    (tmp_path / "docker").mkdir()
    shutil.copy(ROOT / "ci/with-base.sh", tmp_path / "ci")
    lock = images.read_lock()
    lock["pins"]["cpu"]["base"]["digest"] = digest
    (tmp_path / "docker/images.lock.json").write_text(json.dumps(lock))
    (tmp_path / "ci/engine.sh").write_text("#!/bin/sh\necho made\n")
    (tmp_path / "ci/engine.sh").chmod(0o755)
    tool(tools, "docker", engine)
    tool(tools, "sudo", '"$@"')
    done = subprocess.run(
        [tmp_path / "ci/with-base.sh", "printenv", "BASE_IMAGE"],
        env={"PATH": os.environ["PATH"], "BASE_IMAGE": given},
        capture_output=True,
        text=True,
        check=False,
    )
    assert (done.returncode, done.stdout.splitlines()[-1]) == (0, base), done.stderr
    assert ("made" in done.stdout) == ("making one" in done.stdout) == (base == LOCAL)
