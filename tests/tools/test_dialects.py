"""What other tools write in their rows, and what is made of it: the rules are the named tools' own."""

from __future__ import annotations

import json
from typing import Any

import pytest

from common.data.chat import ChatTokenizer
from common.data.rows import MESSAGE_KEYS, ROW_KEYS, WORDS, Problem, grouped
from tests.support.encoded import encode_row
from tests.support.tool_templates import write_tool_base
from tools.data import dialects, turns


def read(record: dict[str, Any], *, chosen: bool = False, **mapping: str) -> dialects.Read:
    return dialects.read(record, mapping, "f:1", chosen=chosen)


def turns_of(record: dict[str, Any], *, chosen: bool = False, **mapping: str) -> list[tuple[str, str]]:
    """The turns of a row as (role, words), the role with a 0 where its words are not trained on."""
    row = read(record, chosen=chosen, **mapping).row
    assert row is not None
    return [(turn.role if turn.trained else f"{turn.role} 0", turn.content) for turn in row.messages]


def talk(*pairs: tuple[str, Any], **of_the_last: object) -> list[dict[str, Any]]:
    found: list[dict[str, Any]] = [{"role": role, "content": content} for role, content in pairs]
    return [*found[:-1], {**found[-1], **of_the_last}]


def a_call(at: str) -> dict[str, Any]:
    return {"type": "function", "function": {"name": "sky", "arguments": {"at": at}}}


ASKED, SAID = ("user", "Why?"), ("assistant", "So.")
TWICE = (ASKED, SAID, ("user", "How?"))


# What was trained on, or left out, without a word.


@pytest.mark.parametrize("key", ["weight", "train", "training", "loss"])
def test_a_message_that_its_tool_does_not_train_on_is_not_trained_on(key):
    """OpenAI's weight, axolotl's train, ms-swift's loss."""
    record = {"messages": talk(*TWICE, ("assistant", "Thus."))}
    record["messages"][1][key] = 0 if key == "weight" else False
    assert turns_of(record) == [ASKED, ("assistant 0", "So."), ("user", "How?"), ("assistant", "Thus.")]
    record["messages"][1][key] = 1 if key == "weight" else True
    assert turns_of(record)[1] == SAID
    record["messages"][1][key] = "no"
    with pytest.raises(ValueError, match=f"message 2: '{key}' is 'no'"):
        read(record)


@pytest.mark.parametrize(
    ("held", "reason"),
    [
        ({"train_detail": [{"begin_offset": 0, "end_offset": 1, "train": False}]}, "'train_detail'"),
        ({"mask": True}, "'mask'"),
        ({"weight": 0, "train": True}, "'weight' and 'train' contradict"),
        ({"reasoning_content": "Hm."}, "'reasoning_content'"),
        ({"refusal": "No."}, "'refusal'"),
    ],
)
def test_a_key_of_a_message_that_cannot_be_kept_is_refused(held, reason):
    with pytest.raises(ValueError, match=reason):
        read({"messages": talk(ASKED, SAID, **held)})
    empty: dict[str, Any] = dict.fromkeys(held)
    assert turns_of({"messages": talk(ASKED, SAID, **empty)}) == [ASKED, SAID], "a column of Parquet is null elsewhere"


def test_every_key_that_training_leaves_to_convert_is_known_to_it():
    assert {*WORDS, *turns.SWITCHES, "mask", "train_detail"} == MESSAGE_KEYS
    assert {*dialects.UNWRITTEN, *dialects.SYSTEM, "functions", "history", "chosen", "rejected"} == ROW_KEYS


def test_training_on_what_the_user_says_is_refused():
    messages = talk(ASKED, SAID)
    messages[0]["train"] = True
    with pytest.raises(ValueError, match="message 1: 'train' asks to train on what the user says"):
        read({"messages": messages})


def test_other_keys_of_a_message_are_said():
    found = read({"messages": talk(ASKED, SAID, name="Ada", id=None)})
    assert found.notes == ["of a message role, content, weight and tool calls are kept; left out: name"]


