from __future__ import annotations

import json
import tracemalloc
from collections.abc import Sequence
from pathlib import Path

import pytest

from common.data.rows import (
    MESSAGE_KEYS,
    Message,
    Row,
    control_rows,
    group_hash,
    groups_of,
    hold_out,
    read_prompts,
    read_rows,
)
from common.errors import DataError


def said(rows: Sequence[Row]) -> list:
    return [(row.messages, row.extra, row.where, row.tools) for row in rows]


def file_of(folder: Path, *lines: object) -> Path:
    path = folder / "rows.jsonl"
    path.write_text("".join((line if isinstance(line, str) else json.dumps(line)) + "\n" for line in lines), "utf-8")
    return path


def pair(prompt: object = "Why?", response: object = "So.", **extra: object) -> dict:
    return {"prompt": prompt, "response": response, **extra}


def test_rows_keep_extra_keys_and_know_their_line(tmp_path):
    path = file_of(tmp_path, pair(topic="fox"), "", "   ", pair("How?", " Thus.\n"))
    first, second = read_rows(path)
    assert (first.prompt, first.messages[-1].content, first.extra) == ("Why?", "So.", {"topic": "fox"})
    assert (second.messages[-1].content, second.where) == (" Thus.\n", f"{path}:4")


def test_messages_with_a_system_turn(tmp_path):
    turns = [("system", "s"), ("user", "a"), ("assistant", "b"), ("user", "c"), ("assistant", "d")]
    path = file_of(tmp_path, {"messages": [{"role": r, "content": c, "name": "x"} for r, c in turns], "id": 3})
    [row] = read_rows(path)
    assert row.messages == tuple(Message(*turn) for turn in turns)
    assert (row.prompt, row.messages[-1].content, row.extra) == ("a", "d", {"id": 3})


@pytest.mark.parametrize(
    ("line", "reason"),
    [
        ("{not json", "not JSON"),
        ('{"prompt": "a"', "not JSON"),
        ("[1]", "a list, not an object"),
        ('"text"', "a str"),
        ({"prompt": "a"}, "no prompt and response, and no messages; columns: prompt; recipe data convert"),
        ({"question": "q", "answer": "a"}, "columns: question, answer; recipe data convert FILE OUT.jsonl"),
        (pair(response=""), "'response' is empty"),
        (pair(prompt=" \n\t "), "'prompt' is only white space"),
        (pair(response=3), "'response' is a number, not a string"),
        (pair(response=None), "'response' is null, not a string"),
        ('{"prompt": "a", "response": "b", "prompt": "c"}', "key 'prompt' twice"),
        ('{"prompt": "a", "response": "\\ud83d"}', "surrogate"),
        ({"messages": []}, "no messages"),
        ({"messages": [{"role": "user", "content": "a"}]}, "must alternate"),
        ({"messages": [{"role": "assistant", "content": "a"}]}, "must alternate"),
        ({"messages": [{"role": "tool", "content": "a"}]}, "tools answer behind the assistant's calls"),
        ({"messages": [{"role": "critic", "content": "a"}]}, "role 'critic'; known: system, user, assistant, tool"),
        ({"messages": [{"role": "user"}]}, "message 1 has no role and content"),
        ({"messages": [{"role": "system", "content": "a"}]}, "must alternate"),
        ({"messages": [{"role": "user", "content": "a"}, {"role": "assistant", "content": ""}]}, "message 2"),
    ],
)
def test_a_bad_line_is_named_with_its_number_and_reason(tmp_path, line, reason):
    path = file_of(tmp_path, pair(), line, pair())
    with pytest.raises(DataError) as error:
        read_rows(path)
    assert f"{path}:2: " in error.value.what
    assert reason in error.value.what
    assert error.value.what.startswith("1 row cannot")


def test_rows_with_one_fault_are_one_line_and_different_faults_a_line_each(tmp_path):
    path = file_of(tmp_path, *[pair(response="") if n % 2 else pair() for n in range(1, 81)], {"prompt": "a"})
    with pytest.raises(DataError) as error:
        read_rows(path)
    count, empty, other = error.value.what.splitlines()
    assert count == "41 rows cannot be used:"
    assert empty == f"  {path}:1: 'response' is empty (40 rows, then rows.jsonl:3, rows.jsonl:5, rows.jsonl:7, ...)"
    assert other.startswith(f"  {path}:81: no prompt and response")
    file_of(tmp_path, *[{f"column_{'x' * n}": 1} for n in range(30)])
    with pytest.raises(DataError) as error:
        read_rows(path)
    assert len(error.value.what.splitlines()) == 31


