"""What `make docs RUN=...` puts into the README of a run."""

from __future__ import annotations

import os
import re
import subprocess
import sys
from pathlib import Path
from typing import Any
from xml.etree import ElementTree

import pytest

pytest.importorskip("matplotlib", reason="the picture is matplotlib's")

from ci import shown
from common.errors import UsageError
from common.paths import ROOT
from tests.support.run_folders import write_lines, write_run
from tools.runs.folder import read_run

BACKEND = {
    "backend": "torch-cpu",
    "device": "a toaster",
    "precision": "fp32",
    "world": 1,
    "threads": 2,
    "compiled": False,
    "versions": {},
    "reason": "",
}
WHOLE: dict[str, Any] = {
    "git_commit": "0123abc" + "d" * 33,
    "git_dirty": False,
    "config_digest": "c" * 64,
    "base": {"name": "none", "identity": "seed", "origin": "random", "licence": "none"},
    "backend": BACKEND,
    "peak_memory_mib": 2355,
}


@pytest.fixture
def root(tmp_path: Path) -> Path:
    """A repository's README with the place for a run."""
    root = tmp_path / "root"
    (root / "docs").mkdir(parents=True)
    (root / "README.md").write_text(f"# Before\n\n{shown.BEGIN}\nan old run\n{shown.END}\n\n# After\n")
    return root


def write_whole(out: Path, answers: dict[str, tuple[str, str]], **manifest: Any) -> Path:
    """A run that is done, whose prompts were answered before and after training as said."""
    folder = write_run(out, every=40, **WHOLE | manifest)
    evaluations = read_run(folder).evaluations
    for at, evaluation in enumerate(evaluations):
        evaluation["samples"] = [{"prompt": asked, "answer": said[at], "tokens": 9} for asked, said in answers.items()]
    write_lines(folder / "evaluations.jsonl", evaluations)
    return folder


def test_the_readme_shows_what_the_run_says_and_keeps_the_rest(root: Path, tmp_path: Path) -> None:
    answers = {f"Prompt {letter}?": (f"{letter} was so.", f"{letter} is so.") for letter in "ABCDE"}
    assert shown.show(write_whole(tmp_path, answers), root) == [root / "docs/run.svg", root / "README.md"]
    page = (root / "README.md").read_text()
    assert page.startswith("# Before\n\n")
    assert page.endswith("\n\n# After\n")
    assert "an old run" not in page
    assert "on a toaster, 2 threads:\n40 steps, 1m00s from start to checked export, 2.3 GiB of memory." in page
    assert "7.1363 → 3.6776 nats a token,\nbetter by 3.4587 ± 0.0000" in page
    assert "of `from_scratch` at commit 0123abc, 2026-01-01," in page
    shows = [f"**Prompt {letter}?**<br>\n*before:* {letter} was so.<br>\n*after:* {letter} is so." for letter in "ACE"]
    assert "\n\n".join(shows) in page
    assert "Prompt B" not in page
    assert "Prompt D" not in page


def test_the_same_run_gives_the_same_bytes(root: Path, tmp_path: Path) -> None:
    folder = write_whole(tmp_path, dict.fromkeys("ABC", ("no", "yes")))
    first = [path.read_bytes() for path in shown.show(folder, root)]
    assert [path.read_bytes() for path in shown.show(folder, root)] == first


def test_what_a_model_writes_is_text_and_is_cut_off_behind_a_word(root: Path, tmp_path: Path) -> None:
    hostile = "<img src=x>\n\n# a | b `c` [d](http://e) $f$ *g* " + "word " * 40
    shown.show(write_whole(tmp_path, {"A": ("", hostile), "B": ("x" * 300, "b"), "C": ("c", "c")}), root)
    page = (root / "README.md").read_text()
    assert r"*after:* \<img src=x\> \# a \| b \`c\` \[d\](http://e) \$f\$ \*g\* word" in page
    assert " word …\n" in page
    assert f"*before:* {'x' * shown.ANSWER} …<br>" in page


