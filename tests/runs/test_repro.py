"""A run again from its manifest: the same bits, or what cannot be restored; other data is refused before training."""

from __future__ import annotations

import json
import os
import shutil
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

pytest.importorskip("torch", reason="the CPU engine is torch")

from common.errors import UsageError, VerificationError
from common.paths import ROOT
from tests.doubles.tiny_recipe import make_tiny_recipe, without_after_run
from tests.support.runs import manifest, outcome, run_tiny
from tools.cli import main
from tools.containers import images
from tools.containers.images import Image
from tools.git import git, head
from tools.results import repro
from tools.runs.folder import read_run


@pytest.fixture(scope="module", autouse=True)
def home(tmp_path_factory) -> Iterator[None]:
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("RECIPES_HOME", str(tmp_path_factory.mktemp("home")))
        yield


@pytest.fixture(scope="module")
def recipe(tiny_base, tmp_path_factory) -> Path:
    return without_after_run(make_tiny_recipe(tmp_path_factory.mktemp("recipe") / "tiny", tiny_base))


@pytest.fixture(scope="module")
def done(recipe, tmp_path_factory) -> Path:
    """A run of three steps with settings of its own; read only."""
    more = ("training_config.learning_rate=0.02", "eval_config.max_new_tokens=2")
    folder = run_tiny(recipe, tmp_path_factory.mktemp("out"), *more, steps=3, export=False)
    return edit(folder, git_dirty=False, git_commit=head()[0])


def edit(folder: Path, **values: object) -> Path:
    path = folder / "manifest.json"
    path.write_text(json.dumps({**json.loads(path.read_text()), **values}))
    return folder


@pytest.fixture
def clean(monkeypatch) -> None:
    """As if the tree of these tests were the commit that HEAD is."""
    monkeypatch.setattr(repro, "head", lambda: (head()[0], False))


def test_a_run_is_reproduced_bit_for_bit_and_its_settings_come_from_the_run(done, recipe, clean, tmp_path, capfd):
    changed = Path(shutil.copytree(recipe, tmp_path / "tiny"))
    text = (changed / "config.yaml").read_text()
    (changed / "config.yaml").write_text(text.replace('"seed": 1', '"seed": 7'))
    run = edit(Path(shutil.copytree(done, tmp_path / "run")), recipe_dir=str(changed))
    said: list[str] = []
    new = repro.repro(run, tmp_path / "again", said.append)
    assert said[-1] == "reproduced bit for bit: 3 steps, 2 evaluations, the last checkpoint"
    assert "restored from config.resolved.yaml: training_config.seed, model_config.lora" in said, (
        "its ties are named now"
    )
    assert not [line for line in said if line.startswith("cannot be restored")]
    assert outcome(new) == outcome(run)
    assert manifest(new)["training_digest"] == manifest(run)["training_digest"]
    assert "step 3/3" in capfd.readouterr().out


def test_a_run_of_format_1_gets_its_split_back_from_the_code_of_now(done, tmp_path):
    run = Path(shutil.copytree(done, tmp_path / "run"))
    path = run / "config.resolved.yaml"
    text = path.read_text().replace("format: 2", "format: 1").replace("batch_size: 4", "batch_size: 2", 1)
    path.write_text(text.replace("micro_batch_size: 4", "gradient_accumulation_steps: 2"))
    found = repro.prepare(read_run(edit(run, overrides=["training_config.batch_size=2"])), ROOT, print)
    for setting in ("training_config.batch_size=4", "training_config.micro_batch_size=2"):
        assert setting in found.settings


def test_with_one_row_changed_nothing_is_trained(done, recipe, clean, tmp_path, monkeypatch, capsys):
    changed = Path(shutil.copytree(recipe, tmp_path / "tiny"))
    rows = (changed / "data" / "rows.jsonl").read_text()
    (changed / "data" / "rows.jsonl").write_text(rows.replace("downhill", "uphill", 1))
    run = edit(Path(shutil.copytree(done, tmp_path / "run")), recipe_dir=str(changed))
    monkeypatch.setattr(sys, "argv", ["recipe", "repro", str(run), "--out", str(tmp_path / "again")])
    with pytest.raises(SystemExit) as ended:
        main.main()
    assert ended.value.code == 3
    assert "the data changed since the run" in capsys.readouterr().err
    assert not (tmp_path / "again").exists()


