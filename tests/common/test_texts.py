"""Texts: what is read, and where one is cut."""

from __future__ import annotations

import pytest

from common.data.texts import Document, cut_in_two, read_texts
from common.errors import DataError, MachineError, UsageError


def test_other_texts_keep_all_but_their_line_ends(tmp_path):
    (tmp_path / "a.txt").write_bytes(b"\xef\xbb\xbfone \r\n\r\n\r\n\r\ntwo\rTHE END")
    assert read_texts("a.txt", tmp_path) == [Document("a.txt", "one \n\n\n\ntwo\nTHE END")]


def test_a_folder_is_read_by_name_with_its_folders(tmp_path):
    for name in ("b.txt", "a.txt", "deep/c.txt", "not.md", "empty.txt"):
        (tmp_path / "texts" / name).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / "texts" / name).write_text("" if name == "empty.txt" else name)
    assert [document.where for document in read_texts("texts", tmp_path)] == ["a.txt", "b.txt", "deep/c.txt"]


@pytest.mark.parametrize(
    ("content", "message"),
    [
        (b"", "the corpus is empty"),
        (b" \n\n", "the corpus is empty"),
        (b"text\0more", "binary data: a zero byte at character 4"),
        (b"fine\n\xff\xfe", "not UTF-8: byte 0xff at byte offset 5"),
    ],
)
def test_what_is_no_text_is_refused(tmp_path, content, message):
    (tmp_path / "a.txt").write_bytes(content)
    with pytest.raises(DataError, match=message):
        read_texts("a.txt", tmp_path)


def test_an_unknown_corpus_is_refused_with_those_there_are(tmp_path):
    with pytest.raises(UsageError, match="shakespeare, tinyshakespeare, a text file"):
        read_texts("shakespear", tmp_path)


def test_a_named_corpus_that_was_not_fetched_is_refused_with_the_command_that_does(tmp_path, monkeypatch):
    monkeypatch.setenv("RECIPES_HOME", str(tmp_path))
    with pytest.raises(MachineError, match="the corpus shakespeare is not on this machine") as caught:
        read_texts("shakespeare", tmp_path / "mine")
    assert caught.value.todo == "fetch it: recipe data build mine"


def test_one_document_is_cut_at_the_end_of_a_line():
    text = "".join(f"line {number}\n" for number in range(100))
    split = cut_in_two(Document("a.txt", text), 0.1)
    train, held_out = split["train"][0].text, split["held_out"][0].text
    assert train + held_out == text
    assert train.endswith("\n")
    assert 0.08 < len(held_out) / len(text) < 0.12
    assert cut_in_two(Document("a.txt", text), 0)["train"][0].text == text
    assert len(cut_in_two(Document("a.txt", "x" * 100), 0.1)["held_out"][0].text) == 10, "no line: cut anyway"
