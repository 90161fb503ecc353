"""What a step costs besides the engine, how fast batches are supplied, and how soon the command answers.

    .venv/bin/python -m bench.loop

The loop is the recipe's own train.py: on the CPU with an engine whose step returns at once, and on an n150 that is not
there with the engine for boards over the doubles of ttml and ttnn, of which only the step returns at once.
"""

from __future__ import annotations

import argparse
import contextlib
import io
import json
import os
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any
from unittest import mock

import numpy as np

from bench import throughput
from common.data.order import random_words
from common.data.tokens import Arrays, Batch, TokenSplit
from common.engine import BackendInfo, StepStats
from common.recipe import load
from tests.doubles.machines import MACHINES, fake_machine
from tests.support.boards import machine
from tools.data.fetch import fetch_pinned
from tools.launch.resolve import resolve
from tools.recipes import find_recipe

ROOT = Path(__file__).resolve().parents[1]
BOARD_RECIPE = "nano-transformer-scratch"  # its model is small enough for the double
QUIET = ("eval_config.every=0", "checkpoint_config.every=0")
LOSS = 4.7  # nats, what untrained weights have of the corpus's characters: a run from scratch checks its first loss
Array = np.ndarray[Any, Any]


class IdleStep:
    """A train step that notes when it is called, and returns at once."""

    def __init__(self) -> None:
        self.called: list[float] = []

    def train_step(self, _batches: Any, learning_rate: float, _step: int) -> StepStats:
        self.called.append(time.perf_counter())
        return StepStats(LOSS, 1.0, learning_rate, tokens=1, supervised_tokens=1, seconds=1e-3, without_gradient=())

    @property
    def gaps(self) -> list[float]:
        """The seconds between calls."""
        return [after - before for before, after in zip(self.called[:-1], self.called[1:], strict=True)]


class IdleEngine(IdleStep):
    """An engine that does nothing. Its answers are one end token."""

    def __init__(self, end_token: int) -> None:
        super().__init__()
        self.end_token = end_token

    info = BackendInfo("idle", "none", "fp32", world=1, threads=1, compiled=False, versions={}, reason="bench")

    def build(self, architecture: Mapping[str, Any]) -> None:
        self.vocab_size = int(architecture["vocab_size"])

    def load(self, weights: Mapping[str, Array]) -> int:
        return sum(array.size for array in weights.values())

    def eval_nll(self, batch: Batch) -> tuple[Array, Array]:
        rows = len(batch.rows)
        return np.ones(rows), np.ones(rows)

    def next_token_logits(self, ids: Array, _lengths: Array, cache: Any = None) -> tuple[Array, Any]:
        logits = np.zeros((len(ids), self.vocab_size), np.float32)
        logits[:, self.end_token] = 1.0  # the largest: every answer ends at once
        return logits, cache

    def state(self) -> Iterator[tuple[str, Array]]:
        yield "optimizer/step", np.zeros(1, np.int64)

    def load_state(self, state: Mapping[str, Array]) -> None:
        raise NotImplementedError

    def disable_adapter(self) -> contextlib.AbstractContextManager[None]:
        return contextlib.nullcontext()

    def close(self) -> None: ...


def loop_gaps(recipe: Path, steps: int) -> list[float]:
    """Return the seconds between calls of the engine, over `steps` steps, evaluation and checkpoints off."""
    engine = IdleEngine(end_token=0)

    @contextlib.contextmanager
    def open_idle(*_: Any) -> Iterator[IdleEngine]:
        yield engine

    with tempfile.TemporaryDirectory(prefix="bench-loop-") as out:
        launch = resolve(recipe, hw="cpu", overrides=QUIET, steps=steps, resume="never", out=Path(out))
        fetch_pinned(launch.config, launch.recipe_dir, print)
        with mock.patch("engines.cpu.open_backend", open_idle), contextlib.redirect_stdout(io.StringIO()):
            load(recipe, "train").train(launch)
    return engine.gaps


