"""Other people's data as rows: CSV, Parquet, Alpaca, ShareGPT, plain text, and pinned data sets of the Hub.

`convert` writes a JSONL file once, which recipes then train on, and beside it what was read.

Plain text is taken as questions and answers only where it says so itself: a line that starts with `Q:` or
`Question:` opens a prompt, `A:` or `Answer:` its response, and each runs to the next mark, over blank lines.
Unmarked prose is refused: cutting it into pairs would be a guess.
"""

from __future__ import annotations

import csv
import io
import json
import re
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from common.config.layers import to_yaml
from common.data.rows import (
    Message,
    Problem,
    Row,
    columns_of,
    conversation,
    json_lines,
    kind_of,
    refuse,
    valid_text,
)
from common.data.texts import decode
from common.errors import DataError, MachineError, UsageError
from common.files import sha256_file

FORMATS = ("auto", "jsonl", "csv", "parquet", "alpaca", "sharegpt", "text")
SUFFIXES = {".csv": "csv", ".tsv": "csv", ".parquet": "parquet", ".txt": "text", ".md": "text"}
SPEAKERS = {"human": "user", "user": "user", "gpt": "assistant", "assistant": "assistant", "system": "system"}
QUESTION = re.compile(r"(?:Q|Question)\s*:\s*", re.IGNORECASE)
ANSWER = re.compile(r"(?:A|Answer)\s*:\s*", re.IGNORECASE)
HUB = "hub:"
# Column names other data sets use for the same thing, tried in this order.
PAIRS = (
    ("prompt", "response"),
    ("question", "answer"),
    ("instruction", "output"),
    ("prompt", "completion"),
    ("input", "target"),
)
TARGETS = ("prompt", "response", "system", "messages")

Record = tuple[str, "Mapping[str, Any] | Problem"]


@dataclass(frozen=True)
class Source:
    """What is read as what: a file, or with the format `hub` a data set of the Hub at a commit."""

    name: str
    format: str
    revision: str | None = None
    subset: str | None = None
    split: str = "train"


@dataclass(frozen=True)
class Report:
    """What a conversion did: files, format, rows written, the keys kept beside them, and what was skipped."""

    source: str
    out: str
    format: str
    rows: int
    extra_keys: Sequence[str]
    skipped: Sequence[Problem]
    sha256: str

    def lines(self) -> list[str]:
        """Return the report for a person, one line a fact."""
        found = [
            f"{self.rows} rows from {self.source} ({self.format}) to {self.out}",
            f"sha256 {self.sha256}",
        ]
        if self.extra_keys:
            found.append(f"kept beside prompt and response: {', '.join(self.extra_keys)}")
        if self.skipped:
            found.append(f"{len(self.skipped)} rows skipped:")
            found += [f"  {problem}" for problem in self.skipped]
        return found


def convert(
    source: str | Path,
    out: Path,
    format: str = "auto",
    mapping: Mapping[str, str] | None = None,
    *,
    revision: str | None = None,
    subset: str | None = None,
    split: str = "train",
    skip_bad: bool = False,
) -> Report:
    """Write the rows of `source` to the new JSONL file `out`.

    `source` is a file or `hub:owner/name` with a `revision` of 40 hex digits (and perhaps a subset and
    split). Raises UsageError when `out` exists or an option makes no sense; DataError that lists every bad
    row, unless `skip_bad`; MachineError when the Hub cannot be reached.
    """
    for path in (out, pins_of(out)):
        if path.exists():
            raise UsageError("the output file exists", where=str(path), todo="choose another name or delete it")
    if not out.parent.is_dir():
        raise UsageError("no such folder", where=str(out.parent))
    found = Source(str(source), guess_format(source, format), revision, subset, split)
    rows, problems = collect(records(found), mapping)
    if not skip_bad:
        refuse(problems, found.name)
    if not rows:
        raise DataError("no usable row in this source", where=found.name)
    write_rows(out, rows)
    write_pins(out, found, mapping)
    return Report(
        source=found.name,
        out=str(out),
        format=found.format,
        rows=len(rows),
        extra_keys=sorted({key for row in rows for key in row.extra}),
        skipped=problems,
        sha256=sha256_file(out),
    )