def test_llama_factorys_history_comes_first_and_its_answers_are_trained_on():
    record = {
        "instruction": "And 3?",
        "input": "",
        "output": "6.",
        "system": "Double.",
        "history": [["1?", "2."], ["2?", "4."]],
    }
    said = [("user", "1?"), ("assistant", "2."), ("user", "2?"), ("assistant", "4.")]
    assert turns_of(record) == [("system", "Double."), *said, ("user", "And 3?"), ("assistant", "6.")]
    assert turns_of({**record, "history": [], "system": ""}) == [("user", "And 3?"), ("assistant", "6.")]
    with pytest.raises(ValueError, match="'history' is no list of"):
        read({**record, "history": ["1?", "2."]})
    cell = {**record, "history": json.dumps(record["history"])}
    assert turns_of(cell) == turns_of(record), "as a CSV file has it"


@pytest.mark.parametrize("column", ["image", "images", "chat_template_kwargs"])
def test_a_column_that_no_template_here_writes_is_refused_unless_it_is_empty(column):
    pair = {"prompt": "Why?", "response": "So."}
    for empty in turns.EMPTY:
        assert turns_of({**pair, column: empty}) == [ASKED, SAID]
    with pytest.raises(ValueError, match=f"'{column}' is not empty"):
        read({**pair, column: [{"name": "f"}]})


def test_a_mapped_name_wins_and_the_column_called_so_is_kept_under_another_name():
    found = read({"prompt": "theirs", "ask": "Why?", "say": "So.", "n": 1}, prompt="ask", response="say")
    assert found.row is not None
    assert (found.row.prompt, found.row.messages[-1].content) == ("Why?", "So.")
    assert found.row.extra == {"column_prompt": "theirs", "n": 1}
    assert found.notes == ["the column 'prompt' is kept beside the row as 'column_prompt'"]
    taken = {"prompt": "theirs", "column_prompt": "too", "ask": "Why?", "say": "So."}
    row = read(taken, prompt="ask", response="say").row
    assert row is not None
    assert row.extra == {"column_column_prompt": "theirs", "column_prompt": "too"}


def test_a_mapped_name_that_the_row_has_no_use_for_is_refused():
    """It would be left out, and the column with it."""
    record = {"messages": talk(ASKED, SAID), "say": "Thus."}
    with pytest.raises(ValueError, match=r"--map response=\.\.\. is of no use to a row that is read as messages"):
        read(record, response="say")
    with pytest.raises(ValueError, match=r"--map prompt=\.\.\. is of no use"):
        read({"turns": talk(ASKED, SAID), "ask": "How?"}, messages="turns", prompt="ask")
    labelled = {"prompt": "Why?", "completion": "So.", "label": 0}
    assert turns_of(labelled, prompt="prompt", response="completion") == [ASKED, SAID], "a label that judges nothing"


def test_a_system_text_in_a_column_is_used_and_not_twice():
    assert turns_of({"prompt": "Why?", "response": "So.", "system": "Be kind."})[0] == ("system", "Be kind.")
    mine = {"messages": talk(("system", "Be kind."), ASKED, SAID), "system": "Be kind."}
    assert turns_of(mine) == [("system", "Be kind."), ASKED, SAID]
    with pytest.raises(ValueError, match="a system text in a column and another one"):
        read({**mine, "system": "Be brief."})


# What each dialect makes.

