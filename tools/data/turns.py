"""The turns of a conversation as other tools write them, made into ours: roles, parts of a content, what is trained on.

What cannot be kept is refused by its name; what is changed on the way is noted, so that whoever reads the data says it.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from typing import Any

from common.data.rows import WORDS, Message, conversation, kind_of, valid_text

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
TOOL_ROLES = ("tool", "function", "function_call", "observation", "tool_call", "tool_response", "ipython")
NO_TOOLS = "the chat templates of the bases here write system, user and assistant alone, and would leave it out"
SWITCHES = ("train", "training", "loss")  # axolotl's message_field_training and its older name; ms-swift's
KNOWN = {"role", "from", "content", "value", "weight", *SWITCHES}


def messages_of(value: Sequence[Any], notes: list[str], trained: bool = True) -> list[Message]:
    """Return the messages of a list of {role, content} or {from, value}; they need not alternate yet.

    With `trained` False no answer among them is trained on. Appends to `notes` what is left out. Raises ValueError with
    the reason for what cannot be kept.
    """
    return [message_of(item, number, notes, trained) for number, item in enumerate(value, start=1)]


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
    if who in TOOL_ROLES:
        raise ValueError(f"{name}: role {who!r}: {NO_TOOLS}; remove the rows with tools")
    if not isinstance(who, str) or who not in ROLES:
        raise ValueError(f"{name}: role {who!r}; known: {', '.join(ROLES)}")
    if held := next((key for key in WORDS if item.get(key)), None):
        raise ValueError(f"{name} has {held!r}: {NO_TOOLS if 'call' in held else 'it would be left out'}")
    content = text_of(of_two(item, "content", "value", name), name)
    if left := sorted(str(key) for key, held in item.items() if key not in KNOWN and held not in (None, "", [], {})):
        notes.append(f"of a message role, content and weight are kept; left out: {', '.join(left)}")
    role = ROLES[who]
    return Message(role, content, is_trained(item, role, name) and (trained or role != "assistant"))


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
    if len(turns) > 1 and turns[-1].role == "user":
        notes.append("the last turn, a question without an answer, is cut off")
        del turns[-1]
    return conversation([record_of(turn) for turn in (*systems, *turns)])


def record_of(message: Message) -> dict[str, Any]:
    """Return a message as it is written in a row: role and content, and weight 0 where it is not trained on."""
    weight = {} if message.trained else {"weight": 0}
    return {"role": message.role, "content": message.content, **weight}


def history_of(value: Any) -> Iterable[Message]:
    """Yield the turns of LLaMA-Factory's `history`, a list of [question, answer]. Raises ValueError."""
    if not isinstance(value, list | tuple) or not all(isinstance(p, list | tuple) and len(p) == 2 for p in value):
        raise ValueError("'history' is no list of [question, answer]")
    for number, (question, answer) in enumerate(value, start=1):
        yield Message("user", valid_text(question, f"history {number}: question"))
        yield Message("assistant", valid_text(answer, f"history {number}: answer"))
