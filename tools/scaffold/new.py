"""`recipe new`: a recipe for other data, made from one that is there. Green at birth, or not there at all.

The fork is put together in a folder beside recipes/, checked as its first run would be, and renamed into place;
whatever goes wrong before leaves nothing behind. Nothing is downloaded and nothing is overwritten. No list names
recipes: a folder of recipes/ with a config.yaml is one, for make, for CI and for the gallery.
"""

from __future__ import annotations

import os
import re
import shutil
import tempfile
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

import yaml

from common import config as configs
from common import hardware
from common.config import Config
from common.config.layers import shown, to_yaml
from common.errors import DataError, UsageError
from common.files import disk_errors, sha256_file, sync, sync_all
from common.hardware import Hardware
from tools import recipes
from tools.data import convert
from tools.data.licence import LICENCE_LINE, licence_of
from tools.edit_yaml import remove_key, set_key
from tools.progress import Watch, unwatched
from tools.results import schema
from tools.scaffold import corpus, pages, rows
from tools.scaffold.pages import Facts
from tools.scaffold.rows import Settings
from tools.scaffold.split import split

Say = Callable[[str], None]
NAME = re.compile(r"[a-z][a-z0-9]*(?:-[a-z0-9]+)*")
LONGEST_NAME = 50
OF_THE_PARENT = ("README.md", schema.FILE, schema.FOLDER)  # at the top: its own words and figures
# What the data decides: the parent's values go from every layer, so that none of them undoes what the fork sets.
OF_THE_DATA = (
    *(f"data_config.{key}" for key in ("source", "corpus", "control")),
    *(f"data_config.{key}" for key in ("split_by", "held_out_share")),
    "eval_config.prompts",
)
OF_ROWS = (
    *("data_config.max_length", "eval_config.max_new_tokens", "eval_config.max_rows", "eval_config.every"),
    *("training_config.num_epochs", "training_config.max_steps", "training_config.scheduler.warmup_steps"),
    *("checkpoint_config.every", "checkpoint_config.keep_best"),
)


@dataclass(frozen=True)
class Own:
    """The user's data, as it was named on the command line."""

    path: Path
    mapping: Mapping[str, str]
    format: str


def new(name: str, parent: str, own: Own | None, say: Say, watch: Watch = unwatched) -> Path:
    """Make recipes/`name` from the recipe `parent`; return its folder.

    `own` is a file of rows in any format that `recipe data convert` takes, or, for a recipe that trains on plain text,
    a text file or a folder of them; None keeps the parent's data, for a change of the loop. Raises UsageError for the
    names and options, DataError for the data; then nothing was written.
    """
    if not NAME.fullmatch(name) or len(name) > LONGEST_NAME:
        raise UsageError(
            f"{name!r} cannot be the name of a recipe",
            todo="lower-case letters, digits and single hyphens between them, a letter first, at most "
            f"{LONGEST_NAME} characters: support-tickets",
        )
    target = recipes.RECIPES / name
    refuse_existing(target)
    source = recipes.find_recipe(parent)
    scratch = tempfile.TemporaryDirectory(prefix=".new-", dir=target.parent.parent)
    with disk_errors("write the recipe", target), scratch as place:
        made, home, notes = Path(place) / name, Path(place) / "home", list[str]()
        take_over(source, made, OF_THE_PARENT)
        pages.rename(made, source.name, name)
        facts = fork(made, source, own, home, notes.append, watch) if own else copied(made, source)
        pages.write(made, facts)
        schema.load(made)
        for board in hardware.table().values():
            if isinstance(resolved(source, board), Config):
                configs.load(made, board)
        refuse_existing(target)
        sync_all(made)
        made.rename(target)
        sync(target.parent)
    for line in notes:
        say(line)
    say(f"written: {shown(target)}")
    for page in ["data/README.md: whose data it is, and its licence"] * bool(own) + ["README.md: what it is for"]:
        say(f"to fill in: {shown(target)}/{page}")
    say(f"next:\n  .venv/bin/recipe data check {name}\n  make recipe NAME={name} HW=cpu STEPS=5\n  make docs")
    return target


def refuse_existing(target: Path) -> None:
    """Refuse a recipe that is there already."""
    if os.path.lexists(target):
        raise UsageError(
            f"there is a {target.name} already, and nothing is overwritten",
            where=shown(target),
            todo="choose another name, or move that one away",
        )