TO_TURNS: list[tuple[str, dict[str, Any], list[tuple[str, str]]]] = [
    ("messages", {"messages": talk(("developer", "s"), ASKED, SAID)}, [("system", "s"), ASKED, SAID]),
    ("messages", {"messages": json.dumps(talk(ASKED, SAID))}, [ASKED, SAID]),
    (
        "messages",
        {"messages": talk(("user", [{"type": "text", "text": "Wh"}, {"type": "text", "text": "y?"}]), SAID)},
        [ASKED, SAID],
    ),
    (
        "ShareGPT",
        {"conversations": [{"from": "human", "value": "Why?"}, {"from": "gpt", "value": "So."}], "system": "s"},
        [("system", "s"), ASKED, SAID],
    ),
    ("conversation", {"conversation": talk(ASKED, SAID)}, [ASKED, SAID]),
    (
        "prompt and completion as messages",
        {"prompt": json.dumps(talk(ASKED), indent=1), "completion": f" {json.dumps(talk(SAID))}"},
        [ASKED, SAID],
    ),
    (
        "prompt and completion as messages",
        {"prompt": talk(*TWICE), "completion": talk(("assistant", "Thus."))},
        [ASKED, ("assistant 0", "So."), ("user", "How?"), ("assistant", "Thus.")],
    ),
    ("prompt and completion (TRL)", {"prompt": "Why?", "completion": "So."}, [ASKED, SAID]),
    ("Alpaca", {"instruction": "Add.", "input": "1 2", "output": "3"}, [("user", "Add.\n\n1 2"), ("assistant", "3")]),
    ("Alpaca", {"instruction": "", "input": "Why?", "output": "So."}, [ASKED, SAID]),
    ("Dolly", {"instruction": "Who?", "context": "c", "response": "r"}, [("user", "Who?\n\nc"), ("assistant", "r")]),
    ("Dolly", {"instruction": "Why?", "context": "", "response": "So.", "category": "qa"}, [ASKED, SAID]),
    (
        "SQuAD",
        {"context": "c", "question": "q", "answers": {"text": ["a", "b"], "answer_start": [0, 1]}},
        [("user", "c\n\nq"), ("assistant", "a")],
    ),
    ("SQuAD", {"context": "c", "question": "q", "answers": "a"}, [("user", "c\n\nq"), ("assistant", "a")]),
    (
        "question and answer about",
        {"context": "c", "question": "q", "answer": "a"},
        [("user", "c\n\nq"), ("assistant", "a")],
    ),
    ("question and answer", {"context": {"c": 1}, "question": "Why?", "answer": "So."}, [ASKED, SAID]),
    (
        "OpenOrca",
        {"system_prompt": "s", "question": "Why?", "response": "So."},
        [("system", "s"), ASKED, SAID],
    ),
    ("query", {"query": "Why?", "response": "So."}, [ASKED, SAID]),
]


@pytest.mark.parametrize(("name", "record", "expected"), TO_TURNS)
def test_the_turns_of_a_dialect(name, record, expected):
    assert turns_of(record) == expected
    assert read(record).dialect.startswith(name)


# Tools: every dialect's calls become the same turns.

OPENAI_CALL = {"id": "1", "type": "function", "function": {"name": "sky", "arguments": '{"at": "a"}'}}
BARE = {"name": "sky", "description": "Look up.", "parameters": {"type": "object", "properties": {}}}
WRAPPED = {"type": "function", "function": BARE}
WITH_TOOLS: list[tuple[str, dict[str, Any]]] = [
    (
        "messages",
        {
            "messages": [
                *talk(ASKED),
                {"role": "assistant", "content": None, "tool_calls": [OPENAI_CALL]},
                {"role": "tool", "tool_call_id": "1", "content": "rain"},
                *talk(SAID),
            ],
            "tools": [WRAPPED],
            "parallel_tool_calls": False,
        },
    ),
    (
        "messages",
        {
            "messages": [
                *talk(ASKED),
                {"role": "assistant", "function_call": {"name": "sky", "arguments": '{"at": "a"}'}},
                {"role": "function", "name": "sky", "content": "rain"},
                *talk(SAID),
            ],
            "functions": [BARE],
        },
    ),
    (
        "messages",
        {
            "messages": [
                *talk(ASKED, ("tool_call", json.dumps({"name": "sky", "arguments": {"at": "a"}}))),
                *talk(("tool_response", "rain"), SAID),
            ],
            "tools": json.dumps([WRAPPED]),
        },
    ),
    (
        "ShareGPT",
        {
            "conversations": [
                {"from": "human", "value": "Why?"},
                {"from": "function_call", "value": '{"name": "sky", "arguments": {"at": "a"}}'},
                {"from": "observation", "value": "rain"},
                {"from": "gpt", "value": "So."},
            ],
            "tools": json.dumps([BARE]),
        },
    ),
    (
        "prompt and completion as messages",
        {
            "prompt": talk(ASKED),
            "completion": [
                {"role": "assistant", "content": "", "tool_calls": [a_call("a")]},
                *talk(("ipython", "rain"), SAID),
            ],
            "tools": [WRAPPED],
        },
    ),
]


