"""`recipe plan`: what a run would need before it starts - memory by component, batches, padding, disk, time.

Nothing is downloaded and no engine is opened: where the base is not here, its shape comes of models.lock.yaml and the
length of rows is estimated, and both are said. Time comes of a recorded or published speed on that board, or not at
all.
"""

from __future__ import annotations

import json
import math
import shutil
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from common.config import Config
from common.data import build, texts
from common.data.order import steps_for
from common.hardware import Hardware, get, round_up
from common.model import bases, llama
from common.train.console import clock
from common.train.launch import Launch
from common.train.plan import prepare
from engines.ttml import memory
from engines.ttml.memory import MIB, Memory
from tools.data.turns import words_of
from tools.launch.resolve import resolve
from tools.recipes import load_dataset
from tools.results.grade import config_of, subject, ties_named
from tools.results.schema import Numbers, load

FORMAT = 1  # of the JSON
CHARACTERS_A_TOKEN = 3  # of English under a Llama tokenizer there are about 4; 3 leaves room
TIGHT = 0.8  # share of a chip above which temporary buffers may not find room


@dataclass(frozen=True)
class Rows:
    """The data as far as it is known: None is unknown. `padding` is the share of a batch's positions that are."""

    train: int | None
    held_out: int | None
    length: int | None
    tokens_per_row: float | None
    padding: float | None
    evidence: str


@dataclass(frozen=True)
class Time:
    """Seconds of the training steps alone, or None, with what they stand on."""

    seconds: float | None
    evidence: str


@dataclass(frozen=True)
class Outlook:
    """Everything `recipe plan` says."""

    hw: Hardware
    why: str
    config: Config
    architecture: Mapping[str, Any]
    rows: Rows
    steps: int | None
    needed: Memory | None
    time: Time
    free_disk: int

    @property
    def fits(self) -> str:
        """`no`, `tight` or `yes` for a board; `unknown` without a length or a board's memory."""
        room = memory.capacity(self.hw)
        if room is None or self.needed is None:
            return "unknown"
        share = self.needed.total / room
        return "no" if share > 1 else "tight" if share > TIGHT else "yes"


def print_outlook(
    recipe: Path,
    hw: str | None,
    overrides: Sequence[str],
    steps: int | None,
    as_json: bool,
    say: Callable[[str], None],
) -> None:
    """Print the outlook of a run. Raises UsageError where it cannot fit, as the run would."""
    found = outlook(recipe, hw, overrides, steps)
    if as_json:
        say(json.dumps(to_dict(found), indent=1))
    else:
        for line in lines(found):
            say(line)
    if found.rows.length is not None:
        memory.refuse_too_large(found.hw, found.config, found.architecture, found.rows.length)


def outlook(recipe: Path, hw: str | None, overrides: Sequence[str], steps: int | None) -> Outlook:
    """What a run of `recipe` would need. Raises UsageError or DataError for what the run would refuse as well."""
    launch = resolve(recipe, hw=hw, overrides=overrides, steps=steps, require_present=False)
    config = ties_named(launch.config)
    architecture, rows = known(launch)
    count = config.training.max_steps
    if count is None and rows.train:
        count = steps_for(config.training.num_epochs or 0, rows.train, config.training.batch_size)
    needed = None
    if rows.length is not None:
        needed = memory.footprint(launch.hw, config, architecture, rows.length)
    time = time_of(load(recipe).numbers, recipe, config, rows, count)
    free = shutil.disk_usage(recipe).free
    return Outlook(launch.hw, launch.reason, config, architecture, rows, count, needed, time, free)


def known(launch: Launch) -> tuple[Mapping[str, Any], Rows]:
    """Return the model's shape and the data: tokenised where what that needs is here, else by what can be reckoned."""
    config, recipe = launch.config, launch.recipe_dir
    base, corpus = config.model.base or "", config.data.corpus or ""
    lock = bases.locked(recipe).get(base)
    if lock and not bases.folder_of(base, lock).is_dir():
        return lock["architecture"], estimated(config, recipe, f"the base {base} is not here")
    if corpus in texts.locked() and not texts.corpus_folder(corpus).is_dir():
        assert config.model.architecture is not None, "a corpus comes with an architecture"
        why = f"the corpus {corpus} is not here: its rows are unknown"
        return config.model.architecture.model_dump(), Rows(None, None, config.data.max_length, None, None, why)
    found, _, dataset = prepare(launch, load_dataset(recipe)[0])
    train, held_out = dataset.train, dataset.held_out
    predicted = (train.tokens - len(train)) / len(train)
    padding = 1 - predicted / dataset.length
    rows = Rows(len(train), len(held_out), dataset.length, predicted, padding, "tokenised here")
    return found.architecture, rows


def estimated(config: Config, recipe: Path, why: str) -> Rows:
    """Rows counted, and their length by their characters."""
    splits = build.read_splits(load_dataset(recipe)[0], config, recipe)
    sizes = [sum(len(words_of(turn)) for turn in row.messages) for row in splits["train"]]
    longest = round_up(math.ceil(max(sizes) / CHARACTERS_A_TOKEN))
    length = config.data.max_length or longest
    mean = sum(sizes) / len(sizes) / CHARACTERS_A_TOKEN
    how = f"{why}; lengths estimated at {CHARACTERS_A_TOKEN} characters a token"
    return Rows(len(sizes), len(splits["held_out"]), length, mean, max(0.0, 1 - mean / length), how)


