"""Rows: what a data set is before it is tokens. JSON lines in UTF-8, one object a line.

A line is `{"prompt": ..., "response": ...}` or `{"messages": [{"role", "content"}, ...]}`, with `tool_calls`, turns of
`tool` and a list of `tools` as OpenAI has them, but each call's arguments as an object. Other keys are kept, but for
those that other tools read as part of it: they are for `recipe data convert`. `"weight": 0` in an assistant's message
keeps it out of the loss. Every line that cannot be used is named with its number and reason.
"""

from __future__ import annotations

import gc
import hashlib
import io
import json
import re
import sys
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from itertools import repeat
from pathlib import Path
from typing import Any, TypeVar

from common.errors import DataError

ROLES = ("system", "user", "assistant")
PLACES = 3  # rows that a fault names behind its first: enough to see what they have in common
T = TypeVar("T")
Keys = Mapping[str, Any]
Tools = Sequence[Mapping[str, Any]]  # as OpenAI describes them
KINDS: dict[type, str] = {type(None): "null", bool: "a boolean", int: "a number", float: "a number", str: "a string"}
KINDS |= {list: "a list", dict: "an object"}
LINE = 7  # bytes of a line's number
NO_EXTRA: Mapping[str, Any] = {}  # one for all rows without: a dict of its own is 64 bytes
CONVERT = "recipe data convert FILE OUT.jsonl makes rows of other forms"
# Keys that hold a part of the conversation, or say how it is trained on, where other tools read them (docs/data.md):
# beside the turns of a row, and beside role and content of a message.
MEDIA = ("image", "images", "video", "videos", "audio", "audios")
ROW_KEYS = frozenset([*"system system_prompt history functions chosen rejected chat_template_kwargs".split(), *MEDIA])
WORDS = tuple("function_call reasoning_content reasoning thinking refusal audio images".split())
MESSAGE_KEYS = frozenset(["train", "train_detail", "training", "mask", "loss", *WORDS])


@dataclass(slots=True)  # not frozen, as one is made of each turn at each look, and frozen it takes three times as long
class Message:
    """One turn: role is one of ROLES or tool; what an assistant says is trained on unless `trained` is False."""

    role: str
    content: str
    trained: bool = True
    # What templates read beside role and content: an assistant's tool_calls, a tool's tool_call_id and name.
    fields: Mapping[str, Any] | None = None


class Row:
    """A conversation that ends with the assistant, its tools, other keys that came with it, its place ("file:line")."""

    # 290 bytes, of which a row of 100 tokens has most in words: a million of them are in memory at once. So roles and
    # file are one text for all rows alike, and the words one piece of UTF-8, in which no byte is 0xff; in front of it
    # is the line, in LINE bytes: as a number of its own it would take 32.
    __slots__ = ("_file", "_held", "extra", "fields", "roles", "tools")

    def __init__(self, messages: Iterable[Message], extra: Keys = NO_EXTRA, where: str = "", tools: Tools = ()) -> None:
        turns = list(messages)
        self.roles = sys.intern(" ".join([turn.role if turn.trained else f"{turn.role}-" for turn in turns]))
        self.fields = fields if any(fields := [turn.fields for turn in turns]) else None
        file, _, line = where.rpartition(":")
        number = int(line) if len(line) < 15 and line.isdecimal() and str(int(line)) == line else -1
        self._file, self.extra, self.tools = where if number < 0 else sys.intern(file), extra, tools or ()
        said = [turn.content.encode() for turn in turns]
        self._held = number.to_bytes(LINE, "big", signed=True) + b"\xff".join(said)

    @property
    def words(self) -> bytes:
        """Return what all turns say, in UTF-8, between them a byte 0xff."""
        return self._held[LINE:]

    @property
    def messages(self) -> tuple[Message, ...]:
        """Return the turns."""
        turns = zip(self.roles.split(" "), self.words.split(b"\xff"), self.fields or repeat(None), strict=False)
        return tuple([Message(role.rstrip("-"), text.decode(), role[-1] != "-", rest) for role, text, rest in turns])

    @property
    def where(self) -> str:
        """Return where the row stands."""
        line = int.from_bytes(self._held[:LINE], "big", signed=True)
        return self._file if line < 0 else f"{self._file}:{line}"

    @property
    def prompt(self) -> str:
        """Return what the user says first."""
        return self.words.split(b"\xff")[self.roles.replace("-", "").split(" ").index("user")].decode()

    def but(self, **changes: Any) -> Row:
        """Return the row with other messages, extra, where or tools."""
        return Row(**{name: getattr(self, name) for name in ("messages", "extra", "where", "tools")} | changes)


