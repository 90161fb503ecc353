"""Train in child processes and kill them with SIGKILL: at random moments, and while a checkpoint is being written.

    python -m tests.runs.killer RECIPE OUT KILLS SEED [KEY=VALUE ...]

Children are forks of one process that has imported torch and computed nothing with it, so that twenty of them cost
seconds. Prints one JSON object: the folder of an unbroken run, those of the runs that were killed and came through,
how many kills there were, and how many left a half-written checkpoint behind.
"""

from __future__ import annotations

import json
import os
import random
import signal
import sys
import time
from pathlib import Path

import engines.cpu.engine  # noqa: F401  imported before the forks
from common.train import checkpoint
from tests.support.runs import folders, manifest, run_tiny


def start(recipe: Path, out: Path, overrides: list[str], resume: str) -> int:
    """Fork a child that trains; return its process id."""
    out.mkdir(parents=True, exist_ok=True)
    child = os.fork()
    if child == 0:
        code = 1
        try:
            silence = os.open(out / "screen.txt", os.O_WRONLY | os.O_CREAT | os.O_APPEND)
            os.dup2(silence, 1)
            os.dup2(silence, 2)
            run_tiny(recipe, out, *overrides, resume=resume, export=False)
            code = 0
        finally:
            os._exit(code)
    return child


def wait(child: int) -> None:
    code = os.waitstatus_to_exitcode(os.waitpid(child, 0)[1])
    assert code == 0, f"a run that nobody killed ended with {code}"


def writing(out: Path) -> bool:
    return any(out.glob("*/checkpoints/.step-*"))


def ended(child: int) -> bool:
    return os.waitid(os.P_PID, child, os.WEXITED | os.WNOHANG | os.WNOWAIT) is not None


def kill(child: int, out: Path, moment: float, *, in_a_write: bool) -> bool:
    """SIGKILL the child after `moment` seconds, or soon after it begins to write a checkpoint."""
    if in_a_write:
        deadline = time.monotonic() + 10
        while not (writing(out) or ended(child)) and time.monotonic() < deadline:
            time.sleep(0.0002)
        moment %= 0.003
    time.sleep(moment)
    if ended(child):
        wait(child)
        return False
    os.kill(child, signal.SIGKILL)
    os.waitpid(child, 0)
    return True


def half_written(out: Path) -> int:
    """Litter of killed saves; and no checkpoint that has a name may be broken."""
    for folder in folders(out):
        for step in checkpoint.steps_saved(folder / "checkpoints"):
            checkpoint.verify(checkpoint.folder_of(folder / "checkpoints", step))
    return len(list(out.glob("*/checkpoints/.step-*")))


def main(recipe: Path, out: Path, kills: int, seed: int, overrides: list[str]) -> None:
    rng = random.Random(seed)
    wait(start(recipe, out / "unbroken", overrides, "never"))
    began = time.monotonic()
    wait(start(recipe, out / "unbroken", overrides, "never"))
    seconds = time.monotonic() - began
    killed, inside, started, broken = 0, 0, 0, out / "killed"
    while killed < kills:
        started += 1
        assert started < 3 * kills, "the runs end before they are killed, or write no checkpoint in a folder beside"
        child = start(recipe, broken, overrides, "auto")
        if kill(child, broken, rng.uniform(0, seconds), in_a_write=killed % 2 == 1):
            killed += 1
            litter = half_written(broken)
            inside += litter > 0
            for path in broken.glob("*/checkpoints/.step-*"):  # so that the next one is seen; a resume cleans too
                path.rename(path.with_name(f".seen-{killed}"))
    wait(start(recipe, broken, overrides, "auto"))
    done = [str(path) for path in folders(broken) if manifest(path)["exit_reason"] == "done"]
    resumed = sum(len(manifest(Path(path))["resumed"]) for path in done)
    unbroken = [str(path) for path in folders(out / "unbroken")]
    print(json.dumps({"unbroken": unbroken, "done": done, "resumed": resumed, "kills": killed, "inside": inside}))


if __name__ == "__main__":
    main(Path(sys.argv[1]), Path(sys.argv[2]), int(sys.argv[3]), int(sys.argv[4]), sys.argv[5:])