def record_of(row: Row) -> dict[str, Any]:
    """Return the row as one JSON object: prompt and response where that says it all, messages otherwise."""
    if [message.role for message in row.messages] == ["user", "assistant"]:
        return {"prompt": row.prompt, "response": row.response, **row.extra}
    return {"messages": [vars(message) for message in row.messages], **row.extra}


def write_rows(path: Path, rows: Iterable[Row]) -> None:
    """Write rows as JSONL to a new file. Raises FileExistsError rather than overwrite."""
    with path.open("x", encoding="utf-8", newline="\n") as file:
        for row in rows:
            file.write(json.dumps(record_of(row), ensure_ascii=False, default=str) + "\n")


def pins_of(out: Path) -> Path:
    """Return the path of the file beside the rows in `out` that says what they were read from."""
    return out.with_name(f"{out.name}.source.yaml")


def write_pins(out: Path, source: Source, mapping: Mapping[str, str] | None) -> None:
    """Write OUT.source.yaml: what the rows in `out` were read from, and the sha256 of both."""
    on_hub = source.format == "hub"
    facts = {
        "format": 1,
        "source": source.name if on_hub else Path(source.name).name,
        "sha256": None if on_hub else sha256_file(Path(source.name)),  # of the Hub the revision says it
        "read_as": source.format,
        "map": dict(mapping or {}),
        "rows_sha256": sha256_file(out),
    }
    facts |= {"revision": source.revision, "subset": source.subset, "split": source.split} if on_hub else {}
    with pins_of(out).open("x", encoding="utf-8") as file:
        file.write(to_yaml(facts))


def scan(path: Path, format: str, mapping: Mapping[str, str]) -> tuple[list[Row], list[Problem]]:
    """Return the usable rows of a file and its bad ones, read as `format`."""
    return collect(records(Source(str(path), format)), mapping)


def load_rows(source: Path, format: str, mapping: Mapping[str, str] | None = None) -> list[Row]:
    """Return all rows of a file. Raises DataError that lists every bad row, or says that there is none."""
    rows, problems = scan(source, format, mapping or {})
    refuse(problems, str(source))
    if not rows:
        raise DataError("no row in this source", where=str(source))
    return rows


def records(source: Source) -> Iterator[Record]:
    """Return (place, record or problem) of every entry of `source`."""
    if source.format == "hub":
        return hub_records(source)
    if source.revision is not None:
        raise UsageError("only a hub: source has a revision", where=source.name)
    readers = {
        "jsonl": json_records,
        "csv": csv_records,
        "parquet": parquet_records,
        "alpaca": json_records,
        "sharegpt": sharegpt_records,
        "text": text_records,
    }
    return readers[source.format](Path(source.name))


def guess_format(source: str | Path, format: str) -> str:
    """Return the format to read `source` as: what was asked for, or what its name and first record show."""
    if format not in FORMATS:
        raise UsageError(f"no format {format!r}; known: {', '.join(FORMATS)}")
    if str(source).startswith(HUB):
        return "hub"
    path = Path(source)
    if not path.is_file():
        raise DataError("no such file", where=str(path))
    if format != "auto":
        return format
    if path.suffix.lower() in SUFFIXES:
        return SUFFIXES[path.suffix.lower()]
    first = next((record for _, record in json_records(path) if not isinstance(record, Problem)), {})
    if "conversations" in first:
        return "sharegpt"
    return "alpaca" if {"instruction", "output"} <= set(first) else "jsonl"


