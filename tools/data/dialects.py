"""The shapes that rows of other tools have: how each is recognized, and what is made of it.

`DIALECTS` is tried from its start; the first whose columns a record has reads it. docs/data.md has its table, made from
it. Each rule is the named tool's own, but for what is said under "not as there".
"""

from __future__ import annotations

import difflib
import functools
import json
import re
from collections.abc import Callable, Container, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

from common.data.rows import MEDIA, Message, Row, columns_of, kind_of, valid_text
from tools.data import templated, turns

Record = Mapping[str, Any]
CHOSEN = "a row of preferences: recipe data convert --chosen keeps the answer that was chosen, without the other one"
NEXT_TO = "\n\n"  # between an instruction and what it is about
# Columns that carry a part of the conversation whatever the dialect, which no template here writes.
UNWRITTEN = (*MEDIA, "chat_template_kwargs")
TOOLS = ("tools", "functions")  # what the assistant may call; functions: OpenAI's older format
SYSTEM = ("system", "system_prompt")
OURS = ("prompt", "response", "messages", "system", "history", *TOOLS, *UNWRITTEN, "chosen", "rejected")
WRITTEN_LIST = re.compile(r"""\s*\[\s*\{\s*["']""")
TARGETS = ("prompt", "response", "system", "messages", "tools")  # of --map


@dataclass
class Reading:
    """A record while it is read: which of its columns were used, and what there is to say about it."""

    record: Record
    chosen: bool = False
    used: set[str] = field(default_factory=set)
    notes: list[str] = field(default_factory=list)
    tools: list[Mapping[str, Any]] = field(default_factory=list)

    def value(self, name: str) -> Any:
        """Return the value of a column, and count it as used; None where there is none."""
        self.used.add(name)
        return self.record.get(name)

    def text(self, name: str) -> str:
        """Return the text of a column. Raises ValueError where it is none."""
        return valid_text(self.value(name), name)

    def text_or_nothing(self, name: str) -> str:
        """Return the text of a column that may be absent or empty. Raises ValueError for what is no text."""
        value = self.value(name)
        if not isinstance(value, str | None):
            raise ValueError(f"{name!r} is {kind_of(value)}, not a string")
        return valid_text(value, name) if value and value.strip() else ""

    def messages(self, name: str, *, trained: bool = True) -> list[Message]:
        """Return the messages of a column: a list of them, or that list as JSON. Raises ValueError."""
        value = self.list_in(name)
        if not isinstance(value, list | tuple):
            raise ValueError(f"{name!r} is {kind_of(value)}, no list of {name}")
        if not value:
            raise ValueError("no messages")
        return turns.messages_of(value, self.notes, trained=trained)

    def list_in(self, name: str) -> Any:
        """Return the value of a column, a list also where it is JSON, as a cell of a CSV file has it; ValueError."""
        value = self.value(name)
        if not isinstance(value, str) or not value.lstrip().startswith("["):
            return value
        try:
            return json.loads(value)
        except (ValueError, RecursionError) as fault:
            how = "; Python's str() of a list is none, json.dumps() is" if "'" in value else ""
            raise ValueError(f"{name!r} begins as a list and is not JSON: {fault}{how}") from fault

    def either(self, name: str, role: str, *, trained: bool = True) -> list[Message]:
        """Return the messages of a column that is a list of them, or one message of `role` that is its text."""
        value = self.record.get(name)
        if isinstance(value, Mapping):
            self.used.add(name)
            return [turns.message_of(value, 1, self.notes)]
        return self.messages(name, trained=trained) if is_list(value) else [Message(role, self.text(name))]


@dataclass(frozen=True)
class Dialect:
    """A shape of rows: the columns it is told by, what is read from it, and in words what is trained and refused.

    `read` returns None for a row that is left out on purpose. `fits` tells dialects apart that have the same columns.
    """

    name: str
    columns: tuple[str, ...]
    read: Callable[[Reading], list[Message] | None]
    trained: str
    refused: str = ""
    fits: Callable[[Record], bool] = lambda _record: True
    told: str = ""  # what `fits` looks at, for a reader

    def missing(self, columns: Container[str]) -> list[str]:
        """Return the columns of this dialect that are not among these, or not in a record."""
        return [column for column in self.columns if column not in columns]