def board_gaps(recipe: Path, steps: int) -> list[float]:
    """Return the same for a faked n150, whose engine's other calls compute on the double."""
    step = IdleStep()
    of_board = (*QUIET, "eval_config.max_rows=2", "eval_config.max_new_tokens=1")
    with tempfile.TemporaryDirectory(prefix="bench-loop-") as folder:
        fake_machine(Path(folder) / "machine", MACHINES["n150"])
        with (
            mock.patch.dict(os.environ, {"RECIPES_SYSFS_ROOT": str(Path(folder) / "machine")}),
            machine(Path(folder)),
            mock.patch("engines.ttml.engine.TTML.train_step", lambda _engine, *words: step.train_step(*words)),
            contextlib.redirect_stdout(io.StringIO()),
        ):
            launch = resolve(recipe, hw="n150", overrides=of_board, steps=steps, resume="never", out=Path(folder))
            load(recipe, "train").train(launch)
    return step.gaps


def full_rows(rows: int, length: int, vocab_size: int = 49152) -> TokenSplit:
    """Return a split whose rows all fill T = `length`: every token that is supplied is a real one."""
    ids = (random_words(rows * (length + 1), 1) % np.uint64(vocab_size)).astype(np.uint32)
    starts = np.arange(rows, dtype=np.int64) * (length + 1)
    return TokenSplit(Arrays(ids, np.ones(len(ids), np.uint8), starts, starts + length + 1), length)


def supply_rate(split: TokenSplit, batch_size: int, seconds: float) -> float:
    """Return the tokens per second that `TokenSplit.batch` supplies: positions of B x T, drawn for `seconds`."""
    step, started = 0, time.perf_counter()
    while (spent := time.perf_counter() - started) < seconds or step == 0:
        step += 1
        split.batch(step, 0, batch_size)
    return step * batch_size * split.length / spent


def command_seconds(command: Sequence[str], times: int) -> float:
    """Return the median wall time of a command in seconds, after one run that fills the disk cache."""
    taken = []
    for _ in range(times + 1):
        started = time.perf_counter()
        subprocess.run(command, check=True, stdout=subprocess.DEVNULL, cwd=ROOT)
        taken.append(time.perf_counter() - started)
    return statistics.median(taken[1:])


def supply(batch_size: int, length: int) -> float:
    """Return the best of three rates, tokens per second: what else the machine does can only lower one."""
    split = full_rows(4096, length)
    return max(supply_rate(split, batch_size, seconds=1.0) for _ in range(3))


def of_loop(gaps: Sequence[float]) -> dict[str, float]:
    """Return the milliseconds a step of these seconds: mean, median and 99th percentile."""
    ms = [1e3 * gap for gap in gaps]
    return {"mean": statistics.fmean(ms), "median": statistics.median(ms), "p99": statistics.quantiles(ms, n=100)[98]}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--recipe", default="tinyllama-finetune")
    parser.add_argument("--steps", type=int, default=2000)
    parser.add_argument("--json", action="store_true")
    arguments = parser.parse_args()
    load_before = os.getloadavg()[0]
    gaps = {
        "cpu": loop_gaps(find_recipe(arguments.recipe), arguments.steps),
        "n150, on the double": board_gaps(find_recipe(BOARD_RECIPE), arguments.steps),
    }
    result: dict[str, Any] = {
        "machine": throughput.machine() | {"load_before": load_before},
        "steps": arguments.steps,
        "loop_ms": {name: of_loop(found) for name, found in gaps.items()},
        # The batches of nano-transformer-scratch: on a CPU, and on a board.
        "supply_tokens_per_second": {
            f"{batch_size}x{length}": supply(batch_size, length) for batch_size, length in ((32, 128), (64, 256))
        },
        "help_seconds": command_seconds([sys.executable, "-m", "tools.cli", "--help"], times=5),
    }
    if arguments.json:
        print(json.dumps(result, indent=1))
        return
    for name, found in result["loop_ms"].items():
        said = ", ".join(f"{key} {value:.3f}" for key, value in found.items())
        print(f"the loop without the step, {name}, ms a step of {arguments.steps}: {said}")
    for shape, rate in result["supply_tokens_per_second"].items():
        print(f"batches of {shape}: {rate / 1e6:.1f} million tokens/s")
    print(f"recipe --help: {result['help_seconds']:.2f} s")


if __name__ == "__main__":
    main()
