from __future__ import annotations

import json
from pathlib import Path
from types import SimpleNamespace

import pytest
import yaml
from hypothesis import given
from hypothesis import strategies as st

from common.data.rows import Message, Row, read_rows
from common.errors import DataError, MachineError, UsageError
from common.files import sha256_file
from tools.data import convert, markers

COMMIT = "0123456789abcdef0123456789abcdef01234567"


def text_file(folder: Path, name: str, content: str) -> Path:
    path = folder / name
    path.write_text(content, encoding="utf-8")
    return path


def converted(source: str | Path, folder: Path, format: str = "auto", **options) -> list[dict]:
    out = folder / "out.jsonl"
    convert.convert(source, out, format, options.pop("mapping", None), **options)
    read_rows(out)  # what is written can be read
    return [json.loads(line) for line in out.read_text(encoding="utf-8").splitlines()]


PAIR = {"prompt": "Why?", "response": "So."}


@pytest.mark.parametrize("delimiter", [",", ";", "\t"])
def test_csv_with_any_delimiter_keeps_texts_as_they_are(tmp_path, delimiter):
    lines = ["question,answer,id", '"Why, you?","He said ""so"".\nTwice.",007']
    content = "\n".join(line.replace(",", delimiter) if n == 0 else line for n, line in enumerate(lines))
    content = content.replace('","', f'"{delimiter}"').replace('",007', f'"{delimiter}007')
    [row] = converted(text_file(tmp_path, "a.csv", content), tmp_path)
    assert row == {"prompt": "Why, you?", "response": 'He said "so".\nTwice.', "id": "007"}


def test_csv_names_every_bad_line(tmp_path):
    source = text_file(tmp_path, "a.csv", 'prompt,response\na,b\nc\nd,e,f\ng,""\n')
    with pytest.raises(DataError) as error:
        converted(source, tmp_path)
    found = error.value.what
    assert "a.csv:3: not the 2 columns of the header (2 rows, then a.csv:4)" in found
    assert "a.csv:5: 'response' is empty" in found
    assert not (tmp_path / "out.jsonl").exists()


def test_csv_with_a_wrong_encoding_or_a_broken_quote(tmp_path):
    path = tmp_path / "a.csv"
    path.write_bytes(b"prompt,response\nok,ok\ncaf\xe9,ok\n")
    with pytest.raises(DataError, match="byte 0xe9 at byte offset 25") as error:
        converted(path, tmp_path)
    assert error.value.where == f"{path}:3"
    with pytest.raises(DataError, match="not CSV"):
        converted(text_file(tmp_path, "b.csv", 'prompt,response\n"a"x,b\n'), tmp_path)


def test_parquet(tmp_path):
    import pyarrow
    from pyarrow import parquet

    path = tmp_path / "a.parquet"
    parquet.write_table(pyarrow.table({"question": ["a", "b"], "answer": ["c", "d"], "n": [1, 2]}), path)
    assert converted(path, tmp_path)[1] == {"prompt": "b", "response": "d", "n": 2}


def test_a_file_that_is_no_parquet_or_holds_nulls(tmp_path):
    import pyarrow
    from pyarrow import parquet

    with pytest.raises(DataError, match="Parquet"):
        converted(text_file(tmp_path, "a.parquet", "no"), tmp_path)
    parquet.write_table(pyarrow.table({"prompt": ["a"], "response": [None]}), tmp_path / "b.parquet")
    with pytest.raises(DataError, match="row 1: 'response' is null"):
        converted(tmp_path / "b.parquet", tmp_path)


def test_alpaca_as_one_list_with_input_and_system(tmp_path):
    entries = [
        {"instruction": "Add.", "input": "1 2", "output": "3", "id": 1},
        {"instruction": "Say hi.", "input": "", "output": "Hi.", "system": ""},
        {"instruction": "Say hi.", "input": "", "output": "Ahoy.", "system": "Be a pirate."},
    ]
    rows = converted(text_file(tmp_path, "a.json", json.dumps(entries)), tmp_path)
    assert rows[0] == {"prompt": "Add.\n\n1 2", "response": "3", "id": 1}
    assert rows[1] == {"prompt": "Say hi.", "response": "Hi."}
    assert [turn["content"] for turn in rows[2]["messages"]] == ["Be a pirate.", "Say hi.", "Ahoy."]


