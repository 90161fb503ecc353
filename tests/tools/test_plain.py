"""The small files that exports and converted bases share, as readers old and new take them."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from tokenizers import Tokenizer

from common.data.chat import ChatTokenizer
from tests.support.llamas import TEXTS, bpe, char, chat
from tools.bases.plain import INPUTS, plain_config, write_tokenizer
from tools.export.end_token import END, declare_end


def settings(folder: Path) -> dict[str, Any]:
    return dict(json.loads((folder / "tokenizer_config.json").read_text(encoding="utf-8")))


def ids(folder: Path) -> list[list[int]]:
    tokenizer = ChatTokenizer.load(folder)
    return [tokenizer.encode_text(text) for text in TEXTS]


@pytest.fixture
def written(tmp_path) -> Callable[[Path], Path]:
    def write(source: Path) -> Path:
        folder = tmp_path / "written"
        folder.mkdir()
        write_tokenizer(source, folder, 256)
        return folder

    return write


def test_transformers_4_find_the_rotary_base_that_5_keep_in_rope_parameters():
    architecture = {"rope_parameters": {"rope_theta": 100000.0, "rope_type": "default"}, "quantization_config": {}}
    config = plain_config(architecture, "bf16")

    assert config["rope_theta"] == 100000.0
    assert config["torch_dtype"] == "bfloat16"
    assert "quantization_config" not in config


def test_a_tokenizer_says_what_a_llama_takes(tmp_path, written):
    """Left out, transformers 4 make token_type_ids, too, and model.generate(**inputs) is an error."""
    assert settings(written(chat(tmp_path / "base", tied=True)))["model_input_names"] == INPUTS
    assert settings(tmp_path / "base").get("model_input_names") is None, "the double says so itself: nothing is tested"


def test_special_tokens_without_a_name_are_a_list_to_every_reader(tmp_path, written):
    """transformers 5 save a list as `extra_special_tokens`; 4.48 to 4.57 want an object there."""
    base = chat(tmp_path / "base", tied=True)
    saved = settings(base) | {"extra_special_tokens": ["<|user|>"]}
    (base / "tokenizer_config.json").write_text(json.dumps(saved))
    found = settings(written(base))

    assert found["additional_special_tokens"] == ["<|user|>"]
    assert "extra_special_tokens" not in found


def test_named_special_tokens_stay_an_object(tmp_path, written):
    base = chat(tmp_path / "base", tied=True)
    named = {"extra_special_tokens": {"user_token": "<|user|>"}}
    (base / "tokenizer_config.json").write_text(json.dumps(settings(base) | named))

    assert settings(written(base)).items() >= named.items()


def test_merges_are_texts_as_tokenizers_before_0_20_want_them(tmp_path, written):
    base = bpe(tmp_path / "base", tied=True)
    before = json.loads((base / "tokenizer.json").read_text(encoding="utf-8"))["model"]["merges"]
    folder = written(base)
    after = json.loads((folder / "tokenizer.json").read_text(encoding="utf-8"))["model"]["merges"]

    assert isinstance(before[0], list), "the double has them as older files do: nothing is tested"
    assert [merge.split(" ") for merge in after] == before
    assert ids(folder) == ids(base)


def test_merges_of_tokens_with_spaces_stay_pairs(tmp_path, written):
    base = chat(tmp_path / "base", tied=True)
    path = base / "tokenizer.json"
    spec = json.loads(path.read_text(encoding="utf-8"))
    vocab, pairs = spec["model"]["vocab"], spec["model"]["merges"]
    vocab |= {" ": len(vocab), " a": len(vocab) + 1}
    pairs.append([" ", "a"])
    path.write_text(json.dumps(spec), encoding="utf-8")

    assert json.loads((written(base) / "tokenizer.json").read_text(encoding="utf-8"))["model"]["merges"] == pairs


# --- an end token for those that have none --------------------------------------------------------------------------


@pytest.mark.parametrize(("make", "rows"), [(char, 320), (bpe, 352), (bpe, 320)], ids=["char", "bpe", "full bpe"])
def test_a_model_without_an_end_gets_an_id_that_no_text_has(tmp_path, written, make, rows):
    base = make(tmp_path / "base", tied=True)
    before = ChatTokenizer.load(base)
    folder = written(base)
    end = declare_end(folder, before, rows)
    (folder / "generation_config.json").write_text(json.dumps({"eos_token_id": end, "suppress_tokens": [end]}))
    tokenizer = ChatTokenizer.load(folder)

    assert ids(folder) == ids(base)
    assert not any(end in text for text in ids(base))
    assert end is not None
    assert end < rows
    assert tokenizer.encode_text(END) == [end]
    assert tokenizer.eos_ids == (end,)
    assert set(tokenizer.never_ids) == {*before.never_ids, end}, "never sampled"
    assert tokenizer.decode([end], skip_special=True) == ""
    assert Tokenizer.from_file(str(folder / "tokenizer.json")).token_to_id(END) == end


def test_transformers_read_the_end_token(tmp_path, written):
    transformers = pytest.importorskip("transformers")
    for number, make in enumerate((char, bpe)):
        base = make(tmp_path / f"base-{number}", tied=True)
        folder = tmp_path / f"made-{number}"
        folder.mkdir()
        write_tokenizer(base, folder, 256)
        end = declare_end(folder, ChatTokenizer.load(base), 320)
        theirs = transformers.AutoTokenizer.from_pretrained(folder)

        assert (theirs.bos_token_id, theirs.eos_token_id, theirs.pad_token_id) == (end, end, end)
        assert [theirs(text)["input_ids"] for text in TEXTS] == ids(base)


def test_characters_that_fill_the_vocabulary_leave_no_id_for_an_end(tmp_path, written):
    base = char(tmp_path / "base", tied=True)
    tokenizer = ChatTokenizer.load(base)
    folder = written(base)
    before = (folder / "tokenizer.json").read_bytes()

    assert declare_end(folder, tokenizer, tokenizer.vocab_size) is None
    assert (folder / "tokenizer.json").read_bytes() == before


def test_a_model_with_an_end_keeps_it(tmp_path, written):
    base = chat(tmp_path / "base", tied=True)
    assert declare_end(written(base), ChatTokenizer.load(base), 1024) is None
