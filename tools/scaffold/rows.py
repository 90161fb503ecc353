"""A fork's rows: read from any format, counted, and what their number and lengths make of the config.

Nothing is downloaded. Where a base's tokenizer is not on this machine, lengths are counted with the other base's, or
reckoned from characters, and that is said; `max_length` is left to the build, which counts, wherever that is no waste.
"""

from __future__ import annotations

import math
import shlex
import statistics
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

from common.config import Config
from common.data.chat import ChatTokenizer
from common.data.order import steps_for
from common.data.rows import Problem, Row, collect, refuse, split_held_out
from common.data.tokens import Encoded
from common.errors import DataError
from common.hardware import TILE, round_up
from common.model import bases as models
from tools.data import checks, convert
from tools.plan.estimate import CHARACTERS_A_TOKEN
from tools.scaffold.split import PROMPTS, SOURCE, Share
from tools.scaffold.yaml import Setting

EVALUATED = 256  # held-out rows that an evaluation reads
FEW_ROWS = 300  # with fewer, more passes; not many more: of ten over 60 rows on a CPU the first third helped
EPOCHS = (3, 5)  # (docs/fork: held-out loss 4.71 untrained, 3.83 after 25 steps, 4.04 after 50 of 75)
CPU_STEPS = 300  # at 2.4 seconds a step (README.md, "Speed") a CPU needs 12 minutes for them
TURN = 8  # tokens that a chat template puts around a message, where they cannot be counted
WASTE = 2.0  # rows are cut where the longest makes a batch this many times wider than 98 of 100 need
ANSWER = (32, 256)  # tokens of an answer to an evaluation prompt
OPTION = "--map prompt=COLUMN --map response=COLUMN, or MAP='prompt=COLUMN response=COLUMN' with make"


class Unmarked(DataError):
    """Prose, where rows were expected."""


@dataclass(frozen=True)
class Lengths:
    """Tokens of each row and of its answer, who counted them, and the context that they must fit."""

    rows: Sequence[int]
    answers: Sequence[int]
    evidence: str
    context: int


def read(data: Path, format: str, mapping: Mapping[str, str]) -> tuple[list[Row], str]:
    """The rows of a file and its format. Raises DataError: what cannot be used, by line, or the columns there are."""
    if data.is_dir():
        raise DataError("this is a folder; rows come from one file", where=str(data))
    name = convert.guess_format(data, format)
    if name == "text" and not marked(data):
        raise Unmarked(
            "nothing says what is a question and what an answer",
            where=str(data),
            todo="start each question with a line 'Q: ...' and its answer with 'A: ...'",
        )
    records = list(convert.records(data, name, None, None, "train"))
    rows, problems = collect(records, mapping)
    reasons = {problem.reason for problem in problems}
    if not rows and len(reasons) == 1 and len(problems) > 1:
        raise DataError(
            f"no row can be used, all {len(problems)} for one reason: {reasons.pop()}",
            where=str(data),
            todo=likely_mapping([record for _, record in records if not isinstance(record, Problem)]),
        )
    refuse(problems, str(data))
    if not rows:
        raise DataError("no row in this file", where=str(data), todo='README.md, "Your own data", says what a row is')
    return rows, name


def marked(data: Path) -> bool:
    """Whether a text marks its questions; an empty one does not say that it is prose."""
    lines = convert.decoded(data).splitlines()
    return not any(line.strip() for line in lines) or any(convert.QUESTION.match(line) for line in lines)


def likely_mapping(records: Sequence[Mapping[str, object]]) -> str:
    """How to name the columns: the two with the longest texts, in their order; without a record, how to write one."""
    if not records:
        return "give each line as many fields as the header; a field that holds the separator stands in double quotes"
    sizes = {
        name: statistics.fmean(len(str(record.get(name) or "")) for record in records)
        for name in records[0]
        if any(isinstance(record.get(name), str) for record in records)
    }
    longest = sorted(sizes, key=lambda name: -sizes[name])[:2]
    if len(longest) < 2:
        return f"name the columns: {OPTION}"
    prompt, response = (name for name in sizes if name in longest)
    words = [f"prompt={prompt}", f"response={response}"]
    typed = " ".join(f"--map {shlex.quote(word)}" for word in words)
    return f"perhaps {typed}" + ("" if " " in prompt + response else f" (make: MAP='{' '.join(words)}')")


