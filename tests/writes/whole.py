"""Whole runs, through the command: all that training, export and page write, on the CPU engine and on the double.

`before` needs torch and a second or two, so these are tried with `make test-all` alone.
"""

from __future__ import annotations

import contextlib
import os
from collections.abc import Callable
from pathlib import Path

from common.data.tokens import TokenDataset
from common.train import checkpoint, metrics
from common.train.manifest import Manifest
from tests.doubles import machines
from tests.doubles.tiny_recipe import make_tiny_recipe
from tests.support.boards import machine
from tests.support.runs import folders, outcome
from tests.writes.faults import Outcome
from tests.writes.trials import Piece, State
from tools.export.record import damaged, read_record
from tools.runs.folder import read_run
from tools.verify.tiny_base import write_tiny_base

SMALL = (
    *("training_config.max_steps=2", "checkpoint_config.every=1", "eval_config.max_new_tokens=2"),
    "device_config.compile=never",  # a run that goes on has decided it, and would keep the undecided config beside
)
LOGS = ("metrics.jsonl", "evaluations.jsonl", "train.log")


def recipe_command(folder: Path, *words: str) -> None:
    from tools.cli.main import recipe

    os.environ["RECIPES_HOME"] = str(folder / "home")
    recipe.main(list(words), standalone_mode=False)


def tiny(folder: Path) -> None:
    make_tiny_recipe(folder / "tiny", write_tiny_base(folder / "base"))
    (folder / "home").mkdir()
    (folder / "runs").mkdir()


def run_on(hw: str) -> Callable[[Path], None]:
    def act(folder: Path) -> None:
        precision = "fp32" if hw == "cpu" else "bf16"  # a board has no other
        overrides = (*SMALL, f"training_config.precision={precision}")
        sets = [word for override in overrides for word in ("--set", override)]
        words = ["run", str(folder / "tiny"), "--hw", hw, "--no-container", "--out", str(folder / "runs"), *sets]
        if hw == "cpu":
            recipe_command(folder, *words)
            return
        root = folder.parent / "machine"
        if not root.is_dir():
            machines.fake_machine(root, machines.MACHINES[hw])
        os.environ["RECIPES_SYSFS_ROOT"] = str(root)
        with machine(folder.parent, 1):
            recipe_command(folder, *words)

    return act


def newest_done(folder: Path) -> State:
    """What the newest run reached, if it is done; whatever has a final name, of any run, is whole."""
    for path in folder.glob("home/tokens/[!.]*"):
        TokenDataset.open(path)
    done: dict[str, object] = {}
    for run in folders(folder / "runs"):
        manifest = Manifest.load(run)
        for step in checkpoint.steps_saved(run / "checkpoints"):
            checkpoint.verify(checkpoint.folder_of(run / "checkpoints", step))
        for name in LOGS[:2]:
            metrics.read(run / name)
        if record := read_record(run / "export"):
            assert damaged(run / "export", record) == ""
        assert bool(record) == (run / "export").exists(), "an export without its record"
        if (page := run / "report.html").exists():
            assert page.read_text().rstrip().endswith("</html>"), "half a page"
        with contextlib.suppress(FileNotFoundError):
            read_run(run)
        if manifest.exit_reason == "done":
            done = {"done": outcome(run), "export": manifest.export and manifest.export.status}
    return done


def over(done: Outcome) -> bool:
    """The run is over and says so: its page can be made again, and the log lacks its last line."""
    return "no report.html" in done.screen or (done.failed.path.endswith("train.log") and "talk to it" in done.screen)


RUNS = tuple(
    Piece(
        f"run on {'the CPU' if hw == 'cpu' else f'the double of {hw}'}",
        tiny,
        run_on(hw),
        newest_done,
        harmless=over,
        in_place=LOGS,
    )
    for hw in ("cpu", "n150")
)
