"""`recipe data`: build, check, count, look at and convert data sets."""

from __future__ import annotations

import functools
import itertools
import json
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any

import click

from common.errors import DataError, UsageError
from tools.cli.options import F, json_option, map_option, options_of_config
from tools.progress import Watch, bars, unwatched
from tools.recipes import find_recipe

if TYPE_CHECKING:
    from rich.text import Text

    from common.config import Config
    from common.data.chat import ChatTokenizer
    from common.data.rows import Problem, Row
    from common.data.tokens import Batch, TokenDataset
    from common.train.launch import Launch


@click.group()
def data() -> None:
    """Build, check, count, look at and convert data sets."""


def options_of_rows(command: F) -> F:
    """Add NAME, --hw, --set, --map, --base and --json: of a recipe, or of a file of rows."""
    base = click.option("--base", help="Tokenizer for a file: a base of models.lock.yaml or a folder.")
    return click.argument("name")(options_of_config(map_option(base(json_option(command)))))


@data.command()
@click.argument("name")
@options_of_config
@json_option
def build(name: str, hw: str | None, overrides: Sequence[str], as_json: bool) -> None:
    """Build the token files of recipe NAME, or say that they are up to date."""
    with bars() as watch:
        _, dataset = tokens_of(open_recipe(name, hw, overrides), watch)
    if as_json:
        hashes = {"tokens_sha256": dataset.tokens_sha256, "source_key": dataset.source_key}
        show_json(vars(dataset.report) | hashes)
        return
    for line in [*dataset.report.lines(), f"tokens sha256 {dataset.tokens_sha256}", str(dataset.folder)]:
        click.echo(line)


@data.command()
@options_of_rows
@click.option("--strict", is_flag=True, help="Fail on warnings too.")
def check(name: str, strict: bool, as_json: bool, **options: Any) -> None:
    """Look for what is wrong with the data of recipe NAME, or of a file of rows."""
    from tools.data import checks
    from tools.data.licence import licence_of

    recipe = recipe_called(name, **options)
    if recipe and recipe.config.data.corpus:
        report_corpus(recipe, strict, as_json)
        return
    with bars() as watch:
        seen = rows_seen(name, recipe, watch, **options)
        report = checks.check(
            seen.rows,
            seen.prompts,
            seen.tokenizer,
            seen.config,
            problems=seen.problems,
            notes=seen.notes,
            read_as=seen.read_as,
            licence=licence_of(seen.card_folders),
            watch=watch,
        )
    if as_json:
        show_json({**report.to_dict(), "failed": report.failed(strict)})
    else:
        click.echo("\n".join(report.lines()))
    if report.failed(strict):
        count = f"errors: {len(report.errors)}, warnings: {len(report.warnings)}"
        raise DataError(f"the data check failed: {count}", where=name, todo="correct the rows listed above")


@data.command()
@options_of_rows
def stats(name: str, as_json: bool, **options: Any) -> None:
    """Count the rows, characters, tokens and padding of recipe NAME, or of a file of rows."""
    from common.data.rows import refuse
    from tools.data import checks

    recipe = recipe_called(name, **options)
    if recipe and recipe.config.data.corpus:
        report_corpus(recipe, False, as_json)
        return
    with bars() as watch:
        seen = rows_seen(name, recipe, watch, **options)
        refuse(seen.problems, seen.source)
        found = checks.stats(seen.rows, seen.tokenizer, seen.config, watch)
    if as_json:
        show_json(found)
    else:
        click.echo("\n".join(checks.stats_lines(found)))


@data.command()
@click.argument("name")
@options_of_config
@click.option("--step", type=click.IntRange(min=1), default=1, show_default=True, help="Optimizer step, from 1.")
@click.option("--rows", "limit", type=click.IntRange(min=1), default=4, show_default=True, help="Rows to print.")
def show(name: str, hw: str | None, overrides: Sequence[str], step: int, limit: int) -> None:
    """Decode the batch of one step of recipe NAME, what is supervised in color or between >> and <<."""
    from rich.console import Console

    recipe = open_recipe(name, hw, overrides)
    tokenizer, dataset = tokens_of(recipe)
    batch = dataset.train.batch(step, recipe.config.training.seed, recipe.config.training.batch_size)
    console, places = Console(highlight=False, soft_wrap=True), dataset.places("train")
    supervised, tokens = int(batch.loss_mask.sum()), batch.loss_mask.size
    console.print(f"step {step}: {len(batch.rows)} rows of {dataset.length}, {supervised} of {tokens} supervised")
    for at in range(min(limit, len(batch.rows))):
        row = int(batch.rows[at])
        console.print(f"\nrow {row} ({places[row]})", style="bold")
        console.print(decoded_line(batch, at, tokenizer, color=console.is_terminal))
    if limit < len(batch.rows):
        console.print(f"\nand {len(batch.rows) - limit} more rows (--rows {len(batch.rows)})")


