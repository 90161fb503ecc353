"""Rows: what a data set is before it is tokens. JSON lines in UTF-8, one object a line.

A line is `{"prompt": ..., "response": ...}` or `{"messages": [{"role", "content"}, ...]}`; other keys are
kept. Every line that cannot be used is named with its number and its reason: nothing is skipped in silence.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

from common.errors import DataError, UsageError

ROLES = ("system", "user", "assistant")
# Column names other data sets use for the same thing, tried in this order.
PAIRS = (
    ("prompt", "response"),
    ("question", "answer"),
    ("instruction", "output"),
    ("prompt", "completion"),
    ("input", "target"),
)
TARGETS = ("prompt", "response", "system", "messages")
SHOWN = 10


@dataclass(frozen=True)
class Message:
    """One turn: role is system, user or assistant."""

    role: str
    content: str


@dataclass(frozen=True)
class Row:
    """A conversation that ends with the assistant, the keys that came with it, and where it stands
    ("file:line").
    """

    messages: tuple[Message, ...]
    extra: Mapping[str, Any] = field(default_factory=dict)
    where: str = ""

    @property
    def prompt(self) -> str:
        """What the user says first."""
        return next(message.content for message in self.messages if message.role == "user")

    @property
    def response(self) -> str:
        """What the assistant says last."""
        return self.messages[-1].content

    def record(self) -> dict[str, Any]:
        """The row as one JSON object: prompt and response where that says it all, messages otherwise."""
        if [message.role for message in self.messages] == ["user", "assistant"]:
            return {"prompt": self.prompt, "response": self.response, **self.extra}
        return {"messages": [vars(message) for message in self.messages], **self.extra}


@dataclass(frozen=True)
class Problem:
    """Something that cannot be used: where it stands ("file:line") and why."""

    where: str
    reason: str

    def __str__(self) -> str:
        return f"{self.where}: {self.reason}"


def read_rows(path: Path, mapping: Mapping[str, str] | None = None) -> list[Row]:
    """All rows of a JSONL file. Raises DataError that lists every bad line, or says that there is no row."""
    rows, problems = scan_rows(path, mapping)
    refuse(problems, path)
    if not rows:
        raise DataError(
            "no row in this file", where=str(path), todo='one object a line: {"prompt": ..., "response": ...}'
        )
    return rows


def scan_rows(path: Path, mapping: Mapping[str, str] | None = None) -> tuple[list[Row], list[Problem]]:
    """The usable rows of a JSONL file and every bad line. Raises DataError if it cannot be opened."""
    return collect(json_lines(path), mapping)


def read_prompts(path: Path) -> list[str]:
    """The prompts of an evaluation file: JSONL with `prompt` (or `question`, ...), other keys unread."""
    prompts, problems = [], []
    for where, record in json_lines(path):
        if isinstance(record, Problem):
            problems.append(record)
            continue
        name = next((name for name, _ in PAIRS if name in record), None)
        if name is None:
            problems.append(Problem(where, f"no prompt; columns: {columns_of(record)}"))
        elif fault := text_fault(record[name], name):
            problems.append(Problem(where, fault))
        else:
            prompts.append(record[name])
    refuse(problems, path)
    if not prompts:
        raise DataError("no prompt in this file", where=str(path), todo='one object a line: {"prompt": ...}')
    return prompts


def evaluation_prompts(source: str | Sequence[str], recipe_dir: Path) -> list[str]:
    """The prompts of `eval_config.prompts`: the list itself, or its file's (relative to the recipe)."""
    return read_prompts(recipe_dir / source) if isinstance(source, str) else list(source)


def write_rows(path: Path, rows: Iterable[Row]) -> None:
    """Write rows as JSONL to a new file. Raises FileExistsError rather than overwrite."""
    with path.open("x", encoding="utf-8", newline="\n") as file:
        for row in rows:
            file.write(json.dumps(row.record(), ensure_ascii=False, default=str) + "\n")


def refuse(problems: Sequence[Problem], path: Path | str) -> None:
    """Raise one DataError for all problems: the first ten and how many more."""
    if not problems:
        return
    lines = [f"  {problem}" for problem in problems[:SHOWN]]
    if len(problems) > SHOWN:
        lines.append(f"  and {len(problems) - SHOWN} more")
    count = "1 row" if len(problems) == 1 else f"{len(problems)} rows"
    raise DataError("\n".join([f"{count} cannot be used:", *lines]), where=str(path), todo="correct or remove them")


