"""The commands that a page shows, as they would be typed, and what is wrong with one.

Nothing is trained and nothing leaves the machine: make runs in a house of stubs, where `recipe` writes its words down;
those are parsed by the real command, and a run that names a recipe which is here is planned by its own dry run.
"""

from __future__ import annotations

import itertools
import re
import shlex
import shutil
import subprocess
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any
from unittest import mock

import click

from common import config as configs
from common.errors import MachineError, RecipeError, UsageError
from common.paths import ROOT
from tools.cli import main
from tools.launch import dry_run
from tools.launch.resolve import resolve
from tools.machine import detect
from tools.recipes import find_recipe

FOLDERS = ("recipes", "docs", "docker", "bench", "ci")  # besides the pages of the root
BLOCK = re.compile(r"^```(?:sh|bash|console)?\n(.*?)^```$", re.MULTILINE | re.DOTALL)
ANY_BLOCK = re.compile(r"^```.*?^```$", re.MULTILINE | re.DOTALL)
INLINE = re.compile(r"`(make [^`\n]+)`")
RECIPE_WORDS = ("recipe", ".venv/bin/recipe")
TO_A_FILE = re.compile(r"\d?>")
STUB = "#!/bin/sh\nexit 0\n"
LISTEN = """#!/bin/sh
printf '%s\\0' "$@" >>calls
printf '\\n' >>calls
"""


class NotHere(Exception):
    """What a command names is not in this checkout."""


class Wrong(Exception):
    """A command that would not do what its page says."""


@dataclass(frozen=True)
class Shown:
    """A command with the page and line that it stands on."""

    page: Path
    line: int
    words: tuple[str, ...]

    def __str__(self) -> str:
        return f"{self.page.relative_to(ROOT) if self.page.is_relative_to(ROOT) else self.page}:{self.line}"


def pages(root: Path = ROOT) -> list[Path]:
    found = [*root.glob("*.md"), *(page for name in FOLDERS for page in (root / name).rglob("*.md"))]
    return sorted(page for page in found if not any(part.startswith(".") for part in page.relative_to(root).parts))


def shown(page: Path) -> Iterator[Shown]:
    """Every line of a block of code that begins with make or recipe, and `make ...` within a line of prose.

    A line may go on after a backslash.
    """
    text = page.read_text(encoding="utf-8")
    prose = ANY_BLOCK.sub(lambda block: "\n" * block[0].count("\n"), text)
    for inline in INLINE.finditer(prose):
        yield from (Shown(page, prose.count("\n", 0, inline.start()) + 1, words) for words in _commands(inline[1]))
    for block in BLOCK.finditer(text):
        first = text.count("\n", 0, block.start(1)) + 1
        lines = block[1].replace("\\\n", "\\\0").split("\n")
        for at, line in enumerate(lines):
            before = sum(earlier.count("\0") for earlier in lines[:at])
            for words in _commands(line.replace("\\\0", " ").strip().removeprefix("$ ")):
                yield Shown(page, first + at + before, words)


def _commands(line: str) -> Iterator[tuple[str, ...]]:
    """The commands of make and recipe in a line of the shell, which may have several."""
    lexer = shlex.shlex(line, posix=True, punctuation_chars=";&|")
    lexer.whitespace_split = True
    try:
        words = list(lexer)
    except ValueError:  # no command: a quotation mark of prose
        return
    for separated, group in itertools.groupby(words, lambda word: not word.strip(";&|")):
        command = tuple(itertools.takewhile(lambda word: not TO_A_FILE.match(word), group))
        if not separated and command and command[0] in ("make", *RECIPE_WORDS):
            yield command


