"""`make torture`: what a power cut leaves of calls that are known, and a training through twenty hits."""

from __future__ import annotations

import copy
import os
import random
import re
import shutil
import signal
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest

pytest.importorskip("torch", reason="the CPU engine is torch")

from common import config as configs
from common import hardware
from common.paths import ROOT
from tests.support.shipped import FOLDERS
from tests.torture import watch
from tests.torture.disk import Disk
from tests.torture.life import KINDS, Fault, Hit, Life, Subject, once
from tests.torture.planted import FAULTS

needs_compiler = pytest.mark.skipif(watch.compiler() is None, reason="power cuts need a C compiler")
WRITER = """
import os, signal, sys
from pathlib import Path
from common.files import write_atomic
from tests.torture.watch import shared, watch
root, control = Path(sys.argv[1]), shared()
control.at, control.target, control.signal, control.pids[0] = int(sys.argv[2]), -1, signal.SIGKILL, os.getpid()
assert watch(root, os.open(sys.argv[3], os.O_WRONLY | os.O_APPEND), control)
"""
OLD, NEW = "old " * 300, "new " * 500
WHOLE = "write_atomic(root / 'file', NEW)"
IN_PLACE = "(root / 'file').write_text(NEW)"
NO_FSYNC = "os.fsync = lambda number: None; write_atomic(root / 'file', NEW)"
RENAMED_FIRST = """
(root / 'beside').write_text(NEW)
(root / 'beside').rename(root / 'file')
folder = os.open(root, os.O_RDONLY); os.fsync(folder)
file = os.open(root / 'file', os.O_RDONLY); os.fsync(file)
"""


@pytest.fixture(scope="module")
def library(tmp_path_factory) -> Path:
    found = watch.build(tmp_path_factory.mktemp("library"))
    assert found
    return found


@pytest.fixture
def left(library, tmp_path) -> Callable[..., set[str]]:
    """What forty power cuts can leave of a file after a script that is killed before its `at`-th call; 0: never."""

    def run(script: str, at: int = 0) -> set[str]:
        root, log = tmp_path / "root", tmp_path / "calls.log"
        shutil.rmtree(root, ignore_errors=True)
        root.mkdir()
        (root / "file").write_text(OLD)
        disk = Disk(root, log)
        words = [sys.executable, "-c", f"{WRITER}\nNEW = {NEW!r}\n{script}", str(root), str(at), str(log)]
        done = subprocess.run(words, cwd=ROOT, env={**os.environ, "LD_PRELOAD": str(library)}, check=False)
        assert done.returncode in ((0, -signal.SIGKILL) if at else (0,))
        disk.read()
        assert not disk.unseen()
        found = set()
        for seed in range(40):
            copy.deepcopy(disk).cut(random.Random(seed))
            file = root / "file"
            found.add(file.read_text() if file.exists() else "gone")
        return found | ({"ended"} if done.returncode == 0 else set())

    return run


@needs_compiler
def test_a_file_that_was_written_whole_is_the_new_one_after_every_cut_and_never_a_part(left):
    assert left(WHOLE) == {NEW, "ended"}
    number, found = 0, set[str]()
    while "ended" not in found:
        number += 1
        found |= left(WHOLE, at=number)
    assert found == {OLD, NEW, "ended"}
    assert number > 4, "created, written, synced, renamed"


@needs_compiler
@pytest.mark.parametrize("script", [IN_PLACE, NO_FSYNC, RENAMED_FIRST], ids=["in place", "no fsync", "renamed first"])
def test_a_cut_leaves_a_part_of_what_was_written_otherwise(left, script):
    found, number = left(script), 0
    while not found - {OLD, NEW, "ended"} and number < 8:
        number += 1
        found |= left(script, at=number)
    assert found - {OLD, NEW, "ended"}