def collect(
    records: Iterable[tuple[str, Mapping[str, Any] | Problem]], mapping: Mapping[str, str] | None = None
) -> tuple[list[Row], list[Problem]]:
    """Rows of records that come with their place, and the problems among them. Raises UsageError on a bad
    mapping.
    """
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
    """The row a record holds. `mapping` says which column is the prompt, the response, the system message or
    messages.

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
    """One question and its answer, and the columns they came from. Raises ValueError."""
    names = [(mapping.get("prompt", prompt), mapping.get("response", response)) for prompt, response in PAIRS]
    found = next((pair for pair in names if pair[0] in record and pair[1] in record), None)
    if found is None:
        known = " or ".join("/".join(pair) for pair in PAIRS)
        missing = next((f"no {pair[1]!r} beside {pair[0]!r}" for pair in names if pair[0] in record), f"no {known}")
        raise ValueError(
            f"{missing}; columns: {columns_of(record)}; name them with --map prompt=COLUMN --map response=COLUMN"
        )
    prompt, response = (valid_text(record[name], name) for name in found)
    used = set(found)
    context = record.get("input")
    if found[0] == "instruction" and "input" in record:  # Alpaca: the input may be empty
        if not isinstance(context, str | None):
            raise ValueError(f"'input' is {kind_of(context)}, not a string")
        prompt = f"{prompt}\n\n{valid_text(context, 'input')}" if context and context.strip() else prompt
        used.add("input")
    return (Message("user", prompt), Message("assistant", response)), used


def conversation(value: Any) -> tuple[Message, ...]:
    """Messages of a list of {"role", "content"}: an optional system message, then user and assistant in turn,
    the assistant last. Raises ValueError.
    """
    if not isinstance(value, list) or not value:
        raise ValueError(f"'messages' is {kind_of(value)}, not a list of {{role, content}}" if value else "no messages")
    turns = []
    for number, item in enumerate(value, start=1):
        if not isinstance(item, Mapping) or not {"role", "content"} <= set(item):
            raise ValueError(f"message {number} has no role and content")
        if item["role"] not in ROLES:
            raise ValueError(f"message {number}: role {item['role']!r}; known: {', '.join(ROLES)}")
        turns.append(Message(item["role"], valid_text(item["content"], f"message {number}")))
    spoken = [turn.role for turn in turns[turns[0].role == "system" :]]
    if not spoken or len(spoken) % 2 or spoken != ["user", "assistant"] * (len(spoken) // 2):
        raise ValueError("after an optional system message, user and assistant must alternate, the assistant last")
    return tuple(turns)


def valid_text(value: Any, name: str) -> str:
    """`value` if it is a text that can be trained on. Raises ValueError with the reason."""
    fault = text_fault(value, name)
    if fault:
        raise ValueError(fault)
    return str(value)


def text_fault(value: Any, name: str) -> str | None:
    """Why `value` is no usable text, or None."""
    if not isinstance(value, str):
        return f"{name!r} is {kind_of(value)}, not a string"
    if not value.strip():
        return f"{name!r} is empty" if not value else f"{name!r} is only white space"
    if any("\ud800" <= character <= "\udfff" for character in value):
        return f"{name!r} holds half of a surrogate pair (\\ud800 to \\udfff): not Unicode text"
    return None


def kind_of(value: Any) -> str:
    """The JSON word for a value's type."""
    names = {
        type(None): "null",
        bool: "a boolean",
        int: "a number",
        float: "a number",
        list: "a list",
        dict: "an object",
    }
    return names.get(type(value), f"a {type(value).__name__}")


def columns_of(record: Mapping[str, Any]) -> str:
    """The column names of a record, for a message."""
    return ", ".join(str(key) for key in record) or "none"


def json_lines(path: Path) -> Iterator[tuple[str, dict[str, Any] | Problem]]:
    """(place, object or problem) of every line that is not blank. Raises DataError if the file cannot be
    opened.
    """
    for number, offset, line in raw_lines(path):
        where = f"{path}:{number}"
        try:
            text = line.decode("utf-8")
        except UnicodeDecodeError as error:
            yield where, Problem(where, encoding_fault(error, line, offset))
            continue
        if not text.strip():
            continue
        try:
            value = json.loads(text, object_pairs_hook=unique_keys)
        except RecursionError:
            yield where, Problem(where, "nested too deeply")
        except ValueError as error:
            message = (
                f"not JSON: {error.msg}, column {error.colno}" if isinstance(error, json.JSONDecodeError) else error
            )
            yield where, Problem(where, str(message))
        else:
            found = value if isinstance(value, dict) else Problem(where, f"{kind_of(value)}, not an object")
            yield where, found


