from __future__ import annotations

import json
import random
import re
from types import SimpleNamespace
from typing import Any

import pytest

from common.data.chat import ChatTokenizer
from common.data.rows import Message, Problem, Row
from common.data.tokens import Encoded, pack
from common.errors import DataError
from tests.support.encoded import encode_row
from tests.support.tool_templates import write_tool_base
from tools.data import checks, markers

WORDS = "amber birch cedar delta ember flint grove heron inlet jasper kelp lotus maple north otter plume".split()


def row(prompt: str, response: str = "", **extra: object) -> Row:
    """A row with an answer of its own; the first one of a test stands in line 1."""
    LINES.append(len(LINES) + 1)
    line = LINES[-1]
    response = response or f"{WORDS[line % 16].title()} number {line} answers that at some length."
    return Row((Message("user", prompt), Message("assistant", response)), extra, f"f:{line}")


LINES: list[int] = []


@pytest.fixture(autouse=True)
def first_line():
    LINES.clear()


def ids(train=(), held_out=(), prompts=(), **options) -> list[str]:
    report = checks.check({"train": train, "held_out": held_out}, prompts, **options)
    return [finding.id for finding in report.findings]


def config(**options) -> Any:
    data = {"system_prompt": None, "max_length": None, "supervise_all": False, **options}
    return SimpleNamespace(data=SimpleNamespace(**data), training=SimpleNamespace(batch_size=2))


@pytest.fixture
def tokenizer(tiny_base) -> ChatTokenizer:
    return ChatTokenizer.load(tiny_base)


CLEAN = ["What is a fox?", "How do bees find flowers?", "Why does bread rise when it is warm?"]


def test_clean_rows_have_no_finding(tokenizer):
    report = checks.check({"train": [row(text) for text in CLEAN]}, ["Who was Ada?"], tokenizer, config())
    assert report.findings == []
    assert not report.failed(strict=True)
    assert report.lines() == ["3 train rows; errors: 0, warnings: 0"]


@pytest.mark.parametrize("text", ["What is a fox?", "what  is a FOX ?", "What is a fox"])
def test_the_same_prompt_on_both_sides_is_an_error(text):
    train = [row("What is a fox?")]
    assert ids(train, [row(text, "Another answer, of another kind.")])[0] == "D002"
    assert ids(train, prompts=[text]) == ["D003"]
    assert ids([row("Why?")], [row("What is a fox?")], [text]) == ["D103"]


def test_nearly_the_same_words_on_both_sides_are_a_warning():
    train = [row("Please explain to me what gradient descent really is")]
    near = "Please explain to me what gradient descent is"
    assert ids(train, [row(near)]) == ["D101", "D108"]
    assert ids(train, prompts=[near]) == ["D102"]
    assert ids([row("Why?")], [row(near)], ["please explain to me: what is gradient descent really"]) == ["D104"]
    assert ids(train, prompts=["Please explain to me what a learning rate is"]) == []
    assert ids([row("What is a fox?")], prompts=["What is an ox?"]) == []


def test_a_leak_says_where_both_stand():
    report = checks.check({"train": [row("Why?"), row("What is a fox?")]}, ["Who?", "what is a fox?"])
    assert report.errors[0].where == ["evaluation prompt 2 = f:2"]


def test_duplicates_and_conflicts_are_told_apart():
    assert ids([row("Why me?", "Because so."), row("why  me?", "because so")]) == ["D105"]
    assert ids([row("Why me?", "Because so."), row("why  me?", "It is not known.")]) == ["D106"]
    assert ids([row("Why me?", "Because so."), row("How so?", "because  so.")]) == ["D107"]
    near = [
        row("Tell me in plain words why foxes are red"),
        row("Tell me in plain words why the foxes are red"),
    ]
    assert ids(near) == ["D108"]
    named = [Row(one.messages, {}, f"a ~ b/rows.jsonl:{line}") for line, one in enumerate(near, start=1)]
    [finding] = checks.check({"train": named}).warnings
    assert finding.where == ["a ~ b/rows.jsonl:2 ~ a ~ b/rows.jsonl:1"]