@data.command()
@click.argument("source")
@click.argument("out", type=click.Path(path_type=Path))
@click.option(
    "--format",
    "format_",
    default="auto",
    show_default=True,
    type=click.Choice(["auto", "jsonl", "csv", "parquet", "arrow", "folder", "text", "alpaca", "sharegpt"]),
)
@map_option
@click.option("--revision", metavar="COMMIT", help="Commit of a hub:owner/name source: 40 hex digits.")
@click.option("--subset", help="Configuration of a Hub data set.")
@click.option("--split", default="train", show_default=True, help="Split of a Hub or saved data set.")
@click.option("--chosen", is_flag=True, help="Of rows of preferences, read the answer that was chosen.")
@click.option("--escape-markers", is_flag=True, help="Write marks of chat templates in the texts with a space inside.")
@click.option("--skip-bad", is_flag=True, help="Leave bad rows out and list them, instead of failing.")
@json_option
def convert(source: str, out: Path, format_: str, pairs: Sequence[str], as_json: bool, **options: Any) -> None:
    """Write the rows of SOURCE (a file, a folder, or hub:owner/name) to the new file OUT.jsonl."""
    from tools.data import convert as converter

    with bars() as watch:
        report = converter.convert(source, out, format_, converter.parse_map(pairs), watch=watch, **options)
    if as_json:
        show_json(asdict(report))
    else:
        click.echo("\n".join(report.lines()))


@dataclass(frozen=True)
class Seen:
    """What a check or a count looks at: rows by split and all that is known around them."""

    source: Path
    card_folders: Sequence[Path]
    rows: Mapping[str, Sequence[Row]] = field(default_factory=dict)
    problems: Sequence[Problem] = ()
    notes: Sequence[Problem] = ()
    read_as: Sequence[str] = ()
    prompts: Sequence[str] = ()
    tokenizer: ChatTokenizer | None = None
    config: Config | None = None


def recipe_called(
    name: str, hw: str | None, overrides: Sequence[str], pairs: Sequence[str], base: str | None
) -> Launch | None:
    """Return the recipe, or None where `name` is a file of rows. Raises UsageError for options of the other kind."""
    from tools.data.files import PACKED, SUFFIXES

    path = Path(name)
    is_file = path.is_file() or (path.is_dir() and not (path / "config.yaml").is_file())
    if not path.exists() and {suffix.lower() for suffix in path.suffixes} & {*SUFFIXES, *PACKED}:
        raise DataError("no such file", where=name, todo="name a file of rows that is there, or a recipe")
    wrong = {"--set": overrides} if is_file else {"--map": pairs, "--base": base}
    if given := [option for option, value in wrong.items() if value]:
        kind = "a file of rows" if is_file else "a recipe, which has rows as JSONL and model_config.base"
        raise UsageError(f"{' and '.join(given)} mean nothing for {kind}")
    return None if is_file else open_recipe(name, hw, overrides)


def open_recipe(name: str, hw: str | None, overrides: Sequence[str]) -> Launch:
    """Return the recipe as it would be launched on a board, which need not be here to look at its data."""
    from tools.launch.resolve import resolve

    return resolve(find_recipe(name), hw=hw, overrides=overrides, require_present=False)


def tokens_of(recipe: Launch, watch: Watch = unwatched) -> tuple[ChatTokenizer, TokenDataset]:
    """Return the recipe's tokenizer and its token files, made when they are not there."""
    from common.train.plan import prepare
    from tools.data.fetch import fetch_pinned
    from tools.data.workers import shown
    from tools.recipes import load_dataset

    fetch_pinned(recipe.config, recipe.recipe_dir, functools.partial(click.echo, err=True))
    _, tokenizer, dataset = prepare(recipe, load_dataset(recipe.recipe_dir)[0], shown(watch))
    return tokenizer, dataset


def tokenizer_of(base: str, recipe_dir: Path | None) -> ChatTokenizer:
    """Return the tokenizer of a base model. What its fetching says goes to stderr."""
    from common.data.chat import ChatTokenizer
    from tools.data.fetch import base_of

    found = base_of(base, functools.partial(click.echo, err=True), recipe_dir)
    return ChatTokenizer.load(found.folder)


