"""The turns of a conversation as other tools write them, made into ours: roles, parts, tool calls, what is trained on.

What cannot be kept is refused by its name; what is changed on the way is noted, so that whoever reads the data says it.
"""

from __future__ import annotations

import itertools
import json
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import replace
from typing import Any, NoReturn, TypeGuard

from common.data.rows import WORDS, Message, Row, conversation, kind_of, unique_keys, valid_text

ROLES = {
    "human": "user",  # ShareGPT
    "user": "user",
    "prompter": "user",  # OpenAssistant
    "gpt": "assistant",  # ShareGPT
    "assistant": "assistant",
    "model": "assistant",  # Gemma
    "system": "system",
    "developer": "system",  # OpenAI's name for it since its reasoning models
}
# Whose content is a call, or a list of calls, as JSON: LLaMA-Factory's name for it and ms-swift's.
CALLERS = ("function_call", "tool_call")
# Who answers a call: OpenAI's names, LLaMA-Factory's, ms-swift's and Llama 3.1's.
ANSWERERS = ("tool", "function", "observation", "tool_response", "ipython")
SWITCHES = ("train", "training", "loss")  # axolotl's message_field_training and its older name; ms-swift's
KNOWN = {"role", "from", "content", "value", "weight", *SWITCHES}
OF_A_MESSAGE = ("weight", *SWITCHES, "mask", "train_detail", "mask_history")  # what says how a message is trained on
LEFT_OUT = "the chat templates of the bases here do not write it, and it would be left out"
FUNCTIONS = "chat templates write functions alone"
# What a column or a key says that has nothing to say; LLaMA-Factory's tools are JSON.
EMPTY: tuple[Any, ...] = (None, "", "[]", [], {})


def messages_of(value: Sequence[Any], notes: list[str], trained: bool = True) -> list[Message]:
    """Return the messages of a list of {role, content} or {from, value}; they need not alternate yet.

    With `trained` False no answer among them is trained on. Appends to `notes` what is left out. Raises ValueError with
    the reason for what cannot be kept.
    """
    found: list[Message] = []
    before = None
    for number, item in enumerate(value, start=1):
        message = message_of(item, number, notes, trained)
        who = of_two(item, "role", "from", f"message {number}")
        if found and who in CALLERS and before in CALLERS:  # ms-swift: calls at once are turns one after another
            both = [call for turn in (found.pop(), message) for call in (turn.fields or {})["tool_calls"]]
            message = replace(message, fields={"tool_calls": both})
        found.append(message)
        before = who
    return found


def after_system(system: str, found: list[Message]) -> list[Message]:
    """Return a conversation with a column's system text before it. Raises ValueError where it has another one."""
    if not (found and found[0].role == "system"):
        return [Message("system", system), *found]
    if found[0].content.strip() != system.strip():
        raise ValueError("a system text in a column and another one as the first message: remove one")
    return found


def message_of(item: Any, number: int, notes: list[str], trained: bool = True) -> Message:
    """Return message `number` of a conversation. Raises ValueError with the reason for what cannot be kept."""
    name = f"message {number}"
    if not isinstance(item, Mapping):
        raise ValueError(f"{name} is {kind_of(item)}, not an object")
    who = of_two(item, "role", "from", name)
    if not isinstance(who, str) or who not in (*ROLES, *CALLERS, *ANSWERERS):
        raise ValueError(f"{name}: role {who!r}; known: {', '.join((*ROLES, *CALLERS, *ANSWERERS))}")
    role = "assistant" if who in CALLERS else "tool" if who in ANSWERERS else ROLES[who]
    read = {"assistant": ("tool_calls", "function_call"), "tool": ("tool_call_id", "name")}.get(role, ())
    if held := next((key for key in ("tool_calls", *WORDS) if item.get(key) and key not in read), None):
        raise ValueError(f"{name} has {held!r}: {f'the {role} calls no tools' if 'call' in held else LEFT_OUT}")
    left = sorted(str(key) for key, held in item.items() if key not in {*KNOWN, *read} and held not in EMPTY)
    if left:
        notes.append(f"of a message role, content, weight and tool calls are kept; left out: {', '.join(left)}")
    content = of_two(item, "content", "value", name)
    fields = fields_of(item, role, content if who in CALLERS else None, name)
    if role == "tool" and not (content is None or isinstance(content, str) or is_parts(content)):
        notes.append("a tool's answer that is no text is written as JSON")
        content = json.dumps(content, ensure_ascii=False)
    # A call needs no words beside it, and a tool may answer with none.
    nothing = content in EMPTY or (isinstance(content, str) and not content.strip())
    silent = who in CALLERS or (nothing and (fields or role == "tool"))
    text = "" if silent else text_of(content, name)
    return Message(role, text, is_trained(item, role, name) and (trained or role != "assistant"), fields)


def is_parts(value: Any) -> bool:
    """Return whether a value is a content of parts, {"type": ...} each."""
    return isinstance(value, list) and bool(value) and all(isinstance(one, Mapping) and "type" in one for one in value)