def json_records(path: Path) -> Iterator[Record]:
    """Yield objects of a JSONL file, or of one JSON list."""
    # Told by the first character: a list begins with "[", a line of JSONL with "{".
    text = path.read_bytes()[:4096].lstrip(b"\xef\xbb\xbf \t\r\n")
    if not text.startswith(b"["):
        yield from json_lines(path)
        return
    try:
        values = json.loads(decode(path))
    except ValueError as error:
        raise DataError(f"not JSON: {error}", where=str(path)) from error
    for number, value in enumerate(values, start=1):
        where = f"{path}: entry {number}"
        yield where, value if isinstance(value, dict) else Problem(where, f"{kind_of(value)}, not an object")


def sharegpt_records(path: Path) -> Iterator[Record]:
    """Yield the records of ShareGPT's form, `conversations` of {"from": human|gpt|system, "value"}."""
    for where, record in json_records(path):
        if isinstance(record, Problem):
            yield where, record
            continue
        turns = record.get("conversations")
        if not isinstance(turns, list) or not all(isinstance(turn, Mapping) for turn in turns):
            yield where, Problem(where, f"no list of conversations; columns: {', '.join(record)}")
            continue
        messages = [
            {"role": SPEAKERS.get(str(turn.get("from")), turn.get("from")), "content": turn.get("value")}
            for turn in turns
        ]
        yield where, {"messages": messages, **{k: v for k, v in record.items() if k != "conversations"}}


def csv_records(path: Path) -> Iterator[Record]:
    """Yield the lines of a CSV file with a header; commas, semicolons or tabs. Every value stays the text it is."""
    text = decode(path)
    header = text.partition("\n")[0]
    # By the header alone: in the cells below it, text is full of commas.
    delimiter = max(",;\t", key=header.count)
    reader = csv.DictReader(io.StringIO(text, newline=""), delimiter=delimiter, strict=True)
    names = reader.fieldnames or []
    if len(set(names)) < len(names):
        raise DataError(f"a column name twice: {', '.join(names)}", where=f"{path}:1")
    try:
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
            number = 0
            for batch in file.iter_batches(batch_size=1024):  # rows in memory at once
                for record in batch.to_pylist():
                    number += 1
                    yield f"{path}: row {number}", record
    except (pyarrow.ArrowException, OSError) as error:
        raise DataError(f"not a readable Parquet file: {error}", where=str(path)) from error


def text_records(path: Path) -> Iterator[Record]:
    """Yield the pairs of a text that marks them with `Q:` and `A:`. Raises DataError if it has none."""
    parts = list(marked_parts(decode(path).splitlines()))
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


def hub_records(source: Source) -> Iterator[Record]:
    """Return the rows of a Hub data set at a commit, through `datasets`; from its cache when the Hub is out of reach.

    Raises UsageError without a commit, MachineError when the data set is neither reachable nor cached.
    """
    name = source.name.removeprefix(HUB)
    if not re.fullmatch(r"[0-9a-f]{40}", source.revision or ""):
        raise UsageError(
            "a data set of the Hub needs a revision of 40 hex digits (a branch can change under a run)",
            where=source.name,
            todo="--revision COMMIT, as the data set's page lists it under 'History'",
        )
    if Path(name).exists():
        raise UsageError(
            f"there is a folder {name} here, which the library would read in place of the Hub's data set",
            where=source.name,
            todo="run it from another folder, or name the folder's file as the source",
        )
    return loaded_records(name, str(source.revision), source.subset, source.split)


def loaded_records(name: str, revision: str, subset: str | None, split: str) -> Iterator[Record]:
    """Yield the rows that `datasets` loads; `name` may also be a local folder of data files."""
    import datasets

    where = f"{HUB}{name}@{revision[:12]}"
    try:
        table = datasets.load_dataset(name, subset, revision=revision, split=split)
    except (ConnectionError, OSError) as error:
        raise MachineError(
            f"the data set is neither reachable nor in the cache: {error}",
            where=where,
            todo="connect once, or convert it elsewhere and copy the JSONL file",
        ) from error
    except ValueError as error:  # an unknown subset or split; the message names those that exist
        raise DataError(str(error), where=where) from error
    for number, record in enumerate(table, start=1):
        yield f"{where}:{split}:{number}", record