@pytest.mark.parametrize(("name", "record"), WITH_TOOLS)
def test_the_tool_calls_of_a_dialect(name, record):
    found = read(record)
    assert found.row is not None
    assert found.dialect.startswith(name)
    assert [(turn.role, turn.content) for turn in found.row.messages] == [
        ASKED,
        ("assistant", ""),
        ("tool", "rain"),
        SAID,
    ]
    fields = found.row.messages[1].fields
    assert fields is not None
    assert [call["function"] for call in fields["tool_calls"]] == [a_call("a")["function"]]
    assert found.row.tools == [WRAPPED]
    assert not {"tools", "functions", "column_tools", "column_functions"} & set(found.row.extra)


def test_xlams_answers_are_calls():
    found = read(
        {"query": "Why?", "tools": json.dumps([BARE]), "answers": '[{"name": "sky", "arguments": {"at": "a"}}]'}
    )
    assert found.row is not None
    assert found.dialect == "function calls (xLAM)"
    assert found.row.messages[-1].fields == {"tool_calls": [a_call("a")]}
    assert found.notes == ["a function in 'tools' is written as {'type': 'function', 'function': ...}"]
    with pytest.raises(ValueError, match="'answers' is empty: no call"):
        read({"query": "Why?", "tools": json.dumps([BARE]), "answers": "[]"})


def test_calls_at_once_are_one_turn_and_answers_come_in_their_order():
    def answered(*ids: str) -> dict[str, Any]:
        calls = [{**OPENAI_CALL, "id": id} for id in ("1", "2")]
        said = [{"role": "tool", "tool_call_id": id, "content": f"to {id}"} for id in ids]
        return {"messages": [*talk(ASKED), {"role": "assistant", "tool_calls": calls}, *said, *talk(SAID)]}

    for order in ("12", "21"):
        assert turns_of(answered(*order))[2:4] == [("tool", "to 1"), ("tool", "to 2")]
    assert read(answered("1", "2")).notes == []
    assert read(answered("2", "1")).notes == ["the answers of tools are put in the order of the calls"]
    numbered = answered("2", "1")
    numbered["messages"][1]["tool_calls"] = [{**OPENAI_CALL, "id": id} for id in (1, 2)]
    assert turns_of(numbered)[2:4] == [("tool", "to 1"), ("tool", "to 2")], "a number is the id that is its text"
    for odd in ("1", "13", "11", "123"):
        with pytest.raises(ValueError, match="'tool_call_id' of no call before it, or a call has no answer"):
            read(answered(*odd))
    one = json.dumps({"name": "sky", "arguments": {}})
    row = read({"messages": talk(ASKED, ("tool_call", one), ("tool_call", one), ("tool", "rain"), SAID)}).row
    assert row is not None
    assert [len((turn.fields or {}).get("tool_calls", ())) for turn in row.messages] == [0, 2, 0, 0]


@pytest.mark.parametrize(
    ("held", "reason"),
    [
        ({"tool_calls": [{"id": "1"}]}, "message 2 has a call without the name of a function"),
        ({"tool_calls": [{"type": "custom", "custom": {"name": "sky"}}]}, "a call of type 'custom'"),
        ({"tool_calls": [{"function": {"name": "sky", "arguments": "{at: a}"}}]}, "arguments is not JSON"),
        ({"tool_calls": [{"function": {"name": "sky", "arguments": "[1]"}}]}, "arguments are a list, not an object"),
        ({"tool_calls": [OPENAI_CALL], "function_call": BARE}, "has its calls twice"),
        ({"tool_calls": "sky"}, "a call is not JSON"),
        ({"tool_calls": [{"function": {"name": "sky", "arguments": '{"at": NaN}'}}]}, "NaN is no number of JSON"),
    ],
)
def test_calls_that_say_no_function_are_refused(held, reason):
    with pytest.raises(ValueError, match=reason):
        read({"messages": talk(ASKED, SAID, **held)})
    with pytest.raises(ValueError, match="the user calls no tools"):
        read({"messages": [{**talk(ASKED)[0], **held}, *talk(SAID)]})