def fields_of(item: Mapping[str, Any], role: str, said: Any, name: str) -> dict[str, Any] | None:
    """Return what templates read of a message beside role and content: its tool calls, or which call a tool answers.

    `said` is a content that is itself calls. None where there is nothing. Raises ValueError with the reason.
    """
    if role == "tool":
        return {key: item[key] for key in ("tool_call_id", "name") if item.get(key)} or None
    calls = [value for value in (said, item.get("tool_calls"), item.get("function_call")) if value not in EMPTY]
    if len(calls) > 1:
        raise ValueError(f"{name} has its calls twice: keep 'tool_calls' alone")
    return {"tool_calls": calls_of(calls[0], name)} if calls and role == "assistant" else None


def calls_of(value: Any, name: str) -> list[dict[str, Any]]:
    """Return calls as templates take them, of one call or a list, perhaps as JSON; arguments are an object then.

    A call is {"function": {"name", "arguments"}} or {"name", "arguments"}. Raises ValueError for what is none.
    """
    found = []
    value = from_json(value, f"{name}: a call")
    for entry in value if isinstance(value, list | tuple) else [value]:
        if isinstance(entry, Mapping) and entry.get("type") not in (None, "function"):
            raise ValueError(f"{name} has a call of type {entry['type']!r}: {FUNCTIONS}")
        function = entry.get("function", entry) if isinstance(entry, Mapping) else None
        if not is_named(function):
            raise ValueError(f"{name} has a call without the name of a function")
        arguments = from_json(function.get("arguments", function.get("parameters")), f"{name}: a call's arguments")
        arguments = {} if arguments in EMPTY else arguments
        if not isinstance(arguments, Mapping):
            raise ValueError(f"{name}: a call's arguments are {kind_of(arguments)}, not an object")
        id = {"id": entry["id"]} if entry.get("id") else {}
        found.append({**id, "type": "function", "function": {"name": function["name"], "arguments": dict(arguments)}})
    return found


def is_named(function: Any) -> TypeGuard[Mapping[str, Any]]:
    """Return whether a value is a function or a call to one: an object with a name."""
    name = function.get("name") if isinstance(function, Mapping) else None
    return isinstance(name, str) and bool(name.strip())


def tools_of(value: Any, name: str, notes: list[str]) -> list[Mapping[str, Any]]:
    """Return a row's tools as OpenAI describes them, also of a list of bare functions, as its older format has them.

    Appends to `notes` what is changed. Raises ValueError with the reason for what cannot be kept.
    """
    found: list[Mapping[str, Any]] = []
    for item in value if isinstance(value, list | tuple) else [None]:
        entry = item if isinstance(item, Mapping) else {}
        function = entry.get("function", entry)
        if "function" in entry and entry.get("type", "function") != "function":
            raise ValueError(f"{name!r} has a tool of type {entry['type']!r}: {FUNCTIONS}")
        if not is_named(function):
            raise ValueError(f"{name!r} is no list of functions, each with its name")
        if function is entry:
            notes.append(f"a function in {name!r} is written as {{'type': 'function', 'function': ...}}")
        found.append({"type": "function", "function": function} if function is entry else entry)
    return found


def no_number(constant: str) -> NoReturn:
    """Refuse NaN and the infinities, which JSON has not. Raises ValueError."""
    raise ValueError(f"{constant} is no number of JSON")


def from_json(value: Any, name: str) -> Any:
    """Return what a text says as JSON, and any other value as it is. Raises ValueError where it is no JSON."""
    if not isinstance(value, str) or not value.strip():
        return value
    try:
        return json.loads(value, object_pairs_hook=unique_keys, parse_constant=no_number)
    except (ValueError, RecursionError) as fault:
        raise ValueError(f"{name} is not JSON: {fault}") from fault


def of_two(item: Mapping[str, Any], one: str, other: str, name: str) -> Any:
    """Return the value of whichever of two keys a message has. Raises ValueError where both are there and differ."""
    first, second = item.get(one), item.get(other)
    if first is not None and second is not None and first != second:
        raise ValueError(f"{name} has {one!r} and {other!r}, and they differ; remove one")
    return second if first is None else first


def text_of(value: Any, name: str) -> str:
    """Return a message's text: itself, or its text parts one after the other. Raises ValueError for other parts."""
    if not isinstance(value, list):
        return valid_text(value, name)
    kinds = [str(part.get("type")) if isinstance(part, Mapping) else kind_of(part) for part in value]
    if other := next((kind for kind in kinds if kind not in ("text", "input_text", "output_text")), None):
        raise ValueError(f"{name} has a part of type {other!r}; only text can be trained on")
    parts = [part.get("text") for part in value]
    if not all(isinstance(part, str) for part in parts):
        raise ValueError(f"{name} has a text part without a text")
    return valid_text("".join(parts), name)


