"""What `recipe serve --check` finds of our server, of `transformers serve` and of llama.cpp's: a table in Markdown.

    .venv/bin/python -m bench.expectations FOLDER [--gguf FILE]

FOLDER is a Llama with a chat template, FILE the same one for llama.cpp, which is left out without it. The peers live in
`.venv-serving`, made on first use from `requirements-serving.txt`. Everything listens on this machine alone.
"""

from __future__ import annotations

import argparse
import datetime
import os
import platform
import re
import sys
import tempfile
from collections.abc import Mapping
from pathlib import Path

from bench.serving import LOCK, VENV, free_port, serving
from bench.throughput import BENCH, ROOT, peer_python
from tools.serve.check import EXPECTATIONS, check

WIDEST = 120  # characters of what came, in a cell
Verdicts = Mapping[str, str]  # what came in place of what was expected, by the sentence of the expectation


def commands(folder: Path, gguf: Path | None, port: int) -> dict[str, tuple[str | None, list[str | Path]]]:
    """Return a model's name and how its server is started at `port`, by server and version; None: it says its name."""
    python = peer_python(LOCK, VENV)
    versions = dict(re.findall(r"^([a-z0-9-]+)==(\S+)", LOCK.read_text(encoding="utf-8"), re.MULTILINE))
    listen: list[str | Path] = ["--host", "127.0.0.1", "--port", str(port)]
    found: dict[str, tuple[str | None, list[str | Path]]] = {
        "`recipe serve`": (folder.name, [sys.executable, "-m", "tools.cli", "serve", folder, *listen]),
        f"`transformers serve` {versions['transformers']}": (
            str(folder),
            [python.parent / "transformers", "serve", folder, *listen],
        ),
    }
    if gguf is not None:
        server: list[str | Path] = [python, BENCH / "peer_llama.py", gguf, str(port), "4"]
        found[f"llama.cpp (xllamacpp {versions['xllamacpp']})"] = (None, server)
    return found


def verdicts(model: str | None, command: list[str | Path], port: int, place: Path) -> Verdicts:
    """Start a server, ask all that is expected of it, and return what does not hold."""
    (place / "hub").mkdir(exist_ok=True)
    settings = {"PYTHONPATH": str(ROOT), "HF_HUB_OFFLINE": "1", "HF_HUB_CACHE": str(place / "hub")}
    said: list[str] = []
    with serving(command, port, place / "log", {**os.environ, **settings}):
        check(f"http://127.0.0.1:{port}", model, None, None, said.append)
    sentences = [sentence_of(expectation) for expectation in EXPECTATIONS]
    failed = [line.removeprefix("  FAILS  ") for line in said if line.startswith("  FAILS  ")]
    return {
        sentence: line[len(sentence) + 1 :] for line in failed for sentence in sentences if line.startswith(sentence)
    }


def sentence_of(expectation: object) -> str:
    """Return what is expected, as `check` prints it."""
    return (expectation.__doc__ or "").strip()


def table(found: Mapping[str, Verdicts]) -> str:
    """Return the table: a row an expectation, a column a server; what came, where it is not what was expected."""
    rows = [["expected", *found], ["---"] * (1 + len(found))]
    for sentence in map(sentence_of, EXPECTATIONS):
        rows.append([sentence, *(cell(server.get(sentence)) for server in found.values())])
    rows.append(["held", *(f"{len(EXPECTATIONS) - len(server)} of {len(EXPECTATIONS)}" for server in found.values())])
    return "\n".join(f"| {' | '.join(row)} |" for row in rows)


def cell(came: str | None) -> str:
    """Return what came as a cell can hold it."""
    if came is None:
        return "yes"
    text = " ".join(came.split()).replace("|", "\\|")
    return "**no:** " + (text if len(text) <= WIDEST else text[:WIDEST] + " ...")


def main() -> None:
    """Ask all servers, one after another, and print the table."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("folder", type=Path, help="a Hugging Face folder of a Llama with a chat template")
    parser.add_argument("--gguf", type=Path, help="the same model for llama.cpp, as recipe export --gguf writes it")
    arguments = parser.parse_args()
    gguf = arguments.gguf and arguments.gguf.resolve()
    found = {}
    for name in commands(arguments.folder.resolve(), gguf, 0):
        port = free_port()
        model, command = commands(arguments.folder.resolve(), gguf, port)[name]
        with tempfile.TemporaryDirectory(prefix="bench-") as place:
            found[name] = verdicts(model, command, port, Path(place))
        print(
            f"bench: {name}: {len(EXPECTATIONS) - len(found[name])} of {len(EXPECTATIONS)} hold",
            file=sys.stderr,
            flush=True,
        )
    print(table(found))
    print(f"\n{datetime.date.today()}, Python {platform.python_version()}, {arguments.folder.name}")


if __name__ == "__main__":
    main()