def test_sharegpt(tmp_path):
    turns = [("system", "s"), ("human", "a"), ("gpt", "b")]
    entry = {"conversations": [{"from": who, "value": text} for who, text in turns], "id": "x"}
    [row] = converted(text_file(tmp_path, "a.jsonl", json.dumps(entry)), tmp_path)
    assert [(turn["role"], turn["content"]) for turn in row["messages"]] == [
        ("system", "s"),
        ("user", "a"),
        ("assistant", "b"),
    ]
    assert row["id"] == "x"


@pytest.mark.parametrize(
    ("entry", "reason"),
    [
        ({"conversations": [{"from": "gpt", "value": "b"}]}, "must alternate"),
        ({"conversations": [{"from": "bot", "value": "b"}]}, "role 'bot'"),
        ({"conversations": [{"from": "human"}]}, "message 1' is null"),
        ({"conversations": "text"}, "no list of conversations"),
    ],
)
def test_sharegpt_rows_that_are_none(tmp_path, entry, reason):
    source = text_file(tmp_path, "a.json", json.dumps([entry]))
    with pytest.raises(DataError, match=reason) as error:
        converted(source, tmp_path, "sharegpt")
    assert "entry 1" in error.value.what


def test_text_that_marks_questions_and_answers(tmp_path):
    content = "\nQ: Why?\nAnd how?\nA: So.\n\nA second paragraph.\n\nQuestion: Who?\nanswer: They.\n"
    rows = converted(text_file(tmp_path, "a.txt", content), tmp_path)
    assert rows == [
        {"prompt": "Why?\nAnd how?", "response": "So.\n\nA second paragraph."},
        {"prompt": "Who?", "response": "They."},
    ]


@pytest.mark.parametrize(
    ("content", "reason"),
    [
        ("Just prose.\n\nMore of it.\n", "nothing says what is a question"),
        ("Q: a\nQ: b\nA: c\n", ":1: a question without an answer"),
        ("Q: a\nA: b\nA: c\n", ":3: an answer without a question"),
        ("Title\nQ: a\nA: b\n", ":1: text before the first question"),
        ("Q: a\nA: b\nQ: c\n", ":3: a question without an answer"),
        ("Q:\nA: b\n", ":1: 'prompt' is empty"),
    ],
)
def test_text_that_would_have_to_be_guessed_is_refused(tmp_path, content, reason):
    with pytest.raises(DataError, match=reason):
        converted(text_file(tmp_path, "a.txt", content), tmp_path)


@pytest.mark.parametrize(
    ("record", "prompt", "response"),
    [
        ({"question": "q", "answer": "a"}, "q", "a"),
        ({"instruction": "i", "output": "o"}, "i", "o"),
        ({"instruction": "i", "input": "x", "output": "o"}, "i\n\nx", "o"),
        ({"instruction": "i", "input": "", "output": "o"}, "i", "o"),
        ({"prompt": "p", "completion": "c"}, "p", "c"),
        ({"input": "i", "target": "t"}, "i", "t"),
    ],
)
def test_well_known_columns_are_recognised(tmp_path, record, prompt, response):
    source = text_file(tmp_path, "a.jsonl", json.dumps(record))
    assert converted(source, tmp_path, "jsonl") == [{"prompt": prompt, "response": response}]


@pytest.mark.parametrize(
    ("record", "reason"),
    [
        ({"prompt": "a"}, r"prompt and response \(no 'response'\), .*; columns: prompt"),
        ({"text": "a", "label": 1}, "columns: text, label; name them with --map prompt=COLUMN"),
        ({"instruction": "i", "input": 3, "output": "o"}, "'input' is a number"),
    ],
)
def test_columns_that_are_not_there_are_named(tmp_path, record, reason):
    with pytest.raises(DataError, match=reason):
        converted(text_file(tmp_path, "a.jsonl", json.dumps(record)), tmp_path, "jsonl")


def test_what_was_read_is_pinned_beside_the_rows(tmp_path):
    source = text_file(tmp_path, "a.csv", "ask,say\na,b\n")
    converted(source, tmp_path, mapping={"prompt": "ask", "response": "say"})
    pins = yaml.safe_load((tmp_path / "out.jsonl.source.yaml").read_text())
    assert pins == {
        "format": 1,
        "source": "a.csv",
        "sha256": sha256_file(source),
        "read_as": "csv",
        "dialects": {"prompt and response": 1},
        "map": {"prompt": "ask", "response": "say"},
        "rows_sha256": sha256_file(tmp_path / "out.jsonl"),
    }