def is_trained(item: Mapping[str, Any], role: str, name: str) -> bool:
    """Return whether a message is trained on by its own keys, True where it has none.

    OpenAI's `weight` is 0 or 1; axolotl's `train` (once `training`) and ms-swift's `loss` are true or false. Raises
    ValueError for other values, for keys at odds, and for keys whose meaning cannot be kept.
    """
    if item.get("train_detail"):
        raise ValueError(f"{name} has 'train_detail': parts of a message cannot be left out of the loss; use weight")
    if item.get("mask") is not None:
        raise ValueError(f"{name} has 'mask', which means either to one tool or another; write weight 0 or 1")
    said = {key: item[key] for key in ("weight", *SWITCHES) if item.get(key) is not None}
    for key, value in said.items():
        if value not in (0, 1):
            raise ValueError(
                f"{name}: {key!r} is {value!r}; known: {'0 and 1' if key == 'weight' else 'true and false'}"
            )
    if len({bool(value) for value in said.values()}) > 1:
        raise ValueError(f"{name}: {' and '.join(map(repr, said))} contradict each other")
    if role == "assistant":
        return all(said.values())
    if wanted := next((key for key in SWITCHES if said.get(key)), None):
        raise ValueError(f"{name}: {wanted!r} asks to train on what the {role} says; only answers are trained on")
    return True


def settled(messages: Sequence[Message], notes: list[str]) -> tuple[Message, ...]:
    """Return a conversation as training takes it: system texts joined, an answer first and a question last cut off.

    Appends to `notes` what was changed. Raises ValueError for what still is no conversation.
    """
    spoken = next((at for at, turn in enumerate(messages) if turn.role != "system"), len(messages))
    systems, turns = list(messages[:spoken]), list(messages[spoken:])
    if any(turn.role == "system" for turn in turns):
        raise ValueError("a system message after the first turn: the templates here write it first alone; move it")
    if len(systems) > 1:
        notes.append("system messages are joined, with a blank line between them")
        systems = [Message("system", "\n\n".join(turn.content for turn in systems))]
    if len(turns) > 1 and turns[0].role == "assistant":
        notes.append("the first turn, an answer to nothing, is cut off")
        del turns[0]
    while len(turns) > 1 and turns[-1].role == "tool":
        notes.append("a tool's answer at the end, which no answer follows, is cut off")
        del turns[-1]
    if len(turns) > 1 and turns[-1].role == "user":
        notes.append("the last turn, a question without an answer, is cut off")
        del turns[-1]
    return conversation([record_of(turn) for turn in (*systems, *in_order(turns, notes))])


def in_order(turns: Sequence[Message], notes: list[str]) -> list[Message]:
    """Return turns with the answers of tools in the order of the calls: many templates write no id, but the order.

    Raises ValueError where ids of calls and of answers to them do not match.
    """
    found: list[Message] = []
    for at, turn in enumerate(turns):
        if turn.role == "tool" and found and found[-1].role == "tool":
            continue  # it was taken with the one before
        answers = list(itertools.takewhile(lambda one: one.role == "tool", turns[at:]))
        calls = (found[-1].fields or {}).get("tool_calls", ()) if found else ()
        ids = [str(call.get("id") or "") for call in calls]  # a number to one tool is a text to another
        said = [str((answer.fields or {}).get("tool_call_id") or "") for answer in answers]
        if answers and all(ids) and all(said):
            if sorted(ids) != sorted(said):
                raise ValueError("a tool's answer has a 'tool_call_id' of no call before it, or a call has no answer")
            if ids != said:
                notes.append("the answers of tools are put in the order of the calls")
            answers.sort(key=lambda answer: ids.index(str((answer.fields or {})["tool_call_id"])))
        found += answers or [turn]
    return found


def record_of(message: Message) -> dict[str, Any]:
    """Return a message as it is written in a row: role, content, calls, and weight 0 where it is not trained on."""
    weight = {} if message.trained else {"weight": 0}
    return {"role": message.role, "content": message.content, **(message.fields or {}), **weight}


def words_of(message: Message) -> str:
    """Return all that a message says: its content, and below it each tool call as JSON."""
    calls = (message.fields or {}).get("tool_calls", ())
    said = [json.dumps(call["function"], ensure_ascii=False) for call in calls]
    return "\n".join([*([message.content] if message.content else []), *said]) if said else message.content


def answer_of(row: Row) -> str:
    """Return what the assistant says last, as `words_of` has it."""
    return words_of(row.messages[-1])


def history_of(value: Any) -> Iterable[Message]:
    """Yield the turns of LLaMA-Factory's `history`, a list of [question, answer]. Raises ValueError."""
    if not isinstance(value, list | tuple) or not all(isinstance(p, list | tuple) and len(p) == 2 for p in value):
        raise ValueError("'history' is no list of [question, answer]")
    for number, (question, answer) in enumerate(value, start=1):
        yield Message("user", valid_text(question, f"history {number}: question"))
        yield Message("assistant", valid_text(answer, f"history {number}: answer"))