# --- columns ------------------------------------------------------------------------------------------------------


def parse_map(pairs: Sequence[str]) -> dict[str, str]:
    """Return {"prompt": "question"} for ("prompt=question",). Raises UsageError."""
    found = {}
    for pair in pairs:
        name, equals, column = pair.partition("=")
        if not (name and equals and column):
            raise UsageError(f"--map {pair!r} is not NAME=COLUMN", todo="for example --map prompt=question")
        found[name] = column
    return found


def collect(
    records: Iterable[tuple[str, Mapping[str, Any] | Problem]], mapping: Mapping[str, str] | None = None
) -> tuple[list[Row], list[Problem]]:
    """Return the rows of records with their places, and the problems. Raises UsageError for a wrong mapping."""
    unknown = [name for name in mapping or {} if name not in TARGETS]
    if unknown:
        raise UsageError(f"cannot map to {unknown[0]!r}; known: {', '.join(TARGETS)}", todo="--map prompt=COLUMN")
    rows, problems = [], []
    for where, record in records:
        if isinstance(record, Problem):
            problems.append(record)
            continue
        try:
            rows.append(row_of(record, mapping or {}, where))
        except ValueError as fault:
            problems.append(Problem(where, str(fault)))
    return rows, problems


def row_of(record: Mapping[str, Any], mapping: Mapping[str, str], where: str) -> Row:
    """Return the row a record holds; `mapping` names the columns of prompt, response, system text or messages.

    Raises ValueError with the reason when there is none.
    """
    absent = [column for column in mapping.values() if column not in record]
    if absent:
        raise ValueError(f"no column {absent[0]!r}; columns: {columns_of(record)}")
    if "messages" in mapping or ("messages" in record and not mapping):
        column = mapping.get("messages", "messages")
        messages = conversation(record[column])
        used = {column}
    else:
        messages, used = exchange(record, mapping)
    if "system" in mapping:
        text = valid_text(record[mapping["system"]], mapping["system"])
        messages = (Message("system", text), *messages)
        used = used | {mapping["system"]}
    return Row(messages, {key: value for key, value in record.items() if key not in used}, where)


def exchange(record: Mapping[str, Any], mapping: Mapping[str, str]) -> tuple[tuple[Message, ...], set[str]]:
    """Return one question and its answer, and the columns they came from. Raises ValueError."""
    names = [(mapping.get("prompt", prompt), mapping.get("response", response)) for prompt, response in PAIRS]
    found = next((pair for pair in names if pair[0] in record and pair[1] in record), None)
    if found is None:
        known = " or ".join("/".join(pair) for pair in PAIRS)
        missing = next((f"no {pair[1]!r} beside {pair[0]!r}" for pair in names if pair[0] in record), f"no {known}")
        raise ValueError(
            f"{missing}; columns: {columns_of(record)}; name them with --map prompt=COLUMN --map response=COLUMN"
        )
    prompt, response = (valid_text(record[name], name) for name in found)
    used, turns = set(found), [("user", prompt), ("assistant", response)]
    if found[0] == "instruction":  # Alpaca's
        if context := text_or_nothing(record, "input"):
            turns[0] = ("user", f"{prompt}\n\n{context}")
        if "system" not in mapping and (system := text_or_nothing(record, "system")):
            turns.insert(0, ("system", system))
        used |= {"input", "system"} & set(record)
    return tuple(Message(*turn) for turn in turns), used


def text_or_nothing(record: Mapping[str, Any], name: str) -> str:
    """Return the text of a column that may be absent or empty. Raises ValueError."""
    value = record.get(name)
    if not isinstance(value, str | None):
        raise ValueError(f"{name!r} is {kind_of(value)}, not a string")
    return valid_text(value, name) if value and value.strip() else ""
