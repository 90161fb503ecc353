"""Other people's data as rows: files and folders in many shapes, and pinned data sets of the Hub.

`convert` writes a JSONL file once, which recipes then train on, and beside it what was read. `files` reads what lies
on the disk, `dialects` knows what its records mean.
"""

from __future__ import annotations

import json
import re
import tempfile
from collections import Counter
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from common.config.layers import to_yaml
from common.data.rows import Problem, Row, grouped, refuse
from common.errors import DataError, MachineError, UsageError
from common.files import disk_errors, sha256_file, sync, sync_all
from tools.data import dialects, files, markers, turns
from tools.data.files import Record
from tools.progress import Watch, unwatched

FORMATS = ("auto", "jsonl", "csv", "parquet", "arrow", "folder", "text", "alpaca", "sharegpt")
# Two that say what the records of a JSON file are, by the dialect's name; the others say how a file is laid out.
ONLY = {"alpaca": "Alpaca (LLaMA-Factory)", "sharegpt": "ShareGPT (LLaMA-Factory, Unsloth, axolotl)"}
HUB = "hub:"


@dataclass(frozen=True)
class Source:
    """What is read as what: a file, or with the format `hub` a data set of the Hub at a commit."""

    name: str
    format: str
    revision: str | None = None
    subset: str | None = None
    split: str = "train"


@dataclass
class Found:
    """What was read: rows, what is none, what was changed on the way (with its place), and the rows of each dialect."""

    rows: list[Row] = field(default_factory=list)
    problems: list[Problem] = field(default_factory=list)
    notes: list[Problem] = field(default_factory=list)
    dialects: Counter[str] = field(default_factory=Counter)

    def read_as(self) -> list[str]:
        """Return the dialects that were recognized, each with its number of rows."""
        return [f"{name} ({count} {'row' if count == 1 else 'rows'})" for name, count in self.dialects.items()]

    def lines(self) -> list[str]:
        """Return what was recognized and changed for a person, one line a fact."""
        return [f"read as {', '.join(self.read_as())}", *grouped(self.notes)]


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
    said: Sequence[str] = ()

    def lines(self) -> list[str]:
        """Return the report for a person, one line a fact."""
        found = [
            f"{self.rows} rows from {self.source} ({self.format}) to {self.out}",
            f"sha256 {self.sha256}",
            *self.said,
        ]
        if self.extra_keys:
            found.append(f"kept beside prompt and response: {', '.join(self.extra_keys)}")
        if self.skipped:
            found.append(f"{len(self.skipped)} rows skipped:")
            found += [f"  {line}" for line in grouped(self.skipped)]
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
    chosen: bool = False,
    escape_markers: bool = False,
    watch: Watch = unwatched,
) -> Report:
    """Write the rows of `source` to the new JSONL file `out`.

    `source` is a file, a folder, or `hub:owner/name` with a `revision` of 40 hex digits (and perhaps a subset and
    split). `chosen` reads preferences for the chosen answer; `escape_markers` writes what looks like a chat template's
    marks with a space inside. Raises UsageError when `out` exists or an option makes no sense; DataError that lists
    every bad row, unless `skip_bad`; MachineError when the Hub cannot be reached.
    """
    for path in (out, pins_of(out)):
        if path.exists():
            raise UsageError("the output file exists", where=str(path), todo="choose another name or delete it")
    if not out.parent.is_dir():
        raise UsageError("no such folder", where=str(out.parent))
    found = Source(str(source), guess_format(source, format), revision, subset, split)
    read = collect(records(found, watch), mapping, chosen=chosen, only=ONLY.get(format))
    rows, problems = read.rows, read.problems
    if not skip_bad:
        refuse(problems, found.name)
    if not rows:
        raise DataError("no usable row in this source", where=found.name)
    if escape_markers:
        marked = [row for row in rows if markers.found_in(row)]
        read.notes += [Problem(row.where, "a chat template's mark is written with a space inside") for row in marked]
        rows = [markers.escape(row) for row in rows]
    scratch = tempfile.TemporaryDirectory(prefix=f".{out.name}-", dir=out.parent)
    with disk_errors("write the rows", out), scratch as folder:
        made = Path(folder) / out.name
        write_rows(made, watch(rows, "writing", len(rows)))
        sha256 = sha256_file(made)
        write_pins(made, sha256, found, mapping, read.dialects)
        put_in_place(made, out)
    return Report(
        source=found.name,
        out=str(out),
        format=found.format,
        rows=len(rows),
        extra_keys=sorted({key for row in rows for key in row.extra}),
        skipped=problems,
        sha256=sha256,
        said=read.lines(),
    )


def record_of(row: Row) -> dict[str, Any]:
    """Return the row as one JSON object: prompt and response where that says it all, messages otherwise."""
    tools = {"tools": row.tools} if row.tools else {}
    if [message.role for message in row.messages] == ["user", "assistant"] and not row.messages[-1].fields:
        return {"prompt": row.prompt, "response": row.messages[-1].content, **tools, **row.extra}
    return {"messages": [turns.record_of(message) for message in row.messages], **tools, **row.extra}


def write_rows(path: Path, rows: Iterable[Row]) -> None:
    """Write rows as JSONL to a new file. Raises FileExistsError rather than overwrite."""
    with path.open("x", encoding="utf-8", newline="\n") as file:
        file.writelines(map(line_of, map(record_of, rows)))


