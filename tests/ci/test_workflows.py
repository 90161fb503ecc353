"""The workflows: least rights, pinned actions, no word of an event in a shell, and whose code reaches a board."""

from __future__ import annotations

import os
import re
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import yaml

from ci import matrix
from common import hardware

ROOT = Path(__file__).resolve().parents[2]
FOLDER = ROOT / ".github/workflows"
TEXTS = {path.name: path.read_text() for path in sorted(FOLDER.glob("*.yml"))}
BOARDS = [board.name for board in hardware.table().values() if not board.is_cpu]
TARGETS = set(re.findall(r"^([a-z][a-z-]*):", (ROOT / "Makefile").read_text(), re.MULTILINE))
TRUSTED = "github.ref == 'refs/heads/main' && github.ref_protected"
Workflow = dict[str, Any]


def complaints(text: str) -> list[str]:
    """What is wrong with a workflow, in words."""
    workflow = {"on" if key is True else key: value for key, value in yaml.safe_load(text).items()}  # YAML 1.1's `on`
    return [*of_pins(text), *of_workflow(workflow), *of_jobs(workflow)]


def of_pins(text: str) -> Iterator[str]:
    for line in re.findall(r"\buses:.*", text):
        if not re.fullmatch(r"uses: [\w-]+/[\w-]+@[0-9a-f]{40} # v\d+\.\d+\.\d+", line):
            yield f"no commit with its version: {line}"


def of_workflow(workflow: Workflow) -> Iterator[str]:
    events = set(workflow["on"] if isinstance(workflow["on"], (dict, list)) else [workflow["on"]])
    own = any(on_a_board(job) for job in workflow["jobs"].values())
    if workflow.get("permissions") != {}:
        yield "permissions are not {} for a start"
    if "concurrency" not in workflow:
        yield "no concurrency"
    elif own and workflow["concurrency"].get("cancel-in-progress"):
        yield "jobs on boards are cancelled by newer ones"
    if own and (strange := events - {"schedule", "workflow_dispatch"}):
        yield f"jobs on boards are started by {', '.join(sorted(strange))}"
    if events & {"pull_request", "pull_request_target"} and "secrets." in str(workflow):
        yield "a secret in a workflow of pull requests"
    if "pull_request" in events and any(set(rights(job).values()) - {"read"} for job in workflow["jobs"].values()):
        yield "code of forks gets a token that can write"
    if "pull_request_target" in events and any(ref != "main" for ref in refs(workflow)):
        yield "pull_request_target checks out something else than main"


def of_jobs(workflow: Workflow) -> Iterator[str]:
    for name, job in workflow["jobs"].items():
        if "permissions" not in job or not isinstance(job["permissions"], dict):
            yield f"{name}: no permissions of its own"
        if not isinstance(job.get("timeout-minutes"), int):
            yield f"{name}: no timeout"
        foreign = any("commit" in ref or "head" in ref for ref in refs({"jobs": {name: job}}))
        if foreign and set(rights(job).values()) - {"read"}:
            yield f"{name}: another's code beside a token that can write"
        yield from (f"{name}: {line}" for step in job["steps"] for line in of_step(step))
        if on_a_board(job):
            yield from (f"{name}: {line}" for line in of_board_job(job))


def of_step(step: dict[str, Any]) -> Iterator[str]:
    if (
        str(step.get("uses", "")).startswith("actions/checkout@")
        and step["with"].get("persist-credentials") is not False
    ):
        yield "the checkout keeps the token"
    run = step.get("run", "")
    if "${{" in run:
        yield f"an expression in a shell: {run}"
    for line in run.splitlines():
        yield from of_command(line)


def of_command(line: str) -> Iterator[str]:
    """Thin: one command of the project, which exists; its output may go to the step's outputs."""
    words = line.removesuffix(' >>"$GITHUB_OUTPUT"').removeprefix("exec ").removeprefix("ci/with-base.sh ").split()
    if words[0] == "make":
        known = words[1] in TARGETS
    elif words[0].startswith("ci/"):
        known = os.access(ROOT / words[0], os.X_OK)
    elif words[:2] == [".venv/bin/python", "-m"]:
        known = words[2:] == ["pip", "check"] or (ROOT / f"{words[2].replace('.', '/')}.py").is_file()
    else:
        known = False
    if not known or re.search(r"[;&|`]|\$\(", line):
        yield f"neither make nor ci/, or no such thing: {line}"


