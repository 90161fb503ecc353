"""The pages of a new recipe: README.md, the card of its data, an empty results.yaml, and the head of its config."""

from __future__ import annotations

import re
import textwrap
from dataclasses import dataclass
from pathlib import Path

from common.config import Config
from common.config.layers import to_yaml
from tools.cli.data import STUB

SAFE_PROMPT = re.compile(r"[\w ,.?'()-]{1,100}")  # what can stand between double quotes in any shell

LONGEST_FILE = 60  # characters of a name in the one line that says what a recipe does
LICENCE_STUB = f"License: {STUB} (for example Apache-2.0, CC-BY-4.0, or: not for others)"


@dataclass(frozen=True)
class Facts:
    """What the pages say of a fork. Without `data` it is a copy with the parent's data."""

    name: str
    parent: str
    what: str
    """One line: what the recipe trains, on what."""
    split: list[str]
    """What its data is, a point each."""
    data: str | None = None
    """File name of the user's data."""
    sha256: str | None = None
    """Of that file, or of the texts of a corpus."""
    prompt: str | None = None
    """Something to ask the trained model."""
    licence: str = ""
    """The line that names the licence of the parent's data."""


def head(facts: Facts) -> list[str]:
    """The comment that config.yaml begins with; its first line is what the gallery says."""
    origin = f"{facts.data} as its data" if facts.data else "its data"
    return [
        facts.what,
        "",
        f"  make recipe NAME={facts.name}                on the board found here, else on the CPU",
        f"  make recipe NAME={facts.name} HW=n150        on one Wormhole chip",
        "",
        *wrapped(
            f"Forked from {facts.parent}, with {origin}. hw/<board>.yaml holds what differs on a board; "
            f"`recipe config show {facts.name}` prints the result."
        ),
    ]


def short(name: str) -> str:
    """The name of a file, for a line that must not wrap."""
    return name if len(name) <= LONGEST_FILE else f"{name[: LONGEST_FILE - 3]}..."


def empty_results(name: str) -> str:
    """results.yaml of a recipe that nobody ran yet."""
    values = to_yaml({"format": 1, "recipe": name, "entries": []})
    return f"# What ran where. Keys: tools/results/schema.py. How to add an entry: CONTRIBUTING.md.\n{values}"


def readme(facts: Facts, cpu: Config, board: Config) -> str:
    """README.md without a figure: what it is, the commands, the data, and what is still to be written."""
    asked = facts.prompt if facts.prompt and SAFE_PROMPT.fullmatch(facts.prompt) else "..."
    todo = "What is it for, and what is a good answer?" if facts.data else "What is changed in `train.py`, and why?"
    owner = " Whose data is it: [data/README.md](data/README.md)." if facts.data else ""
    kept = ": loop, model, batch and learning rate are that recipe's; what hangs on the data was set for it"
    commands = {
        f"make recipe NAME={facts.name} STEPS=5": "a short try",
        f"make recipe NAME={facts.name}": "the board found here, else the CPU twin",
        f'make generate RUN=runs/<...> PROMPT="{asked}"{" BASE=1" if cpu.model.base else ""}': "",
    }
    looks = {
        f".venv/bin/recipe data check {facts.name}": "what is wrong with it" if cpu.model.base else "what is in it",
        f".venv/bin/recipe data stats {facts.name}": "how much it is",
        f".venv/bin/recipe data show {facts.name} --step 3": "a batch, decoded, with its mask",
    }
    lines = [
        f"# {facts.name}",
        "",
        facts.what,
        "",
        f"> **{STUB}, then delete this note.** {todo}{owner}",
        "> Figures: only those of a run, by `recipe grade RUN --record`.",
        "",
        *block(commands),
        "",
        "| | on a CPU | on a board |",
        "|---|---|---|",
        *(f"| {row} | {left} | {right} |" for row, left, right in compared(cpu, board)),
        "| status | never run | never run |",
        "",
        *wrapped(f"Forked from [`{facts.parent}`](../{facts.parent}){kept if facts.data else ''}."),
        "",
        "## The data",
        "",
        *([facts.licence, ""] if facts.licence else []),
        *points(facts.split),
        "",
        *block(looks),
        "",
        "## Change it",
        "",
        "`config.yaml` has the values with their reasons, `dataset.py` says where the data comes from and what is held",
        "out, `train.py` is the loop; there is nothing else.",
    ]
    return "\n".join(lines) + "\n"


def points(texts: list[str]) -> list[str]:
    """A list, in lines."""
    return [line for text in texts for line in wrapped(f"- {text}", "  ")]


def wrapped(text: str, indent: str = "") -> list[str]:
    return textwrap.wrap(text, 118, subsequent_indent=indent, break_on_hyphens=False, break_long_words=False)


def block(commands: dict[str, str]) -> list[str]:
    """A fenced block of commands, with comments side by side."""
    width = max(len(command) for command, comment in commands.items() if comment)
    return ["```", *(f"{command:<{width}}  # {why}" if why else command for command, why in commands.items()), "```"]


def compared(cpu: Config, board: Config) -> list[tuple[str, str, str]]:
    """Rows of the README's table: what is trained, and how, on a CPU and on a board."""

    def stop(config: Config) -> str:
        training = config.training
        return f"{training.num_epochs:g} epochs" if training.num_epochs else f"{training.max_steps} steps"

    def model(config: Config) -> str:
        return f"`{config.model.base or config.model.preset}`"

    def batch(config: Config) -> str:
        return f"{config.training.batch_size}, {config.training.learning_rate:g}, {stop(config)}"

    return [
        ("base" if cpu.model.base else "preset", model(cpu), model(board)),
        ("batch, learning rate, length", batch(cpu), batch(board)),
    ]


def data_card(facts: Facts) -> str:
    """data/README.md: where the data comes from, and the stub of its licence."""
    lines = [
        f"# The data of {facts.name}",
        "",
        LICENCE_STUB,
        "",
        f"> **{STUB}:** the line above, who wrote the data, from what, and whether it holds anything personal.",
        f"> Until then nobody else may use it, and `recipe data check {facts.name}` warns.",
        "",
        f"Made by `recipe new` from `{facts.data}`, sha256 `{facts.sha256}`:",
        "",
        *points(facts.split),
    ]
    return "\n".join(lines) + "\n"


def rename(folder: Path, old: str, new: str) -> None:
    """In every text of the fork, the parent's name and its `make recipe-...` become the new recipe's.

    A name of one word, such as `train`, is one only where a command or a path says so: elsewhere it is code.
    """
    named = r"(?<![\w-])" if "-" in old else r"(?:(?<=NAME=)|(?<=recipes/)|(?<=recipe run )|(?<=data check ))"
    name = re.compile(rf"{named}{re.escape(old)}(?![\w-])")
    for path in sorted(folder.rglob("*")):
        if path.suffix not in (".py", ".yaml", ".md", ".sh") or not path.is_file():
            continue
        text = path.read_text(encoding="utf-8")
        path.write_text(re.sub(r"make recipe-[a-z]+", f"make recipe NAME={new}", name.sub(new, text)), encoding="utf-8")