@pytest.mark.parametrize(
    ("changed", "words"),
    [
        ({"git_dirty": True}, "from a clean tree"),
        ({"git_dirty": None}, "from a clean tree"),
        ({"exit_reason": "stopped: Ctrl-C"}, "a run that is done"),
        ({"overrides": ["training_config.seed=1"]}, "as it stands"),
        ({"command": ["recipe", "run", "from_scratch", "--steps", "5"]}, "as it stands"),
    ],
)
def test_a_run_that_cannot_be_made_again_is_not_shown(changed: Any, words: str, root: Path, tmp_path: Path) -> None:
    folder = write_whole(tmp_path, dict.fromkeys("ABC", ("no", "yes")), **changed)
    refused(folder, root, words)


def test_a_run_without_three_answers_before_and_after_is_not_shown(root: Path, tmp_path: Path) -> None:
    refused(write_whole(tmp_path / "few", {"A": ("no", "yes"), "B": ("no", "yes")}), root, "three answers")
    folder = write_whole(tmp_path / "once", dict.fromkeys("ABC", ("no", "yes")))
    write_lines(folder / "evaluations.jsonl", read_run(folder).evaluations[:1])
    refused(folder, root, "three answers")


def test_a_readme_without_the_place_is_refused(root: Path, tmp_path: Path) -> None:
    (root / "README.md").write_text("# A fork's own\n")
    refused(write_whole(tmp_path, dict.fromkeys("ABC", ("no", "yes"))), root, "both markers")


def refused(folder: Path, root: Path, words: str) -> None:
    """Nothing is written where a run is refused."""
    before = (root / "README.md").read_bytes()
    with pytest.raises(UsageError, match=words):
        shown.show(folder, root)
    assert (root / "README.md").read_bytes() == before
    assert not (root / "docs/run.svg").exists()


def test_make_docs_names_a_run_that_is_not_there() -> None:
    words = [sys.executable, "-m", "ci.docs"]
    environment = os.environ | {"RUN": "runs/gone", "PYTHONPATH": str(ROOT)}
    done = subprocess.run(words, env=environment, cwd=ROOT, capture_output=True, text=True, check=False)
    assert done.returncode == 2
    assert "no run there" in done.stderr
    assert "runs/gone" in done.stderr


def test_a_picture_is_small_has_both_themes_and_needs_nothing(root: Path, tmp_path: Path) -> None:
    """GitHub shows it as a picture: no script runs in one, and nothing is fetched."""
    shown.show(write_whole(tmp_path, dict.fromkeys("ABC", ("no", "yes"))), root)
    for path in (root / shown.PICTURE, ROOT / shown.PICTURE):
        text = path.read_text()
        assert len(text) < 60_000
        used = set(re.findall(r"var\((--[\w-]+)\)", text))
        light, dark = text.split("@media (prefers-color-scheme: dark)")
        for theme in (light, dark.partition("</style>")[0]):
            assert used <= set(re.findall(r"(--[\w-]+):", theme))
        for element in ElementTree.fromstring(text).iter():
            assert element.tag.rpartition("}")[2] not in ("script", "image", "foreignObject", "a")
            names = [name.rpartition("}")[2] for name in element.attrib]
            assert not [name for name in names if name.startswith("on") or name == "src"]
        assert not re.findall(r"href=\"[^#]|url\([^#]|@import", text)


def test_the_readme_of_this_repository_has_the_figures_of_its_picture() -> None:
    _, _, rest = (ROOT / "README.md").read_text().partition(shown.BEGIN)
    block, _, _ = rest.partition(shown.END)
    picture = (ROOT / shown.PICTURE).read_text()
    _, _, figures = block.partition("Held-out loss ")
    loss = figures.partition(" → ")[2].partition(" ")[0]
    gain = figures.partition("better by ")[2].partition(",")[0]
    assert loss
    assert gain
    assert f">{loss} ± " in picture
    assert f">{gain}<" in picture