@pytest.mark.parametrize(
    ("tools", "reason"),
    [
        ("sky", "'tools' is no list of functions"),
        ([{"type": "web_search"}], "'tools' is no list of functions"),
        ([{"type": "custom", "function": BARE}], "'tools' has a tool of type 'custom'"),
        ([{"type": "function", "function": {"description": "Look up."}}], "each with its name"),
    ],
)
def test_tools_that_say_no_function_are_refused(tools, reason):
    with pytest.raises(ValueError, match=reason):
        read({"prompt": "Why?", "response": "So.", "tools": tools})


def test_the_same_tool_in_both_columns_is_one():
    row = read({"prompt": "Why?", "response": "So.", "tools": [WRAPPED], "functions": [BARE]}).row
    assert row is not None
    assert row.tools == [WRAPPED]


@pytest.mark.parametrize("said", [7, ["rain"], True])
def test_what_a_tool_answers_may_be_any_json(said):
    messages = [*talk(ASKED), {"role": "assistant", "content": " ", "tool_calls": [a_call("a")]}]
    assert turns_of({"messages": [*messages, *talk(("tool", said), SAID)]})[2] == ("tool", json.dumps(said))


@pytest.mark.parametrize("column", ["weight", "train", "loss", "mask"])
def test_a_column_that_would_keep_a_message_out_of_the_loss_is_said_to_mean_nothing(column):
    found = read({"prompt": "Why?", "response": "So.", column: 0})
    assert found.notes == [
        f"the column {column!r} is kept beside the row: of a message it would say how it is trained on"
    ]


def test_a_column_of_tools_may_have_another_name():
    row = read({"ask": "Why?", "say": "So.", "apis": [WRAPPED]}, prompt="ask", response="say", tools="apis").row
    assert row is not None
    assert (row.tools, row.extra) == ([WRAPPED], {})


@pytest.mark.parametrize(
    ("messages", "expected", "note"),
    [
        (
            [*talk(ASKED), {"role": "assistant", "tool_calls": [a_call("a")]}, *talk(("tool", "rain"))],
            [ASKED, ("assistant", "")],
            "a tool's answer at the end, which no answer follows, is cut off",
        ),
        (
            [*talk(ASKED), {"role": "assistant", "tool_calls": [a_call("a")]}, *talk(("tool", {"sky": 1}), SAID)],
            [ASKED, ("assistant", ""), ("tool", '{"sky": 1}'), SAID],
            "a tool's answer that is no text is written as JSON",
        ),
        (talk(ASKED, SAID, ("user", "How?")), [ASKED, SAID], "the last turn, a question without an answer, is cut off"),
        (talk(("assistant", "Hi."), ASKED, SAID), [ASKED, SAID], "the first turn, an answer to nothing, is cut off"),
        (
            talk(("system", "a"), ("developer", "b"), ASKED, SAID),
            [("system", "a\n\nb"), ASKED, SAID],
            "system messages are joined, with a blank line between them",
        ),
    ],
)
def test_what_is_changed_is_said(messages, expected, note):
    assert turns_of({"messages": messages}) == expected
    assert read({"messages": messages}).notes == [note]


@pytest.mark.parametrize(
    ("record", "reason"),
    [
        ({"messages": talk(ASKED, ("tool", "7"), SAID)}, "must alternate.*; tools answer behind the assistant's calls"),
        ({"messages": talk(ASKED, SAID, ("system", "s"), *TWICE[2:], SAID)}, "a system message after the first turn"),
        ({"messages": talk(ASKED, ("assistant", [{"type": "image_url"}]))}, "a part of type 'image_url'"),
        ({"messages": talk(ASKED, ASKED, SAID)}, "must alternate"),
        ({"messages": [None]}, "message 1 is null, not an object"),
        ({"messages": {}}, "'messages' is an object"),
        ({"messages": "Why?"}, "'messages' is a string"),
        ({"messages": [{"role": ["user"], "content": "Why?"}]}, r"role \['user'\]; known"),
        ({"messages": talk(ASKED, SAID, value="No.")}, "message 2 has 'content' and 'value', and they differ"),
        ({"messages": talk(ASKED, ("assistant", [{"text": "So.", "image_url": "a.png"}]))}, "a part of type 'None'"),
        ({"messages": str(talk(ASKED, SAID))}, r"'messages' begins as a list and is not JSON: .* json.dumps\(\) is"),
        ({"prompt": str(talk(ASKED)), "completion": "So."}, "'prompt' begins as a list and is not JSON"),
        ({"conversations": "[" * 100_000}, "'conversations' begins as a list and is not JSON"),
        ({"prompt": "p", "response": "r", "kto_tag": "maybe"}, "'kto_tag' is neither true nor false"),
        ({"segments": [{"label": True, "text": "a"}]}, "axolotl's input_output"),
        ({"context": "c", "question": "q", "answers": {"text": []}}, "'answers' is empty"),
        ({"chosen": "a", "rejected": "b", "prompt": "p"}, "--chosen"),
        *(
            ({"prompt": "p", "completion": "c", "label": said}, "'label' says whether an answer is good")
            for said in (False, 0, 1, "True", "false")
        ),
        ({"messages": talk(ASKED, SAID), "kto_tag": "False"}, "'kto_tag' says whether an answer is good"),
    ],
)
def test_what_cannot_be_kept_is_refused(record, reason):
    with pytest.raises(ValueError, match=reason):
        read(record)