def test_the_same_question_after_another_turn_is_no_conflict():
    def talk(first: str, answer: str) -> Row:
        turns = [("user", first), ("assistant", "Yes."), ("user", "Why?"), ("assistant", answer)]
        return Row(tuple(Message(*turn) for turn in turns), {}, first)

    assert ids([talk("Do foxes sleep?", "They tire."), talk("Do bees dance?", "To show the way.")]) == []


# Written in parts, so that no scanner takes this file for a leak.
SECRETS = [
    "s" + "k-" + "abcDEF123456" * 3,
    "AK" + "IA" + "ABCDEFGHIJKLMNOP",
    "gh" + "p_" + "a1B2" * 9,
    "h" + "f_" + "abcdefghij" * 4,
    "-----BEGIN RSA " + "PRIVATE KEY-----",
    "xo" + "xb-" + "1234567890-abc",
    "ey" + "J" + "hbGciOiJI.ey" + "J" + "zdWIiOiIx.SflKxwRJSMeK",
]


@pytest.mark.parametrize("secret", SECRETS)
def test_keys_are_errors_and_are_not_printed_again(secret):
    report = checks.check({"train": [row("What is my key?", f"It is {secret} as you know.")]})
    assert [finding.id for finding in report.findings] == ["D004"]
    assert secret not in "\n".join(report.lines())


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ("Write to jane.doe+x@firm.co.uk today", ["D109"]),
        ("Write to someone@example.com today", []),
        ("Call +49 30 1234 5678 now", ["D110"]),
        ("Call (555) 123-4567 now", ["D110"]),
        ("Call 555.123.4567 now", ["D110"]),
        ("Call 030 12345678 now", ["D110"]),
        ("On 2024-01-31 at 10:15 we saw 1,115,394 characters", []),
        ("The address 192.168.100.200 and version 10.11.12 are fine", []),
        ("About 1 000 000 000 or 0.00012345 or 3.14159265358979 of them", []),
        ("1e-4 to 5e-5, 1100048384 parameters, 2048 x 2048", []),
    ],
)
def test_mail_addresses_and_phone_numbers_are_warnings_and_numbers_are_none(text, expected):
    assert ids([row("Whom do I ask?", text)]) == expected


def test_what_is_looked_for_first_hides_no_private_data():
    """Texts of the patterns' own parts, put together by chance, against the patterns alone."""
    draw = random.Random(3)
    keys = [*SECRETS, "a@b.co", *" .-@,a0", *(secret[:at] for secret in SECRETS for at in (4, 12))]
    numbers = ["+49 30 1234", "030 123", "49", "030", "02", "555", "(555)", "1234", "٣٤٥", *" .-/()+ax", "example"]
    texts = ["".join(draw.choices(parts, k=draw.randint(1, 9))) for parts in (keys, numbers) for _ in range(20_000)]
    plainly = [[name for name, (shape, _) in checks.SECRETS.items() if re.search(shape, text)] for text in texts]
    assert [checks.secrets_in(text) for text in texts] == plainly
    assert [checks.has_email(text) for text in texts] == [bool(checks.EMAIL.search(text)) for text in texts]
    phones = [bool(checks.PHONE.search(text)) for text in texts]
    assert [checks.has_phone(text) for text in texts] == phones
    assert sum(phones) > 200, "the parts make numbers often enough"


def test_every_kind_of_key_is_seen_behind_what_is_looked_for_first():
    long = "A1b2" * 12
    keys = ["gh" + f"{kind}_{long}" for kind in "pousr"] + ["github" + f"_pat_{long}", "gl" + f"pat-{long}"]
    keys += ["AS" + "IA" + "ABCDEFGHIJKLMNOP", "AI" + "za" + long[:35], *("xo" + f"x{kind}-{long}" for kind in "abprs")]
    assert all(len(checks.secrets_in(f"It is {key}")) == 1 for key in keys)


