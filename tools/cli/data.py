"""`recipe data`: build, check, count, look at and convert data sets."""

from __future__ import annotations

import functools
import json
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, TypeVar

import click

from common.errors import DataError, UsageError
from common.paths import find_recipe
from tools.cli.options import options_of_config

if TYPE_CHECKING:
    from rich.text import Text

    from common.config import Config
    from common.data.chat import ChatTokenizer
    from common.data.rows import Problem, Row
    from common.data.tokens import Batch, TokenDataset
    from common.train.launch import Launch

F = TypeVar("F", bound=Callable[..., Any])


@click.group()
def data() -> None:
    """Build, check, count, look at and convert data sets."""


def map_option(command: F) -> F:
    """Add --map, repeatable, to a command."""
    return click.option(
        "--map",
        "pairs",
        metavar="NAME=COLUMN",
        multiple=True,
        help="Column of prompt, response, system or messages.",
    )(command)


json_option = click.option("--json", "as_json", is_flag=True, help="Print JSON.")


@data.command()
@click.argument("name")
@options_of_config
@json_option
def build(name: str, hw: str | None, overrides: Sequence[str], as_json: bool) -> None:
    """Build the token files of recipe NAME, or say that they are up to date."""
    _, dataset = open_recipe(name, hw, overrides).tokens()
    if as_json:
        show_json(
            {
                **dataset.report.to_dict(),
                "tokens_sha256": dataset.tokens_sha256,
                "source_key": dataset.source_key,
            }
        )
        return
    for line in [*dataset.report.lines(), f"tokens sha256 {dataset.tokens_sha256}", str(dataset.folder)]:
        click.echo(line)


@data.command()
@click.argument("name")
@options_of_config
@map_option
@click.option("--base", help="Tokenizer for a file: a base of models.lock.yaml or a folder.")
@click.option("--strict", is_flag=True, help="Fail on warnings too.")
@json_option
def check(
    name: str,
    hw: str | None,
    overrides: Sequence[str],
    pairs: Sequence[str],
    base: str | None,
    strict: bool,
    as_json: bool,
) -> None:
    """Look for what is wrong with the data of recipe NAME, or of a file of rows."""
    from tools.data import checks
    from tools.data.licence import licence_of

    if corpus := corpus_of(name, hw, overrides):
        refuse_options(pairs=pairs, overrides=(), hw=None, base=base)
        report_corpus(corpus, strict, as_json)
        return
    seen = look_at(name, hw, overrides, pairs, base)
    report = checks.check(
        seen.rows,
        seen.prompts,
        seen.tokenizer,
        seen.config,
        problems=seen.problems,
        licence=licence_of(seen.card_folders),
    )
    if as_json:
        show_json({**report.to_dict(), "failed": report.failed(strict)})
    else:
        click.echo("\n".join(report.lines()))
    if report.failed(strict):
        count = f"errors: {len(report.errors)}, warnings: {len(report.warnings)}"
        raise DataError(f"the data check failed: {count}", where=name, todo="correct the rows listed above")


@data.command()
@click.argument("name")
@options_of_config
@map_option
@click.option("--base", help="Tokenizer for a file: a base of models.lock.yaml or a folder.")
@json_option
def stats(
    name: str, hw: str | None, overrides: Sequence[str], pairs: Sequence[str], base: str | None, as_json: bool
) -> None:
    """Count the rows, characters, tokens and padding of recipe NAME, or of a file of rows."""
    from common.data.rows import refuse
    from tools.data import checks

    if corpus := corpus_of(name, hw, overrides):
        refuse_options(pairs=pairs, overrides=(), hw=None, base=base)
        report_corpus(corpus, False, as_json)
        return
    seen = look_at(name, hw, overrides, pairs, base)
    refuse(seen.problems, seen.source or name)
    found = checks.stats(seen.rows, seen.tokenizer, seen.config)
    if as_json:
        show_json(found.to_dict())
    else:
        click.echo("\n".join(found.lines()))