@dataclass(frozen=True)
class Read:
    """What became of a record: its row, None where it is left out on purpose; the dialect; what there is to say."""

    row: Row | None
    dialect: str
    notes: Sequence[str]


def is_list(value: Any) -> bool:
    """Return whether a value is a list of messages, or one written as JSON, be it well or badly."""
    return isinstance(value, list | tuple) or (isinstance(value, str) and bool(WRITTEN_LIST.match(value)))


def read(record: Record, mapping: Mapping[str, str], where: str, *, chosen: bool = False) -> Read:
    """Return the row that a record holds; `mapping` names the columns of prompt, response, system text or messages.

    A mapped name wins over a column that is called so. With `chosen`, preferences are read for their chosen answer.
    Raises ValueError with the reason when there is none.
    """
    reading = Reading(record, chosen)
    picked = {name: picked_from(reading, column) for name, column in mapping.items()}
    if mapping:
        # What is mapped stands under our names, and hides a column of the record that is called so.
        shown = {key: value for key, value in record.items() if key not in reading.used} | picked
        inner = Reading(shown, chosen, notes=reading.notes)
        dialect = mapped_dialect(mapping) or recognized(shown, mapping)
        found = dialect.read(inner)
        messages = finished(found, inner)
        if found is not None and (idle := [name for name in mapping if name not in inner.used]):
            raise ValueError(f"--map {idle[0]}=... is of no use to a row that is read as {dialect.name}")
        used = reading.used | (inner.used - set(mapping))
        reading.tools = inner.tools
    else:
        dialect = recognized(record)
        found = dialect.read(reading)
        messages, used = finished(found, reading), reading.used
    if messages is None:
        return Read(None, dialect.name, reading.notes)
    extra = kept({key: value for key, value in record.items() if key not in used}, reading.notes)
    return Read(Row(messages, extra, where, reading.tools), dialect.name, reading.notes)


def finished(found: list[Message] | None, reading: Reading) -> tuple[Message, ...] | None:
    """Return the conversation of what a dialect read, with the system text, history and tools of its other columns."""
    if found is None:
        return None
    for name in UNWRITTEN:
        if reading.value(name) not in turns.EMPTY:
            raise ValueError(f"{name!r} is not empty: {turns.LEFT_OUT}; remove the column or the row")
    for name in TOOLS:
        if (value := reading.list_in(name)) not in turns.EMPTY:
            found_here = turns.tools_of(value, name, reading.notes)
            reading.tools += [tool for tool in found_here if tool not in reading.tools]
    if earlier := reading.list_in("history"):
        at = 1 if found and found[0].role == "system" else 0
        found = [*found[:at], *turns.history_of(earlier), *found[at:]]
    for name in SYSTEM:
        if system := reading.text_or_nothing(name):
            found = turns.after_system(system, found)
    return turns.settled(found, reading.notes)


def kept(extra: Mapping[str, Any], notes: list[str]) -> dict[str, Any]:
    """Return the columns that stay beside a row: one that is called as a part of a row gets another name."""
    found: dict[str, Any] = {}
    for key, value in extra.items():
        name = key
        while name in OURS or (name != key and name in extra):
            name = f"column_{name}"
        if key in turns.OF_A_MESSAGE:
            notes.append(f"the column {key!r} is kept beside the row: of a message it would say how it is trained on")
        if name != key:
            notes.append(f"the column {key!r} is kept beside the row as {name!r}")
        found[name] = value
    return found


def picked_from(reading: Reading, column: str) -> Any:
    """Return what a name of `--map` stands for: a column, or a place in one, as answers.text.0. Raises ValueError."""
    if column in reading.record:
        return reading.value(column)
    value: Any = reading.record
    for at, part in enumerate(steps := column.split(".")):
        if isinstance(value, Mapping) and part in value:
            value = value[part]
        elif isinstance(value, list | tuple) and part.isdigit() and int(part) < len(value):
            value = value[int(part)]
        elif at == 0:
            raise ValueError(f"no column {part!r}; columns: {columns_of(reading.record)}")
        else:
            raise ValueError(f"nothing at {column!r}: no {part!r} in {'.'.join(steps[:at])!r}")
    reading.used.add(steps[0])
    return value


