"""Tokenizers made from a corpus: ids, what is unknown, sizes in bytes, and the folder that others load."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from tokenizers import Tokenizer

from common.data import vocabulary
from common.data.chat import ChatTokenizer
from common.data.texts import Document
from common.data.vocabulary import UNKNOWN
from common.errors import DataError
from common.paths import ROOT
from tests.doubles.tiny_recipe import write_play

TEXT = "FOX.\nAy, caf\u00e9 \u2014 \U0001f98a!\n\n\nOWL.\n\tNo.\n"


def documents(text: str) -> list[Document]:
    return [Document("a.txt", text)]


@pytest.fixture(scope="module")
def char(tmp_path_factory) -> Path:
    return vocabulary.train("char", 96, documents(TEXT), tmp_path_factory.mktemp("t") / "char")


@pytest.fixture(scope="module")
def play(tmp_path_factory) -> str:
    return write_play(tmp_path_factory.mktemp("t") / "play.txt").read_text()


@pytest.fixture(scope="module")
def bpe(tmp_path_factory, play) -> Path:
    return vocabulary.train("bpe", 320, documents(play), tmp_path_factory.mktemp("t") / "bpe")


def test_characters_have_ids_by_code_point_and_the_unknown_one_the_last(char):
    vocab = json.loads((char / "tokenizer.json").read_text())["model"]["vocab"]
    assert list(vocab) == [*sorted(set(TEXT)), UNKNOWN]
    assert list(vocab.values()) == list(range(len(vocab)))


@settings(max_examples=60, deadline=None)
@given(st.text(alphabet=st.sampled_from([*set(TEXT), "q", "\r", "\u0301", UNKNOWN, "\x00"]), max_size=40))
def test_the_look_up_and_the_library_make_the_same_ids(char, text):
    tokenizer = Tokenizer.from_file(str(char / "tokenizer.json"))
    assert vocabulary.char_table(tokenizer)[vocabulary.code_points(text)].tolist() == tokenizer.encode(text).ids


def test_text_comes_back_as_it_was(char, bpe, play):
    for folder, kind, text in ((char, "char", TEXT), (bpe, "bpe", play), (bpe, "bpe", TEXT)):
        ids = vocabulary.encode(vocabulary.load(folder), kind, documents(text))
        assert Tokenizer.from_file(str(folder / "tokenizer.json")).decode(ids.tolist()) == text


def test_parts_are_encoded_as_within_the_whole(bpe, play, monkeypatch):
    text = play + "a\n\n\nb\n c\n\n d  \ne\n" * 30
    whole = Tokenizer.from_file(str(bpe / "tokenizer.json")).encode(text).ids
    for size in (1, 7, 100):
        monkeypatch.setattr(vocabulary, "CHUNK", size)
        assert "".join(vocabulary.chunks(text)) == text
        assert vocabulary.encode(vocabulary.load(bpe), "bpe", documents(text)).tolist() == whole


def test_the_sizes_of_ids_add_up_to_the_bytes_of_the_text(char, bpe, play):
    for folder, kind, text in ((char, "char", TEXT), (bpe, "bpe", play), (bpe, "bpe", TEXT)):
        ids = vocabulary.encode(vocabulary.load(folder), kind, documents(text))
        assert vocabulary.bytes_of_ids(vocabulary.load(folder), kind)[ids].sum() == len(text.encode())


def test_what_was_not_in_training_is_unknown_to_characters_and_not_to_bytes(char, bpe):
    unknown = vocabulary.load(char).token_to_id(UNKNOWN)
    ids = vocabulary.encode(vocabulary.load(char), "char", documents("FZq\u0416"))
    assert (ids == unknown).tolist() == [False, True, True, True]
    assert vocabulary.load(bpe).token_to_id(UNKNOWN) is None
    assert ChatTokenizer.load(char).never_ids == (unknown,)


def test_an_unknown_sign_in_the_corpus_is_no_character_of_it(tmp_path):
    folder = vocabulary.train("char", 96, documents(f"a{UNKNOWN}b"), tmp_path / "t")
    assert ChatTokenizer.load(folder).vocab_size == 3
    assert vocabulary.encode(vocabulary.load(folder), "char", documents(f"a{UNKNOWN}b")).tolist() == [0, 2, 1]


def test_a_vocabulary_that_the_corpus_cannot_fill_is_refused(tmp_path, play):
    with pytest.raises(DataError, match=r"cannot fill a BPE vocabulary of 32000: it gives \d+ ids"):
        vocabulary.train("bpe", 32000, documents(play), tmp_path / "t")
    assert not (tmp_path / "t").exists()


def test_more_characters_than_the_model_has_room_for_are_refused(tmp_path):
    text = "".join(map(chr, range(0x4E00, 0x4E00 + 96)))
    with pytest.raises(DataError, match=r"97 ids .* room for 96"):
        vocabulary.train("char", 96, documents(text), tmp_path / "t")


def test_bytes_that_the_model_has_no_room_for_are_refused_as_bytes(tmp_path, play):
    with pytest.raises(DataError, match=r"256 ids \(a byte each\), the vocabulary room for 96") as caught:
        vocabulary.train("bpe", 96, documents(play), tmp_path / "t")
    assert "type=char" in (caught.value.todo or "")


def test_the_same_corpus_makes_the_same_tokenizer(tmp_path, play):
    for kind, size in (("char", 96), ("bpe", 300)):
        made = [vocabulary.train(kind, size, documents(play), tmp_path / f"{kind}{n}") for n in range(2)]
        assert len({(folder / "tokenizer.json").read_bytes() for folder in made}) == 1


def test_transformers_load_the_folder_and_make_the_same_ids(char, bpe, play):
    transformers = pytest.importorskip("transformers")
    for folder, kind, text in ((char, "char", TEXT + "q"), (bpe, "bpe", play + TEXT)):
        theirs = transformers.AutoTokenizer.from_pretrained(folder)
        ids = vocabulary.encode(vocabulary.load(folder), kind, documents(text))
        assert theirs(text)["input_ids"] == ids.tolist()
        assert ChatTokenizer.load(folder).encode_text(text) == ids.tolist()
        known = ids[ids != vocabulary.load(folder).token_to_id(UNKNOWN)] if kind == "char" else ids
        assert theirs.decode(known) == ChatTokenizer.load(folder).decode(known)


@pytest.mark.parametrize("threads", [1, 3])
def test_num_proc_is_the_number_of_threads_that_work(play, tmp_path, threads):
    """In a process of its own: the library makes its threads once."""
    program = """
import os, sys
from pathlib import Path
from common.data import vocabulary
from common.data.texts import Document

vocabulary.CHUNK = 100
documents = [Document("a", sys.stdin.read())]
before = len(os.listdir("/proc/self/task"))
vocabulary.use_threads(int(sys.argv[1]))
folder = vocabulary.train("bpe", 320, documents, Path(sys.argv[2]))
vocabulary.encode(vocabulary.load(folder), "bpe", documents)
print(len(os.listdir("/proc/self/task")) - before)
"""
    command = [sys.executable, "-c", program, str(threads), str(tmp_path / "t")]
    done = subprocess.run(command, input=play, capture_output=True, text=True, check=False, cwd=ROOT)
    assert done.stdout.strip() == str(threads), done.stderr
