"""What `recipe base` does: add, list, check, remove."""

from __future__ import annotations

import re
from collections.abc import Callable, Iterator, Mapping
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from common.config.layers import shown
from common.errors import MachineError, RecipeError, UsageError
from common.model import bases
from tools import recipes
from tools.bases import hub, lock, pin

Say = Callable[[str], None]
REPOSITORY = re.compile(r"[A-Za-z0-9][\w.-]*/[A-Za-z0-9][\w.-]*")


# --- add and remove -----------------------------------------------------------------------------------------------


def add(recipe: Path, wanted: str, say: Say, *, replace: bool = False) -> None:
    """Pin `wanted`, owner/name or owner/name@revision, for the recipe in the folder `recipe`; say what it is.

    Raises UsageError for the name or a pin at another commit, MachineError for what the Hub or the model refuses.
    """
    repo, _, revision = wanted.partition("@")
    if not REPOSITORY.fullmatch(repo):
        raise UsageError(
            f"{wanted!r} is no model of the Hub",
            where="REPO[@REVISION]",
            todo="write it as its page does, owner/name: HuggingFaceTB/SmolLM2-360M-Instruct, or ...@main",
        )
    bases.own(recipe)  # one that cannot be read is refused before the Hub is asked
    entry, notes = pin.look_up(repo, revision or None)
    changed = lock.put(recipe, repo, entry, replace)
    done = "pinned" if changed else "is pinned there already"
    say(f"{repo} at {entry['revision'][:12]}: {done}, in {shown(recipe / bases.OWN_LOCK)}")
    template = f"chat template in {entry['chat_template']}" if entry["chat_template"] else "no chat template"
    say(f"  {entry['parameters']:,} parameters, licence {entry['licence']}, {template}")
    say(f"  {len(entry['files'])} files, {entry['download_mb']} MB, each by its sha256; a run fetches them once")
    for note in notes:
        say(f"note: {note}")
    shipped = next(((name, other) for name, other in bases.locked().items() if other.get("repo") == repo), None)
    if shipped:
        say(f"note: every recipe has it as {shipped[0]}, at {shipped[1]['revision'][:12]}")
    if not lock.named_by(recipe, repo):
        say(f"next: set `model_config.base: {repo}` in {shown(recipe / 'config.yaml')}, or in an overlay of hw/")


def remove(recipe: Path, name: str, say: Say) -> None:
    """Take a pin out of a recipe's lock; what was fetched stays. Raises UsageError where the recipe names it."""
    entry = lock.take_out(recipe, name)
    say(f"{name} at {str(entry.get('revision'))[:12]} is no longer pinned for {recipe.name}")
    if "revision" in entry and (folder := bases.folder_of(name, entry)).is_dir():
        say(f"its files stay in {folder}: other recipes and runs may use them")


# --- list ---------------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Pinned:
    """A pinned base as a row of the table; `pinned_by` is None where every recipe has it."""

    name: str
    source: str
    commit: str
    parameters: int
    licence: str
    here: bool
    pinned_by: str | None
    used_by: dict[str, list[str]]


def listed() -> list[Pinned]:
    """Return every pinned base: those of all recipes, then each recipe's own, with the configs that name it."""
    folders = recipes.folders()
    found = [_row(name, entry, None, folders) for name, entry in bases.locked().items()]
    for folder in folders:
        found += [_row(name, entry, folder.name, [folder]) for name, entry in lock.whole(folder).items()]
    return found


def _row(name: str, entry: Mapping[str, Any], owner: str | None, folders: list[Path]) -> Pinned:
    used = {folder.name: layers for folder in folders if (layers := lock.named_by(folder, name))}
    from_hub = entry["source"] == "hub"
    return Pinned(
        name=name,
        source=str(entry["repo"] if from_hub else entry["package"]),
        commit=str(entry["revision"] if from_hub else entry["sha256"])[:12],
        parameters=int(entry["parameters"]),
        licence=str(entry["licence"]),
        here=(bases.folder_of(name, entry) / "base.json").is_file(),
        pinned_by=owner,
        used_by=used,
    )