@pytest.mark.parametrize(
    "record",
    [
        {"prompt": "Why?", "chosen": "So.", "rejected": "No."},
        {"prompt": talk(ASKED), "chosen": talk(SAID), "rejected": talk(("assistant", "No."))},
        {"prompt": "Why?", "chosen": talk(ASKED, SAID), "rejected": talk(ASKED, ("assistant", "No."))},
        {"chosen": "\n\nHuman: Why?\n\nAssistant: So.", "rejected": "\n\nHuman: Why?\n\nAssistant: No."},
        {"instruction": "Why?", "input": "", "chosen": "So.", "rejected": "No."},
        {
            "conversations": [{"from": "human", "value": "Why?"}],
            "chosen": {"from": "gpt", "value": "So."},
            "rejected": {"from": "gpt", "value": "No."},
        },
        {"question": "Why?", "chosen": "So.", "rejected": "No."},
        {"prompt": "Why?", "completion": "So.", "label": True},
        {"prompt": "Why?", "completion": "So.", "label": "True"},
        {"prompt": "Why?", "completion": "So.", "label": 1},
        {"instruction": "Why?", "output": "So.", "kto_tag": True},
    ],
)
def test_the_chosen_answer_is_trained_on_when_that_is_asked_for(record):
    assert turns_of(record, chosen=True) == [ASKED, SAID]
    row = read(record, chosen=True).row
    assert row is not None
    assert not {"rejected", "chosen", "column_prompt"} & set(row.extra)


@pytest.mark.parametrize("label", [False, 0, "False"])
def test_an_answer_that_was_judged_bad_is_left_out_and_that_is_said(label):
    found = read({"prompt": "Why?", "completion": "No.", "label": label}, chosen=True)
    assert (found.row, found.notes) == (None, ["rows whose 'label' is false are left out"])


def test_a_place_inside_of_a_column_by_its_path():
    record = {"q": "Why?", "answers": {"text": ["So.", "Thus."]}, "a.b": "Dot."}
    assert turns_of(record, prompt="q", response="answers.text.1") == [ASKED, ("assistant", "Thus.")]
    assert turns_of(record, prompt="q", response="a.b") == [ASKED, ("assistant", "Dot.")]
    with pytest.raises(ValueError, match=r"nothing at 'answers.text.2': no '2' in 'answers.text'"):
        read(record, prompt="q", response="answers.text.2")


def test_the_nearest_two_are_named_with_what_is_missing():
    with pytest.raises(ValueError, match=r"the nearest: Alpaca .*\(no 'output'\), Dolly \(no 'response'\)"):
        read({"instruction": "Add.", "n": 1})
    with pytest.raises(ValueError, match=r"the nearest: question and answer \(no 'question' and no 'answer'\)"):
        read({"Questions": "Why?", "Answers": "So."})
    with pytest.raises(ValueError, match=r"the nearest: prompt and response \(.*\), messages .*\(no 'messages'\)"):
        read({"a": "Why?", "b": "So."})


# Texts that are written in a template.

ALPACA = "Below is an instruction that describes a task. Write a response that appropriately completes the request."


