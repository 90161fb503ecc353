"""What files of rows look like: packed, in UTF-16, laid out in other ways, saved by `datasets`, in a folder."""

from __future__ import annotations

import gzip
import json
import tracemalloc
from pathlib import Path

import pyarrow
import pytest
from pyarrow import parquet

from common.data.rows import Problem
from common.errors import DataError, UsageError
from tools.data import convert, files

ROWS = [{"prompt": f"Why {n}?", "response": f"So, é {n}."} for n in range(3)]
LINES = "".join(json.dumps(row, ensure_ascii=False) + "\n" for row in ROWS)
TABLE = "prompt,response\n" + "".join(f'{row["prompt"]},"{row["response"]}"\n' for row in ROWS)


def read(path: Path, split: str = "train") -> list[object]:
    return [record for _, record in files.records(path, files.kind_of_file(path), split)]


def written(folder: Path, name: str, data: bytes) -> Path:
    path = folder / name
    if name.endswith(".gz"):
        data = gzip.compress(data)
    if name.endswith(".zst"):
        with pyarrow.OSFile(str(path), "wb") as raw, pyarrow.CompressedOutputStream(raw, "zstd") as stream:
            stream.write(data)
    else:
        path.write_bytes(data)
    return path


@pytest.mark.parametrize("packed", ["", ".gz", ".zst"])
@pytest.mark.parametrize("encoding", ["utf-8", "utf-8-sig", "utf-16"])
@pytest.mark.parametrize(
    ("name", "text"),
    [
        ("a.jsonl", LINES),
        ("a.json", json.dumps(ROWS, indent=1)),
        ("a.csv", TABLE),
        ("a.txt", "".join(f"Q: {row['prompt']}\nA: {row['response']}\n" for row in ROWS)),
    ],
)
def test_every_format_packed_and_in_every_encoding(tmp_path, name, text, encoding, packed):
    assert read(written(tmp_path, name + packed, text.encode(encoding))) == ROWS


@pytest.mark.parametrize(
    "text",
    [
        "\n".join(json.dumps(row, indent=2) for row in ROWS),
        "".join(json.dumps(row) for row in ROWS),
        " ".join(json.dumps(row) for row in ROWS) + "\n\n",
    ],
)
def test_json_objects_one_after_another_in_any_layout(tmp_path, text):
    path = written(tmp_path, "a.json", text.encode())
    assert read(path) == ROWS
    assert next(files.records(path, "jsonl"))[0] == f"{path}: object 1"


def test_a_broken_line_is_named_and_the_others_are_read(tmp_path):
    path = written(tmp_path, "a.jsonl", f"no\n{LINES}".encode())
    first, *others = files.records(path, "jsonl")
    assert isinstance(first[1], Problem)
    assert first[0] == f"{path}:1"
    assert [record for _, record in others] == ROWS


def test_a_key_twice_in_an_entry_of_a_list_is_refused(tmp_path):
    with pytest.raises(DataError, match="key 'prompt' twice"):
        read(written(tmp_path, "a.json", b'[{"prompt": "a", "prompt": "b", "response": "c"}]'))


@pytest.mark.parametrize("name", ["a.jsonl.gz", "a.csv.zst"])
def test_a_file_that_is_not_packed_as_its_name_says(tmp_path, name):
    path = tmp_path / name
    path.write_bytes(LINES.encode())
    with pytest.raises(DataError, match="cannot read the file"):
        read(path)
    path.write_bytes(written(tmp_path, f"whole.{name}", LINES.encode() * 99).read_bytes()[:-9])
    with pytest.raises(DataError, match="cannot read the file"):
        read(path)


@pytest.mark.parametrize("text", ["[" * 100_000, '{"a":' * 100_000], ids=["lists", "objects"])
def test_json_that_is_nested_without_end_is_one_message(tmp_path, text):
    with pytest.raises(DataError, match="nested too deeply"):
        convert.convert(written(tmp_path, "a.json", text.encode()), tmp_path / "out.jsonl")