def test_untidy_text():
    assert ids([row("Is it?", "No.")]) == ["D111"]
    assert ids([row("Why?", "Because of white space.\n")]) == ["D114"]


def test_template_markers_are_errors_with_their_place(tokenizer):
    report = checks.check({"train": [row("What does <|assistant|> mean?")]}, (), tokenizer)
    assert [finding.id for finding in report.errors] == ["D005"]
    assert report.errors[0].where == ["f:1: '<|assistant|>' in the user's text"]


def test_rows_longer_than_max_length_say_what_they_would_lose(tokenizer):
    long = row("Tell me all about the fox " * 8)
    report = checks.check({"train": [long, row("Why?")]}, (), tokenizer, config(max_length=96))
    assert [finding.id for finding in report.findings] == ["D114", "D117"]
    assert "f:1: would lose" in report.findings[1].where[0]


def test_rows_that_the_template_refuses_are_errors(tokenizer):
    tight = config(max_length=32, system_prompt="a long system prompt " * 10)
    report = checks.check({"train": [row("Why?"), row("How?")]}, (), tokenizer, tight)
    (finding,) = report.findings
    (fault,) = finding.faults
    assert (finding.id, finding.message) == ("D006", "2 rows cannot be tokenized")
    assert fault == "f:1: nothing of the answer is left in 33 tokens (2 rows, then f:2)", "one fault is one line"


def test_a_row_of_weight_0_is_an_error_where_all_is_trained_on(tokenizer):
    turns = [Message("user", "Why?"), Message("assistant", "So.", trained=False), *row("How?").messages]
    weighed = row("Why?").but(messages=turns)
    assert ids([weighed], tokenizer=tokenizer, config=config(supervise_all=False)) == ["D007"]
    report = checks.check({"train": [weighed, row("Who?")]}, (), tokenizer, config(supervise_all=True))
    (finding,) = report.findings
    (fault,) = finding.faults
    assert (finding.id, fault) == ("D006", "f:2: a message of weight 0, and data_config.supervise_all trains on all")


def called(prompt: str, **arguments: str) -> Row:
    """A row that ends with a call, of a tool that no conversation names."""
    function = {"name": "sky", "arguments": arguments}
    call = Message("assistant", "", fields={"tool_calls": [{"type": "function", "function": function}]})
    return row(prompt).but(messages=(Message("user", prompt), call))


def test_rows_with_tools_are_named_and_asked_of_a_base(tokenizer, tmp_path):
    rows = [called("Will it rain?", at="Paris"), called("Is it warm there?", at="Oslo")]
    report = checks.check({"train": [*rows, row("Why?")]})
    (finding,) = report.findings
    assert (finding.id, finding.faults) == ("D120", ["f:1: tools or calls to them (2 rows, then f:2)"])
    assert ids(rows, tokenizer=tokenizer) == ["D006"], "the tiny base's template knows no tools"
    assert ids(rows, tokenizer=ChatTokenizer.load(write_tool_base(tmp_path / "b"))) == []


def test_what_a_call_says_is_looked_at_as_an_answer_is():
    """Two calls with other arguments are not the same answer, nor an empty one; and a key in one is found."""
    rows = [called("Will it rain?", at="Paris"), called("Is it warm there?", at="Oslo")]
    assert ids(rows) == ["D120"]
    assert ids([rows[0], called("Is it dry?", at="Paris")]) == ["D107", "D120"]
    assert ids([called("Log in?", key="AKIA" + "A1B2C3D4" * 2)]) == ["D004", "D120"]
    assert ids([called("Stop?", at="<|im_end|>")]) == ["D008", "D120"]
    found = checks.stats({"train": rows})
    assert found["response_characters"]["min"] == len('{"name": "sky", "arguments": {"at": "Oslo"}}')


def test_fewer_rows_than_a_batch_unusable_lines_and_no_licence():
    assert ids([row("Why?")], config=config()) == ["D007"]
    assert ids(problems=[Problem("f:3", "not JSON")]) == ["D001"]
    assert ids([row("Why?")], licence=None) == ["D119"]


