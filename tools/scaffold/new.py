"""`recipe new`: a recipe for other data, made from one that is there. Green at birth, or not there at all.

The fork is put together in a folder beside recipes/, checked as every recipe is, and renamed into place; whatever goes
wrong before leaves nothing behind. Nothing is downloaded and nothing is overwritten. No list names recipes: a folder of
recipes/ with a config.yaml is one, for make, for CI and for the gallery.
"""

from __future__ import annotations

import os
import re
import shutil
import tempfile
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

from common import config as configs
from common import hardware, paths
from common.config import Config
from common.config.layers import shown
from common.data import corpora
from common.data.build import Builder
from common.errors import DataError, UsageError
from common.files import sha256_file
from common.hardware import Hardware
from tools.cli.data import LICENCE_LINE, licence_of
from tools.data import checks
from tools.results import schema
from tools.scaffold import corpus
from tools.scaffold import pages as scaffold_pages
from tools.scaffold import rows as scaffold_rows
from tools.scaffold import split as scaffold_split
from tools.scaffold.pages import Facts
from tools.scaffold.yaml import Setting, YamlFile

Say = Callable[[str], None]
NAME = re.compile(r"[a-z][a-z0-9]*(?:-[a-z0-9]+)*")
LONGEST_NAME = 50
OF_THE_PARENT = ("README.md", schema.FILE, schema.FOLDER)  # at the top: its own words and figures
# What the data decides. A layer over config.yaml loses these keys, so that it cannot undo what the fork sets there.
OF_THE_DATA = (
    *(f"data_config.{key}" for key in ("source", "corpus", "format", "map", "revision", "control")),
    *(f"data_config.{key}" for key in ("split_by", "held_out_share")),
    "eval_config.prompts",
)
OF_THE_ROWS = ("data_config.max_length", "eval_config.max_new_tokens", "eval_config.max_rows")
STOPS = ("training_config.max_steps", "training_config.num_epochs")


@dataclass(frozen=True)
class Own:
    """The user's data, as it was named on the command line."""

    path: Path
    mapping: Mapping[str, str]
    format: str


def new(name: str, parent: str, own: Own | None, say: Say) -> Path:
    """Make recipes/`name` from the recipe `parent`; return its folder.

    `own` is a file of rows in any format that `recipe data convert` takes, or, for a recipe that trains on plain text,
    a text file or a folder of them; None keeps the parent's data, for a change of the loop. Raises UsageError for the
    names and options, DataError for the data; then nothing was written.
    """
    target = refuse_name(name)
    source = paths.find_recipe(parent)
    with tempfile.TemporaryDirectory(prefix=".new-", dir=target.parent.parent) as scratch:
        made = Path(scratch) / name
        shutil.copytree(source, made, ignore=left_behind(source))
        scaffold_pages.rename(made, source.name, name)
        notes: list[str] = []
        facts = fork(made, source, own, notes.append) if own else copied(made, source)
        write_pages(made, facts)
        check(made, source, own is not None)
        refuse_existing(target)
        made.rename(target)
    for line in [*notes, *farewell(target, own is not None)]:
        say(line)
    return target


def left_behind(source: Path) -> Callable[[str, list[str]], set[str]]:
    """What of a recipe's folder no fork takes over, as shutil's `ignore`."""

    def names(folder: str, found: list[str]) -> set[str]:
        hidden = {name for name in found if name.startswith(".") or name == "__pycache__"}
        return hidden | (set(OF_THE_PARENT) & set(found) if Path(folder) == source else set())

    return names


def refuse_name(name: str) -> Path:
    """The folder that a recipe of this name will be in. Raises UsageError."""
    if not NAME.fullmatch(name) or len(name) > LONGEST_NAME:
        raise UsageError(
            f"{name!r} cannot be the name of a recipe",
            todo="lower-case letters, digits and single hyphens between them, a letter first, at most "
            f"{LONGEST_NAME} characters: support-tickets",
        )
    target = paths.RECIPES / name
    refuse_existing(target)
    return target


def refuse_existing(target: Path) -> None:
    if os.path.lexists(target):
        raise UsageError(
            f"there is a {target.name} already, and nothing is overwritten",
            where=shown(target),
            todo="choose another name, or move that one away",
        )


def write_pages(made: Path, facts: Facts) -> None:
    """README.md, results.yaml, the head of config.yaml, and the card of the user's own data."""
    config = YamlFile(made / "config.yaml")
    config.replace_head(scaffold_pages.head(facts))
    config.write()
    pages = {schema.FILE: scaffold_pages.empty_results(facts.name)}
    pages["README.md"] = scaffold_pages.readme(facts, configs.load(made, hardware.get("cpu")), some_config(made))
    if facts.data:
        pages["data/README.md"] = scaffold_pages.data_card(facts)
    for path, text in pages.items():
        (made / path).write_text(text, encoding="utf-8")


