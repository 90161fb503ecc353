"""Files of other people's rows as records: JSON in every layout, CSV, Parquet, Arrow, text, folders; gzip and zstd.

What a record says is for `dialects` to know. Each comes with its place, and what is none with its reason.

Plain text is taken as questions and answers only where it says so itself: a line that starts with `Q:` or
`Question:` opens a prompt, `A:` or `Answer:` its response, and each runs to the next mark, over blank lines.
Unmarked prose is refused: cutting it into pairs would be a guess.
"""

from __future__ import annotations

import contextlib
import csv
import gzip
import io
import json
import os
import re
import zlib
from collections.abc import Iterable, Iterator, Mapping
from pathlib import Path
from typing import Any

from common.data.rows import Problem, json_lines, kind_of, unique_keys
from common.data.texts import decode
from common.errors import DataError, UsageError

SUFFIXES = {
    ".jsonl": "jsonl",
    ".json": "jsonl",
    ".ndjson": "jsonl",
    ".csv": "csv",
    ".tsv": "csv",
    ".parquet": "parquet",
    ".arrow": "arrow",
    ".txt": "text",
    ".md": "text",
}
PACKED = (".gz", ".zst")
BLOCK = 1 << 24  # bytes that are unpacked at a time
ABOUT = ("dataset_info.json", "dataset_infos.json", "state.json", "dataset_dict.json", ".md")  # not rows, in a folder
QUESTION = re.compile(r"(?:Q|Question)\s*:\s*", re.IGNORECASE)
ANSWER = re.compile(r"(?:A|Answer)\s*:\s*", re.IGNORECASE)
UTF16 = (b"\xff\xfe", b"\xfe\xff")

Record = tuple[str, "Mapping[str, Any] | Problem"]


def kind_of_file(path: Path) -> str:
    """Return how a file or folder is read, by its name: jsonl where the name says nothing. Raises DataError."""
    if path.is_dir():
        return "arrow" if is_saved(path) else "folder"
    if not path.is_file():
        raise DataError("no such file", where=str(path))
    return SUFFIXES.get(bare(path).suffix.lower(), "jsonl")


def bare(path: Path) -> Path:
    """Return a path without the ending that says how it is packed."""
    return path.with_suffix("") if path.suffix.lower() in PACKED else path


def is_saved(folder: Path) -> bool:
    """Return whether a folder was written by `save_to_disk` of `datasets`."""
    return (folder / "state.json").is_file() or (folder / "dataset_dict.json").is_file()


def records(path: Path, kind: str, split: str = "train") -> Iterator[Record]:
    """Return (place, record or problem) of every entry of a file or folder; `split` of one that has several."""
    if kind == "arrow":
        return arrow_records(path, split)
    readers = {
        "jsonl": json_records,
        "csv": csv_records,
        "parquet": parquet_records,
        "text": text_records,
        "folder": folder_records,
    }
    return readers[kind](path)


def about(path: Path, kind: str) -> int | None:
    """Return about how many records a file has, for a bar: its lines, or the rows of Parquet; None if unknown."""
    if kind == "parquet":
        from pyarrow import ArrowException, parquet

        with contextlib.suppress(ArrowException, OSError):
            return int(parquet.read_metadata(path).num_rows)
    if kind not in ("jsonl", "csv") or path.suffix.lower() in PACKED:
        return None
    with contextlib.suppress(OSError), path.open("rb") as file:  # who reads it says what is wrong with it
        return sum(block.count(b"\n") for block in iter(lambda: file.read(1 << 20), b"")) or None
    return None


def files_of(folder: Path) -> list[Path]:
    """Return the files of rows in a folder, by name. Raises DataError where there is none, or one that is unknown."""
    files = sorted(path for path in folder.rglob("*") if path.is_file() and not path.name.endswith(ABOUT))
    # Nor in hidden folders: `hf download --local-dir` keeps its notes in .cache.
    files = [path for path in files if not any(part.startswith(".") for part in path.relative_to(folder).parts)]
    if unknown := [path for path in files if bare(path).suffix.lower() not in SUFFIXES]:
        todo = f"move it elsewhere; read are {', '.join(SUFFIXES)}, also packed as {' and '.join(PACKED)}"
        raise DataError("a file in the folder is none of rows by its name", where=str(unknown[0]), todo=todo)
    if not files:
        raise DataError("no file of rows in this folder", where=str(folder))
    return files


def folder_records(folder: Path) -> Iterator[Record]:
    """Yield the records of every file of rows in a folder."""
    for path in files_of(folder):
        yield from records(path, kind_of_file(path))