def take_over(source: Path, made: Path, without: Sequence[str] = ()) -> None:
    """Copy a recipe's folder to `made`, but for what no fork takes over: hidden files, and those in `without`."""
    made.mkdir()
    for path in sorted(source.iterdir()):
        if path.name.startswith(".") or path.name in ("__pycache__", *without):
            continue
        if path.is_dir():
            take_over(path, made / path.name)
        else:
            shutil.copy(path, made)


def resolved(recipe: Path, board: Hardware) -> Config | str:
    """Return the recipe's config on a board, or why it has none."""
    try:
        return configs.load(recipe, board)
    except UsageError as error:
        return error.what


def on_board(recipe: Path) -> Config:
    """Return the recipe's config on the first card that it fits, else on the CPU. Raises UsageError."""
    found = (resolved(recipe, board) for board in hardware.table().values() if not board.is_cpu)
    on_card = next((config for config in found if isinstance(config, Config)), None)
    return on_card or on_cpu(recipe)


def on_cpu(recipe: Path) -> Config:
    """Return the recipe's config on the CPU."""
    return configs.load(recipe, hardware.get("cpu"))


def recipes_of_rows() -> str:
    """Return what to do where a recipe that trains on rows is wanted."""
    names = " or ".join(path.name for path in recipes.folders() if on_board(path).data.corpus is None)
    return f"fork a recipe that trains on rows: --from {names}"


# --- the three kinds of fork ----------------------------------------------------------------------------------------


def copied(made: Path, source: Path) -> Facts:
    """Return the facts of a copy with the parent's data, whose licence the README names."""
    first = (source / "config.yaml").read_text(encoding="utf-8").partition("\n")[0].removeprefix("# ")
    licence = licence_of([source / "data", source]) or ""
    if licence and not LICENCE_LINE.match(licence):  # a file of its own
        licence = f"License: see `{licence}`."
    what = f"{first.rstrip('.')}: a copy of {source.name}."
    return Facts(made.name, source.name, what, f"{licence}\n\nAs in [`{source.name}`](../{source.name}).".strip())


def fork(made: Path, source: Path, own: Own, home: Path, say: Say, watch: Watch) -> Facts:
    """Put the user's data in the place of the parent's, and set what depends on it."""
    parent = on_board(source)
    if parent.data.corpus is None:
        forget(made, parent, (*OF_THE_DATA, *OF_ROWS))
        return fork_rows(made, source, own, home, say, watch)
    if own.mapping or own.format not in ("auto", "text"):
        raise UsageError(
            f"{source.name} trains on plain text, which has neither columns nor formats",
            where="--map" if own.mapping else f"--format {own.format}",
            todo=f"leave it out, or {recipes_of_rows()}",
        )
    if own.path.suffix.lower() in corpus.ROW_SUFFIXES:
        raise DataError(
            f"{own.path.name} looks like rows, and {source.name} trains on plain text",
            where=str(own.path),
            todo=recipes_of_rows(),
        )
    forget(made, parent, OF_THE_DATA)
    return fork_corpus(made, source, own.path, home, say)


def forget(made: Path, parent: Config, keys: Sequence[str]) -> None:
    """Take the parent's data out of the copy, and `keys` out of every layer over config.yaml."""
    if (made / "data").is_dir():
        shutil.rmtree(made / "data")
    for name in (parent.data.source, parent.data.corpus, parent.eval.prompts):
        copy = (made / name).resolve() if isinstance(name, str) else made
        if copy.is_relative_to(made.resolve()) and copy.is_file():  # not what a path leads to outside of the copy
            copy.unlink()
    for path in [*made.glob("presets/*.yaml"), *made.glob("hw/*.yaml")]:
        edit(path, keys, {})


def edit(layer: Path, keys: Sequence[str], settings: Settings) -> None:
    """Set `settings` in a layer, remove those of `keys` that are not among them, and the layer if nothing is left."""
    text = layer.read_text(encoding="utf-8") if layer.is_file() else ""
    for key in [key for key in keys if key not in settings]:
        text = remove_key(text, key)
    for key, (value, why) in settings.items():
        text = set_key(text, key, value, why)
    layer.write_text(text, encoding="utf-8")
    if yaml.safe_load(text) is None:  # an overlay in which nothing differs any more
        layer.unlink()