def line_of(record: Mapping[str, Any]) -> str:
    """Return a record as a line of JSON, in characters that UTF-8 has."""
    line = json.dumps(record, ensure_ascii=False, default=str)
    # Beside the texts, a key may hold half of a surrogate pair, which JSON writes as \ud800 and UTF-8 cannot.
    return (json.dumps(record, default=str) if re.search("[\ud800-\udfff]", line) else line) + "\n"


def pins_of(out: Path) -> Path:
    """Return the path of the file beside the rows in `out` that says what they were read from."""
    return out.with_name(f"{out.name}.source.yaml")


def put_in_place(made: Path, out: Path) -> None:
    """Rename finished rows to `out`, and what was written beside them to what stands beside it: both, or none."""
    sync_all(made.parent)
    pins_of(made).rename(pins_of(out))
    try:
        made.rename(out)
    except OSError:
        pins_of(out).unlink()
        raise
    sync(out.parent)


def write_pins(
    out: Path, sha256: str, source: Source, mapping: Mapping[str, str] | None, read: Mapping[str, int]
) -> None:
    """Write OUT.source.yaml: what the rows in `out` were read from and as what, and the sha256 of both."""
    on_hub, path = source.format == "hub", Path(source.name)
    facts: dict[str, Any] = {
        "format": 1,
        "source": source.name if on_hub else path.resolve().name,
        "sha256": None if on_hub or path.is_dir() else sha256_file(path),  # of the Hub the revision says it
        "read_as": source.format,
        "dialects": dict(read),
        "map": dict(mapping or {}),
        "rows_sha256": sha256,
    }
    facts |= {"revision": source.revision, "subset": source.subset, "split": source.split} if on_hub else {}
    if path.is_dir() and not on_hub:
        every = sorted(file for file in path.rglob("*") if file.is_file() and file.resolve() != out.resolve())
        facts["files"] = {file.relative_to(path).as_posix(): sha256_file(file) for file in every}
    with pins_of(out).open("x", encoding="utf-8") as file:
        file.write(to_yaml(facts))


def scan(path: Path, format: str, mapping: Mapping[str, str], watch: Watch = unwatched) -> Found:
    """Return the usable rows of a file or folder and its bad ones, read as `format`."""
    return collect(records(Source(str(path), format), watch), mapping)


def load(source: Path, format: str, mapping: Mapping[str, str] | None = None, watch: Watch = unwatched) -> Found:
    """Return what a file holds. Raises DataError that lists every bad row, or says that there is no row."""
    found = scan(source, format, mapping or {}, watch)
    refuse(found.problems, str(source))
    if not found.rows:
        raise DataError("no row in this source", where=str(source))
    return found


def records(source: Source, watch: Watch = unwatched) -> Iterable[Record]:
    """Return (place, record or problem) of every entry of `source`."""
    if source.format == "hub":
        return watch(hub_records(source), "reading", None)
    if source.revision is not None:
        raise UsageError("only a hub: source has a revision", where=source.name)
    path = Path(source.name)
    total = None if watch is unwatched else files.about(path, source.format)
    return watch(files.records(path, source.format, source.split), "reading", total)


def guess_format(source: str | Path, format: str) -> str:
    """Return how to read `source`: what was asked for, or what its name shows."""
    if format not in FORMATS:
        raise UsageError(f"no format {format!r}; known: {', '.join(FORMATS)}")
    if str(source).startswith(HUB):
        return "hub"
    found = files.kind_of_file(Path(source))
    if format in ONLY and found == "text":  # JSON of another name, as it says what its records are
        return "jsonl"
    return found if format == "auto" or format in ONLY else format


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
    found: dict[str, str] = {}
    for pair in pairs:
        name, equals, column = pair.partition("=")
        if not (name and equals and column):
            raise UsageError(f"--map {pair!r} is not NAME=COLUMN", todo="for example --map prompt=question")
        if name in found:
            raise UsageError(f"--map {name}=... is there twice: {found[name]}, {column}", todo="leave one out")
        found[name] = column
    return found


def collect(
    records: Iterable[Record],
    mapping: Mapping[str, str] | None = None,
    *,
    chosen: bool = False,
    only: str | None = None,
) -> Found:
    """Return what records hold, with their places; only those of the dialect `only`, where one is named.

    Raises UsageError for a wrong mapping.
    """
    unknown = [name for name in mapping or {} if name not in dialects.TARGETS]
    if unknown:
        known = ", ".join(dialects.TARGETS)
        raise UsageError(f"cannot map to {unknown[0]!r}; known: {known}", todo="--map prompt=COLUMN")
    found = Found()
    for where, record in records:
        if isinstance(record, Problem):
            found.problems.append(record)
            continue
        try:
            read = dialects.read(record, mapping or {}, where, chosen=chosen)
            if only not in (None, read.dialect):
                raise ValueError(f"read as {read.dialect}, not as {only}")
        except ValueError as fault:
            found.problems.append(Problem(where, str(fault)))
            continue
        found.dialects[read.dialect] += 1
        found.notes += [Problem(where, note) for note in read.notes]
        found.rows += [read.row] if read.row else []
    return found