def test_the_rows_that_are_written_into_their_own_source_are_no_part_of_it(tmp_path, monkeypatch):
    source = tmp_path / "rows"
    source.mkdir()
    asked = text_file(source, "a.csv", "prompt,response\na,b\n")
    monkeypatch.chdir(tmp_path)
    convert.convert(source, Path("rows/out.jsonl"), "folder")
    pins = yaml.safe_load((source / "out.jsonl.source.yaml").read_text())
    assert pins["files"] == {"a.csv": sha256_file(asked)}


def test_a_file_in_the_place_of_the_pins_is_not_overwritten(tmp_path):
    mine = text_file(tmp_path, "out.jsonl.source.yaml", "my notes\n")
    with pytest.raises(UsageError, match="the output file exists"):
        converted(text_file(tmp_path, "a.csv", "prompt,response\na,b\n"), tmp_path)
    assert mine.read_text() == "my notes\n"
    assert not (tmp_path / "out.jsonl").exists()


def test_a_mapping_with_a_system_text(tmp_path):
    source = text_file(tmp_path, "a.jsonl", json.dumps({"Frage": "q", "reply": "a", "rules": "s", "n": 1}))
    [row] = converted(source, tmp_path, mapping={"prompt": "Frage", "response": "reply", "system": "rules"})
    assert [turn["content"] for turn in row["messages"]] == ["s", "q", "a"]
    assert row["n"] == 1


def test_a_mapping_to_nothing_known_or_from_nothing_there_is_refused(tmp_path):
    source = text_file(tmp_path, "a.jsonl", json.dumps(PAIR))
    with pytest.raises(UsageError, match="'promt'"):
        converted(source, tmp_path, mapping={"promt": "prompt"})
    with pytest.raises(UsageError, match=r"--map prompt=\.\.\. is there twice: ask, question"):
        convert.parse_map(["prompt=ask", "prompt=question"])
    with pytest.raises(DataError, match="no column 'question'; columns: prompt, response"):
        converted(source, tmp_path, mapping={"prompt": "question"})


def test_a_mapping_and_jsonl(tmp_path):
    source = text_file(tmp_path, "a.jsonl", '{"ask": "a", "say": "b", "n": 1}\n')
    assert converted(source, tmp_path, mapping={"prompt": "ask", "response": "say"}) == [
        {"prompt": "a", "response": "b", "n": 1}
    ]


def test_unknown_columns_are_listed_with_the_option(tmp_path):
    source = text_file(tmp_path, "a.csv", "ask,say\na,b\n")
    with pytest.raises(DataError, match="columns: ask, say; name them with --map prompt=COLUMN"):
        converted(source, tmp_path)


def test_an_existing_file_is_never_overwritten(tmp_path):
    source = text_file(tmp_path, "a.jsonl", json.dumps(PAIR))
    out = text_file(tmp_path, "out.jsonl", "mine")
    with pytest.raises(UsageError, match="exists"):
        convert.convert(source, out)
    with pytest.raises(UsageError, match="exists"):
        convert.convert(source, source)
    assert out.read_text() == "mine"


def test_bad_rows_may_be_left_out_and_are_listed(tmp_path):
    source = text_file(tmp_path, "a.jsonl", f"{json.dumps(PAIR)}\nno\n{json.dumps(PAIR)}\n")
    report = convert.convert(source, tmp_path / "out.jsonl", skip_bad=True)
    assert report.rows == 2
    assert [problem.where for problem in report.skipped] == [f"{source}:2"]
    assert f"{source}:2: not JSON" in "\n".join(report.lines())


def test_a_missing_source_folder_or_format(tmp_path):
    with pytest.raises(DataError, match="no such file"):
        convert.convert(tmp_path / "no.csv", tmp_path / "out.jsonl")
    source = text_file(tmp_path, "a.jsonl", json.dumps(PAIR))
    with pytest.raises(UsageError, match="no such folder"):
        convert.convert(source, tmp_path / "no" / "out.jsonl")
    with pytest.raises(UsageError, match="no format 'xml'; known: auto"):
        convert.convert(source, tmp_path / "out.jsonl", "xml")
    with pytest.raises(UsageError, match="only a hub: source"):
        convert.convert(source, tmp_path / "out.jsonl", revision=COMMIT)


# The Hub, with a local folder or a stand-in in its place.


def test_a_hub_data_set_needs_a_commit(tmp_path):
    for revision in (None, "main", COMMIT[:12]):
        with pytest.raises(UsageError, match="40 hex digits"):
            convert.convert("hub:someone/rows", tmp_path / "out.jsonl", revision=revision)