def of_board_job(job: dict[str, Any]) -> Iterator[str]:
    """Its phases, their order and time are compared with the rehearsal in test_hardware_job.py."""
    concurrency = job.get("concurrency", {})
    if concurrency != {"group": "hardware-${{ matrix.board }}", "cancel-in-progress": False, "queue": "max"}:
        yield "its board can be given to two, or a waiting job be dropped"
    if TRUSTED not in " ".join(job.get("if", "").split()):
        yield "no look at whose code it is"
    if "environment" not in job:
        yield "no environment, so no reviewer"
    if job["strategy"].get("fail-fast") is not False:
        yield "one board's failure cancels another's job"
    steps = job["steps"]
    if [step for step in steps if "run" in step and "timeout-minutes" not in step]:
        yield "a step without a timeout"
    if sum(step.get("timeout-minutes", 0) for step in steps) > job["timeout-minutes"]:
        yield "the job ends before its steps' own time is up"
    if any(re.match(r"(?!exec )\S*ci/hardware\.sh", step.get("run", "")) for step in steps):
        yield "a phase that gets no signal: a runner signals the step's own process alone, so `exec`"
    if "upload-artifact@" not in steps[-1].get("uses", "") or steps[-1].get("if") != "always()":
        yield "artifacts are not always kept"


def on_a_board(job: dict[str, Any]) -> bool:
    return not re.fullmatch(r"ubuntu-\d\d\.04", str(job["runs-on"]))


def rights(job: dict[str, Any]) -> dict[str, str]:
    return dict(job.get("permissions") or {})


def refs(workflow: Workflow) -> list[str]:
    """What is checked out, the default as an empty word."""
    steps = [step for job in workflow["jobs"].values() for step in job["steps"]]
    return [step["with"].get("ref", "") for step in steps if "actions/checkout@" in step.get("uses", "")]


# --- the workflows as they are ----------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", TEXTS)
def test_a_workflow_keeps_the_rules(name: str) -> None:
    assert complaints(TEXTS[name]) == []


def test_an_action_has_one_version_everywhere() -> None:
    used = {tuple(use) for text in TEXTS.values() for use in re.findall(r"uses: (\S+)@(\S+ # v\S+)", text)}
    assert len(used) == len({action for action, _ in used}) > 0


def test_only_the_hardware_workflow_has_boards() -> None:
    own = [name for name, text in TEXTS.items() if any(map(on_a_board, yaml.safe_load(text)["jobs"].values()))]
    assert own == ["hardware.yml"]


def test_every_pull_request_runs_what_a_contributor_is_told_to_run() -> None:
    for command in (
        "make lint",
        "make test",
        "make test-runs",
        "make test-processes",
        "make golden",
        "make test-containers",
    ):
        assert re.search(rf"run: (?:ci/with-base\.sh )?{command}$", TEXTS["ci.yml"], re.MULTILINE), command
    versions = re.findall(r'"(3\.\d+)"', re.search(r"python: (\[.*\])", TEXTS["ci.yml"])[1])  # type: ignore[index]
    offered = re.findall(r"Python :: (3\.\d+)", (ROOT / "pyproject.toml").read_text())
    assert versions == offered


def test_what_is_too_slow_for_a_pull_request_runs_every_week() -> None:
    for command in ("make test-all", "ci/without-recipe.sh", "ci/weekly.sh"):
        assert re.search(rf"run: (?:ci/with-base\.sh )?{command}$", TEXTS["weekly.yml"], re.MULTILINE), command