class House:
    """The Makefile and ci/forward.sh among stubs: what make hands over to `recipe` is written down."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        shutil.copy(ROOT / "Makefile", folder)
        for path in (ROOT / "ci").rglob("*.sh"):
            stub = folder / path.relative_to(ROOT)
            stub.parent.mkdir(parents=True, exist_ok=True)
            stub.write_text(STUB)
            stub.chmod(0o755)
        shutil.copy(ROOT / "ci/forward.sh", folder / "ci/forward.sh")
        for name, text in (("python", STUB), ("recipe", LISTEN)):
            path = folder / ".venv/bin" / name
            path.parent.mkdir(parents=True, exist_ok=True)
            path.write_text(text)
            path.chmod(0o755)
        text = (ROOT / "Makefile").read_text(encoding="utf-8")
        lists = re.findall(r"^FROM_\w+ := (.*)$", text, re.MULTILINE)
        self.variables = {name for names in lists for name in names.split()}
        self.variables |= set(re.findall(r"^(\w+) \?=", text, re.MULTILINE))

    def make(self, words: Sequence[str]) -> list[list[str]]:
        """What `recipe` was called with, by each call that these words of make lead to. Raises Wrong."""
        given = [word.partition("=")[0] for word in words if "=" in word]
        if unknown := sorted(set(given) - self.variables):
            known = ", ".join(sorted(self.variables))
            raise Wrong(f"the Makefile takes no {', '.join(unknown)}: it would be ignored; it takes {known}")
        calls = self.folder / "calls"
        calls.unlink(missing_ok=True)
        environment = {"PATH": "/usr/local/bin:/usr/bin:/bin", "HOME": str(self.folder)}
        done = subprocess.run(
            ["make", *words], cwd=self.folder, env=environment, capture_output=True, text=True, timeout=60, check=False
        )
        if done.returncode:
            raise Wrong(f"make {shlex.join(words)}: {done.stderr.strip()}")
        return [line.split("\0")[:-1] for line in calls.read_text().split("\n")[:-1]] if calls.exists() else []

    def forwarded(self, command: Sequence[str]) -> list[list[str]]:
        """The words after `recipe` that a command of a page comes to."""
        return self.make(command[1:]) if command[0] == "make" else [list(command[1:])]

    def check(self, command: Shown) -> None:
        """Raises Wrong for a command that is refused, NotHere for one whose recipe is not here."""
        for words in self.forwarded(command.words):
            check_words(words)


def check_words(words: Sequence[str]) -> None:
    """Are these words of `recipe` understood, and its config accepted? Raises Wrong or NotHere."""
    try:
        verb, params = parsed(words)
    except click.ClickException as error:
        raise Wrong(f"recipe {shlex.join(words)}: {error.format_message()}") from None
    if "name" not in params:
        return
    try:
        recipe = find_recipe(params["name"])
    except UsageError:
        raise NotHere(f"the recipe {params['name']} is not here") from None
    try:
        if verb == "run":
            plan(recipe, params)
        elif "overrides" in params:
            board = detect.choose(params.get("hw"), require_present=False).hardware
            configs.load(recipe, board, params["overrides"], params.get("steps"))
    except RecipeError as error:
        raise Wrong(f"recipe {shlex.join(words)}: {error}") from None


def parsed(words: Sequence[str]) -> tuple[str, dict[str, Any]]:
    """The verb and its parameters; files that are named need not exist. Raises click's errors."""
    command: click.Command = main.recipe
    rest, context = list(words), None
    with mock.patch.object(click.Path, "convert", lambda self, value, param, context: value):
        while isinstance(command, click.Group):
            context = command.make_context("recipe", rest, parent=context)
            if not context.args and not context._protected_args:
                return "", {}  # an option of the group alone, as --debug
            _, found, rest = command.resolve_command(context, [*context._protected_args, *context.args])
            assert found is not None
            command = found
        context = command.make_context(command.name, rest, parent=context)
    return command.name or "", context.params


def plan(recipe: Path, params: dict[str, Any]) -> None:
    """`recipe run --dry-run` with these parameters, as on a machine without an engine."""
    asked = ("hw", "overrides", "steps", "world", "stop_at", "resume", "accept_changes", "out")
    launch = resolve(recipe, require_present=False, **{name: params[name] for name in asked})
    with mock.patch.object(dry_run, "check_engine", side_effect=MachineError("no engine is asked")):
        assert list(dry_run.describe(launch, params["container"]))