@dataclass(frozen=True)
class Problem:
    """Something that cannot be used: where it stands ("file:line") and why."""

    where: str
    reason: str

    def __str__(self) -> str:
        return f"{self.where}: {self.reason}"


def read_rows(path: Path) -> list[Row]:
    """Return all rows of a JSONL file. Raises DataError that lists every bad line, or says that there is no row."""
    return read_all(path, row_of, "no row in this file", '{"prompt": ..., "response": ...}')


def read_all(path: Path, read: Callable[[Mapping[str, Any], str], T], lacking: str, form: str) -> list[T]:
    """Return what `read` makes of each line of a JSONL file. Raises DataError for bad lines, and for none at all."""
    found, problems = scan(path, read)
    refuse(problems, path)
    if not found:
        raise DataError(lacking, where=str(path), todo=f"one object a line: {form}")
    return found


def scan(path: Path, read: Callable[[Mapping[str, Any], str], T]) -> tuple[list[T], list[Problem]]:
    """Return what `read` makes of each line of a JSONL file and its place, and every bad line. Raises DataError."""
    found, problems = [], []
    gc.disable()  # each collection would look at all rows that there are so far: a fifth of the time, to find nothing
    try:
        for where, record in json_lines(path):
            try:
                if isinstance(record, Problem):
                    raise ValueError(record.reason)
                found.append(read(record, where))
            except ValueError as fault:
                problems.append(Problem(where, str(fault)))
    finally:
        gc.enable()
    return found, problems


def row_of(record: Mapping[str, Any], where: str) -> Row:
    """Return the row that a record holds. Raises ValueError with the reason when it holds none."""
    if not ROW_KEYS.isdisjoint(record) and (said := [key for key in record if key in ROW_KEYS and record[key]]):
        raise ValueError(f"{said[0]!r} would be left out of the conversation; {CONVERT}")
    if "messages" in record:
        messages, used = conversation(record["messages"]), {"messages"}
    elif "prompt" in record and "response" in record:
        prompt, response = valid_text(record["prompt"], "prompt"), valid_text(record["response"], "response")
        messages, used = (Message("user", prompt), Message("assistant", response)), {"prompt", "response"}
    else:
        raise ValueError(f"no prompt and response, and no messages; columns: {columns_of(record)}; {CONVERT}")
    if len(record) == len(used):  # as most are
        return Row(messages, NO_EXTRA, where)
    extra = {key: value for key, value in record.items() if key not in used and key != "tools"} or NO_EXTRA
    return Row(messages, extra, where, functions_of(record.get("tools") or [], "'tools'", {"name": str}))


def read_prompts(source: str | Sequence[str], recipe_dir: Path) -> list[str]:
    """Return the prompts of `eval_config.prompts`: the list itself, or each `prompt` of a JSONL file in the recipe.

    Raises DataError that lists every line without one, or says that there is none.
    """
    if not isinstance(source, str):
        return list(source)
    return read_all(recipe_dir / source, prompt_of, "no prompt in this file", '{"prompt": ...}')


def prompt_of(record: Mapping[str, Any], _where: str) -> str:
    """Return the prompt of a record. Raises ValueError with the reason when it has none."""
    if "prompt" not in record:
        raise ValueError(f"no prompt; columns: {columns_of(record)}")
    return valid_text(record["prompt"], "prompt")


def refuse(problems: Sequence[Problem], path: Path | str) -> None:
    """Raise one DataError for all problems, a line a fault."""
    if problems:
        count = "1 row" if len(problems) == 1 else f"{len(problems)} rows"
        lines = "\n  ".join([f"{count} cannot be used:", *grouped(problems)])
        raise DataError(lines, where=str(path), todo="correct or remove them")


def grouped(problems: Iterable[Problem]) -> list[str]:
    """Return a line a fault, whatever its numbers and the row's words quoted at its end: first row, count, the next."""
    faults: dict[str, list[Problem]] = {}
    for problem in problems:
        faults.setdefault(re.sub(r"\d+|: '[^']*'$|: \"[^\"]*\"$", "0", problem.reason), []).append(problem)
    lines = []
    for first, *others in faults.values():
        places = [other.where.rpartition("/")[2] for other in others[:PLACES]] + ["..."][: len(others) > PLACES]
        lines.append(f"{first} ({len(others) + 1} rows, then {', '.join(places)})" if others else str(first))
    return lines