def test_what_is_another_here_is_said(done, tmp_path, monkeypatch):
    monkeypatch.setattr(images, "read_local", dict)

    def lost(**values: object) -> list[str]:
        folder = edit(Path(shutil.copytree(done, tmp_path / f"run{len(list(tmp_path.iterdir()))}")), **values)
        return list(repro.lost_environment(read_run(folder, strict=True), ROOT))

    engine = manifest(done)["backend"]
    assert lost() == []
    assert "another sha256" in lost(lock_sha256="0" * 64)[0]
    assert "torch 1.0: " in lost(backend=engine | {"versions": {"torch": "1.0"}})[0]
    assert "the CPU's class: a toaster" in lost(cpu_class="a toaster")[0]
    assert "the image: sha256:1; here none" in lost(image={"reference": "sha256:1"})[0]
    monkeypatch.setattr(repro, "image_for", lambda hw: Image(hw.image, "sha256:1", "local", "1"))
    assert lost(image={"reference": "sha256:1"}) == []
    assert lost(image={"reference": "sha256:1"}, lock_sha256="0" * 64) == [], "what is in it is not of this environment"
    assert "the image: sha256:2; here sha256:1" in lost(image={"reference": "sha256:2"})[0]
    assert "a board promises none" in lost(backend=engine | {"backend": "ttml"})[0]
    asked: dict[str, object] = {"at": "", "command": [], "overrides": [], "config_digest": ""}
    resumed = [{**asked, "step": 2, "notes": ["changed: device_config.threads: 1 -> 2"]}]
    assert "after step 2, which changed something" in lost(resumed=resumed)[0]


def test_a_branch_of_another_run_is_refused(done, tmp_path):
    run = edit(Path(shutil.copytree(done, tmp_path / "run")), parent="other/step-00000002")
    with pytest.raises(UsageError, match="starts from a checkpoint of another one, other/step-00000002"):
        repro.repro(run, tmp_path, lambda line: None)


def test_the_code_is_that_of_the_commit_and_its_tree_goes_away_again(done, tmp_path, monkeypatch):
    root = tmp_path / "root"
    root.mkdir()
    for module in ("tools.git", "tools.results.repro"):
        monkeypatch.setattr(f"{module}.ROOT", root)
    author = ("-c", "user.name=a", "-c", "user.email=b")
    for version in ("one", "two"):
        (root / "code.py").write_text(version)
        for command in (["init", "-q"], ["add", "."], [*author, "commit", "-qm", version]):
            subprocess.run(["git", "-C", str(root), *command], check=True)
    first = git("rev-parse", "HEAD~1").stdout.strip()
    with repro.code_of(read_run(edit(copy(done, tmp_path), git_commit=first), strict=True), lambda line: None) as (
        tree,
        lost,
    ):
        assert (tree / "code.py").read_text() == "one"
        assert not lost
    assert not tree.exists()
    assert len(git("worktree", "list").stdout.splitlines()) == 1
    assert (root / "code.py").read_text() == "two"
    for values, words in (
        ({"git_commit": "0" * 40}, "is not in this repository"),
        ({"git_dirty": True}, "not a commit"),
    ):
        with repro.code_of(read_run(edit(copy(done, tmp_path), **values), strict=True), lambda line: None) as (
            tree,
            lost,
        ):
            assert tree == root
            assert words in lost[0]


def copy(folder: Path, to: Path) -> Path:
    return Path(shutil.copytree(folder, to / f"copy{len(list(to.iterdir()))}"))


def test_a_difference_is_named_and_fails_where_the_same_bits_are_expected(done, tmp_path):
    run, other = read_run(done, strict=True), copy(done, tmp_path)
    lines = [json.loads(line) for line in (other / "metrics.jsonl").read_text().splitlines()]
    for line in lines:
        if line["step"] == 2 and "loss" in line:
            line["loss"] += 1e-15
    (other / "metrics.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines))
    new = read_run(other, strict=True)
    with pytest.raises(VerificationError, match="not reproduced: loss of step 2: ") as error:
        repro.compare(run, new, True, lambda line: None)
    assert error.value.code == 6
    said: list[str] = []
    repro.compare(run, new, False, said.append)
    assert said[0].startswith("not the same bits, which were not to be expected: loss of step 2")


def test_the_last_checkpoint_and_every_answer_are_compared_too(done, tmp_path):
    run, other = read_run(done, strict=True), copy(done, tmp_path)
    state = other / "checkpoints" / "step-00000003"
    shutil.rmtree(state)
    assert repro.first_difference(run, read_run(other, strict=True)) is not None
    text = (other / "evaluations.jsonl").read_text()
    (other / "evaluations.jsonl").write_text(text.replace('"answer": "', '"answer": "?', 1))
    assert repro.first_difference(run, read_run(other, strict=True)) == "the evaluation after step 0"
    os.truncate(other / "evaluations.jsonl", 0)
    assert repro.first_difference(run, read_run(other, strict=True)) == "2 evaluations, now 0"