@pytest.mark.parametrize(
    ("name", "text"),
    [
        ("ChatML", "<|im_start|>user\nWhy?<|im_end|>\n<|im_start|>assistant\nSo.<|im_end|>\n"),
        ("Zephyr", "<|user|>\nWhy?</s>\n<|assistant|>\nSo.</s>\n"),
        ("Llama 2", "<s>[INST] Why? [/INST] So. </s>"),
        (
            "Llama 3",
            "<|start_header_id|>{}<|end_header_id|>\n\nWhy?<|eot_id|><|start_header_id|>{}<|end_header_id|>\n\nSo.<|eot_id|>",
        ),
        ("Gemma", "<bos><start_of_turn>user\nWhy?<end_of_turn>\n<start_of_turn>model\nSo.<end_of_turn>\n"),
        (
            "### headings",
            f"{ALPACA}\n\n### Instruction:\nWhy?\n\n### Response:\nSo.",
        ),
        ("### headings", "<s>### Human: Why?### Assistant: So.</s>"),
        ("### headings", "### Human: Why?\n### Assistant: So."),
        ("Human and Assistant", "\n\nHuman: Why?\n\nAssistant: So."),
    ],
)
def test_a_text_in_a_template_is_taken_apart(name, text):
    text = text.format("user", "assistant")
    assert turns_of({"text": text}) == [ASKED, SAID]
    assert read({"text": text}).notes == [f"'text' is taken apart into turns: it is written as {name}"]


@pytest.mark.parametrize(
    ("text", "reason"),
    [
        ("Once upon a time.", "in no template that is known .*columns: text"),
        ("<|im_start|>user\nWhy?<|im_end|>\n<|im_start|>assistant\nSo.", "words outside of its turns"),
        ("<|im_start|>user\nWhy?<|im_end|><|im_start|>assistant\nSo.<|im_start|>user\nHow?<|im_end|>", "words outside"),
        ("[INST] Why? [INST] How? [/INST] Thus.", "words outside"),
        ("<|im_start|>tool\n7<|im_end|>", "a turn of 'tool'"),
        ("### Instruction:\na\n### Response:\nb\n### Input:\nc", "the headings Instruction, Response, Input"),
    ],
)
def test_a_text_that_would_lose_words_is_refused(text, reason):
    with pytest.raises(ValueError, match=reason):
        read({"text": text})


def test_texts_that_lose_different_words_are_one_fault():
    def fault(words: str) -> Problem:
        with pytest.raises(ValueError, match="words outside") as raised:
            read({"text": f"<|im_start|>user\nWhy?<|im_end|> {words}"})
        return Problem("f:1", str(raised.value))

    assert len(grouped(map(fault, ("one", "it's two", 'so "three"')))) == 1
    assert len(grouped([Problem("f:1", "role 'a'; known: b"), Problem("f:2", "role 'c'; known: b")])) == 2


def test_a_system_text_and_an_input_of_a_template_are_kept():
    llama = "[INST] <<SYS>>\nBe kind.\n<</SYS>>\n\nWhy? [/INST] So. </s><s>[INST] How? [/INST] Thus. </s>"
    expected = [("system", "Be kind."), ASKED, SAID, ("user", "How?"), ("assistant", "Thus.")]
    assert turns_of({"text": llama}) == expected
    mistral = "<s>[INST] Why? [/INST] So. [INST] How? [/INST] Thus."
    assert turns_of({"text": mistral}) == [ASKED, SAID, ("user", "How?"), ("assistant", "Thus.")]
    own = f"{ALPACA} Be kind.\n\n### Instruction:\n<s>Why</s>?\n\n### Response:\nSo."
    assert turns_of({"text": own}) == [("system", f"{ALPACA} Be kind."), ("user", "Why</s>?"), SAID]
    alpaca = "### Instruction:\nAdd.\n\n### Input:\n1 2\n\n### Response:\n3</s>"
    assert turns_of({"text": alpaca}) == [("user", "Add.\n\n1 2"), ("assistant", "3")]