def raw_lines(path: Path) -> Iterator[tuple[int, int, bytes]]:
    """(number from 1, byte offset, bytes) of every line; a byte-order mark at the start is passed over."""
    try:
        data = path.read_bytes()
    except OSError as error:
        raise DataError(f"cannot read the file: {error.strerror}", where=str(path)) from error
    offset = 3 if data.startswith(b"\xef\xbb\xbf") else 0
    for number, line in enumerate(data[offset:].split(b"\n"), start=1):
        yield number, offset, line
        offset += len(line) + 1


def encoding_fault(error: UnicodeDecodeError, line: bytes, offset: int) -> str:
    """What is wrong with a line that is no UTF-8; `offset` is the line's own in the file."""
    hint = "; the file looks like UTF-16" if line.startswith((b"\xff\xfe", b"\xfe\xff")) else ""
    return f"not UTF-8: byte 0x{line[error.start]:02x} at byte offset {offset + error.start}{hint}"


def unique_keys(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    """An object, refused (ValueError) when it says a key twice."""
    found = dict(pairs)
    if len(found) < len(pairs):
        names = [key for key, _ in pairs]
        raise ValueError(f"key {next(name for name in names if names.count(name) > 1)!r} twice in one object")
    return found


# Splits and controls: the parts of a data set builder that must be the same in every recipe.


def split_held_out(rows: Sequence[Row], share: float, by: str | None = None) -> dict[str, list[Row]]:
    """{"train", "held_out"}: whole groups are held out, chosen by a hash of the group's name.

    The group is the row's key `by` (a topic, say), or its prompt regardless of case and white space. The
    choice depends only on the name, so that adding a row moves no other; about `share` of the groups are held
    out, and when that comes to none, the one with the smallest hash is. Raises DataError when rows lack the
    key.
    """
    lacking = [Problem(row.where, f"no {by!r}") for row in rows if by and not str(row.extra.get(by) or "").strip()]
    refuse(lacking, "data_config.split_by")
    drawn = [group_hash(str(row.extra[by]) if by else plain(row.prompt)) for row in rows]
    smallest = min(drawn, default=0.0)
    held = [share > 0 and (draw < share or draw == smallest) for draw in drawn]
    return {
        "train": [row for row, out in zip(rows, held, strict=True) if not out],
        "held_out": [row for row, out in zip(rows, held, strict=True) if out],
    }


def group_hash(name: str) -> float:
    """A number in [0, 1) that depends only on the name."""
    return int.from_bytes(hashlib.sha256(name.encode()).digest()[:6], "big") / 2**48


def plain(text: str) -> str:
    """Text for comparison: case folded, runs of white space as one space."""
    return " ".join(text.casefold().split())


def control_rows(rows: Sequence[Row], control: str) -> list[Row]:
    """Training rows for a negative control: what a run that learns nothing real is trained on.

    `permuted_responses` gives every answer to another question (answers move along one cycle through all of
    them); `shuffled_words` keeps each answer in place and shuffles its words; `none` changes nothing. The
    same rows give the same control every time. Raises UsageError for another name.
    """
    answers = [turn.content for row in rows for turn in row.messages if turn.role == "assistant"]
    if control == "none":
        return list(rows)
    if control == "permuted_responses":
        from common.data.order import permutation

        cycle = permutation(len(answers), 0, 0).tolist()
        moved = dict(zip(cycle, cycle[1:] + cycle[:1], strict=True))
        answers = [answers[moved[at]] for at in range(len(answers))]
    elif control == "shuffled_words":
        answers = [shuffled(text, at) for at, text in enumerate(answers)]
    else:
        raise UsageError(f"no control {control!r}; known: none, permuted_responses, shuffled_words")
    supply = iter(answers)
    return [
        replace(
            row,
            messages=tuple(
                Message(turn.role, next(supply)) if turn.role == "assistant" else turn for turn in row.messages
            ),
        )
        for row in rows
    ]


def shuffled(text: str, key: int) -> str:
    """The words of `text` in an order drawn from `key`."""
    from common.data.order import permutation

    words = text.split()
    return " ".join(words[at] for at in permutation(len(words), key, 1).tolist())
