"""The fast tokenizer's texts are the template's, and its tokens those that the library gives for a text as a whole."""

from __future__ import annotations

import json
import random
import re
from dataclasses import replace

import pytest
from tokenizers import Tokenizer

from common.data.chat import ChatTokenizer
from common.data.rows import Message, Row
from common.errors import DataError
from tests.support.tool_templates import write_tool_base
from tools.data.fast import FastTokenizer, Words, words_apart

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
        "[INST]",
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
        for text, (ids, _) in zip(texts(2000), words.encode([(text, ()) for text in texts(2000)]), strict=True):
            assert ids.tolist() == tokenizer.encode(text, add_special_tokens=False).ids, repr(text)


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
    assert [ids.tolist() for ids, _ in Words(tokenizer).encode([(text, ()) for text in texts(300)])] == wanted


def test_no_more_words_are_kept_than_a_limit(tokenizer, monkeypatch):
    monkeypatch.setattr("tools.data.fast.KEPT", 10)
    words = Words(tokenizer)
    for text in texts(50):
        _, (ids, _) = words.encode([(text, ()), (text, ())])
        assert ids.tolist() == tokenizer.encode(text, add_special_tokens=False).ids


@pytest.mark.parametrize("longer", ["<|user|>x", "<s>"], ids=["one begins another", "one begins inside of another"])
def test_tokens_that_could_lie_over_each_other_are_left_to_the_library(longer, tiny_base, tmp_path):
    def change(rules):
        content = longer if longer != "<s>" else "<|<s>"
        rules["added_tokens"].append({**rules["added_tokens"][0], "id": 600, "content": content})
        rules["model"]["vocab"][content] = 600

    tokenizer = changed(tiny_base, tmp_path, change)
    words = Words(tokenizer)
    for text in ("<|user|>x", "a<|user|>", "<|<s>", "<s>x<|<s> b", "<|<s"):
        for cut in range(len(text) + 1):
            ((ids, (count,)),) = words.encode([(text, (cut,))])
            whole, head = (tokenizer.encode(part, add_special_tokens=False).ids for part in (text, text[:cut]))
            assert ids.tolist() == whole
            assert count == (len(head) if whole[: len(head)] == head else None), (text, cut)


def test_a_cut_counts_the_tokens_before_it_where_they_are_the_same_alone(tokenizer):
    words = Words(tokenizer)
    for text in texts(150):
        whole = tokenizer.encode(text, add_special_tokens=False).ids
        heads = [tokenizer.encode(text[:cut], add_special_tokens=False).ids for cut in range(len(text) + 1)]
        ((_, counts),) = words.encode([(text, range(len(text) + 1))])
        assert counts == [len(head) if whole[: len(head)] == head else None for head in heads], repr(text)


def chat(template: str, folder) -> ChatTokenizer:
    from tools.verify.tiny_base import write_tiny_base

    write_tiny_base(folder)
    (folder / "chat_template.jinja").write_text(template)
    return ChatTokenizer.load(folder)


ANSWER = "{% if add_generation_prompt %}{{ '<|assistant|>' }}{% endif %}"
WRITING = {  # these write words, and learn nothing of them
    "joined": "{% for m in messages %}{{ '<|' + m['role'] + '|>' + m['content'] + eos_token }}{% endfor %}",
    "braces": "{% for m in messages %}{0}{{ '{' + m.role + '}' }}{{ m.content }}{{ eos_token }}{% endfor %}",
    "trimmed": "{% for m in messages %}{{ m.role + (' ' + m.content) | trim + eos_token }}{% endfor %}",
    "kind": "{% for m in messages %}{% if m.content is string and m.content %}{{ m.content }}{% endif %}{% endfor %}",
    "set": "{% set a = messages[0].content.strip() + '.' %}{{ a }}{% for m in messages %}{{ m.content }}{% endfor %}",
}
LOOKING = {
    "index": "{{ m.content[0] }}",
    "slice": "{{ m.content[:3] }}",
    "length": "{{ m.content | length }}",
    "loop": "{% for c in m.content %}{{ c }}-{% endfor %}",
    "within": "{% if 'hi' in m.content %}yes{% endif %}",
    "inside": "{% if m.content in 'hi you' %}yes{% endif %}",
    "among": "{% if m.content in ['hi', 'b'] %}yes{% endif %}",
    "equal": "{% if m.content == 'hi' %}yes{% endif %}",
    "order": "{% if m.content < 'i' %}yes{% endif %}",
    "key": "{{ {'hi': 1}[m.content] }}",
    "upper": "{{ m.content | upper }}",
    "method": "{{ m.content.replace('h', 'j') }}",
    "begins": "{% if m.content.startswith('h') %}yes{% endif %}",
    "begins it": "{% if 'hi there'.startswith(m.content) %}yes{% endif %}",
    "json": "{{ m.content | tojson }}",
    "all as json": "{{ messages | tojson }}",
    "format": "{{ '%5s' % m.content }}",
    "format method": "{{ '{:>5}'.format(m.content) }}",
    "replaced in": "{{ 'a hi b'.replace(m.content, '') }}",
    "repeated": "{{ m.content * 2 }}",
    "sequence": "{% if m.content is sequence %}yes{% endif %}",
    "iterable": "{% if m.content is iterable %}yes{% endif %}",
    "tilde": "{{ (m.content ~ ' x') | upper }}",
    "joined": "{{ [m.content, 'x'] | join('-') | title }}",
    "changed": "{% if loop.changed(m.content) %}yes{% endif %}",
    "stripped of": "{{ m.content.strip('h') }}",
    "list": "{{ [m.content] }}",
    "number": "{{ m.content | int }}",
}
TALKS = [
    ("hi", "you {0} } {"),
    ("  hi ", "b\n"),
    ("zebra", "\ue0000\ue001 é 日本"),
    ("hi", "there", "hi", "hi hi"),
]