# --- bytes and text ---------------------------------------------------------------------------------------------------


def bytes_of(path: Path) -> bytes:
    """Return a file's bytes, unpacked, and as UTF-8 where a byte-order mark says UTF-16. Raises DataError."""
    try:
        data = unpacked(path)
        return data.decode("utf-16").encode() if data.startswith(UTF16) else data
    except UnicodeError as error:
        raise DataError("begins with the mark of UTF-16, and is none", where=str(path)) from error
    except (OSError, EOFError, zlib.error) as error:
        raise DataError(f"cannot read the file: {error}", where=str(path)) from error


def unpacked(path: Path) -> bytes:
    """Return a file's bytes, of `.gz` and `.zst` those that are packed in it.

    Raises OSError, EOFError, zlib.error; DataError where there are more than `room` of them.
    """
    if path.suffix.lower() == ".gz":
        with gzip.open(path) as stream:
            return up_to_room(stream, path)
    if path.suffix.lower() == ".zst":
        import pyarrow

        with pyarrow.OSFile(str(path)) as raw, pyarrow.CompressedInputStream(raw, "zstd") as stream:
            return up_to_room(stream, path)
    return path.read_bytes()


def up_to_room(stream: Any, path: Path) -> bytes:
    """Return all that a stream has. Raises DataError as soon as that is more than `room`: a packed file may swell."""
    blocks, size, limit = [], 0, room()
    while block := stream.read(BLOCK):
        blocks.append(block)
        size += len(block)
        if size > limit:
            raise swollen(path, limit)
    return b"".join(blocks)


def swollen(path: Path, limit: int) -> DataError:
    """Return the error of a file that says in few bytes what takes more than `limit`."""
    return DataError(
        f"unpacks to more than {limit / 1e9:.1f} GB, a quarter of this machine's memory",
        where=str(path),
        todo="unpack it and split it into files of a folder, or convert it on a larger machine",
    )


def room() -> int:
    """Return how many bytes of text are read at once: a quarter of the memory, as they are there again as rows."""
    return os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES") // 4


def text_of(path: Path) -> str:
    """Return a file as text. Raises DataError with line and byte offset of what is no UTF-8."""
    return decode(path, bytes_of(path))


# --- formats ----------------------------------------------------------------------------------------------------------


def json_records(path: Path) -> Iterator[Record]:
    """Yield the objects of a JSON file: one a line, a list of them, or one after another in any layout."""
    data = bytes_of(path)
    found = re.search(rb"\S[^\n]*", data.removeprefix(b"\xef\xbb\xbf"))
    first = found.group() if found else b""
    if first.startswith(b"["):
        yield from list_records(path, decode(path, data))
        return
    try:
        json.loads(first)
    except (ValueError, RecursionError):
        # Not an object a line. Where the whole file is none after another either, its lines have the better messages.
        if values := sequence(data):
            for number, value in enumerate(values, start=1):
                yield placed(f"{path}: object {number}", value)
            return
    yield from json_lines(path, data)


def placed(where: str, value: Any) -> Record:
    """Return a value with its place, as a problem where it is no object."""
    return where, value if isinstance(value, dict) else Problem(where, f"{kind_of(value)}, not an object")


def list_records(path: Path, text: str) -> Iterator[Record]:
    """Yield the entries of one JSON list."""
    try:
        values = json.loads(text, object_pairs_hook=unique_keys)
    except ValueError as error:
        raise DataError(f"not JSON: {error}", where=str(path)) from error
    except RecursionError as error:
        raise DataError("nested too deeply", where=str(path)) from error
    for number, value in enumerate(values, start=1):
        yield placed(f"{path}: entry {number}", value)


def sequence(data: bytes) -> list[Any]:
    """Return the JSON values of a file that has one after another, between them white space or nothing; else []."""
    try:
        text = data.decode("utf-8-sig").strip()
        decoder, values, at = json.JSONDecoder(object_pairs_hook=unique_keys), [], 0
        while at < len(text):
            value, at = decoder.raw_decode(text, at)
            values.append(value)
            while at < len(text) and text[at] in " \t\r\n":
                at += 1
    except (ValueError, RecursionError):
        return []
    return values