@pytest.fixture
def hub(tmp_path, monkeypatch):
    """`datasets.load_dataset`, its own code, pointed at a folder laid out as a Hub data set."""
    import datasets

    monkeypatch.setattr(datasets.config, "HF_DATASETS_CACHE", tmp_path / "cache")
    folder = tmp_path / "hub" / "rows"
    folder.mkdir(parents=True)
    asked: list[tuple] = []
    load = datasets.load_dataset

    def load_dataset(name, subset=None, *, revision=None, split=None):
        asked.append((name, subset, revision, split))
        return load(str(folder), subset, split=split, cache_dir=str(tmp_path / "cache"))

    monkeypatch.setattr(datasets, "load_dataset", load_dataset)
    return SimpleNamespace(folder=folder, asked=asked)


def test_a_hub_data_set_at_its_commit(tmp_path, hub):
    text_file(hub.folder, "train.jsonl", '{"question": "a", "answer": "b"}\n{"question": "c", "answer": "d"}\n')
    rows = converted("hub:someone/rows", tmp_path, revision=COMMIT)
    assert rows == [{"prompt": "a", "response": "b"}, {"prompt": "c", "response": "d"}]
    assert hub.asked == [("someone/rows", None, COMMIT, "train")]
    pins = yaml.safe_load((tmp_path / "out.jsonl.source.yaml").read_text())
    assert (pins["source"], pins["revision"], pins["split"]) == ("hub:someone/rows", COMMIT, "train")


def test_bad_rows_and_an_unknown_split_of_a_hub_data_set(tmp_path, hub):
    text_file(hub.folder, "train.jsonl", '{"prompt": "a", "response": ""}\n')
    with pytest.raises(DataError, match="train:1: 'response' is empty"):
        converted("hub:someone/rows", tmp_path, revision=COMMIT)
    with pytest.raises(DataError, match="Unknown split"):
        converted("hub:someone/rows", tmp_path, revision=COMMIT, split="nothing")


def test_no_network_is_an_error_of_the_machine(tmp_path, monkeypatch):
    import datasets

    def unreachable(*_args, **_options):
        raise ConnectionError("Couldn't reach the Hub")

    monkeypatch.setattr(datasets, "load_dataset", unreachable)
    with pytest.raises(MachineError, match="neither reachable nor in the cache"):
        converted("hub:someone/rows", tmp_path, revision=COMMIT)


def test_offline_and_not_cached_is_an_error_of_the_machine(tmp_path, monkeypatch):
    """The real `datasets`, told to stay offline."""
    import datasets
    import huggingface_hub

    monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_OFFLINE", True)
    monkeypatch.setattr(datasets.config, "HF_HUB_OFFLINE", True)
    monkeypatch.setattr(datasets.config, "HF_DATASETS_CACHE", tmp_path / "cache")
    with pytest.raises(MachineError):
        converted("hub:someone/rows-that-nobody-has", tmp_path, revision=COMMIT)


texts = st.text(st.characters(exclude_categories=["Cs"]), min_size=1).filter(lambda text: text.strip())


@given(st.lists(st.lists(st.tuples(texts, texts), min_size=1, max_size=3), min_size=1, max_size=4))
def test_what_is_written_is_read_back(tmp_path_factory, conversations):
    path = tmp_path_factory.mktemp("rows") / "out.jsonl"
    rows = [
        Row(
            tuple(Message(role, text) for turn in turns for role, text in zip(("user", "assistant"), turn, strict=True))
        )
        for turns in conversations
    ]
    convert.write_rows(path, rows)
    assert [row.messages for row in read_rows(path)] == [row.messages for row in rows]
    with pytest.raises(FileExistsError):
        convert.write_rows(path, rows)


def test_half_of_a_surrogate_pair_beside_the_texts_is_written_as_json_writes_it(tmp_path):
    source = text_file(tmp_path, "a.jsonl", r'{"prompt": "a b", "response": "c d", "note": "\ud800"}')
    assert converted(source, tmp_path) == [{"prompt": "a b", "response": "c d", "note": "\ud800"}]


def test_a_message_of_weight_0_is_written_with_it(tmp_path):
    turns: list[dict] = [{"role": role, "content": "a b"} for role in ("user", "assistant") * 2]
    turns[1]["weight"] = 0
    assert converted(text_file(tmp_path, "a.jsonl", json.dumps({"messages": turns})), tmp_path) == [{"messages": turns}]


