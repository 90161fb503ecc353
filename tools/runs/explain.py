"""`recipe explain`: what in a log, or in a run's folder, is known to mean something, and what to do about it."""

from __future__ import annotations

import math
import re
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path

from common import known_errors
from common.errors import UsageError, without_secrets
from common.known_errors import KnownError
from common.model import bases
from common.model.llama import EMBEDDING, HEAD
from common.model.weights import Weights
from common.train import checkpoint
from common.train.ending import BEGINS, ENDS
from tools.runs.folder import RunFolder, is_run, read_run

LINES = 200_000  # of a log that are looked at, the last ones
# Steps, and the nats around ln(vocabulary) that count as guessing: as far as the first loss of random weights may be
# from it (common/train/first_loss.py, BAND).
FLAT = 20
FLAT_BAND = 0.1


@dataclass(frozen=True)
class Found:
    """A known error, and where it was seen."""

    error: KnownError
    where: str


def print_explanation(target: Path, say: Callable[[str], None]) -> None:
    """Print what is known of a log file, or of the run in a folder. Raises UsageError where there is neither."""
    found = list(explain(target))
    for one in found:
        say(f"{one.error.id} ({without_secrets(one.where)})")
        say(f"  means: {one.error.means}")
        say(f"  to do: {one.error.answer}")
    if not found:
        say("nothing that is known; the end of the log says more, and recipe verify run RUN looks at the numbers")


def explain(target: Path) -> Iterator[Found]:
    """Yield each known error once, at its first line; a run's states after its log's lines."""
    log = target / "train.log" if target.is_dir() else target
    if not log.is_file():
        raise UsageError("no log there", where=str(log), todo="give a log file, or a folder of runs/")
    lines = log.read_text(encoding="utf-8", errors="replace").splitlines()
    run = read_run(target) if is_run(target) else None
    seen: set[str] = set()
    for number, line in list(enumerate(lines, 1))[-LINES:]:
        row = known_errors.match(line)
        if row and row.id not in seen:
            seen.add(row.id)
            yield Found(row, f"{log.name}:{number}: {line.strip()[:160]}")
    for row in known_errors.table():
        if row.state and (where := STATES[row.state](lines, run)):
            yield Found(row, where)


def no_end(lines: list[str], run: RunFolder | None) -> str | None:  # noqa: ARG001  one shape for all states
    """Say where the last line that begins a run has none after it that ends it."""
    marks = [(number, line) for number, line in enumerate(lines, 1) if re.search(f"Z ({BEGINS}|{ENDS})", line)]
    if marks and f"Z {BEGINS}" in marks[-1][1]:
        return f"begun in line {marks[-1][0]}; last line: {lines[-1].strip()[:120]}"
    return None


def flat_at_guessing(lines: list[str], run: RunFolder | None) -> str | None:  # noqa: ARG001
    """Say where the last steps all cost what guessing among the vocabulary costs."""
    losses = list(run.losses.items())[-FLAT:] if run else []
    if run is None or len(losses) < FLAT or (vocabulary := vocabulary_of(run)) is None:
        return None
    guess = math.log(vocabulary)
    if all(abs(loss - guess) < FLAT_BAND for _, loss in losses):
        return f"steps {losses[0][0]} to {losses[-1][0]} are within {FLAT_BAND} of ln({vocabulary}) = {guess:.3f}"
    return None


def evaluation_is_training(lines: list[str], run: RunFolder | None) -> str | None:  # noqa: ARG001
    """Say where a held-out loss is the training loss of its step."""
    for score in run.scores if run else ():
        if run and score["eval_loss"] == run.losses.get(score["step"]):
            return f"step {score['step']}: both are {score['eval_loss']!r}"
    return None


def never_moved(lines: list[str], run: RunFolder | None) -> str | None:  # noqa: ARG001
    """Say which tensors the run itself found unmoved at its end."""
    names = (run and run.fact("never_moved")) or []
    return f"{len(names)} tensors, such as {names[0]}" if names else None


def fabric_without_a_file(lines: list[str], run: RunFolder | None) -> str | None:  # noqa: ARG001
    """Say where a log that has the fabric's time-out says that no descriptor was named."""
    return line_of("no-descriptor", lines) if line_of("fabric-sync", lines) else None


def fabric_of_another_shape(lines: list[str], run: RunFolder | None) -> str | None:  # noqa: ARG001
    """Say where a log that has the fabric's time-out says that the descriptor is another mesh's."""
    return line_of("mesh-mismatch", lines) if line_of("fabric-sync", lines) else None


def fabric_on_one_device(lines: list[str], run: RunFolder | None) -> str | None:
    """Say that a run whose fabric timed out was to open one device."""
    return f"its mesh is {mesh}" if (mesh := mesh_of_a_time_out(lines, run)) == [1, 1] else None


def fabric_of_the_right_file(lines: list[str], run: RunFolder | None) -> str | None:
    """Say that a run whose fabric timed out was to open several: none begins before its descriptor has that shape."""
    mesh = mesh_of_a_time_out(lines, run)
    return f"its mesh is {mesh}" if mesh and mesh != [1, 1] and not fabric_without_a_file(lines, run) else None


def mesh_of_a_time_out(lines: list[str], run: RunFolder | None) -> list[int] | None:
    """Return the mesh of a run whose log has the fabric's time-out; None: it has not, or the mesh is not known."""
    config = run.known_config if run and line_of("fabric-sync", lines) else None
    return list(config.device.mesh_shape) if config and config.device.mesh_shape else None


def line_of(id: str, lines: list[str]) -> str | None:
    """Return where a log has a line with the text of the row `id`."""
    text = next(str(row.text) for row in known_errors.table() if row.id == id)
    numbers = (number for number, line in enumerate(lines, 1) if re.search(text, line, re.IGNORECASE))
    return f"line {number}" if (number := next(numbers, None)) else None


STATES: Mapping[str, Callable[[list[str], RunFolder | None], str | None]] = {
    "no_end": no_end,
    "flat_at_guessing": flat_at_guessing,
    "evaluation_is_training": evaluation_is_training,
    "never_moved": never_moved,
    "fabric_without_a_file": fabric_without_a_file,
    "fabric_of_another_shape": fabric_of_another_shape,
    "fabric_on_one_device": fabric_on_one_device,
    "fabric_of_the_right_file": fabric_of_the_right_file,
}


def vocabulary_of(run: RunFolder) -> int | None:
    """Return the rows of the output head: of the newest checkpoint, or of the base that adapters stand on."""
    saved = checkpoint.newest(run.folder / "checkpoints")
    if entry := bases.locked(run.known_recipe_dir).get(run.fact("base", "name") or ""):
        return int(entry["architecture"]["vocab_size"])
    origin = Path(run.fact("base", "origin") or "/nowhere")
    for folder in ([saved.folder] if saved else []) + ([origin] if origin.is_dir() else []):
        shapes = Weights(sorted(folder.glob("model*.safetensors"))).shapes
        for name in (HEAD, EMBEDDING):
            if name in shapes:
                return shapes[name][0]
    return None