def conversation(value: Any) -> tuple[Message, ...]:
    """Return the messages of such a list: perhaps a system's, then user and assistant in turns. Raises ValueError."""
    if not isinstance(value, list) or not value:
        raise ValueError(f"'messages' is {kind_of(value)}, not a list of {{role, content}}" if value else "no messages")
    turns = []
    for number, item in enumerate(value, start=1):
        if not isinstance(item, Mapping) or not {"role", "content"} <= set(item):
            raise ValueError(f"message {number} has no role and content")
        if item["role"] not in (*ROLES, "tool"):
            raise ValueError(f"message {number}: role {item['role']!r}; known: {', '.join(ROLES)}, tool")
        if odd := next((key for key in item if key in MESSAGE_KEYS and item[key] is not None), None):
            raise ValueError(f"message {number} has {odd!r}, which says how it is trained on or written; {CONVERT}")
        if (weight := item.get("weight")) not in (None, 0, 1):
            raise ValueError(f"message {number}: 'weight' is {weight!r}; known: 0 (not trained on) and 1")
        fields, content = fields_of(item, f"message {number}"), item["content"]
        # A call needs no words beside it, and a tool may answer with none.
        silent = content in (None, "") and (fields or item["role"] == "tool")
        text = "" if silent else valid_text(content, f"message {number}")
        turns.append(Message(sys.intern(item["role"]), text, weight in (None, 1), fields))
    # Of each role the first letter; A is an assistant that calls tools.
    shape = "".join(turn.role[0].upper() if turn.fields and turn.role != "tool" else turn.role[0] for turn in turns)
    if not re.fullmatch("s?(u(At+)*(a|A$))+", shape):
        rest = "; tools answer behind the assistant's calls to them" if re.search("[A-Zt]", shape) else ""
        what = "after an optional system message, user and assistant must alternate, the assistant last"
        raise ValueError(what + rest)
    if not any(turn.trained for turn in turns if turn.role == "assistant"):
        raise ValueError("no answer is trained on: every one has weight 0")
    return tuple(turns)


def fields_of(item: Mapping[str, Any], name: str) -> dict[str, Any] | None:
    """Return the `fields` of a message: its tool calls, or which call a tool answers. Raises ValueError."""
    functions_of(item.get("tool_calls") or [], f"{name}: 'tool_calls'", {"name": str, "arguments": dict})
    keys = ("tool_calls", "tool_call_id", "name") if item["role"] == "tool" else ("tool_calls",)
    return {key: item[key] for key in keys if item.get(key)} or None


def functions_of(value: Any, name: str, kinds: Mapping[str, type]) -> list[Mapping[str, Any]]:
    """Return a list of {"function": {...}}, with keys of these kinds in each. Raises ValueError where it is none."""
    for entry in value if isinstance(value, list) else [None]:
        function = entry.get("function") if isinstance(entry, Mapping) else None
        if not isinstance(function, Mapping) or not all(isinstance(function.get(key), kinds[key]) for key in kinds):
            raise ValueError(f"{name} is no list of {{'function': {{{', '.join(kinds)}}}}}; {CONVERT}")
    # Most rows have none, and to write nothing as JSON takes a fifth of the time in which a row is read.
    valid_text(json.dumps(value, ensure_ascii=False) if value else "[]", name)
    return list(value)


def valid_text(value: Any, name: str) -> str:
    """Return `value` if it is a text that can be trained on. Raises ValueError with the reason."""
    if not isinstance(value, str):
        raise ValueError(f"{name!r} is {kind_of(value)}, not a string")
    if not value or value.isspace():
        raise ValueError(f"{name!r} is empty" if not value else f"{name!r} is only white space")
    if not value.isascii() and re.search("[\ud800-\udfff]", value):
        raise ValueError(f"{name!r} holds half of a surrogate pair (\\ud800 to \\udfff): not Unicode text")
    return value


def kind_of(value: Any) -> str:
    """Return the JSON word for a value's type."""
    return KINDS.get(type(value), f"a {type(value).__name__}")


def columns_of(record: Mapping[str, Any]) -> str:
    """Return the column names of a record, for a message."""
    return ", ".join(str(key) for key in record) or "none"