# --- lengths --------------------------------------------------------------------------------------------------------


def tokenizer_here(config: Config, recipe: Path) -> ChatTokenizer | None:
    """The tokenizer of a config's base if it is on this machine."""
    base = config.model.base or ""
    entry = models.locked().get(base)
    folders = [models.folder_of(base, entry)] if entry else [Path(base).expanduser(), recipe / base]
    found = next((folder for folder in folders if (folder / "tokenizer.json").is_file()), None)
    return ChatTokenizer.load(found) if found else None


def context_of(config: Config, recipe: Path) -> int:
    """Positions of a config's base."""
    base = config.model.base or ""
    entry = models.locked().get(base)
    architecture = entry["architecture"] if entry else models.resolve(base, recipe_dir=recipe).architecture
    return int(architecture["max_position_embeddings"])


def lengths(rows: Sequence[Row], configs: Sequence[Config], recipe: Path) -> Lengths:
    """Tokens by the tokenizers of these configs that are here, the larger count of each row, else by characters.

    Raises DataError with what the data check finds: rows that hold keys, or markers of the chat template.
    """
    context = min(context_of(config, recipe) for config in configs)
    bases = {config.model.base: config for config in configs}
    here = {base: found for base, config in bases.items() if (found := tokenizer_here(config, recipe))}
    refuse_findings(rows, None)
    if not here:
        texts = [[len(turn.content.encode()) for turn in row.messages] for row in rows]
        return Lengths(
            rows=[sum(math.ceil(size / CHARACTERS_A_TOKEN) + TURN for size in turns) for turns in texts],
            answers=[math.ceil(turns[-1] / CHARACTERS_A_TOKEN) for turns in texts],
            evidence=f"estimated at {CHARACTERS_A_TOKEN} bytes a token: no base's tokenizer is on this machine",
            context=context,
        )
    counted = [encoded(rows, tokenizer, bases[base].data.system_prompt) for base, tokenizer in here.items()]
    absent = [str(base) for base in bases if base not in here]
    rest = f"; {' and '.join(absent)}, not on this machine, counts a little otherwise" if absent else ""
    return Lengths(
        rows=[max(len(row.ids) for row in each) for each in zip(*counted, strict=True)],
        answers=[max(int(row.mask.sum()) for row in each) for each in zip(*counted, strict=True)],
        evidence=f"counted with the tokenizer of {' and '.join(map(str, here))}{rest}",
        context=context,
    )


def encoded(rows: Sequence[Row], tokenizer: ChatTokenizer, system: str | None) -> list[Encoded]:
    """Tokens of rows. Raises DataError that lists every row that the chat template refuses."""
    try:
        return [tokenizer.encode_row(row, system=system) for row in rows]
    except DataError:
        refuse_findings(rows, tokenizer)
        raise


def refuse_findings(rows: Sequence[Row], tokenizer: ChatTokenizer | None) -> None:
    """Raise DataError with every error that the data check finds: keys and tokens, markers of the chat template."""
    found = [*checks.private_data(rows), *(checks.template_findings(rows, tokenizer, None) if tokenizer else ())]
    lines = [line for finding in found if finding.is_error for line in finding.lines()]
    if lines:
        raise DataError("\n".join(["the data check failed:", *lines]), todo="correct these rows, then run it again")


def refuse_longer_than_context(rows: Sequence[Row], found: Lengths, where: str) -> None:
    """Raise DataError that lists the rows with more tokens than the model has positions for."""
    long = [
        Problem(row.where, f"{size} tokens")
        for row, size in zip(rows, found.rows, strict=True)
        if size - 1 > found.context // TILE * TILE
    ]
    if long:
        places = "\n".join(f"  {problem}" for problem in long[: checks.SHOWN])
        more = f"\n  and {len(long) - checks.SHOWN} more" if len(long) > checks.SHOWN else ""
        count = f"{len(long)} of {len(rows)} rows"
        raise DataError(
            f"{count} are longer than the {found.context} positions of the model:\n{places}{more}",
            where=f"{where}, {found.evidence}",
            todo="shorten or split them: what is cut away cannot be learned",
        )


# --- what they make of the config -----------------------------------------------------------------------------------


def can_be_asked(sizes: Lengths) -> list[bool]:
    """Which rows' prompts leave room in the model for the longest answer."""
    return [size + ANSWER[1] <= sizes.context for size in sizes.rows]