def mapped_dialect(mapping: Mapping[str, str]) -> Dialect | None:
    """Return the dialect of columns that were named, None where they say neither both texts nor the messages."""
    if "messages" in mapping:
        return MESSAGES
    return PROMPT_RESPONSE if {"prompt", "response"} <= set(mapping) else None


def recognized(record: Record, mapping: Mapping[str, str] | None = None) -> Dialect:
    """Return the dialect of a record. Raises ValueError that names the two nearest, and what each of them misses."""
    for dialect in DIALECTS:
        if not dialect.missing(record) and dialect.fits(record):
            return dialect
    for prompt, response in PAIRS:  # one of both was mapped
        names = {"prompt" if "prompt" in (mapping or {}) else prompt: "user"}
        names["response" if "response" in (mapping or {}) else response] = "assistant"
        if mapping and set(names) <= set(record):
            return pair("columns of --map", *names)
    raise ValueError(f"no dialect that is known; the nearest: {nearest(tuple(record))}; {columns_said(record)}")


@functools.cache  # a file without a dialect has the same columns a hundred thousand times
def nearest(columns: tuple[str, ...]) -> str:
    """Return the two dialects nearest to a row of these columns, with the columns that each of them misses."""
    absent = {one.name: one.missing(columns) for one in DIALECTS}
    # Of two alike one that is told by its columns alone; where no column is near any, our own two forms.
    ranked = sorted(
        (one for one in DIALECTS if absent[one.name]),
        key=lambda one: (-nearness(one, columns), bool(one.told), one is not PROMPT_RESPONSE, one is not MESSAGES),
    )
    return ", ".join(f"{one.name} (no {' and no '.join(map(repr, absent[one.name]))})" for one in ranked[:2])


def nearness(dialect: Dialect, columns: tuple[str, ...]) -> float:
    """Return the share of a dialect's columns that a row has, in parts for one that is spelled nearly so."""
    names = [str(column).casefold() for column in columns]

    def near(column: str) -> float:
        found = difflib.get_close_matches(column, names, n=1, cutoff=0.75)  # "Questions" for question, not "label"
        return difflib.SequenceMatcher(None, column, found[0]).ratio() if found else 0.0

    return sum(map(near, dialect.columns)) / len(dialect.columns)


def columns_said(record: Record) -> str:
    """Return the columns of a record and how to say which of them is what, for a message."""
    return f"columns: {columns_of(record)}; name them with --map prompt=COLUMN --map response=COLUMN"


# --- how each is read -------------------------------------------------------------------------------------------------


def joined(*parts: str) -> str:
    """Return the parts that are not empty, one below the other."""
    return NEXT_TO.join(part for part in parts if part)


def pair(name: str, prompt: str, response: str, about: str = "", note: str = "") -> Dialect:
    """Return a dialect of one question and its answer, in two columns, with perhaps a third that it is about."""

    def exchange(reading: Reading) -> list[Message]:
        below = reading.text_or_nothing(about) if about else ""
        asked = reading.text_or_nothing(prompt) if below else reading.text(prompt)
        return [Message("user", joined(asked, below)), Message("assistant", reading.text(response))]

    said = f"`{response}`{note}" + (f"; the question is `{prompt}`, a blank line, `{about}`" if about else "")
    return Dialect(name, (prompt, response), exchange, said)


def of_messages(column: str) -> Callable[[Reading], list[Message]]:
    """Return the reader of a column that is a list of messages."""
    return lambda reading: reading.messages(column)


def prompt_and_completion(reading: Reading) -> list[Message]:
    """Return the turns of TRL's conversational prompt and completion; the loss is over the completion alone."""
    asked = reading.either("prompt", "user", trained=False)
    if any(turn.role == "assistant" for turn in asked):
        reading.notes.append("answers inside of 'prompt' get weight 0: TRL trains on the completion alone")
    return [*asked, *reading.either("completion", "assistant")]