@pytest.mark.parametrize(
    ("record", "reason"),
    [
        (pair(system="Be kind."), "'system' would be left out"),
        (pair(history=[["a", "b"]]), "'history' would be left out"),
        (pair(chosen="a", rejected="b"), "'chosen' would be left out"),
    ],
)
def test_a_column_that_other_tools_read_as_part_of_the_conversation_is_refused(tmp_path, record, reason):
    with pytest.raises(DataError, match=reason):
        read_rows(file_of(tmp_path, record))


def talk(**of_the_answer: object) -> dict:
    return {"messages": [{"role": "user", "content": "a"}, {"role": "assistant", "content": "b", **of_the_answer}]}


def test_an_answer_of_weight_0_is_not_trained_on(tmp_path):
    turns = [*talk(weight=0)["messages"], *talk(weight=1)["messages"]]
    [row] = read_rows(file_of(tmp_path, {"messages": turns}))
    assert [turn.trained for turn in row.messages] == [True, False, True, True]
    for other in (0.5, 2, "0"):
        with pytest.raises(DataError, match=r"'weight' is .*; known: 0"):
            read_rows(file_of(tmp_path, talk(weight=other)))
    with pytest.raises(DataError, match="no answer is trained on"):
        read_rows(file_of(tmp_path, talk(weight=0)))


def test_a_user_of_weight_0_still_asks_the_prompt(tmp_path):
    turns = [{"role": "user", "content": "a", "weight": 0}, {"role": "assistant", "content": "b"}]
    [row] = read_rows(file_of(tmp_path, {"messages": turns}))
    assert (row.prompt, groups_of([row], None)) == ("a", ["a"])


@pytest.mark.parametrize("key", sorted(MESSAGE_KEYS))
def test_a_key_of_a_message_that_other_tools_give_a_meaning_is_refused(tmp_path, key):
    with pytest.raises(DataError, match=f"message 2 has '{key}'.*recipe data convert"):
        read_rows(file_of(tmp_path, talk(**{key: False})))


def test_a_wrong_encoding_names_line_and_byte_offset(tmp_path):
    path = tmp_path / "latin.jsonl"
    start = '{"prompt": "café", "response": "ok"}\n'.encode()
    path.write_bytes(start + '{"prompt": "café", "response": "ok"}\n'.encode("latin-1"))
    with pytest.raises(DataError) as error:
        read_rows(path)
    assert f":2: not UTF-8: byte 0xe9 at byte offset {len(start) + 15}" in error.value.what
    assert path.read_bytes()[len(start) + 15] == 0xE9


def test_utf16_is_recognised_and_a_utf8_mark_is_passed_over(tmp_path):
    path = tmp_path / "marked.jsonl"
    path.write_text(json.dumps(pair()) + "\n", encoding="utf-8-sig")
    assert len(read_rows(path)) == 1
    path.write_text(json.dumps(pair()) + "\n", encoding="utf-16")
    with pytest.raises(DataError, match="looks like UTF-16"):
        read_rows(path)


def test_windows_line_ends_and_unicode_line_separators_are_no_trouble(tmp_path):
    path = tmp_path / "rows.jsonl"
    path.write_bytes(
        '{"prompt": "a\u2028b",\r "response": "c\u0085d"}\r\n{"prompt": "e", "response": "f"}\r\n'.encode()
    )
    assert [row.prompt for row in read_rows(path)] == ["a\u2028b", "e"]


@pytest.mark.parametrize("content", ["", "\n\n", "  \n"])
def test_no_row_at_all_is_an_error(tmp_path, content):
    path = tmp_path / "empty.jsonl"
    path.write_text(content)
    with pytest.raises(DataError, match="no row"):
        read_rows(path)


def test_a_missing_file_is_an_error_of_the_data(tmp_path):
    with pytest.raises(DataError, match="No such file") as error:
        read_rows(tmp_path / "nowhere.jsonl")
    assert error.value.code == 3


def test_prompts_need_no_response(tmp_path):
    file_of(tmp_path, {"prompt": "a", "topic": "t"}, {"prompt": "b"})
    assert read_prompts("rows.jsonl", tmp_path) == ["a", "b"]
    assert read_prompts(["c"], tmp_path) == ["c"]
    file_of(tmp_path, {"prompt": " "}, {"text": "a"})
    with pytest.raises(DataError, match="2 rows cannot be used"):
        read_prompts("rows.jsonl", tmp_path)


# Splits and controls.


def topic_rows(topics: int, each: int = 3) -> list[Row]:
    return [
        Row(
            (Message("user", f"q{t}.{n}"), Message("assistant", f"answer {t} {n} end")),
            {"topic": f"t{t}"},
            f"f:{t}.{n}",
        )
        for t in range(topics)
        for n in range(each)
    ]


def names(rows: list[Row]) -> set[str]:
    return {row.where for row in rows}


