"""Another user's folder of runs: it is looked at, and whatever would write into it says so in one message."""

from __future__ import annotations

import os
import subprocess
import sys
import tempfile
from collections.abc import Iterator
from pathlib import Path

import pytest

from common.paths import ROOT
from tests.doubles.machines import bare_environment
from tests.support import run_folders

# Root may write anywhere: here without that right, which leaves it what a folder's mode says.
WITHOUT_RIGHTS = () if os.getuid() else ("setpriv", "--bounding-set=-dac_override,-dac_read_search,-fowner")


def kept() -> bool:
    """Return whether root cannot give its rights up here."""
    try:
        return subprocess.run([*WITHOUT_RIGHTS, "true"], check=False).returncode != 0
    except FileNotFoundError:
        return True


pytestmark = pytest.mark.skipif(kept(), reason="root, and no setpriv that may give its rights up")


@pytest.fixture
def theirs() -> Iterator[Path]:
    """A run in a folder that everybody may read and its owner alone may change."""
    with tempfile.TemporaryDirectory() as place:  # not tmp_path, into which only its owner may look
        run = run_folders.write_run(Path(place) / "out", checkpoints=[20, 40])
        (Path(place) / "home").mkdir(mode=0o777)
        Path(place).chmod(0o755)
        (Path(place) / "home").chmod(0o777)
        for path in (run.parent, *run.parent.rglob("*")):
            path.chmod(0o555 if path.is_dir() else 0o444)
        yield run
        for path in (run.parent, *run.parent.rglob("*")):
            path.chmod(0o755)


@pytest.mark.parametrize(
    ("words", "code"),
    [
        (["runs", "list", "--out", "OUT"], 0),
        (["runs", "show", "RUN"], 0),
        (["explain", "RUN"], 0),
        (["report", "RUN"], 4),
        (["report", "--out", "OUT"], 4),
        (["runs", "prune", "RUN", "--yes"], 4),
        (["export", "RUN"], 4),
        (["export", "RUN", "--check"], 4),
        (["run", "from_scratch", "--hw", "cpu", "--out", "OUT"], 4),
    ],
    ids=lambda words: " ".join(words) if isinstance(words, list) else None,
)
def test_it_is_read_and_not_written(words: list[str], code: int, theirs: Path):
    recipe = ROOT / "tests/doubles/recipes/from_scratch"
    given = [{"RUN": str(theirs), "OUT": str(theirs.parent), "from_scratch": str(recipe)}.get(w, w) for w in words]
    place = theirs.parent.parent
    environment = {**bare_environment(), "PYTHONPATH": str(ROOT), "HOME": str(place / "home")}
    environment |= {"RECIPES_HOME": str(place / "home/cache"), "PYTHONDONTWRITEBYTECODE": "1"}
    before = sorted(path.relative_to(place) for path in theirs.parent.rglob("*"))
    command = [*WITHOUT_RIGHTS, sys.executable, "-m", "tools.cli", *given]
    done = subprocess.run(command, env=environment, cwd=place, capture_output=True, text=True, check=False)
    assert done.returncode == code, done.stdout + done.stderr
    assert "Traceback" not in done.stderr
    assert sorted(path.relative_to(place) for path in theirs.parent.rglob("*")) == before