def preference(reading: Reading) -> list[Message]:
    """Return the turns up to the chosen answer. Raises ValueError unless that was asked for."""
    if not reading.chosen:
        raise ValueError(CHOSEN)
    reading.used.add("rejected")
    value = reading.record["chosen"]
    if isinstance(value, str) and "\n\nHuman:" in f"\n\n{value.lstrip()}":  # hh-rlhf: all in one text
        reading.used.add("chosen")
        return [Message(*turn) for turn in templated.split(value.strip())[1]]
    answer = reading.either("chosen", "assistant")
    if answer[0].role != "assistant":  # the whole conversation, as UltraFeedback has it
        reading.used.add("prompt")
        return answer
    if "conversations" in reading.record:
        return [*reading.messages("conversations", trained=False), *answer]
    if "instruction" in reading.record:
        asked = joined(reading.text("instruction"), reading.text_or_nothing("input"))
        return [Message("user", asked), *answer]
    question = next((name for name in ("prompt", "question") if name in reading.record), None)
    if question is None:
        raise ValueError("a chosen answer without its 'prompt': name the question's column with --map prompt=COLUMN")
    return [*reading.either(question, "user", trained=False), *answer]


def judged(label: str) -> Callable[[Reading], list[Message] | None]:
    """Return the reader of answers that were judged good or bad, true or false in the column `label`."""

    def good(reading: Reading) -> list[Message] | None:
        if (is_good := verdict(reading.value(label))) is None:
            raise ValueError(f"{label!r} is neither true nor false, and so does not say whether the answer is good")
        if not reading.chosen:
            raise ValueError(
                f"{CHOSEN} ({label!r} says whether an answer is good; where it does not, name the columns with --map)"
            )
        if not is_good:
            reading.notes.append(f"rows whose {label!r} is false are left out")
            return None
        inner = {key: value for key, value in reading.record.items() if key != label}
        rest = Reading(inner, reading.chosen, reading.used, reading.notes)
        return recognized(inner).read(rest)

    return good


def squad(reading: Reading) -> list[Message]:
    """Return SQuAD's question below its paragraph, and the first of its answers."""
    answers = reading.value("answers")
    texts = answers.get("text") if isinstance(answers, Mapping) else answers
    texts = [texts] if isinstance(texts, str) and texts else texts
    first = texts[0] if isinstance(texts, list | tuple) and texts else None
    if first is None:
        raise ValueError("'answers' is empty: the paragraph does not answer the question; remove the row")
    first = first.get("text") if isinstance(first, Mapping) else first
    question = joined(reading.text("context"), reading.text("question"))
    return [Message("user", question), Message("assistant", valid_text(first, "answers.text.0"))]


def about_context(reading: Reading) -> list[Message]:
    """Return a question below the text that it is about, and its answer."""
    question = joined(reading.text_or_nothing("context"), reading.text("question"))
    return [Message("user", question), Message("assistant", reading.text("answer"))]


def calls(reading: Reading) -> list[Message]:
    """Return xLAM's question and the calls that answer it."""
    if (value := reading.list_in("answers")) in turns.EMPTY:
        raise ValueError("'answers' is empty: no call to train on; remove the row")
    fields = {"tool_calls": turns.calls_of(value, "'answers'")}
    return [Message("user", reading.text("query")), Message("assistant", "", fields=fields)]


def segments(_reading: Reading) -> list[Message]:
    """Refuse axolotl's input_output, which has text and no turns. Raises ValueError."""
    raise ValueError("axolotl's input_output: 'segments' are text without turns; write them as messages with weight 0")


def templated_text(reading: Reading) -> list[Message]:
    """Return the turns of a text that is written in a template. Raises ValueError where it is in none."""
    try:
        name, found = templated.split(reading.text("text"))
    except templated.Untemplated as fault:
        raise ValueError(f"{fault}; {columns_said(reading.record)}") from fault
    reading.notes.append(f"'text' is taken apart into turns: it is written as {name}")
    return [Message(*turn) for turn in found]