# Beside TRL 1.16.0: what its SFTTrainer makes of these rows with this tokenizer and template, by its collator. An id
# with a minus has the label -100 there: it is not trained on.
TRL: dict[str, tuple[dict[str, Any], str]] = {
    "prompt and completion as messages": (
        {"prompt": talk(*TWICE), "completion": talk(("assistant", "Thus."))},
        (
            "-3 -204 -309 -94 -36 -2 -204 -4 -204 -56 -84 -19 -2 -204 -3 -204 -45 -84 -92 -36 -2 -204 -4 -204 "
            "308 90 88 19 2 204"
        ),
    ),
    "one question": (
        {"prompt": talk(ASKED), "completion": talk(SAID)},
        "-3 -204 -309 -94 -36 -2 -204 -4 -204 56 84 19 2 204",
    ),
}


TRL_WITH_TOOLS = (
    "-5 -204 -57 -84 -84 -81 -88 -31 -204 -96 -7 -89 -94 -290 -7 -31 -226 -7 -75 -90 -83 -72 -89 -331 -7 -17 -226 -7 "
    "-75 -90 -83 -72 -89 -331 -7 -31 -226 -96 -7 -83 -312 -74 -7 -31 -226 -7 -88 -80 -94 -7 -98 -98 -2 -204 -3 -204 "
    "-309 -94 -36 -2 -204 -4 -204 33 72 311 81 35 88 80 94 226 96 7 276 7 31 226 7 70 7 98 33 20 72 311 81 35 33 72 "
    "311 81 35 88 80 94 226 96 7 276 7 31 226 7 71 7 98 33 20 72 311 81 35 2 -204 -33 -97 -344 -84 -81 -97 -35 -204 "
    "-72 -2 -204 -33 -97 -344 -84 -81 -97 -35 -204 -73 -2 -204 -4 -204 56 84 19 2 -204 -3 -204 -45 -84 -92 -36 -2 "
    "-204 -4 -204 45 82 19 33 72 311 81 35 88 80 94 226 96 7 276 7 31 226 7 74 7 98 33 20 72 311 81 35 2 -204 -33 -97 "
    "-344 -84 -81 -97 -35 -204 -75 -2 -204 -4 -204 308 90 88 19 2 -204"
)


@pytest.mark.parametrize("name", TRL)
def test_the_tokens_are_those_of_trl_and_the_labels_but_for_the_line_break_behind_the_end(tiny_base, name):
    record, theirs = TRL[name][0], [int(id) for id in TRL[name][1].split()]
    row = read(record).row
    assert row is not None
    encoded = encode_row(ChatTokenizer.load(tiny_base), row)
    assert encoded.ids.tolist() == [abs(id) for id in theirs]
    assert encoded.mask.tolist() == [*(int(id > 0) for id in theirs[:-1]), 0]


def test_tool_calls_have_the_tokens_and_labels_of_trl(tmp_path):
    """With `assistant_only_loss`, by this template's marks of what the assistant generates."""
    called = {"role": "assistant", "content": "", "tool_calls": [a_call("a"), a_call("b")]}
    messages = [*talk(ASKED), called, *talk(("tool", "c"), ("tool", "d"), SAID, ("user", "How?"))]
    messages += [{"role": "assistant", "content": "Hm.", "tool_calls": [a_call("e")]}, *talk(("tool", "f"))]
    messages += talk(("assistant", "Thus."))
    row = read({"messages": messages, "tools": json.dumps([{"type": "function", "function": {"name": "sky"}}])}).row
    assert row is not None
    encoded = encode_row(ChatTokenizer.load(write_tool_base(tmp_path / "b")), row)
    theirs = [int(id) for id in TRL_WITH_TOOLS.split()]
    assert encoded.ids.tolist() == [abs(id) for id in theirs]
    assert encoded.mask.tolist() == [int(id > 0) for id in theirs]


def test_trl_has_the_tokens_of_messages_too_and_trains_on_all_of_them(tiny_base):
    row = read({"messages": talk(("system", "Be kind."), *TWICE, ("assistant", "Thus."))}).row
    assert row is not None
    encoded = encode_row(ChatTokenizer.load(tiny_base), row)
    behind_system = TRL["prompt and completion as messages"][1].replace("-", "").split()
    trl = [5, 204, 39, 74, 226, 80, 266, 73, 19, 2, 204, *map(int, behind_system)]
    assert encoded.ids.tolist() == trl
    assert [id for id, trained in zip(trl, encoded.mask, strict=True) if trained] == [56, 84, 19, 2, 308, 90, 88, 19, 2]