def rows_seen(
    name: str, recipe: Launch | None, watch: Watch, pairs: Sequence[str], base: str | None, **_options: Any
) -> Seen:
    """Return the rows of the recipe, or of the file `name` where there is none."""
    return rows_of_recipe(recipe, watch) if recipe else rows_of_file(Path(name), pairs, base, watch)


def rows_of_file(path: Path, pairs: Sequence[str], base: str | None, watch: Watch) -> Seen:
    """Return the rows of a file in any form that `convert` takes; bad lines are kept as problems."""
    from tools.data import convert

    found = convert.scan(path, convert.guess_format(path, "auto"), convert.parse_map(pairs), watch)
    tokenizer = tokenizer_of(base, None) if base else None
    card = path if path.is_dir() else path.parent
    rows = {"train": found.rows}
    return Seen(path, [card], rows, found.problems, found.notes, found.read_as(), tokenizer=tokenizer)


def rows_of_recipe(recipe: Launch, watch: Watch) -> Seen:
    """Return the rows of a recipe with its prompts, tokenizer and config; where lines are bad, those alone."""
    from common.data.build import read_splits
    from common.data.rows import row_of, scan
    from common.recipe import call
    from tools.data.files import about
    from tools.recipes import load_dataset

    config, folder = recipe.config, recipe.recipe_dir
    assert config.data.source is not None, "rows have a source"
    assert config.model.base is not None, "what trains on rows has a base"
    source = folder / config.data.source
    cards = [source.parent, folder]
    taken = iter(watch(itertools.count(), "reading", None if watch is unwatched else about(source, "jsonl")))

    def read(record: Mapping[str, Any], where: str) -> bool:
        next(taken)
        return bool(row_of(record, where))

    if problems := scan(source, read)[1]:  # the recipe's own builder would stop at them
        return Seen(source, cards, problems=problems)
    splits, prompts = load_dataset(folder)
    rows, asked = read_splits(splits, config, folder), call(prompts, config, folder)
    tokenizer = tokenizer_of(config.model.base, folder)
    return Seen(source, cards, rows, prompts=asked, tokenizer=tokenizer, config=config)


def report_corpus(recipe: Launch, strict: bool, as_json: bool) -> None:
    """Print what is to be known of a corpus. Raises DataError for unknown characters when `strict`."""
    _, dataset = tokens_of(recipe)
    info = dataset.info
    if as_json:
        keys = ("corpus", "vocab_size", "unknown")
        show_json({**{key: info[key] for key in keys}, **vars(dataset.report)})
    else:
        click.echo("\n".join(dataset.report.lines()))
        click.echo(f"held-out documents: {', '.join(info['corpus']['held_out']['documents'])}")
    if strict and info["unknown"]:
        raise DataError(
            f"{info['unknown']:.3%} of the held-out characters are in no training text",
            where=str(recipe.config.data.corpus),
            todo="use data_config.tokenizer.type=bpe, which knows every byte",
        )


def decoded_line(batch: Batch, at: int, tokenizer: ChatTokenizer, color: bool) -> Text:
    """Return row `at` of a batch as text, what is supervised in green, or between >> and << without color.

    A token is supervised when it is a label that counts; the first token of a row never is one.
    """
    from rich.text import Text

    tokens = [(int(batch.input_ids[at, 0]), False)]
    real = real_length(batch, at)
    tokens += zip(batch.labels[at, :real].tolist(), (batch.loss_mask[at, :real] > 0).tolist(), strict=True)
    line = Text()
    while tokens:
        supervised = tokens[0][1]
        end = next((n for n, token in enumerate(tokens) if token[1] != supervised), len(tokens))
        words = tokenizer.decode([token for token, _ in tokens[:end]])
        if color:
            line.append(words, style="green" if supervised else "dim")
        else:
            line.append(f">>{words}<<" if supervised else words)
        tokens = tokens[end:]
    return line


def real_length(batch: Batch, at: int) -> int:
    """Return the number of labels of row `at` that are no padding (id 0 with mask 0 at the end)."""
    real = (batch.labels[at] != 0) | (batch.loss_mask[at] > 0)
    return int(real.nonzero()[0].max()) + 1 if real.any() else 0


def show_json(value: Any) -> None:
    """Print a value as JSON."""
    click.echo(json.dumps(value, indent=1, ensure_ascii=False))