def test_a_blow_that_comes_as_the_run_ends_is_none(tmp_path):
    """The command has its code and gives back its memory, which takes a millisecond or more; nothing kills it then."""

    def struck(kind: str, call: int) -> str:
        def strike(_found: object, hit: Hit) -> None:
            hit.came = "step 8 saved"

        body: Any = SimpleNamespace(
            subject=Subject("cpu/a", [], 1, False), log=tmp_path / "calls.log", strike=strike, check=lambda: None
        )
        body.start = lambda _hit: SimpleNamespace(control=SimpleNamespace(calls=0))
        body.end = lambda _found: 0
        hit = Hit(kind, 8, call, 1, 0.1, 0, False)
        once(body, hit, Life("cpu/a", 0), random.Random(0))
        return hit.came

    assert [struck(kind, 0) for kind in ("kill -9", "power cut", "SIGTERM")] == ["", "", "step 8 saved"]
    with pytest.raises(Fault, match="ended with 0"):  # the process was alive: it made that call
        struck("kill -9", 3)


def torture(**asked: str) -> subprocess.CompletedProcess[str]:
    environment = {name: value for name, value in os.environ.items() if name not in ("NAME", "HOURS", "AT", "FAULT")}
    words = [sys.executable, "-m", "tests.torture"]
    return subprocess.run(
        words, cwd=ROOT, env={**environment, **asked}, capture_output=True, text=True, check=False, timeout=900
    )


def small(recipe: Path) -> dict[str, str]:
    """Ask for this recipe alone, on the default engine."""
    if (configs.load(recipe, hardware.get("cpu")).data.source or "").startswith("hub:"):
        pytest.skip("its rows come from the Hub, and no test uses the network")
    return {"ENGINE": "cpu", "NAME": recipe.name, "SEED": "7"}


@pytest.mark.parametrize(
    "recipe",
    [pytest.param(path, marks=() if path == FOLDERS[-1] else pytest.mark.slow) for path in FOLDERS],
    ids=lambda path: path.name,
)
def test_a_training_comes_through_twenty_hits_as_the_unbroken_one(recipe):
    """What is hit is common/train and tools/launch, the same for every recipe: one of them is enough for every day."""
    done = torture(KILLS="20", **small(recipe))
    assert done.returncode == 0, done.stdout + done.stderr
    (hits,) = map(int, re.findall(r"^(\d+) hits in \d+ trainings, .*: all equal$", done.stdout, re.MULTILINE))
    assert hits >= 20
    came = {
        line[2:14].strip(): sum(map(int, line[14:].split()))
        for line in done.stdout.splitlines()
        if line[2:14].strip() in KINDS
    }
    assert sum(came.values()) == hits
    assert came["kill -9"] > 0
    assert came["power cut"] > 0 or watch.compiler() is None


@pytest.mark.slow  # a rank is a process, and the double is imported anew in each
@pytest.mark.parametrize("engine", ["cpu-x2", "double"])
def test_a_training_on_another_engine_comes_through_hits_too(engine):
    done = torture(KILLS="10", **{**small(FOLDERS[-1]), "ENGINE": engine})
    assert done.returncode == 0, done.stdout + done.stderr
    assert f"{engine}: " in done.stdout
    assert ": all equal" in done.stdout


@needs_compiler
@pytest.mark.slow
@pytest.mark.parametrize("fault", FAULTS)
def test_a_planted_defect_is_found_and_its_life_can_be_lived_again(fault):
    asked = small(FOLDERS[-1])
    done = torture(KILLS="200", FAULT=fault, **asked)
    assert done.returncode == 6, done.stdout + done.stderr
    (life,) = re.findall(r"^FAILED: make torture SEED=7 AT=(\S+)", done.stdout, re.MULTILINE)[:1]
    assert "FAILED" in torture(AT=life, FAULT=fault, SEED="7").stdout


def test_a_word_that_is_not_known_is_refused():
    done = torture(ENGINE="gpu")
    assert done.returncode == 2
    assert "one of cpu, cpu-x2, double" in done.stderr