@pytest.mark.parametrize("name", [*WRITING, *LOOKING])
def test_what_is_written_is_what_the_template_writes(name, tmp_path):
    template = WRITING.get(name) or "{% for m in messages %}" + LOOKING[name] + "{{ m.content }}{% endfor %}"
    plain = chat(template + ANSWER, tmp_path)
    fast = FastTokenizer(plain)
    for _ in range(2):
        for talk in TALKS:
            turns = [Message(role, text) for role, text in zip(("user", "assistant") * 2, talk, strict=False)]
            for opened in (False, True):
                try:
                    wanted = plain.render(turns, answer_next=opened)
                except Exception as error:  # whatever Jinja raises: the fast one must, too
                    with pytest.raises(type(error)):
                        fast.render(turns, answer_next=opened)
                else:
                    assert fast.render(turns, answer_next=opened) == wanted
    assert all(map(bool, fast._forms.values())) == (name in WRITING), "looked at once, or for each row"


def test_rows_get_the_tokens_and_masks_of_the_plain_tokenizer(tiny_base):
    plain = ChatTokenizer.load(tiny_base)
    found = texts(400)
    turns = [tuple(map(Message, ("user", "assistant", "user", "assistant"), found[at : at + 4])) for at in range(390)]
    rows = [Row(four[: 2 + 2 * (at % 2)], {}, f"rows:{at}") for at, four in enumerate(turns)]
    for options in ((None, None, False), ("Be brief.", 40, False), (None, None, True)):
        pairs = zip(plain.encode_rows(rows, *options), FastTokenizer(plain).encode_rows(rows, *options), strict=True)
        for one, other in pairs:
            assert told(one) == told(other)


def chats(count: int) -> list[Row]:
    """Rows of one to six turns, some with a system message, answers of weight 0, or texts that no layout takes."""
    draw, found = random.Random(2), iter(texts(count * 8))
    rows = []
    for at in range(count):
        roles = ["system"][: draw.randrange(2)] + ["user", "assistant"] * draw.randint(1, 3)
        # Every seventh row as drawn; of the others, marks of the template and white space at an edge are taken off.
        said = [next(found) if at % 7 == 0 else f"{re.sub('</s>|<.user.>', ' ', next(found)).strip()}." for _ in roles]
        turns = [Message(role, text) for role, text in zip(roles, said, strict=True)]
        weighed = [replace(turn, trained=turn.role != "assistant" or draw.random() < 0.8) for turn in turns]
        rows.append(Row(weighed, {}, f"rows:{at}"))
    return rows


BEFORE = "{% for m in messages %}{{ '<|' + m['role'] + '|>' }}"
OPENS = "{% if add_generation_prompt %}<s>{% endif %}"


def led(lead: str, tail: str = "") -> str:
    """A template that writes `lead` before each text, or an answer to come, and `tail` behind its end token."""
    end = f"eos_token + '{tail}'" if tail else "eos_token"
    return f"{BEFORE}{{{{ '{lead}' + m['content'] + {end} }}}}{{% endfor %}}" + ANSWER.replace("|>'", f"|>{lead}'")