def split_rows(rows: list[Row], share: float, by: str | None = None) -> dict[str, list[Row]]:
    groups = groups_of(rows, by)
    held_out = hold_out(groups, share)
    pairs = list(zip(rows, groups, strict=True))
    return {
        "train": [row for row, group in pairs if group not in held_out],
        "held_out": [row for row, group in pairs if group in held_out],
    }


def test_topics_are_held_out_whole_and_about_the_share(tmp_path):
    rows = topic_rows(300)
    parts = split_rows(rows, 0.1, "topic")
    held = {row.extra["topic"] for row in parts["held_out"]}
    assert held.isdisjoint(row.extra["topic"] for row in parts["train"])
    assert len(parts["train"]) + len(parts["held_out"]) == len(rows)
    assert 15 <= len(held) <= 45


def test_adding_rows_moves_none():
    before = split_rows(topic_rows(60), 0.1, "topic")
    after = split_rows([*topic_rows(90, each=4)], 0.1, "topic")
    assert names(before["held_out"]) <= names(after["held_out"])
    assert names(before["train"]) <= names(after["train"])


def test_without_a_key_the_prompt_decides_regardless_of_case_and_space():
    rows = [Row((Message("user", text), Message("assistant", "a")), {}, text) for text in ("Why  Me?", "why me?")]
    parts = split_rows([*rows, *topic_rows(20)], 0.5)
    assert len([row for row in parts["held_out"] if row in rows]) in (0, 2)


def test_a_small_set_still_holds_one_group_out_and_share_zero_none():
    for count in range(2, 8):
        parts = split_rows(topic_rows(count), 0.0001, "topic")
        assert len(parts["held_out"]) == 3
    assert split_rows(topic_rows(5), 0.0, "topic")["held_out"] == []


def test_rows_without_the_key_are_named():
    rows = [*topic_rows(2), Row((Message("user", "a"), Message("assistant", "b")), {}, "f:9")]
    with pytest.raises(DataError, match="f:9: no 'topic'"):
        split_rows(rows, 0.1, "topic")


def test_permuted_responses_keep_every_answer_and_give_each_to_another_row():
    rows = topic_rows(10)
    control = control_rows(rows, "permuted_responses")
    assert sorted(row.messages[-1].content for row in control) == sorted(row.messages[-1].content for row in rows)
    assert all(
        ours.messages[-1].content != theirs.messages[-1].content for ours, theirs in zip(control, rows, strict=True)
    )
    assert [row.prompt for row in control] == [row.prompt for row in rows]
    assert said(control) == said(control_rows(rows, "permuted_responses"))


def test_shuffled_words_keep_the_words_of_each_answer():
    text = "one two three four five six seven eight"
    rows = [Row((Message("user", "q"), Message("assistant", text)))] * 2
    first, second = control_rows(rows, "shuffled_words")
    assert sorted(first.messages[-1].content.split()) == sorted(text.split())
    assert text != first.messages[-1].content != second.messages[-1].content


def test_a_control_keeps_what_is_not_trained_on():
    rows = [Row((*topic_rows(1)[0].messages[:1], Message("assistant", f"a b {n}", n > 0))) for n in range(4)]
    for control in ("permuted_responses", "shuffled_words"):
        assert [row.messages[1].trained for row in control_rows(rows, control)] == [False, True, True, True]


def test_control_none_changes_nothing():
    assert said(control_rows(topic_rows(3), "none")) == said(topic_rows(3))


def test_who_is_held_out_is_told_by_the_hash_of_the_name_alone():
    names = [f"name {at % 40}" for at in range(100)]
    drawn = {name: group_hash(name) for name in names}
    for share in (0.0, 1e-9, 0.1, 0.5, 1.0):
        least = {min(drawn, key=lambda name: drawn[name])} if share else set()
        assert hold_out(iter(names), share) == {name for name in drawn if drawn[name] < share} | least
    assert hold_out([], 0.5) == set()


def test_rows_of_a_long_file_take_little_more_than_their_words(tmp_path):
    path = file_of(tmp_path, *[pair(f"What is number {at}?", f"It is {at}.") for at in range(5_000)])
    tracemalloc.start()
    rows = read_rows(path)
    peak = tracemalloc.get_traced_memory()[1]
    tracemalloc.stop()
    words = sum(len(row.words) for row in rows)
    # On a 64-bit CPython 3.11 a row is 80 bytes, the head of its words 33, its line number 7, its place in the list 9
    assert peak - words < 150 * len(rows)


def test_a_line_feed_alone_ends_a_line(tmp_path):
    path = tmp_path / "rows.jsonl"
    path.write_bytes('{"prompt": "a\u2028b",\r "response": "c\x85d"}\r\n\n{"prompt": "e", "response": "f"}'.encode())
    assert [(row.prompt, row.where) for row in read_rows(path)] == [("a\u2028b", f"{path}:1"), ("e", f"{path}:3")]