@pytest.mark.parametrize("name", ["a.jsonl.gz", "a.jsonl.zst"])
def test_a_packed_file_that_swells_is_given_up(tmp_path, monkeypatch, name):
    monkeypatch.setattr(files, "room", lambda: 40_000_000)
    path = written(tmp_path, name, b" " * 100_000_000)
    tracemalloc.start()
    with pytest.raises(DataError, match=r"unpacks to more than 0\.0 GB, a quarter of this machine's memory"):
        read(path)
    peak = tracemalloc.get_traced_memory()[1]
    tracemalloc.stop()
    assert peak < 90_000_000
    assert read(written(tmp_path, f"less.{name}", LINES.encode())) == ROWS


def test_a_table_that_swells_is_given_up(tmp_path, monkeypatch):
    path = tmp_path / "rows.parquet"
    table = pyarrow.table({"prompt": ["the same text " * 100] * 4000, "response": ["yes"] * 4000})
    parquet.write_table(table, path)
    assert path.stat().st_size < 20_000
    assert len(list(files.records(path, "parquet"))) == 4000
    monkeypatch.setattr(files, "room", lambda: 1 << 20)
    with pytest.raises(DataError, match=r"unpacks to more than 0\.0 GB"):
        list(files.records(path, "parquet"))


def test_a_cell_of_a_table_may_be_long(tmp_path):
    answer = "word " * 40_000
    path = written(tmp_path, "a.csv", f"prompt,response\nWhy?,{answer}\n".encode())
    assert read(path) == [{"prompt": "Why?", "response": answer}]


def test_a_marked_text_keeps_the_characters_that_are_line_ends_elsewhere(tmp_path):
    path = written(tmp_path, "a.txt", "Q: Wh\u2028y?\r\nA: S\x0bo.\rMore.\n".encode())
    assert read(path) == [{"prompt": "Wh\u2028y?", "response": "S\x0bo.\nMore."}]


@pytest.mark.parametrize(("name", "content"), [("dataset_dict.json", "[]"), ("dataset_info.json", "[1]")])
def test_a_saved_folder_with_other_json_in_it_is_one_message(tmp_path, name, content):
    if name == "dataset_info.json":
        (tmp_path / "state.json").write_text("{}")
    (tmp_path / name).write_text(content)
    with pytest.raises(DataError, match="not readable as Arrow"):
        read(tmp_path)


def test_a_folder_that_datasets_saved(tmp_path):
    import datasets

    table = datasets.Dataset.from_list(ROWS)
    table.save_to_disk(str(tmp_path / "one"))
    datasets.DatasetDict({"train": table, "test": table.select([2])}).save_to_disk(str(tmp_path / "two"))
    assert read(tmp_path / "one") == ROWS
    assert read(tmp_path / "two") == ROWS
    assert read(tmp_path / "two", "test") == ROWS[2:]
    with pytest.raises(UsageError, match="no split 'dev'") as error:
        read(tmp_path / "two", "dev")
    assert "--split train or test" in str(error.value.todo)
    assert read(next((tmp_path / "one").glob("*.arrow"))) == ROWS


def test_a_folder_of_files_in_the_order_of_their_names(tmp_path):
    folder = tmp_path / "rows"
    (folder / "b").mkdir(parents=True)
    written(folder, "a.jsonl.gz", LINES.encode())
    written(folder / "b", "c.csv", TABLE.encode())
    (folder / "README.md").write_text("# Rows\n\nLicense: CC0\n")
    (folder / ".cache" / "huggingface").mkdir(parents=True)
    for hidden in (".hidden", ".cache/huggingface/a.jsonl.metadata", ".cache/huggingface/a.jsonl"):
        (folder / hidden).write_text("no")
    assert read(folder) == [*ROWS, *ROWS]
    report = convert.convert(folder, tmp_path / "out.jsonl")
    assert report.rows == 6
    assert "b/c.csv: " in (tmp_path / "out.jsonl.source.yaml").read_text()
    (folder / "notes.docx").write_text("no")
    with pytest.raises(DataError, match="none of rows by its name"):
        read(folder)


def test_a_folder_without_rows(tmp_path):
    with pytest.raises(DataError, match="no file of rows"):
        read(tmp_path)
