"""A fork's rows: written, proven to train, and what their number and lengths make of the config."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from pathlib import Path

from common.config import Config
from common.data import build
from common.data.chat import ChatTokenizer
from common.data.order import steps_for
from common.data.rows import groups_of, hold_out
from common.errors import DataError
from common.hardware import round_up
from common.model import bases
from common.recipe import call
from common.train.plan import check_prompts, refuse_too_long
from tools.data import checks
from tools.data.convert import line_of, record_of, write_rows
from tools.data.turns import answer_of
from tools.data.workers import shown
from tools.plan.estimate import CHARACTERS_A_TOKEN
from tools.progress import Watch
from tools.recipes import load_dataset
from tools.scaffold.split import Split

SOURCE, PROMPTS = "data/rows.jsonl", "data/prompts.jsonl"
EVALUATED = 256  # held-out rows that an evaluation reads
FEW_ROWS = 300  # with fewer, more passes; not many more: of ten over 60 rows on a CPU the first third helped
EPOCHS = (3, 5)  # (docs/fork: held-out loss 4.71 untrained, 3.83 after 25 steps, 4.04 after 50 of 75)
CPU_STEPS = 300  # at 2.4 seconds a step (bench/README.md, "Training: what came out") a CPU needs 12 minutes for them
ANSWER = (32, 256)  # tokens of an answer to an evaluation prompt
Settings = dict[str, tuple[object, str]]  # by dotted key: the value, and why it is this one


def write(folder: Path, found: Split) -> None:
    """Write the rows and the prompts."""
    (folder / SOURCE).parent.mkdir()
    write_rows(folder / SOURCE, found.rows)
    with (folder / PROMPTS).open("x", encoding="utf-8", newline="\n") as file:
        for row in found.asked:  # with the answer that was written for it, for whoever reads the file
            file.write(line_of({**record_of(row), "prompt": row.prompt}))


def base_here(config: Config, recipe: Path) -> bases.Base | None:
    """Return the base of a config, None where it would have to be fetched."""
    name = config.model.base or ""
    entry = bases.locked(recipe).get(name)
    here = entry is None or (bases.folder_of(name, entry) / "base.json").is_file()
    return bases.resolve(name, recipe_dir=recipe) if here else None


def prove(
    made: Path, found: Split, configs: Sequence[Config], home: Path, say: Callable[[str], None], watch: Watch
) -> None:
    """Look for what `recipe data check` finds, by the lines of the user's file, and make the tokens in `home`.

    Raises DataError for its errors, and for whatever else would end the fork's first run.
    """
    pairs = list(zip(found.rows, groups_of(found.rows, found.column), strict=True))
    held_out = hold_out((group for _, group in pairs), found.share)
    splits = {
        "train": [row for row, group in pairs if group not in held_out],
        "held_out": [row for row, group in pairs if group in held_out],
    }
    for config in {config.model.base: config for config in configs}.values():
        base, (splits_of, prompts_of) = base_here(config, made), load_dataset(made)
        tokenizer, prompts = ChatTokenizer.load(base.folder) if base else None, call(prompts_of, config, made)
        report = checks.check(splits, prompts, tokenizer, config, watch=watch)
        if report.errors:
            lines = [line for finding in report.errors for line in finding.lines()]
            raise DataError("\n".join(["the data check failed:", *lines]), todo="correct these rows, then run it again")
        parts = build.read_splits(splits_of, config, made)
        theirs = {name: len(part) for name, part in parts.items()}
        if theirs != {name: len(part) for name, part in splits.items()}:
            raise DataError(
                f"it makes {theirs['train']} rows to train on of {found.train}, {theirs['held_out']} held out",
                where="dataset.py of the recipe that is forked",
                todo="fork one whose dataset.py splits by split_by and held_out_share",
            )
        if base and tokenizer:
            made_of_it = build.build(config, parts, tokenizer, base.folder, home, shown(watch))
            refuse_too_long(made_of_it, base.architecture)
            check_prompts(prompts, config, tokenizer, base.architecture, say)
        else:
            say(f"tokens are counted by the first run: {config.model.base} is not on this machine")
    for line in report.lines():
        say(line)


def settings(found: Split) -> Settings:
    """Return what the rows set on every board: where they are, how they are split, what is asked."""
    sizes = sorted(len(answer_of(row)) for row in found.rows)
    longest = sizes[math.ceil(0.95 * len(sizes)) - 1]  # nearest rank; the longest of all may be one of a kind
    tokens = round_up(math.ceil(longest / CHARACTERS_A_TOKEN), 16)
    values: Settings = {
        "data_config.source": (SOURCE, f"{found.train} rows to train on, {found.held_out} held out"),
        "data_config.split_by": (found.column, f"the same {found.column or 'prompt'} is on one side"),
        "data_config.held_out_share": (found.share, f"the hash puts {found.held_out} rows below it"),
        "eval_config.prompts": (PROMPTS, f"{len(found.asked)} rows set aside: never trained on"),
        "eval_config.max_new_tokens": (
            min(max(tokens, ANSWER[0]), ANSWER[1]),
            f"95 of 100 answers have at most {longest} characters",
        ),
    }
    if found.held_out > EVALUATED:
        values["eval_config.max_rows"] = (EVALUATED, f"of {found.held_out} held out, evenly spread")
    return values


def schedule(rows: int, batch: int, limit: int | None = None) -> Settings:
    """Return passes, warm-up and intervals for so many training rows; `limit` is the most steps, if any."""
    least, most = EPOCHS
    epochs = min(max(least, round(FEW_ROWS / rows)), most) if rows < 1_000 else 2 if rows < 10_000 else 1
    steps = steps_for(epochs, rows, batch)
    stop: Settings = {"training_config.num_epochs": (epochs, f"{steps} steps of {batch} rows")}
    if limit is not None and steps > limit:
        stop = {"training_config.max_steps": (limit, f"{limit * batch / rows:.2g} passes; {epochs} take {steps} steps")}
        steps = limit
    tenth, quarter, third = (max(1, math.ceil(steps / parts)) for parts in (10, 4, 3))
    return stop | {
        "training_config.scheduler.warmup_steps": (min(tenth, 100), "a tenth of the steps, 100 at most"),
        "eval_config.every": (third, "before, twice on the way, and at the end"),
        "checkpoint_config.every": (quarter, "a quarter of the run is what a power cut costs"),
        "checkpoint_config.keep_best": (True, "few rows are soon learned by heart: the best step is exported"),
    }