@data.command()
@click.argument("name")
@options_of_config
@click.option("--step", type=click.IntRange(min=1), default=1, show_default=True, help="Optimizer step, from 1.")
@click.option("--rows", "limit", type=click.IntRange(min=1), default=4, show_default=True, help="Rows to print.")
def show(name: str, hw: str | None, overrides: Sequence[str], step: int, limit: int) -> None:
    """Decode the batch of one step of recipe NAME, what is supervised in color or between >> and <<."""
    from rich.console import Console

    recipe = open_recipe(name, hw, overrides)
    tokenizer, dataset = recipe.tokens()
    batch = dataset.train.batch(step, recipe.config.training.seed, recipe.config.training.batch_size)
    console = Console(highlight=False, soft_wrap=True)
    supervised, tokens = int(batch.loss_mask.sum()), batch.loss_mask.size
    console.print(f"step {step}: {len(batch.rows)} rows of {dataset.length}, {supervised} of {tokens} supervised")
    for at in range(min(limit, len(batch.rows))):
        row = int(batch.rows[at])
        console.print(f"\nrow {row} ({dataset.info['rows']['train'][row]})", style="bold")
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
    type=click.Choice(["auto", "jsonl", "csv", "parquet", "alpaca", "sharegpt", "text"]),
)
@map_option
@click.option("--revision", metavar="COMMIT", help="Commit of a hub:owner/name source: 40 hex digits.")
@click.option("--subset", help="Configuration of a Hub data set.")
@click.option("--split", default="train", show_default=True, help="Split of a Hub data set.")
@click.option("--skip-bad", is_flag=True, help="Leave bad rows out and list them, instead of failing.")
@json_option
def convert(
    source: str,
    out: Path,
    format_: str,
    pairs: Sequence[str],
    revision: str | None,
    subset: str | None,
    split: str,
    skip_bad: bool,
    as_json: bool,
) -> None:
    """Write the rows of SOURCE (a file, or hub:owner/name) to the new file OUT.jsonl."""
    from tools.data import convert as converter

    report = converter.convert(
        source,
        out,
        format_,
        converter.parse_map(pairs),
        revision=revision,
        subset=subset,
        split=split,
        skip_bad=skip_bad,
    )
    if as_json:
        show_json(report.to_dict())
    else:
        click.echo("\n".join(report.lines()))


@dataclass(frozen=True)
class Recipe:
    """A recipe as it would be launched on a board."""

    launch: Launch

    @property
    def folder(self) -> Path:
        return self.launch.recipe_dir

    @property
    def config(self) -> Config:
        return self.launch.config

    def tokens(self) -> tuple[ChatTokenizer, TokenDataset]:
        """Return the recipe's tokenizer and its token files, made when they are not there."""
        from common.recipe import load_dataset
        from common.train.plan import prepare
        from tools.data.fetch import fetch_pinned

        fetch_pinned(self.launch.config, functools.partial(click.echo, err=True))
        _, tokenizer, dataset = prepare(self.launch, load_dataset(self.folder)[0])
        return tokenizer, dataset

    def tokenizer(self) -> ChatTokenizer:
        """Return the tokenizer of the recipe's base model, which is fetched when it is not here."""
        if self.config.model.base is None:
            raise UsageError("the recipe has no base model to take a tokenizer from", where="model_config.base")
        return tokenizer_of(self.config.model.base, self.folder)


@dataclass(frozen=True)
class Seen:
    """What a check or a count looks at: rows by split and all that is known around them."""

    rows: Mapping[str, Sequence[Row]]
    problems: Sequence[Problem]
    prompts: Sequence[str]
    tokenizer: ChatTokenizer | None
    config: Config | None
    source: Path | None
    card_folders: Sequence[Path]