def json_lines(path: Path, data: bytes | None = None) -> Iterator[tuple[str, dict[str, Any] | Problem]]:
    """Yield (place, object or problem) of every line of a file, or of `data` in its place; DataError if unreadable."""
    try:
        file = path.open("rb") if data is None else io.BytesIO(data)
    except OSError as error:
        raise DataError(f"cannot read the file: {error.strerror}", where=str(path)) from error
    decode, begin, end, name = json.JSONDecoder(object_pairs_hook=unique_keys).decode, 0, 0, str(path)
    # A file of bytes has its lines cut at the line feed alone: text is also cut elsewhere, and JSON may hold U+2028.
    for number, ended in enumerate(file, start=1):
        mark = 3 if number == 1 and ended.startswith(b"\xef\xbb\xbf") else 0  # a byte-order mark is passed over
        where, line, begin, end = f"{name}:{number}", ended[mark:].rstrip(b"\n"), end + mark, end + len(ended)
        try:
            if not (text := line.decode("utf-8")).strip():
                continue
            said = decode(text)
            found = said if isinstance(said, dict) else Problem(where, f"{kind_of(said)}, not an object")
        except UnicodeDecodeError as error:
            found = Problem(where, encoding_fault(line, error.start, begin))
        except RecursionError:
            found = Problem(where, "nested too deeply")
        except ValueError as error:
            said = isinstance(error, json.JSONDecodeError) and f"not JSON: {error.msg}, column {error.colno}"
            found = Problem(where, said or str(error))
        yield where, found


def encoding_fault(line: bytes, at: int, offset: int) -> str:
    """Return what is wrong with byte `at` of a line that is no UTF-8; `offset` is the line's own in the file."""
    hint = "; the file looks like UTF-16" if line.startswith((b"\xff\xfe", b"\xfe\xff")) else ""
    return f"not UTF-8: byte 0x{line[at]:02x} at byte offset {offset + at}{hint}"


def unique_keys(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    """Return the object of these pairs. Raises ValueError when it says a key twice."""
    found = dict(pairs)
    if len(found) < len(pairs):
        names = [key for key, _ in pairs]
        raise ValueError(f"key {next(name for name in names if names.count(name) > 1)!r} twice in one object")
    return found


# --- what a recipe's dataset.py does with rows ------------------------------------------------------------------


def groups_of(rows: Sequence[Row], by: str | None) -> list[str]:
    """Return the group of each row, which goes to one side of the split whole.

    That is its key `by`, or its prompt whatever its case and white space. Raises DataError for rows without the key.
    """
    lacking = [Problem(row.where, f"no {by!r}") for row in rows if by and not str(row.extra.get(by) or "").strip()]
    refuse(lacking, "data_config.split_by")
    return [str(row.extra[by]) if by else plain(row.prompt) for row in rows]


def hold_out(names: Iterable[str], share: float) -> set[str]:
    """Return about `share` of the names by the hash of each alone; one at least, unless the share is 0."""
    found, smallest = set[str](), (1.0, "")
    for name in names:
        draw = group_hash(name)
        smallest = min(smallest, (draw, name))
        found |= {name} if draw < share else set()
    return found or ({smallest[1]} if share > 0 and smallest[0] < 1 else set())


def group_hash(name: str) -> float:
    """Return a number in [0, 1) that depends on the name alone."""
    # 48 bits: a float64 holds them exactly, so the quotient is below 1.
    return int.from_bytes(hashlib.sha256(name.encode()).digest()[:6], "big") / 2**48


def plain(text: str) -> str:
    """Return a text for comparison: case folded, runs of white space as one space."""
    return " ".join(text.casefold().split())


def control_rows(rows: Sequence[Row], control: str) -> list[Row]:
    """Return the training rows for a negative control: what a run that learns nothing real is trained on.

    `permuted_responses` moves answers along one cycle through all of them; `shuffled_words` keeps each in place and
    shuffles its words; `none` changes nothing. The same rows give the same control every time.
    """
    if control == "none":
        return list(rows)
    if called := next((row for row in rows if row.fields), None):
        raise DataError(f"control {control} leaves tool calls in place, and would train on them", where=called.where)
    answers = [turn.content for row in rows for turn in row.messages if turn.role == "assistant"]
    from common.data.order import permutation  # numpy: a board's host reads texts with this module, and has none

    if control == "permuted_responses":
        # One cycle through all answers, not a permutation: that would leave some of them at their own question.
        cycle = permutation(len(answers), 0, 0).tolist()
        moved = dict(zip(cycle, cycle[1:] + cycle[:1], strict=True))
        answers = [answers[moved[at]] for at in range(len(answers))]
    else:
        words = [text.split() for text in answers]
        # An order of its own for each answer: seed `at`; the 1 keeps them apart from the cycle above.
        orders = [permutation(len(found), at, 1).tolist() for at, found in enumerate(words)]
        answers = [" ".join(found[at] for at in order) for found, order in zip(words, orders, strict=True)]
    supply = iter(answers)

    def answered(turn: Message) -> Message:
        return replace(turn, content=next(supply)) if turn.role == "assistant" else turn

    return [row.but(messages=map(answered, row.messages)) for row in rows]