def print_list(as_json: bool, say: Say) -> None:
    """Print every pinned base, as a table or as JSON."""
    import json

    rows = listed()
    if as_json:
        return say(json.dumps([asdict(row) for row in rows], indent=1))
    table = [("base", "from", "commit", "parameters", "licence", "here", "pinned by", "named by")]
    for row in rows:
        used = "; ".join(f"{recipe} ({', '.join(layers)})" for recipe, layers in row.used_by.items())
        where = "" if row.source == row.name else row.source
        shape = f"{row.parameters:,}", row.licence, "yes" if row.here else "no"
        table.append((row.name, where, row.commit, *shape, row.pinned_by or "every recipe", used or "nothing"))
    widths = [max(map(len, column)) for column in zip(*table, strict=True)]
    for line in table:
        say("  ".join(f"{cell:<{width}}" for cell, width in zip(line, widths, strict=True)).rstrip())
    return None


# --- check --------------------------------------------------------------------------------------------------------


def check(recipe: Path | None, say: Say) -> int:
    """Verify the files of pinned bases on this machine, and ask the Hub whether their commits are still there.

    Of the recipe in `recipe`, or of all where it is None. Return 6 where a file is damaged or a commit gone, else 0:
    what was not fetched, and a Hub that cannot be reached, is said.
    """
    folders = [recipe] if recipe else recipes.folders()
    pins = [(None, name, entry) for name, entry in bases.locked().items()] if recipe is None else []
    every = [*pins, *((folder, name, entry) for folder in folders for name, entry in lock.whole(folder).items())]
    faults = 0
    for folder, name, entry in every:
        say(f"{name}{f' of {folder.name}' if folder else ''}")
        for sound, line in (here(folder, name, entry), *upstream(entry)):
            faults += not sound
            say(f"  {'ok   ' if sound else 'WRONG'}  {line}")
    if not every:
        say(f"{recipe.name if recipe else 'nothing'} pins no base of its own")
    return 6 if faults else 0


def here(recipe: Path | None, name: str, entry: Mapping[str, Any]) -> tuple[bool, str]:
    """Return whether a base's files on this machine are sound, and what is to be said of them."""
    if not (bases.folder_of(name, entry) / "base.json").is_file():
        return True, f"not on this machine yet: a run fetches its {entry['download_mb']} MB"
    try:
        folder = bases.resolve(name, recipe_dir=recipe).folder
    except RecipeError as error:
        return False, f"{error.what}; to do: {error.todo}"
    return True, f"every file has its sha256: {folder}"


def upstream(entry: Mapping[str, Any]) -> Iterator[tuple[bool, str]]:
    """Yield what the Hub says of a pin: its commit there or gone, its files the same, its main branch moved on."""
    if entry["source"] != "hub":
        return
    repo, commit = entry["repo"], entry["revision"]
    try:
        info, main = pin.info_of(repo, commit), str(pin.info_of(repo, None).sha)
    except hub.Gone as error:
        yield False, f"{error.what}: what is here is all there is; keep {bases.home() / 'bases'}"
        return
    except MachineError as error:
        yield True, f"the Hub was not asked: {error.what}; to do: {error.todo}"
        return
    theirs = {file.rfilename: file.lfs.sha256 for file in info.siblings or [] if file.lfs}
    names = {file.rfilename for file in info.siblings or []}
    changed = [name for name, ours in entry["files"].items() if name not in names or theirs.get(name, ours) != ours]
    if changed:
        yield False, f"the Hub has other files at {commit[:12]}: {', '.join(changed)}; a run would refuse them"
    else:
        moved = "main is there, too" if main == commit else f"main has moved on to {main[:12]}"
        yield True, f"the Hub has {commit[:12]} with these files; {moved}"
