"""`recipe grade --record`: a finished run of a clean tree becomes an entry of its recipe's results.yaml.

The entry of the same training on the same board is replaced, any other one and every comment stays; the change is
printed. `make docs` then makes the tables.
"""

from __future__ import annotations

import datetime
import difflib
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any

import yaml

from common.engine import BackendInfo
from common.errors import UsageError
from common.files import write_atomic
from common.paths import ROOT
from tools.edit_yaml import line_after
from tools.git import git
from tools.results.schema import FILE, load
from tools.runs.folder import RunFolder, at_step, read_run

# Steps of which the training loss is kept, besides the last. Among them are those at which tt-train's published curve
# is compared (1, 5, 10, 20, 500: nano-transformer-scratch/README.md).
STEPS = (1, 5, 10, 20, 50, 100, 200, 500, 1000, 2000, 5000)
SPREAD = 3  # a band is so many times the largest deviation that was seen
MADE = (FILE, "README.md", "recipes/README.md", "docs/board.md")  # what recording itself changes


def record(folder: Path, others: Sequence[Path], speed: bool, say: Callable[[str], None]) -> None:
    """Write the entry of the run in `folder`; the runs in `others` say how far figures may stray (its band).

    Raises UsageError for a run or a tree that is not clean, or runs that are not of one training.
    """
    run = read_run(folder, strict=True)
    recipe = run.recipe_dir
    refuse_unclean(run)
    spread = [read_run(other, strict=True) for other in others]
    for other in spread:
        refuse_unlike(run, other)
    write(recipe, entry_of(run, spread, speed), say)


def write(recipe: Path, entry: dict[str, Any], say: Callable[[str], None]) -> None:
    """Put `entry` into the recipe's results.yaml and say what changes; what cannot be read back is not left there."""
    path = recipe / FILE
    old = path.read_text(encoding="utf-8")
    new = placed(old, entry)
    write_atomic(path, new)
    try:
        load(recipe)
    except BaseException:
        write_atomic(path, old)
        raise
    for line in difflib.unified_diff(old.splitlines(), new.splitlines(), "recorded", "now", lineterm="", n=1):
        say(line)
    say(f"{path}: {'unchanged' if old == new else 'written'}; make docs brings the tables up to date")


def refuse_unclean(run: RunFolder) -> None:
    """Raise UsageError unless the run is done, and it and the repository of now are of a commit."""
    manifest = run.manifest
    if manifest.exit_reason != "done":
        raise UsageError(f"the run is not done: {manifest.exit_reason}", where=str(run.folder))
    if manifest.git_dirty is not False:
        raise UsageError(
            "the run is not of a commit: the tree it ran from had changes, or no git",
            where=f"{run.folder}: git_dirty {manifest.git_dirty}",
            todo="commit, run again, and record that run",
        )
    refuse_changed_tree()


def refuse_changed_tree() -> None:
    """Raise UsageError where the repository has changes besides what recording itself makes."""
    done = git("status", "--porcelain")
    changed = [line[3:] for line in done.stdout.splitlines()]
    if done.returncode or (odd := [name for name in changed if not name.endswith(MADE)]):
        raise UsageError(
            f"the tree is not clean: {', '.join(odd[:5])}" if not done.returncode else "there is no git here",
            where=str(ROOT),
            todo="commit or put away what is changed",
        )


def refuse_unlike(run: RunFolder, other: RunFolder) -> None:
    """Raise UsageError where `other` says nothing about how far `run` may stray."""
    if run.manifest.data.tokens_sha256 != other.manifest.data.tokens_sha256 or run.last_step != other.last_step:
        raise UsageError(
            "a run of other tokens, or of another length, does not say how far this one may stray",
            where=str(other.folder),
            todo="give runs of the same command with other threads, precision or seed",
        )


def entry_of(run: RunFolder, spread: Sequence[RunFolder], speed: bool) -> dict[str, Any]:
    """Return the entry as the values of its YAML, in the order of CONTRIBUTING.md."""
    manifest, last, engine = run.manifest, run.last_step, run.backend
    steps = sorted({step for step in STEPS if step < last} | {last})
    values = {
        "board": manifest.hw,
        "evidence": "measured",
        "what": f"recipe run {run.config.recipe} --hw {manifest.hw}",
        "overrides": manifest.overrides,
        "steps": asked_steps(manifest.command),
        "date": datetime.date.fromisoformat(manifest.start[:10]),
        "commit": manifest.git_commit,
        "image": run.image,
        "machine": machine_of(engine),
        "loss_at": {step: run.losses[step] for step in steps},
        "held_out": held_out_of(run),
        "tokens_per_second": round(run.tokens_per_second, 1) if speed and run.tokens_per_second else None,
        "peak_memory_mib": manifest.peak_memory_mib if engine.world == 1 else None,
        "band": band_of(run, spread, steps) if spread else None,
        "exact": exact_of(run) if engine.backend == "torch-cpu" else None,
    }
    return {key: value for key, value in values.items() if value is not None}