def some_config(recipe: Path) -> Config:
    """The recipe's config on the first card that it fits, else on the CPU. Raises UsageError where it fits nothing."""
    found = (resolved(recipe, board) for board in hardware.table().values() if not board.is_cpu)
    on_card = next((config for config in found if isinstance(config, Config)), None)
    return on_card or configs.load(recipe, hardware.get("cpu"))


def config_of(layer: Path) -> Config:
    """The config that a layer is the last word in: the CPU's for hw/cpu.yaml, a board's for config.yaml."""
    return configs.load(layer.parents[1], hardware.get("cpu")) if layer.stem == "cpu" else some_config(layer.parent)


def recipes_of(kind: str) -> str:
    """The recipes that train on `rows`, or on `text`, for a message."""
    folders = sorted(path.parent for path in paths.RECIPES.glob("*/config.yaml"))
    return " or ".join(path.name for path in folders if (some_config(path).data.corpus is not None) == (kind == "text"))


# --- the three kinds of fork ----------------------------------------------------------------------------------------


def copied(made: Path, source: Path) -> Facts:
    """A copy with the parent's data: its loop is to be changed."""
    first = (source / "config.yaml").read_text(encoding="utf-8").partition("\n")[0].removeprefix("# ")
    named = licence_of([source / "data", source])
    if named and not LICENCE_LINE.match(named):  # a file of its own
        named = f"License: see `{named}`."
    split = [f"As in [`{source.name}`](../{source.name})."]
    return Facts(
        name=made.name,
        parent=source.name,
        what=f"{first.rstrip('.')}: a copy of {source.name}.",
        split=split,
        licence=named or "",
    )


def fork(made: Path, source: Path, own: Own, say: Say) -> Facts:
    """Put the user's data in the place of the parent's, and set what hangs on it."""
    parent = some_config(source)
    forget(made, parent)
    if parent.data.corpus is None:
        return fork_rows(made, source, own, say)
    if own.mapping or own.format not in ("auto", "text"):
        raise UsageError(
            f"{source.name} trains on plain text, which has neither columns nor formats",
            where="--map" if own.mapping else f"--format {own.format}",
            todo=f"leave it out, or fork a recipe that trains on rows: --from {recipes_of('rows')}",
        )
    return fork_corpus(made, source, own.path, say)


def forget(made: Path, parent: Config) -> None:
    """Take the parent's data out of the copy, and what was set for it out of every layer."""
    shutil.rmtree(made / "data", ignore_errors=True)
    for name in (parent.data.source, parent.data.corpus, parent.eval.prompts):
        copy = (made / name).resolve() if isinstance(name, str) else made
        if copy.is_relative_to(made.resolve()) and copy.is_file():  # not what a path leads to outside of the copy
            copy.unlink()
    of_rows = OF_THE_ROWS if parent.data.corpus is None else ()
    for path in [*made.glob("presets/*.yaml"), *made.glob("hw/*.yaml")]:
        layer = YamlFile(path)
        for key in (*OF_THE_DATA, *of_rows):
            layer.remove(key)
        layer.write()
    config = YamlFile(made / "config.yaml")
    for key in ("format", "map", "revision", "control"):
        config.remove(f"data_config.{key}")
    config.write()


def apply(layer: Path, settings: Sequence[Setting]) -> list[str]:
    """Write settings into a layer; return them with their reasons, a line each."""
    edited = YamlFile(layer)
    for setting in settings:
        if setting.key in STOPS:
            edited.remove(next(key for key in STOPS if key != setting.key))
        edited.set(setting)
    edited.write()
    return [f"  {setting}" for setting in settings]


def fork_rows(made: Path, source: Path, own: Own, say: Say) -> Facts:
    """The fork of a recipe that trains on rows."""
    board, cpu = some_config(source), configs.load(source, hardware.get("cpu"))
    try:
        rows, kind = scaffold_rows.read(own.path, own.format, own.mapping)
    except scaffold_rows.Unmarked as error:
        raise DataError(
            error.what,
            where=error.where,
            todo=f"{error.todo}; or train on it as plain text: --from {recipes_of('text')}",
        ) from error
    sizes = scaffold_rows.lengths(rows, (board, cpu), source)
    scaffold_rows.refuse_longer_than_context(rows, sizes, str(own.path))
    batch = max(board.training.batch_size, cpu.training.batch_size)
    found = scaffold_split.share(rows, batch, scaffold_rows.can_be_asked(sizes), str(own.path))
    scaffold_split.write(made, found)
    counts = f"{found.train} to train on, {found.held_out} held out, {len(found.asked)} asked at every evaluation"
    say(f"{made.name}: {source.name} with {len(rows)} rows of {own.path} ({kind}): {counts}")
    for line in scaffold_rows.described(found, sizes):
        say(line)
    layers = {made / "config.yaml": (board, None), made / "hw/cpu.yaml": (cpu, scaffold_rows.CPU_STEPS)}
    for layer, (config, limit) in layers.items():
        if layer.is_file():
            settings = scaffold_rows.settings(found, sizes) if config is board else []
            settings += scaffold_rows.schedule(found.train, config.training.batch_size, limit)
            say(f"{layer.relative_to(made)}:")
            for line in apply(layer, settings):
                say(line)
            if config is cpu:
                drop_restated(layer, settings)
    for line in scaffold_rows.warnings(found, sizes, configs.load(made, hardware.get("cpu")), source):
        say(line)
    return Facts(
        name=made.name,
        parent=source.name,
        what=f"Fine-tune an instruction model on {scaffold_pages.short(own.path.name)}: {len(rows)} rows.",
        split=scaffold_split.points(found),
        data=own.path.name,
        sha256=sha256_file(own.path),
        prompt=found.asked[0].prompt,
    )


