"""Words are tokenized once; a text's tokens stay what the library gives for it as a whole."""

from __future__ import annotations

import json
import random

import pytest
from tokenizers import Tokenizer

from common.data.words import Words, words_apart

# What stands at the edge of a rule: white space of every kind, contractions, digits, parts of special tokens.
ATOMS = [
    *(
        "a",
        "word",
        " ",
        "  ",
        "\n",
        "\t",
        "\r\n",
        "'s",
        " 'll",
        "5",
        " 12",
        ".",
        "...",
        "é",
        " É",
        "e\u0301",
        "日本",
        "🙂",
    ),
    *(
        "\u00a0",
        "\u3000",
        "\u2028",
        "\x1c",
        "\x85",
        "\u200b",
        "\u180e",
        "\ufeff",
        "\0",
        "_",
        " -",
        "<",
        "</s>",
        "<|user|>",
    ),
]


def texts(count: int) -> list[str]:
    draw = random.Random(1)
    return ["".join(draw.choices(ATOMS, k=draw.randrange(30))) for _ in range(count)]


@pytest.fixture
def tokenizer(tiny_base):
    return Tokenizer.from_file(str(tiny_base / "tokenizer.json"))


def changed(tiny_base, folder, change):
    """The tiny base's tokenizer with its rules changed."""
    rules = json.loads((tiny_base / "tokenizer.json").read_text())
    change(rules)
    (folder / "tokenizer.json").write_text(json.dumps(rules))
    return Tokenizer.from_file(str(folder / "tokenizer.json"))


def test_words_give_the_tokens_of_whole_texts(tokenizer):
    assert words_apart(tokenizer)
    words = Words(tokenizer)
    for _ in range(2):  # the second time from what is known
        for text, ids in zip(texts(2000), words.encode(texts(2000)), strict=True):
            assert ids == tokenizer.encode(text, add_special_tokens=False).ids, repr(text)


def test_tokens_before_a_character_are_counted_as_by_the_whole_text(tokenizer):
    words = Words(tokenizer)
    for text in texts(200):
        starts = [start for start, _ in tokenizer.encode(text, add_special_tokens=False).offsets]
        for at in range(len(text) + 1):
            assert words.tokens_before(text, at) == sum(start < at for start in starts), (text, at)


@pytest.mark.parametrize(
    "change",
    [
        lambda rules: rules["pre_tokenizer"].update(add_prefix_space=True),
        lambda rules: rules["pre_tokenizer"].update(use_regex=False),
        lambda rules: rules.update(normalizer={"type": "Strip", "strip_left": True, "strip_right": True}),
        lambda rules: rules["added_tokens"][2].update(lstrip=True),
        lambda rules: rules["added_tokens"][2].update(rstrip=True),
        lambda rules: rules["added_tokens"].append({**rules["added_tokens"][0], "id": 600, "content": "a word"}),
    ],
    ids=[
        "space in front",
        "no expression",
        "normalizer",
        "token takes the space before",
        "and after",
        "token of two words",
    ],
)
def test_other_rules_get_whole_texts(change, tiny_base, tmp_path):
    tokenizer = changed(tiny_base, tmp_path, change)
    assert not words_apart(tokenizer)
    wanted = [encoding.ids for encoding in tokenizer.encode_batch(texts(300), add_special_tokens=False)]
    assert Words(tokenizer).encode(texts(300)) == wanted


def test_no_more_words_are_kept_than_a_limit(tokenizer, monkeypatch):
    monkeypatch.setattr("common.data.words.KEPT", 10)
    words = Words(tokenizer)
    for text in texts(50):
        assert words.encode([text, text])[1] == tokenizer.encode(text, add_special_tokens=False).ids