@pytest.mark.parametrize(
    ("name", "old", "new", "says"),
    [
        ("ci.yml", "@08c6903cd8c0fde910a37f88322edcfb5dd907a8 # v5.0.0", "@v5", "no commit with its version"),
        ("ci.yml", " # v5.0.0", "", "no commit with its version"),
        ("ci.yml", "permissions: {}", "permissions: read-all", "permissions are not {}"),
        ("ci.yml", "    permissions:\n      contents: read # checkout\n", "", "no permissions of its own"),
        ("ci.yml", "contents: read", "contents: write", "code of forks gets a token that can write"),
        ("ci.yml", "    timeout-minutes: 20\n", "", "no timeout"),
        ("ci.yml", "{persist-credentials: false}", "{fetch-depth: 1}", "keeps the token"),
        ("ci.yml", "run: make lint", "run: make lint-all", "no such thing"),
        ("ci.yml", "run: ci/browser.sh", "run: ci/missing.sh", "no such thing"),
        ("ci.yml", "run: make lint", "run: curl -fsSL example.org | sh", "neither make nor ci/"),
        ("ci.yml", "run: make lint", "run: make lint; id", "neither make nor ci/"),
        ("ci.yml", "run: make lint", "run: make lint HW=${{ github.head_ref }}", "an expression in a shell"),
        ("ci.yml", "make rehearse", "make rehearse\n        env: {A: '${{ secrets.A }}'}", "a secret in a workflow"),
        ("weekly.yml", "-m ci.matrix --cpu", "-m ci.gone --cpu", "no such thing"),
        ("hardware-label.yml", "ref: main", "ref: ${{ github.event.pull_request.head.sha }}", "else than main"),
        ("hardware.yml", "  schedule:", "  pull_request:\n  schedule:", "are started by pull_request"),
        ("hardware.yml", "cancel-in-progress: false", "cancel-in-progress: true", "cancelled by newer ones"),
        ("hardware.yml", "      queue: max\n", "", "a waiting job be dropped"),
        ("hardware.yml", "group: hardware-${{ matrix.board }}", "group: hardware", "given to two"),
        ("hardware.yml", "github.ref_protected &&\n", "true &&\n", "whose code it is"),
        ("hardware.yml", "    environment: ", "    # environment: ", "no reviewer"),
        ("hardware.yml", "fail-fast: false", "fail-fast: true", "cancels another's job"),
        (
            "hardware.yml",
            "run: make setup\n        timeout-minutes: 15\n",
            "run: make setup\n",
            "a step without a timeout",
        ),
        ("hardware.yml", "timeout-minutes: 350", "timeout-minutes: 200", "before its steps' own time"),
        ("hardware.yml", "exec ci/hardware.sh train", "ci/hardware.sh train", "gets no signal"),
        ("hardware.yml", "        if: always()\n        with:", "        with:", "artifacts are not always kept"),
        (
            "hardware.yml",
            "contents: read # checkout\n    concurrency",
            "contents: write\n    concurrency",
            "another's code",
        ),
    ],
)
def test_what_breaks_a_rule_is_seen(name: str, old: str, new: str, says: str) -> None:
    assert old in TEXTS[name]
    assert any(says in line for line in complaints(TEXTS[name].replace(old, new)))


def test_a_board_is_chosen_by_mains_code_not_by_the_commits() -> None:
    jobs = yaml.safe_load(TEXTS["hardware.yml"])["jobs"]
    assert jobs["board"]["strategy"]["matrix"] == "${{ fromJSON(needs.allow.outputs.matrix) }}"
    assert refs({"jobs": {"allow": jobs["allow"]}}) == ["main"]
    assert '--board "$BOARDS" --rows "$ROWS"' in jobs["allow"]["steps"][-1]["run"]
    assert "${{ matrix.labels }}" not in TEXTS["hardware.yml"]


def test_a_run_that_was_asked_for_is_never_skipped_in_silence() -> None:
    jobs = yaml.safe_load(TEXTS["hardware.yml"])["jobs"]
    assert jobs["trust"]["if"] == "github.event_name == 'workflow_dispatch' || vars.TT_BOARDS"
    assert {"COMMIT", "BOARDS", "PROTECTED"} <= jobs["trust"]["env"].keys()
    assert jobs["status"]["if"] == "always() && inputs.commit"
    assert set(jobs["status"]["needs"]) == jobs.keys() - {"status"}, "it waits for all that can fail"
    assert jobs["status"]["env"]["COMMIT"] == "${{ inputs.commit }}"


# --- the matrix and its labels ----------------------------------------------------------------------------------------


def test_every_board_with_chips_has_a_runner_label_and_every_recipe() -> None:
    rows = list(matrix.on_boards(matrix.recipes(""), matrix.boards([])))
    assert list(dict.fromkeys(row["board"] for row in rows)) == BOARDS
    job = yaml.safe_load(TEXTS["hardware.yml"])["jobs"]["board"]
    assert job["runs-on"] == ["self-hosted", "tenstorrent", "${{ matrix.board }}"]
    declared = yaml.safe_load((ROOT / ".github/actionlint.yaml").read_text())["self-hosted-runner"]["labels"]
    assert declared == ["tenstorrent", *BOARDS]