def machine_of(engine: BackendInfo) -> str:
    """Return what a run was on, in words."""
    count = f"{engine.world} processes of " if engine.world > 1 and engine.backend == "torch-cpu" else ""
    return f"{engine.device}, {count}{engine.threads} thread{'s' if engine.threads > 1 else ''}"


def asked_steps(command: Sequence[str]) -> int | None:
    """Return what the command gave to --steps."""
    for word, after in zip(command, [*command[1:], ""], strict=True):
        if word == "--steps":
            return int(after)
        if word.startswith("--steps="):
            return int(word.partition("=")[2])
    return None


def held_out_of(run: RunFolder) -> dict[str, Any] | None:
    """Return the last evaluation, and the untrained model on the same rows."""
    rows, before = run.held_out(run.last_step), run.held_out(0)
    if rows is None:
        return None
    found: dict[str, Any] = {"step": run.last_step, "loss": rows.loss}
    if len(rows.nll) > 1:
        found["standard_error"] = rows.standard_error
    if bits := (at_step(run.scores, run.last_step) or {}).get("bits_per_byte"):
        found["bits_per_byte"] = bits
    if before is not None and len(before.nll) == len(rows.nll) > 1:
        gain, error = rows.improvement_over(before)
        found["untrained"] = {"loss": before.loss, "standard_error": before.standard_error}
        found["gain"] = {"loss": gain, "standard_error": error}
    return found


def band_of(run: RunFolder, spread: Sequence[RunFolder], steps: Sequence[int]) -> dict[str, Any]:
    """Return three times the largest deviation of the other runs, at each step and of the held-out loss."""

    def band(values: list[float]) -> float:
        return float(f"{SPREAD * max(values) + 1e-6:.2g}")  # the 1e-6 is for what another order of a sum may do

    rows = run.held_out(run.last_step)
    others = [found for other in spread if (found := other.held_out(run.last_step)) is not None]
    values: dict[str, Any] = {
        "loss": {step: band([abs(other.losses[step] - run.losses[step]) for other in spread]) for step in steps}
    }
    if rows is not None and others:
        values["held_out"] = band([abs(other.loss - rows.loss) for other in others])
    kinds = "; ".join(kind_of(run, other) for other in spread)
    return {**values, "origin": f"{SPREAD} x the largest deviation of {len(spread)} other runs: {kinds}"}


def kind_of(run: RunFolder, other: RunFolder) -> str:
    """Return what differs between two runs, in words."""
    settings = [line for line in run.config.changes(other.config) if not line.startswith(("logging_", "eval_"))]
    here, there = run.environment, other.environment
    return ", ".join(settings) or ", ".join(k for k in here if here[k] != there[k]) or "the same again"


def exact_of(run: RunFolder) -> dict[str, Any]:
    bits = {"history_sha256": run.history_sha256, "weights_sha256": run.weights_sha256}
    return {**run.environment, "tokens_sha256": run.manifest.data.tokens_sha256, **bits}


def placed(text: str, entry: dict[str, Any]) -> str:
    """Return the text of results.yaml with `entry` in place of the one of its training, else at the end."""
    block = yaml.safe_dump([entry], sort_keys=False, allow_unicode=True, width=110).splitlines()
    block = [f"  {line}" for line in block]
    lines = text.splitlines()
    for first, after, old in entries_of(text):
        same = all(old.get(key) == entry.get(key) for key in ("board", "evidence", "overrides", "steps"))
        if same and ("scaling" in old) == ("scaling" in entry):
            return "\n".join([*lines[:first], *block, *lines[after:]]) + "\n"
    if text.rstrip().endswith("entries: []"):
        return "\n".join([text.rstrip().removesuffix(" []"), *block]) + "\n"
    return "\n".join([*lines, "", *block]) + "\n"


def entries_of(text: str) -> Iterator[tuple[int, int, dict[str, Any]]]:
    """Yield each entry with its first line and the one after its last, comments around it left out."""
    root: Any = yaml.compose(text, Loader=yaml.SafeLoader)
    tree, lines = yaml.safe_load(text), text.splitlines()
    nodes = next(value for key, value in root.value if key.value == "entries").value
    for node, old in zip(nodes, tree["entries"], strict=True):
        yield node.start_mark.line, line_after(node, lines), old