# Tools.


def call(**arguments: object) -> dict:
    return {"type": "function", "function": {"name": "sky", "arguments": arguments}}


TOOLS = [{"type": "function", "function": {"name": "sky", "description": "Look up."}}]
ASK = {"role": "user", "content": "Why?"}
CALL = {"role": "assistant", "content": "", "tool_calls": [call(at="Paris")]}
ANSWER = {"role": "tool", "content": "rain", "tool_call_id": "7", "name": "sky"}
SAY = {"role": "assistant", "content": "So."}


def test_tools_and_calls_to_them_are_kept_as_templates_take_them(tmp_path):
    (found,) = read_rows(file_of(tmp_path, {"messages": [ASK, CALL, ANSWER, SAY], "tools": TOOLS, "n": 1}))
    assert (found.tools, found.extra) == (TOOLS, {"n": 1})
    assert [turn.fields for turn in found.messages] == [
        None,
        {"tool_calls": CALL["tool_calls"]},
        {"tool_call_id": "7", "name": "sky"},
        None,
    ]
    (plain,) = read_rows(file_of(tmp_path, {"messages": [ASK, SAY], "tools": []}))
    assert not plain.tools
    assert not plain.extra


@pytest.mark.parametrize(
    "messages",
    [
        [ASK, CALL],
        [ASK, CALL, ANSWER, ANSWER, SAY],
        [ASK, CALL, ANSWER, {**CALL, "content": None}, {**ANSWER, "content": ""}, SAY, ASK, CALL],
    ],
)
def test_the_orders_that_turns_with_tools_may_have(tmp_path, messages):
    assert len(read_rows(file_of(tmp_path, {"messages": messages}))[0].messages) == len(messages)


@pytest.mark.parametrize(
    ("messages", "reason"),
    [
        ([ASK, CALL, SAY], "tools answer behind the assistant's calls"),
        ([ASK, SAY, ANSWER, SAY], "tools answer behind"),
        ([ASK, CALL, ANSWER], "the assistant last"),
        ([ASK, CALL, ASK, SAY], "must alternate"),
        ([ASK, CALL, ANSWER, ASK, SAY], "must alternate"),
        ([ASK, {**CALL, "role": "user"}, ANSWER, SAY], "must alternate"),
        ([ASK, {**CALL, "tool_calls": [{"function": {"name": "sky", "arguments": "{}"}}]}], "recipe data convert"),
        ([ASK, {**CALL, "tool_calls": "sky"}], "message 2: 'tool_calls' is no list of"),
        ([ASK, {**CALL, "tool_calls": [call(at="\ud83d")]}], "half of a surrogate pair"),
    ],
)
def test_calls_that_no_template_could_write_are_refused(tmp_path, messages, reason):
    with pytest.raises(DataError, match=reason):
        read_rows(file_of(tmp_path, {"messages": messages}))


def test_tools_that_are_none_are_refused(tmp_path):
    for odd in ("sky", [{"name": "sky"}], [{"function": {"description": "Look up."}}]):
        with pytest.raises(DataError, match=r"'tools' is no list of \{'function': \{name\}\}; recipe data convert"):
            read_rows(file_of(tmp_path, {"messages": [ASK, SAY], "tools": odd}))


def test_a_control_does_not_leave_calls_in_place(tmp_path):
    rows = read_rows(file_of(tmp_path, {"messages": [ASK, CALL, ANSWER, SAY]}))
    assert control_rows(rows, "none") == rows
    with pytest.raises(DataError, match="leaves tool calls in place"):
        control_rows(rows, "permuted_responses")


@pytest.mark.parametrize(
    "where",
    [
        "",
        "rows.jsonl:7",
        "a:b/rows.jsonl:12",
        "f:007",
        "f:-1",
        "f:9999999999999999",
        "f:99999999999999",
        "f:٣",
        "f:",
        ":3",
        "row 5",
        "sheet, row 9",
    ],
)
def test_a_row_gives_back_what_it_was_made_of(where):
    turns = (
        Message("system", "Be \x00 brief."),
        Message("user", "Wh\u00ffy\n?"),
        Message("assistant", "日本 🦊", trained=False),
        Message("user", "-"),
        Message("assistant", "So."),
    )
    row = Row(turns, {"topic": "fox"}, where)
    assert (row.messages, row.extra, row.where) == (turns, {"topic": "fox"}, where)
    assert row.prompt == "Wh\u00ffy\n?"
    called = row.but(messages=(*turns[:-1], Message("assistant", "", fields={"tool_calls": []})), tools=[{}])
    assert (called.messages[-1].fields, called.tools, called.extra, called.where) == (
        {"tool_calls": []},
        [{}],
        row.extra,
        where,
    )
    assert called.messages[:-1] == turns[:-1]