def time_of(entries: Sequence[Numbers], recipe: Path, config: Config, rows: Rows, steps: int | None) -> Time:
    """Steps x tokens / speed, of the first entry for this board and model that has a speed: ours before others'."""
    fast = [entry for entry in entries if entry.board == config.hw and entry.tokens_per_second]
    fast = [entry for entry in fast if same_model(entry, recipe, config)]
    # A board computes padding too; the CPU engine does not.
    per_row = rows.tokens_per_row if get(config.hw).is_cpu else rows.length
    for entry in sorted(fast, key=lambda entry: entry.evidence != "measured"):
        if steps is None or per_row is None:
            break
        assert entry.tokens_per_second is not None
        seconds = steps * config.training.batch_size * per_row / entry.tokens_per_second
        return Time(seconds, f"{entry.evidence}: {entry.tokens_per_second:,.0f} tokens/s on {entry.machine}")
    return Time(None, f"no speed of this model on {config.hw} is recorded or published: nothing is guessed")


def same_model(entry: Numbers, recipe: Path, config: Config) -> bool:
    other = config_of(entry, recipe)
    return other is not None and subject(other)[:4] == subject(config)[:4]


def disk(found: Outlook) -> dict[str, float]:
    """MB on the disk at the most: checkpoints that are kept and the one being written, and the export."""
    config, shapes = found.config, llama.shapes(found.architecture)
    whole = sum(math.prod(shape) for shape in shapes.values())
    trained = sum(math.prod(shape) for shape in memory.trained_shapes(config, found.architecture))
    half = not found.hw.is_cpu or config.training.precision == "bf16"
    stored = 2 if half else 4
    full = config.training.optimizer.type == "AdamWFullPrecision" and half
    one = trained * (stored + (12 if full else 2 * stored))
    kept = config.checkpoint.keep_last + 1 + config.checkpoint.keep_best
    exported = {"fp32": 4, "bf16": 2, "auto": stored}[config.export.dtype]
    export = whole * exported + (trained * 4 if config.model.lora else 0)
    sizes = {"a checkpoint": one, "checkpoints": one * kept, "export": export, "free": found.free_disk}
    return {name: round(size / 1e6, 1) for name, size in sizes.items()}


def lines(found: Outlook) -> Iterator[str]:
    """For a person."""
    config, rows = found.config, found.rows
    yield f"{config.recipe} on {found.why}"
    yield config.batch_equation
    if rows.train:
        epoch = rows.train / config.training.batch_size
        yield f"{rows.train} training rows, {rows.held_out} held out: {epoch:.1f} steps an epoch"
    if rows.length is not None:
        share = "" if rows.padding is None else f"; {rows.padding:.0%} of a batch is padding"
        yield f"rows of {rows.length} tokens{share} ({rows.evidence})"
    if found.steps:
        epochs = f" = {found.steps * config.training.batch_size / rows.train:.2f} epochs" if rows.train else ""
        yield f"{found.steps} steps{epochs}"
    yield from memory_lines(found)
    sizes = disk(found)
    kept = f"{sizes['checkpoints']:,.0f} MB of checkpoints ({sizes['a checkpoint']:,.0f} each)"
    yield f"disk: at most {kept} and {sizes['export']:,.0f} MB of export; {sizes['free']:,.0f} MB are free"
    steps = "" if found.time.seconds is None else f"{clock(found.time.seconds)} of training steps, "
    yield f"time: {steps}{found.time.evidence}"


def memory_lines(found: Outlook) -> Iterator[str]:
    """Each component, their sum, and whether it fits."""
    if found.needed is None:
        yield "memory: unknown without the length of rows"
        return
    sizes = found.needed.mib()
    for name, size in sizes.items():
        if size and name != "total":
            bound = ", at least" if name == "activations" else ""
            yield f"  {name:12} {size:>10,.1f} MiB{bound}"
    lora = found.config.model.lora
    if lora and lora.tie_groups == "build":
        yield "adapters as on a build of ttml that fuses least, which needs most: a run asks the build it has"
    runner = "memory-efficient" if found.config.model.gradient_checkpointing else "default"
    room = memory.capacity(found.hw)
    if room is None:
        yield f"memory: at least {sizes['total']:,.1f} MiB of the host, by arithmetic"
        return
    verdict = {
        "no": "it cannot fit",
        "tight": "tight: temporary buffers come on top, and nobody has measured them here",
        "yes": "it should fit; temporary buffers come on top",
    }[found.fits]
    yield (
        f"memory a chip: at least {sizes['total']:,.1f} of {room / MIB:,.0f} MiB with the {runner} runner, by "
        f"arithmetic: {verdict}"
    )


def to_dict(found: Outlook) -> dict[str, Any]:
    """For machines; memory in MiB, disk in MB, time in seconds."""
    config = found.config
    return {
        "format": FORMAT,
        "recipe": config.recipe,
        "hw": found.hw.name,
        "why": found.why,
        "batch": {"size": config.training.batch_size, "equation": config.batch_equation},
        "rows": asdict(found.rows),
        "steps": found.steps,
        "memory_mib": found.needed.mib() if found.needed else None,
        "fits": found.fits,
        "disk_mb": disk(found),
        "time": asdict(found.time),
    }