def reasons(layer: str, settings: Settings) -> list[str]:
    """Return what is set in a layer, and why, a line each."""
    lines = [f"  {to_yaml({key: value}).strip()}  ({why})" for key, (value, why) in settings.items()]
    return [f"{layer}:", *lines] if lines else []


def fork_rows(made: Path, source: Path, own: Own, home: Path, say: Say, watch: Watch) -> Facts:
    """Make the fork of a recipe that trains on rows."""
    parents = {"config.yaml": on_board(source), "hw/cpu.yaml": on_cpu(source)}
    # The larger batch of the two: the fork has to fill one of it wherever it runs.
    batch = max(config.training.batch_size for config in parents.values())
    kind = convert.guess_format(own.path, own.format)
    read = convert.load(own.path, kind, own.mapping, watch)
    for line in read.lines():
        say(line)
    found = split(read.rows, batch, str(own.path))
    counts = f"{found.train} to train on, {found.held_out} held out, {len(found.asked)} asked at every evaluation"
    counts += f", {found.left_out} left out, which have the prompt of one that is asked" if found.left_out else ""
    total = len(found.rows) + len(found.asked) + found.left_out
    say(f"{made.name}: {source.name} with {total} rows of {own.path} ({kind}): {counts}")
    rows.write(made, found)
    everywhere = rows.settings(found) | rows.schedule(found.train, parents["config.yaml"].training.batch_size)
    edit(made / "config.yaml", (*OF_THE_DATA, *OF_ROWS), everywhere)
    layers = {"config.yaml": everywhere}
    if (source / "hw/cpu.yaml").is_file():
        cpu = rows.schedule(found.train, parents["hw/cpu.yaml"].training.batch_size, rows.CPU_STEPS)
        layers["hw/cpu.yaml"] = {key: to for key, to in cpu.items() if everywhere.get(key, (None,))[0] != to[0]}
        edit(made / "hw/cpu.yaml", (), layers["hw/cpu.yaml"])
    for layer, settings in layers.items():
        for line in reasons(layer, settings):
            say(line)
    rows.prove(made, found, (on_board(made), on_cpu(made)), home, say, watch)
    chosen = f"{found.held_out} of them are held out, chosen by a hash, so that adding a row moves no other"
    return Facts(
        name=made.name,
        parent=source.name,
        what=f"Fine-tune an instruction model on {pages.short(own.path.name)}: {total} rows.",
        data=f"- `{rows.SOURCE}`: {len(found.rows)} rows; {chosen}.\n"
        f"- `{rows.PROMPTS}`: {len(found.asked)} rows set aside, asked before training, on the way and at the end;\n"
        "  `response` is what was written for them.",
        source=f"`{own.path.name}`, sha256 `{sha256_file(own.path)}`",
    )


def fork_corpus(made: Path, source: Path, data: Path, home: Path, say: Say) -> Facts:
    """Make the fork of a recipe that trains on plain text."""
    name = corpus.copy(data, made)
    settings, documents = corpus.settings(name, made)
    how = settings["data_config.held_out_share"][1]
    corpus.write_prompts(made, documents)
    train, held_out = (sum(len(part.text) for part in documents[split]) for split in ("train", "held_out"))
    counts = f"{train:,} characters to train on, {held_out:,} held out"
    say(f"{made.name}: {source.name} with {data}: {counts}")
    edit(made / "config.yaml", OF_THE_DATA, settings)
    layers = {"config.yaml": on_board, "hw/cpu.yaml": on_cpu}
    for layer in [layer for layer in layers if (made / layer).is_file()]:
        pieces = corpus.fit_vocabulary(made, layers[layer](made), documents)
        edit(made / layer, (), pieces)
        steps = corpus.schedule(made, layers[layer](made), home)
        edit(made / layer, (), steps)
        for line in reasons(layer, settings | pieces | steps):
            say(line)
        settings = {}
    return Facts(
        name=made.name,
        parent=source.name,
        what=f"Train a transformer from random weights on {pages.short(data.name)}: {train + held_out:,} characters.",
        data=f"- `{name}`: {counts} ({how}).\n"
        f"- `{rows.PROMPTS}`: beginnings of held-out lines, which the model continues at every evaluation.",
        source=f"`{data.name}`",
    )
