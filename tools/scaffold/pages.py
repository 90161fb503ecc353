"""The pages of a new recipe: README.md, the card of its data, an empty results.yaml, and the head of its config."""

from __future__ import annotations

import re
from dataclasses import dataclass
from pathlib import Path

from tools.data.licence import STUB
from tools.results import schema

LONGEST_FILE = 60  # characters of a name in the one line that says what a recipe does


@dataclass(frozen=True)
class Facts:
    """What the pages say of a fork: its name and its parent's, one line of what it trains on what, and its data."""

    name: str
    parent: str
    what: str
    data: str
    """Markdown: the files and how they were split, or the licence of the parent's data."""
    source: str | None = None
    """Name and sha256 of the user's data; None for a copy with the parent's."""


HEAD = """\
# {what}
#
#   make recipe NAME={name}                on the board found here, else on the CPU
#   make recipe NAME={name} HW=n150        on one Wormhole chip
#
# Forked from {parent}. hw/<board>.yaml holds what differs on a board.
"""
RESULTS = """\
# What ran where. Keys: tools/results/schema.py. How to add an entry: CONTRIBUTING.md.
format: 1
recipe: {name}
entries: []
"""
README = """\
# {name}

{what}

> **{stub}, then delete this note.** {todo}
> Figures: only those of a run, by `recipe grade RUN --record`.

```
make recipe NAME={name} STEPS=5    # a short try
make recipe NAME={name}            # the board found here, else the CPU twin
.venv/bin/recipe generate runs/NAME --prompt "..."
```

| | on a CPU | on a board |
|---|---|---|
| status | never run | never run |

Forked from [`{parent}`](../{parent}).

## The data

{data}

```
.venv/bin/recipe data check {name}            # what is wrong with it
.venv/bin/recipe data show {name} --step 3    # a batch, decoded, with its mask
```

## Change it

`config.yaml` has the values with their reasons, `dataset.py` says where the data comes from and what is held out,
`train.py` is the loop; there is nothing else.
"""
CARD = """\
# The data of {name}

License: {stub} (for example Apache-2.0, CC-BY-4.0, or: not for others)

> **{stub}:** the line above, who wrote the data, from what, and whether it holds anything personal.
> Until then nobody else may use it, and `recipe data check {name}` warns.

Made by `recipe new` from {source}:

{data}
"""
TODO_DATA = "What is it for, and what is a good answer?\n> Whose data is it: [data/README.md](data/README.md)."
TODO_LOOP = "What is changed in `train.py`, and why?"


def write(folder: Path, facts: Facts) -> None:
    """Write README.md, results.yaml, the head of config.yaml and, for the user's own data, data/README.md."""
    values = {**vars(facts), "stub": STUB, "todo": TODO_DATA if facts.source else TODO_LOOP}
    pages = {"README.md": README, schema.FILE: RESULTS} | ({"data/README.md": CARD} if facts.source else {})
    for path, text in pages.items():
        (folder / path).write_text(text.format(**values), encoding="utf-8")
    config = folder / "config.yaml"
    body = re.sub(r"\A(?:#.*\n)+", "", config.read_text(encoding="utf-8"))
    config.write_text(HEAD.format(**values) + body, encoding="utf-8")


def short(name: str) -> str:
    """Return the name of a file, cut for a line that must not wrap."""
    return name if len(name) <= LONGEST_FILE else f"{name[: LONGEST_FILE - 3]}..."


def rename(folder: Path, old: str, new: str) -> None:
    """Write the new recipe's name for the parent's, and for its `make recipe-...`, in every text of the fork.

    A name of one word, such as `train`, is one only where a command or a path says so: elsewhere it is code.
    """
    named = r"(?<![\w-])" if "-" in old else r"(?:(?<=NAME=)|(?<=recipes/)|(?<=recipe run )|(?<=data check ))"
    name = re.compile(rf"{named}{re.escape(old)}(?![\w-])")
    for path in sorted(folder.rglob("*")):
        if path.suffix in (".py", ".yaml", ".md", ".sh") and path.is_file():
            text = name.sub(new, path.read_text(encoding="utf-8"))
            path.write_text(re.sub(r"make recipe-[a-z]+", f"make recipe NAME={new}", text), encoding="utf-8")