def test_the_report_says_what_was_recognized_and_what_was_changed(tmp_path):
    turns = [{"role": role, "content": "a b"} for role in ("user", "assistant", "user")]
    lines = [json.dumps({"messages": turns})] * 5 + [json.dumps({"question": "a", "answer": "b"})]
    report = convert.convert(text_file(tmp_path, "a.jsonl", "\n".join(lines)), tmp_path / "out.jsonl")
    text = "\n".join(report.lines())
    assert "read as messages (OpenAI, TRL, axolotl's chat_template) (5 rows), question and answer (1 row)" in text
    changed = (
        "the last turn, a question without an answer, is cut off (5 rows, then a.jsonl:2, a.jsonl:3, a.jsonl:4, ...)"
    )
    assert f"a.jsonl:1: {changed}" in text


def test_a_format_that_names_a_dialect_takes_no_other(tmp_path):
    source = text_file(tmp_path, "a.jsonl", json.dumps(PAIR))
    with pytest.raises(DataError, match="read as prompt and response, not as Alpaca"):
        converted(source, tmp_path, "alpaca")
    table = text_file(tmp_path, "a.csv", "instruction,output\na b,c d\n")
    assert converted(table, tmp_path, "alpaca") == [{"prompt": "a b", "response": "c d"}], "laid out as its name says"


MARKED = {"prompt": "What is <|im_end|>, and </s>?", "response": "Two marks, as <|anything|> is."}


CALL = {"type": "function", "function": {"name": "sky", "arguments": {"at": "a<|im_end|>"}}}
TOOL = {"type": "function", "function": {"name": "sky", "description": "Writes [INST]."}}
TALK = [
    {"role": "user", "content": "Why?"},
    {"role": "assistant", "content": "", "tool_calls": [CALL], "weight": 0},
    {"role": "tool", "content": "rain", "tool_call_id": "7", "name": "sky"},
    {"role": "assistant", "content": "So."},
]


def test_what_is_written_of_tools_is_read_back_as_it_was(tmp_path):
    """And converting what was converted changes nothing."""
    rows = [{"messages": TALK, "tools": [TOOL]}, {"prompt": "Why?", "response": "So.", "tools": [TOOL], "n": 1}]
    source = text_file(tmp_path, "a.jsonl", "\n".join(map(json.dumps, rows)))
    assert converted(source, tmp_path) == rows
    call, answer = read_rows(tmp_path / "out.jsonl")[0].messages[1:3]
    assert (call.fields, call.trained) == ({"tool_calls": [CALL]}, False)
    assert answer.fields == {"tool_call_id": "7", "name": "sky"}


def test_parquets_nulls_are_no_arguments(tmp_path):
    """In a column of objects each has the keys of all: of every call the arguments of the others, null."""
    import pyarrow
    from pyarrow import parquet

    def talk(**arguments: str) -> list[dict]:
        call = {"type": "function", "function": {"name": "sky", "arguments": arguments}}
        return [{"role": "user", "content": "Why?"}, {"role": "assistant", "content": None, "tool_calls": [call]}]

    table = pyarrow.table({"messages": [talk(at="Paris"), talk(when="now")]})
    assert table.to_pylist()[0]["messages"][1]["tool_calls"][0]["function"]["arguments"] == {
        "at": "Paris",
        "when": None,
    }
    parquet.write_table(table, tmp_path / "a.parquet")
    found = [row["messages"][1]["tool_calls"][0]["function"] for row in converted(tmp_path / "a.parquet", tmp_path)]
    assert [one["arguments"] for one in found] == [{"at": "Paris"}, {"when": "now"}]


def test_markers_are_escaped_in_calls_and_tools_too(tmp_path):
    source = text_file(tmp_path, "a.jsonl", json.dumps({"messages": TALK, "tools": [TOOL]}))
    (row,) = converted(source, tmp_path, escape_markers=True)
    assert row["messages"][1]["tool_calls"][0]["function"]["arguments"] == {"at": "a< |im_end|>"}
    assert row["tools"][0]["function"]["description"] == "Writes [ INST]."
    assert row["messages"][2] == TALK[2]


def test_markers_are_escaped_when_that_is_asked_for(tmp_path):
    source = text_file(tmp_path, "a.jsonl", json.dumps(MARKED))
    assert converted(source, tmp_path, escape_markers=True) == [
        {"prompt": "What is < |im_end|>, and < /s>?", "response": "Two marks, as < |anything|> is."}
    ]
    assert markers.escaped("<|[INST]|>") == "< |[ INST]|>", "one inside of another"