def test_warnings_fail_only_when_strict_and_the_report_is_json():
    report = checks.check({"train": [row("Is it?", "No.")]})
    assert (report.failed(), report.failed(strict=True)) == (False, True)
    value = json.loads(json.dumps(report.to_dict()))
    assert value["warnings"][0]["id"] == "D111"
    assert value["errors"] == []


def test_ten_places_are_shown_and_all_are_kept():
    report = checks.check({"train": [row(f"{word}{n}?", "No.") for n in (1, 2) for word in WORDS]})
    single = next(finding for finding in report.findings if finding.id == "D111")
    assert len(single.where) == 32
    assert single.lines()[-1] == "  and 22 more"
    assert len(single.lines()) == 12


# Statistics.


def test_stats_count_rows_characters_and_tokens(tokenizer):
    rows = {
        "train": [row("Why?", "So it is."), row("Is it?", "It is, and for long.", topic="t")],
        "held_out": [row("a b")],
    }
    found = checks.stats(rows, tokenizer, config())
    assert found["rows"] == {"train": 2, "held_out": 1}
    assert (found["prompt_characters"]["min"], found["prompt_characters"]["max"]) == (3, 6)
    assert found["steps_per_epoch"] == 1.0
    assert found["extra_keys"] == ["topic"]
    sizes = [len(encode_row(tokenizer, one).ids) for part in rows.values() for one in part]
    assert (found["tokens"]["max"], found["tokens"]["total"]) == (max(sizes), sum(sizes))
    assert 0 < found["tokens"]["supervised_share"] < 1
    json.dumps(found)
    assert checks.stats_lines(found)[:2] == ["rows: 2 train, 1 held out", "prompt characters: min 3, mean 4, max 6"]
    assert checks.stats_lines(found)[-1] == "steps per epoch: 1.00 of batch 2"


def test_percentiles_and_padding_of_known_sizes():
    import numpy as np

    encoded = [Encoded(np.ones(n, np.uint32), np.ones(n, np.uint8)) for n in (33, 17, 65, 97)]
    found = checks.token_stats(pack(encoded))
    assert [found[name] for name in ("p50", "p95", "max", "needed_length")] == [33, 97, 97, 96]
    assert [(cost["length"], cost["rows_cut"]) for cost in found["padding"]] == [(32, 2), (64, 1), (96, 0)]
    used = [(32 + 16 + 32 + 32) / 128, (32 + 16 + 64 + 64) / 256, (32 + 16 + 64 + 96) / 384]
    assert [1 - cost["share"] for cost in found["padding"]] == pytest.approx(used)


def test_no_row_is_an_error():
    with pytest.raises(DataError, match="no row"):
        checks.stats({"train": []})


def test_every_marker_of_a_base_laid_out_as_tinyllama_is_known_without_one_and_escaped(tokenizer):
    for marker in ("<unk>", "<s>", "</s>", "<|user|>", "<|assistant|>", "<|system|>"):
        assert tokenizer.marker_in(marker) == marker
        assert ids([row(f"What does {marker} mean?")]) == ["D008"]
        assert ids([markers.escape(row(f"What does {marker} mean?"))], tokenizer=tokenizer) == []
    assert ids([row("What do [INST] and <|anything|> mean?")]) == ["D113"]
    assert ids([row("What do < s >, a<b and [x] mean?")]) == []


def test_rows_are_compared_only_with_what_there_is(monkeypatch):
    asked: list[tuple[int, int]] = []

    def pairs(ours: list[Any], theirs: list[Any], _watch: object) -> list[Any]:
        asked.append((len(ours), len(theirs)))
        return []

    monkeypatch.setattr(checks, "near_pairs", pairs)
    checks.check({"train": [row("Why?"), row("How?")]})
    assert asked == [(2, 2)], "each with the others: nothing is held out, and nothing is asked"
    checks.check({"train": [row("Why?"), row("How?")], "held_out": [row("Who?")]}, ["When?"])
    assert asked[1:] == [(1, 2), (1, 2), (1, 1), (3, 3)]