LAID_OUT = {  # a template: whether it has a layout, None where it has one for some conversations
    "bare": (BEFORE + "{{ m['content'] + eos_token }}{% endfor %}" + ANSWER, True),
    "line": (led("\n", "\n"), True),
    "word": (led(">>", "\nx"), True),
    "end of all": (BEFORE + "{{ m['content'] }}{% endfor %}" + ANSWER + "{{ eos_token }}", False),
    "no end": (BEFORE + "{{ m['content'] }}{% endfor %}" + ANSWER, False),
    "other end": (BEFORE + "{{ m['content'] + '<unk>' }}{% endfor %}" + ANSWER, True),
    "behind": (BEFORE + "{{ m['content'] + '!' + eos_token }}{% endfor %}" + ANSWER, False),
    "words before": (led(" says: "), True),
    "begins a token": (led("<"), False),
    "opens less": (BEFORE + "{{ '\n' + m['content'] + eos_token }}{% endfor %}" + ANSWER, False),
    "opens more": (BEFORE + "{{ m['content'] + eos_token }}{% endfor %}" + ANSWER.replace("|>'", "|>\n'"), False),
    "last alone": (BEFORE + "{{ m['content'] + eos_token }}{% if loop.last %}!{% endif %}{% endfor %}" + ANSWER, False),
    "twice": (BEFORE + "{{ m['content'] + eos_token + m['content'] }}{% endfor %}" + ANSWER, False),
    "backwards": ("{% for m in messages[::-1] %}{{ '<s>' + m['content'] + eos_token }}{% endfor %}" + OPENS, False),
    "long talks": (
        "{% if messages | length > 2 %}<unk>{% endif %}"
        + BEFORE
        + "{{ m['content'] + eos_token }}{% endfor %}"
        + ANSWER,
        None,
    ),
    "last ends": (
        BEFORE
        + "{{ m['content'] }}{% if loop.last and m.role != 'user' %}{{ eos_token }}{% endif %}{% endfor %}"
        + ANSWER,
        None,
    ),
    "mark": (led("[INST]"), True),
    "trimmed": (BEFORE + "{{ m['content'].strip() + eos_token }}{% endfor %}" + ANSWER, True),
    "letter": (led("s"), True),
}


@pytest.mark.parametrize("name", LAID_OUT)
def test_rows_put_together_of_words_get_the_tokens_and_masks_of_the_plain_tokenizer(name, tmp_path):
    template, has_layout = LAID_OUT[name]
    plain = chat(template, tmp_path)
    agree(plain, has_layout)


def test_a_word_that_ends_an_answer_is_looked_for(tmp_path):
    plain = chat(LAID_OUT["bare"][0], tmp_path)
    (tmp_path / "generation_config.json").write_text(json.dumps({"eos_token_id": [2, *plain.encode_text("word")[-1:]]}))
    agree(ChatTokenizer.load(tmp_path), False)


def agree(plain: ChatTokenizer, has_layout: bool | None) -> None:
    fast, rows = FastTokenizer(plain), chats(100)
    for options in ((None, None, False), ("Be brief.", 200, False), (None, None, True)):
        wanted = [told(one) for one in plain.encode_rows(rows, *options)]
        assert [told(one) for one in fast.encode_rows(rows, *options)] == wanted
    # Of those with several turns, as the last one may be written in another way; and with an answer that is trained on.
    several = [at for roles, at in fast._layouts.items() if len(roles.split()) > 3 and "assistant" in roles.split()]
    assert several
    assert has_layout is None or all(map(bool, several)) == any(map(bool, several)) == has_layout
    assert sum(map(bool, fast._laid_out(rows, None, None))) > (10 if has_layout else -1), "rows are put together"


def told(found):
    return str(found) if isinstance(found, Exception) else (found.ids.tolist(), found.mask.tolist(), found.cut)


def test_tools_are_written_by_the_template_itself(tmp_path):
    plain = ChatTokenizer.load(write_tool_base(tmp_path / "b"))
    call = {"type": "function", "function": {"name": "sky", "arguments": {"at": "a"}}}
    turns = [Message("user", "Why?"), Message("assistant", "", fields={"tool_calls": [call]}), Message("tool", "rain")]
    called = Row((*turns, Message("assistant", "So.")), {}, "f:1", [{"type": "function", "function": {"name": "sky"}}])
    untooled = Row((Message("user", "Why?"), Message("assistant", "So.")))
    for rows in ([called, untooled], [untooled, called]):
        for ours, theirs in zip(FastTokenizer(plain).encode_rows(rows), plain.encode_rows(rows), strict=True):
            assert not isinstance(ours, DataError)
            assert not isinstance(theirs, DataError)
            assert (ours.ids.tolist(), ours.mask.tolist()) == (theirs.ids.tolist(), theirs.mask.tolist())