def verdict(value: Any) -> bool | None:
    """Return whether a value says true or false, also as 1 and 0 or as a cell of CSV has it; None for any other."""
    return {"true": True, "1": True, "false": False, "0": False}.get(str(value).strip().casefold())


MESSAGES = Dialect(
    "messages (OpenAI, TRL, axolotl's chat_template)",
    ("messages",),
    of_messages("messages"),
    "every assistant's turn and its end token, but for `weight` 0, and for `train`, `training` or `loss` false",
    "`mask`, `train_detail`, `train: true` on another's turn, calls without their answers, parts other than text",
)
PROMPT_RESPONSE = pair("prompt and response", "prompt", "response")
PAIRS = (
    ("prompt", "response"),
    ("question", "answer"),
    ("instruction", "output"),
    ("prompt", "completion"),
    ("input", "target"),
)
DIALECTS: tuple[Dialect, ...] = (
    Dialect(
        "preferences (TRL, LLaMA-Factory, UltraFeedback, hh-rlhf)",
        ("chosen", "rejected"),
        preference,
        "with `--chosen`: the chosen answer alone",
        "without `--chosen`",
    ),
    Dialect(
        "judged answers (TRL's unpaired preferences)",
        ("prompt", "completion", "label"),
        judged("label"),
        "with `--chosen`: the rows whose `label` is true",
        "without `--chosen`",
        lambda record: verdict(record["label"]) is not None,
        "`label` is true or false, or 1 or 0",
    ),
    Dialect(
        "judged answers (LLaMA-Factory's KTO)",
        ("kto_tag",),
        judged("kto_tag"),
        "with `--chosen`: the rows whose `kto_tag` is true",
        "without `--chosen`",
    ),
    MESSAGES,
    Dialect(
        "ShareGPT (LLaMA-Factory, Unsloth, axolotl)",
        ("conversations",),
        of_messages("conversations"),
        "every turn `from` gpt or function_call, not those from observation; a `system` column comes first",
        "a `system` column at odds with a first system turn",
    ),
    Dialect(
        "conversation (LMSYS, WildChat)",
        ("conversation",),
        of_messages("conversation"),
        "every assistant's turn",
        "as of messages",
    ),
    Dialect(
        "prompt and completion as messages (TRL)",
        ("prompt", "completion"),
        prompt_and_completion,
        "the completion's answers; those inside of the prompt get weight 0",
        "as of messages; `chat_template_kwargs`",
        lambda record: is_list(record["prompt"]) or is_list(record["completion"]),
        "one of them is a list",
    ),
    Dialect(
        "function calls (xLAM)",
        ("query", "answers", "tools"),
        calls,
        "the calls in `answers`; `query` asks",
        "no call in `answers`",
    ),
    Dialect(
        "input_output (axolotl)", ("segments",), segments, "nothing", "all: text without turns fits no chat template"
    ),
    PROMPT_RESPONSE,
    Dialect(
        "SQuAD",
        ("context", "question", "answers"),
        squad,
        "the first answer; the question is `context`, a blank line, `question`",
        "a question without an answer",
    ),
    Dialect(
        "question and answer about a text",
        ("context", "question", "answer"),
        about_context,
        "`answer`; the question is `context`, a blank line, `question`",
        fits=lambda record: isinstance(record["context"], str),
        told="`context` is a text",
    ),
    pair("question and answer", "question", "answer"),
    pair("Alpaca (LLaMA-Factory)", "instruction", "output", "input", ", and the answers of `history`"),
    pair("Dolly", "instruction", "response", "context"),
    pair("prompt and completion (TRL)", "prompt", "completion"),
    pair("input and target", "input", "target"),
    pair("OpenOrca", "question", "response", "", "; `system_prompt` comes first"),
    pair("query and response", "query", "response"),
    Dialect(
        "text in a template",
        ("text",),
        templated_text,
        "every assistant's turn; known: ChatML, Llama 3, Llama 2, Zephyr, Gemma, `### Instruction:`, `Human:`",
        "plain text, and words outside of turns",
    ),
)