def open_recipe(name: str, hw: str | None, overrides: Sequence[str]) -> Recipe:
    """Return the recipe called `name`, or in the folder `name`. No board needs to be here to look at its data."""
    from tools.launch.resolve import resolve

    return Recipe(resolve(find_recipe(name), hw=hw, overrides=overrides, require_present=False))


def tokenizer_of(base: str, recipe_dir: Path | None) -> ChatTokenizer:
    """Return the tokenizer of a base model. What its fetching says goes to stderr."""
    from common.data.chat import ChatTokenizer
    from tools.data.fetch import base_of

    found = base_of(base, functools.partial(click.echo, err=True), recipe_dir)
    return ChatTokenizer.load(found.folder)


def look_at(name: str, hw: str | None, overrides: Sequence[str], pairs: Sequence[str], base: str | None) -> Seen:
    """Return the rows of a file, or a recipe's with prompts, tokenizer and config; bad lines are kept as problems."""
    from tools.data import convert

    if Path(name).is_file():
        refuse_options(pairs=(), overrides=overrides, hw=None, base=None)
        rows, problems = convert.scan(Path(name), convert.guess_format(name, "auto"), convert.parse_map(pairs))
        tokenizer = tokenizer_of(base, None) if base else None
        return Seen({"train": rows}, problems, (), tokenizer, None, Path(name), [Path(name).parent])
    refuse_options(pairs=pairs, overrides=(), hw=None, base=base)
    from common.data.build import read_splits
    from common.data.rows import scan_rows
    from common.recipe import call, load_dataset

    recipe = open_recipe(name, hw, overrides)
    source = recipe.folder / (recipe.config.data.source or "")
    cards = [source.parent, recipe.folder]
    problems = scan_rows(source)[1]
    if problems:  # the recipe's own builder would stop at them
        return Seen({}, problems, (), None, None, source, cards)
    splits, prompts = load_dataset(recipe.folder)
    parts, asked = read_splits(splits, recipe.config, recipe.folder), call(prompts, recipe.config, recipe.folder)
    return Seen(parts, (), asked, recipe.tokenizer(), recipe.config, source, cards)


def corpus_of(name: str, hw: str | None, overrides: Sequence[str]) -> Recipe | None:
    """Return the recipe called `name` where it trains on a corpus."""
    if Path(name).is_file():
        return None
    recipe = open_recipe(name, hw, overrides)
    return recipe if recipe.config.data.corpus else None


def report_corpus(recipe: Recipe, strict: bool, as_json: bool) -> None:
    """Print what is to be known of a corpus. Raises DataError for unknown characters when `strict`."""
    _, dataset = recipe.tokens()
    info = dataset.info
    if as_json:
        keys = ("corpus", "vocab_size", "unknown")
        show_json({**{key: info[key] for key in keys}, **dataset.report.to_dict()})
    else:
        click.echo("\n".join(dataset.report.lines()))
        click.echo(f"held-out documents: {', '.join(info['corpus']['held_out']['documents'])}")
    if strict and info["unknown"]:
        raise DataError(
            f"{info['unknown']:.3%} of the held-out characters are in no training text",
            where=str(recipe.config.data.corpus),
            todo="use data_config.tokenizer.type=bpe, which knows every byte",
        )


def refuse_options(**given: Any) -> None:
    """Raises UsageError for options without a meaning: --set for a file, --map and --base for a recipe."""
    names = {"pairs": "--map", "overrides": "--set", "hw": "--hw", "base": "--base"}
    wrong = [names[key] for key, value in given.items() if value]
    if wrong:
        kind = "a file of rows" if "--set" in wrong else "a recipe, which has rows as JSONL and model_config.base"
        raise UsageError(f"{' and '.join(wrong)} mean nothing for {kind}")


def decoded_line(batch: Batch, at: int, tokenizer: ChatTokenizer, color: bool) -> Text:
    """Return row `at` of a batch as text, its supervised stretches green, or, without color, between >> and <<.

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