def fork_corpus(made: Path, source: Path, data: Path, say: Say) -> Facts:
    """The fork of a recipe that trains on plain text."""
    if data.suffix.lower() in corpus.ROW_SUFFIXES:
        raise DataError(
            f"{data.name} looks like rows, and {source.name} trains on plain text",
            where=str(data),
            todo=f"fork a recipe that trains on rows: --from {recipes_of('rows')}",
        )
    text = corpus.copy(data, made)
    prompts = corpus.beginnings(text)
    corpus.write_prompts(made, prompts)
    say(f"{made.name}: {source.name} with {data}: {text}")
    settings = [
        Setting("data_config.corpus", text.name, str(text)),
        text.held_out_share,
        Setting("eval_config.prompts", corpus.PROMPTS, "beginnings of held-out lines"),
    ]
    for layer in (made / "config.yaml", made / "hw/cpu.yaml"):
        if layer.is_file():
            lines = apply(layer, settings)
            lines += apply(layer, corpus.vocabulary_settings(text, config_of(layer), made))
            lines += apply(layer, corpus.schedule(text, config_of(layer), str(data)))
            for line in [f"{layer.relative_to(made)}:", *lines] if lines else []:
                say(line)
            settings = []
    for line in corpus.warnings(made):
        say(line)
    return Facts(
        name=made.name,
        parent=source.name,
        what="Train a transformer from random weights on "
        f"{scaffold_pages.short(data.name)}: {text.characters():,} characters.",
        split=corpus.points(text, len(prompts)),
        data=data.name,
        sha256=corpora.text_sha256([part for split in text.splits.values() for part in split]),
        prompt=prompts[0],
    )


def drop_restated(layer: Path, settings: Sequence[Setting]) -> None:
    """Take out of hw/cpu.yaml what was set there and is the same in config.yaml: an overlay holds what differs."""
    boards = [board for board in hardware.table().values() if board.is_cpu]
    meant = [resolved(layer.parents[1], board) for board in boards]
    for setting in settings:
        if not layer.is_file():  # nothing differs: the overlay went with its last key
            return
        before, edited = layer.read_text(encoding="utf-8"), YamlFile(layer)
        edited.remove(setting.key)
        edited.write()
        if [resolved(layer.parents[1], board) for board in boards] != meant:
            layer.write_text(before, encoding="utf-8")


def resolved(recipe: Path, board: Hardware) -> Config | str:
    """The recipe's config on a board, or why it has none."""
    try:
        return configs.load(recipe, board)
    except UsageError as error:
        return error.what


# --- the end --------------------------------------------------------------------------------------------------------


def check(made: Path, source: Path, own_data: bool) -> None:
    """The fork on every board that its parent fits, and what its dataset.py makes of the user's data.

    The parent's data is not looked at: it may have to be fetched first.

    Raises UsageError or DataError for what is wrong.
    """
    schema.load(made)
    for board in hardware.table().values():
        if isinstance(resolved(source, board), Config):
            configs.load(made, board)
    if not own_data:
        return
    builder = Builder(configs.load(made, hardware.get("cpu")), made)
    prompts = builder.prompts()
    if builder.config.data.corpus is not None:
        builder.documents()
        return
    splits = builder.splits()
    leaks = [finding for finding in checks.leaks(splits["train"], splits["held_out"], prompts) if finding.is_error]
    if leaks:
        raise DataError(
            "\n".join(["the data check failed:", *(line for finding in leaks for line in finding.lines())]),
            where=str(source / "dataset.py"),
            todo="the parent's dataset.py splits these rows otherwise than by split_by and held_out_share",
        )


def farewell(target: Path, own_data: bool) -> list[str]:
    """Where the fork is, what a person has to write, and the next commands."""
    pages = ["data/README.md: whose data it is, and its licence", "README.md: what it is for"]
    return [
        f"written: {shown(target)}",
        *(f"to fill in: {shown(target)}/{page}" for page in pages[0 if own_data else 1 :]),
        "next:",
        f"  .venv/bin/recipe data check {target.name}",
        f"  make recipe NAME={target.name} HW=cpu STEPS=5",
        "  make docs",
    ]