def described(found: Share, sizes: Lengths) -> list[str]:
    """Lengths and kept columns, for the screen."""
    middle, high = (percentile(sizes.rows, part) for part in (0.5, 0.95))
    lines = [f"tokens a row: p50 {middle}, p95 {high}, longest {max(sizes.rows)} ({sizes.evidence})"]
    kept = sorted({key for row in found.rows for key in row.extra} - {found.split_by.value})
    if kept:
        names = ", ".join(key or "a column without a name" for key in kept)
        lines.append(f"kept beside prompt and response, not trained on, part of the recipe: {names}")
    return lines


def warnings(found: Share, sizes: Lengths, config: Config, recipe: Path) -> list[str]:
    """What `recipe data check` warns of, by the lines of the user's file."""
    splits = split_held_out(found.rows, float(found.held_out_share.value), by=found.split_by.value)
    prompts = [row.prompt for row in found.asked]
    long = config.data.max_length is not None or max(sizes.rows) > checks.LONG_TOKENS  # else they need not be counted
    return checks.check(splits, prompts, tokenizer_here(config, recipe) if long else None, config).lines()


def settings(found: Share, sizes: Lengths) -> list[Setting]:
    """What the data sets on every board: where it is, how it is split, how long it is, what is asked."""
    answer = round_up(percentile(sizes.answers, 0.95), 16)
    least, most = ANSWER
    values = [
        Setting("data_config.source", SOURCE, f"{found.train} rows to train on, {found.held_out} held out"),
        found.split_by,
        found.held_out_share,
        max_length(sizes),
        Setting("eval_config.prompts", PROMPTS, f"{found.set_aside}: never trained on, never scored"),
        Setting(
            "eval_config.max_new_tokens",
            min(max(least, answer), most),
            f"95 of 100 answers end within {percentile(sizes.answers, 0.95)} tokens",
        ),
    ]
    if found.held_out > EVALUATED:
        values.append(Setting("eval_config.max_rows", EVALUATED, f"of {found.held_out} held out, evenly spread"))
    return values


def max_length(sizes: Lengths) -> Setting:
    """Left to the build, unless a few long rows would fill every batch with padding."""
    key, longest = "data_config.max_length", round_up(max(sizes.rows) - 1)
    most = round_up(percentile(sizes.rows, 0.98) - 1)
    if longest <= WASTE * most:
        return Setting(key, None, f"the build takes what the longest row needs, {longest} or so: nothing is cut")
    cut = sum(size - 1 > most for size in sizes.rows)
    text = (
        f"cuts {cut} of {len(sizes.rows)} rows: the longest has {max(sizes.rows)} tokens, and all would be padded to it"
    )
    return Setting(key, most, text)


def schedule(rows: int, batch: int, limit: int | None = None) -> list[Setting]:
    """Passes, warm-up and intervals for so many training rows. `limit` is the most steps; None: no limit."""
    least, most = EPOCHS
    epochs = min(max(least, round(FEW_ROWS / rows)), most) if rows < 1_000 else 2 if rows < 10_000 else 1
    steps = steps_for(epochs, rows, batch)
    long = limit is not None and steps > limit
    if long:
        assert limit is not None
        seen = limit * batch / rows
        stop = Setting("training_config.max_steps", limit, f"{seen:.2g} passes: {epochs} would take {steps} steps")
        steps = limit
    else:
        why = f"{rows} rows: {rows / batch:.1f} steps of {batch} a pass, {steps} in all"
        stop = Setting("training_config.num_epochs", epochs, why)
    third, quarter, warm = (max(1, math.ceil(steps / parts)) for parts in (3, 4, 10))
    return [
        stop,
        Setting("training_config.scheduler.warmup_steps", min(warm, 100), f"a tenth of the {steps} steps, 100 at most"),
        Setting("eval_config.every", third, "before, twice on the way, and at the end"),
        Setting("checkpoint_config.every", quarter, "a quarter of the run is what a power cut costs"),
        Setting("checkpoint_config.keep_best", True, "few rows are soon learned by heart: the best step is exported"),
    ]


def percentile(sizes: Sequence[int], share: float) -> int:
    """The smallest size that `share` of them do not exceed."""
    return sorted(sizes)[math.ceil(share * len(sizes)) - 1]
