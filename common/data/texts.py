"""Plain text to train from scratch on: read from a file, a folder, or a fetched corpus, and held out by whole texts."""

from __future__ import annotations

import hashlib
import os
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from common.data.rows import encoding_fault
from common.errors import DataError, MachineError, UsageError
from common.files import read_pins
from common.paths import home

LOCK = Path(__file__).with_name("corpora.yaml")


@dataclass(frozen=True)
class Document:
    """One text: a play, a file, or a part of a file. `where` names it in messages."""

    where: str
    text: str


def locked() -> dict[str, dict[str, Any]]:
    """Return the entries of corpora.yaml by name."""
    return read_pins(LOCK, "corpora")


def corpus_folder(name: str) -> Path:
    """Return where the corpus `name` of corpora.yaml is kept, fetched or not."""
    return home() / "corpora" / f"{name}-{locked()[name]['sha256'][:12]}"


def read_texts(name: str, recipe_dir: Path) -> list[Document]:
    """Return the texts of a corpus of corpora.yaml, of one file, or of every *.txt file of a folder, in their order.

    Lines end in one line feed; nothing else is changed. Raises UsageError for what is none of these, MachineError for
    a corpus that was not fetched or was changed, DataError for what is no UTF-8 text or is empty.
    """
    entry = locked().get(name)
    files = sorted(corpus_folder(name).glob("*.txt")) if entry else _text_files(name, recipe_dir)
    if entry and not files:
        what = f"the corpus {name} is not on this machine ({entry['download_mb']} MB)"
        raise MachineError(what, where=str(corpus_folder(name)), todo=f"fetch it: recipe data build {recipe_dir.name}")
    root = Path(os.path.commonpath([file.parent for file in files])) if files else Path()
    documents = [Document(file.relative_to(root).as_posix(), _text_of(file)) for file in files]
    documents = [document for document in documents if document.text.strip()]
    if not documents:
        raise DataError("the corpus is empty", where=name, todo="give a text file, or a folder with *.txt files")
    if entry and entry["text_sha256"] and text_sha256(documents) != entry["text_sha256"]:
        what, todo = f"the corpus {name} is not what was fetched: a file of it changed", "delete the folder, then"
        raise MachineError(what, where=str(corpus_folder(name)), todo=f"{todo}: recipe data build {recipe_dir.name}")
    return documents


def _text_files(name: str, recipe_dir: Path) -> list[Path]:
    path = recipe_dir / Path(name).expanduser()
    if path.is_file():
        return [path]
    if path.is_dir():
        return sorted(path.rglob("*.txt"))
    todo = f"name one of {', '.join(locked())}, a text file, or a folder with *.txt files"
    raise UsageError(f"no corpus called {name!r}, and no file or folder {path}", where="data_config.corpus", todo=todo)


def _text_of(file: Path) -> str:
    text = decode(file)
    if (at := text.find("\0")) >= 0:
        what = f"binary data: a zero byte at character {at}"
        raise DataError(what, where=str(file), todo="give a plain UTF-8 text file")
    return text.replace("\r\n", "\n").replace("\r", "\n")


def decode(path: Path, data: bytes | None = None) -> str:
    """Return a file, or `data` in its place, as text. Raises DataError with line and offset of what is no UTF-8."""
    try:
        raw = path.read_bytes() if data is None else data
        return raw.decode("utf-8-sig")
    except OSError as error:
        raise DataError(f"cannot read the file: {error.strerror}", where=str(path)) from error
    except UnicodeDecodeError as error:
        at = error.start + len(raw) - len(error.object)  # the codec counts from behind a byte-order mark
        line, begin = raw.count(b"\n", 0, at) + 1, raw.rfind(b"\n", 0, at) + 1
        fault = encoding_fault(raw[begin:], at - begin, begin)
        raise DataError(fault, where=f"{path}:{line}", todo="save the file as UTF-8") from error


def cut_in_two(document: Document, share: float) -> dict[str, list[Document]]:
    """Return the first part of a text for training and the rest, cut at the line end nearest to the last `share`."""
    text = document.text
    wanted = len(text) - round(len(text) * share)
    after = text.find("\n", wanted) + 1
    before = text.rfind("\n", 0, wanted) + 1
    # Each is 0 where there is no line end on its side; a text of one line is cut where it was wanted.
    cut = min((at for at in (before, after) if at), key=lambda at: abs(at - wanted), default=wanted)
    cut = cut if share else len(text)
    parts = {"train": text[:cut], "held_out": text[cut:]}
    return {name: [Document(f"{document.where} ({name})", part)] if part else [] for name, part in parts.items()}


def text_sha256(documents: Sequence[Document]) -> str:
    """Return the sha256 over names and texts, in order."""
    digest = hashlib.sha256()
    for document in documents:
        text = document.text.encode()
        digest.update(f"{document.where} {len(text)}\n".encode())  # the length says where the text ends
        digest.update(text)
    return digest.hexdigest()
