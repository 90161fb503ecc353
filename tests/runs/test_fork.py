"""docs/fork/README.md, followed in a throwaway copy of the repository: the fork of its CSV is found, and trains."""

from __future__ import annotations

import os
import re
import shlex
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

from tests.support.runs import run_tiny

ROOT = Path(__file__).resolve().parents[2]
PAGE = ROOT / "docs/fork/README.md"
COMMANDS = [
    shlex.split(line, comments=True)
    for block in re.findall(r"^```\n(.*?)^```$", PAGE.read_text(encoding="utf-8"), re.MULTILINE | re.DOTALL)
    for line in block.splitlines()
    if line.startswith(("make ", ".venv/bin/recipe "))
]
NEW = dict(word.split("=", 1) for word in COMMANDS[0][2:])
NOT_COPIED = (".git", ".venv*", "__pycache__", ".*_cache", ".new-*", "*.egg-info")
SMALL = ("eval_config.max_new_tokens=2", "device_config.threads=1", "training_config.precision=fp32")

pytestmark = [
    pytest.mark.skipif(
        not (ROOT / "recipes" / NEW["FROM"]).is_dir(),
        reason=f"the recipe {NEW['FROM']}, which the page forks, is not here",
    ),
]


def not_copied(folder: str, names: list[str]) -> set[str]:
    """What a clone does not have, and the runs in the repository's own folder, as shutil's `ignore`."""
    return shutil.ignore_patterns(*NOT_COPIED, *["runs"] * (Path(folder) == ROOT))(folder, names)


class Clone:
    """A copy of the working tree whose `make` uses this Python and sets nothing up."""

    def __init__(self, folder: Path) -> None:
        self.root = Path(shutil.copytree(ROOT, folder / "clone", ignore=not_copied))
        self.home = folder / "home"
        self.script("ci/setup.sh", "exit 0")
        self.script(".venv/bin/recipe", f'exec {shlex.quote(sys.executable)} -m tools.cli "$@"')
        self.script(".venv/bin/python", f'exec {shlex.quote(sys.executable)} "$@"')

    def script(self, name: str, body: str) -> None:
        path = self.root / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(f"#!/bin/bash\n{body}\n")
        path.chmod(0o755)

    def run(self, *words: str) -> str:
        """What a command printed; it must end with 0."""
        kept = {name: os.environ[name] for name in ("PATH", "HOME") if name in os.environ}
        environment = {**kept, "PYTHONPATH": str(self.root), "RECIPES_HOME": str(self.home), "OMP_NUM_THREADS": "1"}
        done = subprocess.run(
            words, cwd=self.root, env=environment, capture_output=True, text=True, check=False, timeout=600
        )
        assert done.returncode == 0, done.stdout + done.stderr
        return done.stdout


@pytest.fixture(scope="module")
def clone(tmp_path_factory) -> Clone:
    return Clone(tmp_path_factory.mktemp("fork"))


@pytest.fixture(scope="module")
def screen(clone) -> str:
    """What the page's first command prints; from here on its recipe is in the clone."""
    return clone.run(*COMMANDS[0])


@pytest.fixture(scope="module")
def recipe(clone, screen) -> Path:
    return clone.root / "recipes" / NEW["NAME"]


def test_the_page_shows_what_its_first_command_prints(screen):
    page = PAGE.read_text(encoding="utf-8")
    shown = [line for line in screen.splitlines() if re.match(r"  \w+_config\.", line)]
    assert len(shown) >= 10
    assert not [line for line in shown if line not in page]


def test_make_docs_finds_the_fork_and_has_nothing_to_do_then(clone, recipe):
    clone.run("make", "docs")
    assert f"| [`{recipe.name}`]({recipe.name}) |" in (clone.root / "recipes/README.md").read_text()
    assert f"[`{recipe.name}`](recipes/{recipe.name})" in (clone.root / "README.md").read_text()
    assert "written" not in clone.run("make", "docs")


def test_its_data_check_finds_nothing_but_the_missing_licence(clone, recipe, tiny_base):
    base = f"model_config.base={tiny_base}"
    found = clone.run(".venv/bin/recipe", "data", "check", recipe.name, "--hw", "cpu", "--set", base)
    assert re.findall(r"[DL]\d{3}", found) == ["D119"]
    assert "60 train, 8 held out rows; errors: 0" in found


def test_it_trains_resumes_and_exports(recipe, tmp_path, tiny_base, monkeypatch):
    pytest.importorskip("torch", reason="the CPU engine is torch")
    from common.errors import Stopped
    from tests.support.runs import folders, manifest

    monkeypatch.setenv("RECIPES_HOME", str(tmp_path / "home"))
    overrides = (*SMALL, f"model_config.base={tiny_base}", "eval_config.every=2")
    with pytest.raises(Stopped):
        run_tiny(recipe, tmp_path, *overrides, steps=4, stop_at=2)
    run = run_tiny(recipe, tmp_path, *overrides, steps=4, resume="auto")
    assert [run] == folders(tmp_path)
    values = manifest(run)
    assert values["exit_reason"] == "done"
    assert [event["step"] for event in values["resumed"]] == [2]
    assert values["export"]["status"] == "verified", values["export"]
    assert (run / "before_after.md").is_file()


@pytest.mark.slow
def test_what_is_tested_of_every_recipe_holds_for_the_fork(clone, recipe):
    clone.run("make", "docs")
    chosen = [
        "-m",
        "not slow",
        "-k",
        f"{recipe.name} or test_docs",
        "tests/recipes",
        "tests/runs",
        "tests/ci/test_docs.py",
    ]
    done = clone.run(".venv/bin/python", "-m", "pytest", "-q", "-n", "0", "-p", "no:cacheprovider", *chosen)
    assert int(re.findall(r"(\d+) passed", done)[0]) > 20


@pytest.mark.slow
def test_a_fork_from_plain_text_trains(clone, tmp_path, monkeypatch):
    pytest.importorskip("torch", reason="the CPU engine is torch")
    from tests.doubles.tiny_recipe import write_play
    from tests.support.runs import manifest

    parents = [path.parent for path in clone.root.glob("recipes/*/config.yaml") if "corpus:" in path.read_text()]
    if not parents:
        pytest.skip("no recipe here trains on plain text")
    text = write_play(tmp_path / "play.txt", scenes=400)
    for parent in parents:
        name = f"young-{parent.name}"
        clone.run("make", "new-recipe", f"NAME={name}", f"FROM={parent.name}", f"DATA={text}")
        monkeypatch.setenv("RECIPES_HOME", str(tmp_path / "home"))
        small = ("device_config.mesh_shape=[1,1]", "eval_config.max_rows=4", "training_config.batch_size=4")
        run = run_tiny(clone.root / "recipes" / name, tmp_path / name, *SMALL, *small, steps=2)
        assert manifest(run)["export"]["status"] == "verified"