def csv_records(path: Path) -> Iterator[Record]:
    """Yield the lines of a CSV file with a header; commas, semicolons or tabs. Every value stays the text it is."""
    text = text_of(path)
    header = text.partition("\n")[0]
    # By the header alone: in the cells below it, text is full of commas.
    delimiter = max(",;\t", key=header.count)
    csv.field_size_limit(max(csv.field_size_limit(), len(text)))  # its default refuses a cell of 131,073 characters
    reader = csv.DictReader(io.StringIO(text, newline=""), delimiter=delimiter, strict=True)
    try:
        names = reader.fieldnames or []
        if len(set(names)) < len(names):
            raise DataError(f"a column name twice: {', '.join(names)}", where=f"{path}:1")
        for record in reader:
            where = f"{path}:{reader.line_num}"
            cells = len(record.get(None) or ())
            if cells or None in record.values():
                yield where, Problem(where, f"not the {len(names)} columns of the header")
            else:
                yield where, dict(record)
    except csv.Error as error:
        raise DataError(f"not CSV: {error}", where=f"{path}:{reader.line_num}") from error


def parquet_records(path: Path) -> Iterator[Record]:
    """Yield the rows of a Parquet file."""
    import pyarrow
    from pyarrow import parquet

    try:
        with parquet.ParquetFile(path) as file:
            number, size, limit = 0, 0, room()
            for batch in file.iter_batches(batch_size=1024):  # rows in memory at once
                size += batch.nbytes
                if size > limit:  # a text that comes a million times is stored once
                    raise swollen(path, limit)
                for record in batch.to_pylist():
                    number += 1
                    yield f"{path}: row {number}", {key: without_nulls(value) for key, value in record.items()}
    except (pyarrow.ArrowException, OSError) as error:
        raise DataError(f"not a readable Parquet file: {error}", where=str(path)) from error


def arrow_records(path: Path, split: str) -> Iterator[Record]:
    """Yield the rows of a folder that `datasets` saved, or of one Arrow file. Raises UsageError for a split unknown."""
    import datasets
    import pyarrow

    try:
        table = datasets.load_from_disk(str(path)) if path.is_dir() else datasets.Dataset.from_file(str(path))
    except (pyarrow.ArrowException, OSError, ValueError, KeyError, TypeError, AttributeError) as error:  # odd JSON, too
        raise DataError(f"not readable as Arrow: {error}", where=str(path)) from error
    if isinstance(table, datasets.DatasetDict):
        if split not in table:
            raise UsageError(
                f"no split {split!r}", where=str(path), todo=f"recipe data convert ... --split {' or '.join(table)}"
            )
        table = table[split]
    for number, record in enumerate(table, start=1):
        yield f"{path}: row {number}", {key: without_nulls(value) for key, value in record.items()}


def without_nulls(value: Any) -> Any:
    """Return a value of Arrow without the keys of objects that are null.

    Objects in one column have the same keys there: a call's arguments those of every other call, null where they are
    not its own.
    """
    if isinstance(value, dict):
        return {key: without_nulls(inner) for key, inner in value.items() if inner is not None}
    return [*map(without_nulls, value)] if isinstance(value, list) else value


def text_records(path: Path) -> Iterator[Record]:
    """Yield the pairs of a text that marks them with `Q:` and `A:`. Raises DataError if it has none."""
    parts = list(marked_parts(re.split(r"\r\n|\r|\n", text_of(path))))
    if not any(kind == "Q" for kind, _, _ in parts):
        raise DataError(
            "nothing says what is a question and what an answer",
            where=str(path),
            todo="start each question with a line 'Q: ...' and its answer with 'A: ...'",
        )
    before, after = [("", 0, ""), *parts], [*parts[1:], ("", 0, "")]
    for previous, (kind, line, text), following in zip(before, parts, after, strict=False):
        where = f"{path}:{line}"
        if kind == "Q" and following[0] == "A":
            yield where, {"prompt": text, "response": following[2]}
        elif kind == "Q":
            yield where, Problem(where, "a question without an answer")
        elif kind == "A" and previous[0] != "Q":
            yield where, Problem(where, "an answer without a question")
        elif kind == "" and text:
            yield where, Problem(where, "text before the first question")


def marked_parts(lines: Iterable[str]) -> Iterator[tuple[str, int, str]]:
    """Yield ("Q" or "A", first line, text) of every marked part; "" for what stands before the first mark."""
    kind, first, part = "", 1, []
    for number, line in enumerate(lines, start=1):
        mark = next((name for name, shape in (("Q", QUESTION), ("A", ANSWER)) if shape.match(line)), None)
        if mark is None:
            part.append(line)
            continue
        yield kind, first, "\n".join(part).strip()
        shape = QUESTION if mark == "Q" else ANSWER
        kind, first, part = mark, number, [shape.sub("", line, count=1)]
    yield kind, first, "\n".join(part).strip()
