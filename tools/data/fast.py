"""A chat tokenizer for many rows, with the tokens of ChatTokenizer.

Most templates write a message's words as they are, and most tokenizers first cut a text at its spaces. Where their own
rules say so, a row needs no template engine, and no word is tokenized twice.

An edit of this file makes no token set anew, as one of SHAPERS (common/data/build.py) does, because the tokens are the
same. Whoever mends a token that was another one raises FORMAT in common/data/tokens.py, so that none stays stored.
"""

from __future__ import annotations

import json
import re
from array import array
from bisect import bisect_left, bisect_right
from collections.abc import Iterable, Iterator, Sequence
from itertools import accumulate, chain
from typing import TYPE_CHECKING, Any

from common.data.chat import ChatTokenizer, Cut, compile_template
from common.data.rows import Message

if TYPE_CHECKING:
    from tokenizers import Tokenizer

# Byte-level BPE as of GPT-2 and SmolLM2 cuts a text by a regular expression before it looks at any merge. At a space
# between two printable characters that expression always begins a piece, as its ` ?` alternatives come before those of
# white space: so the tokens of `a b` are those of `a`, then those of ` b`. Only between printable ASCII here, as what
# is white space beyond it differs between libraries and Unicode's versions. The look ahead stands first because Python
# then searches for the space itself, twice as fast.
BETWEEN_WORDS = re.compile(r"(?= [!-~])(?<=[!-~])")
NEVER = re.compile(r"(?!)")  # whole texts, for any other tokenizer
KEPT = 100_000  # words: some 30 MB


class FastTokenizer(ChatTokenizer):
    """A ChatTokenizer that is faster at many rows."""

    def __init__(self, plain: ChatTokenizer) -> None:
        self._words = Words(plain.library)
        self._looking = compile_template(plain.template, finalize=text_of) if plain.template else None
        self._forms: dict[tuple[bool | str, ...], str] = {}
        super().__init__(plain.library, plain.template, plain.tokens, plain.eos_ids, plain.sha256)

    def render(
        self, messages: Sequence[Message], tools: Sequence[Any] = (), *, answer_next: bool = False, where: str = ""
    ) -> str:
        """Return what ChatTokenizer's render does: by the form that these roles have, if the template has forms."""
        if tools or any(message.fields for message in messages):
            return super().render(messages, tools, answer_next=answer_next, where=where)
        roles: tuple[bool | str, ...] = (answer_next, *(message.role for message in messages))
        words = [message.content for message in messages]
        form = self._forms.get(roles)
        if form is None:
            form = self._forms[roles] = self._form(roles)
        if form and all(text and text == text.strip() for text in words):
            return form.format(*words)
        return super().render(messages, answer_next=answer_next, where=where)

    def _form(self, roles: tuple[bool | str, ...]) -> str:
        """Return what the template writes for roles, with {0}, {1} for the words; "" where it looks into or refuses."""
        turns = [{"role": role, "content": Held(f"\ue000{at}\ue001")} for at, role in enumerate(roles[1:])]
        try:
            assert self._looking is not None
            facts = {"tools": None, "documents": None, **self.tokens}
            text = self._looking.render(messages=turns, add_generation_prompt=roles[0], **facts)
        except (Looked, Exception):  # whatever it is, ChatTokenizer's own render says it
            return ""
        return re.sub("\ue000(\\d+)\ue001", r"{\1}", text.replace("{", "{{").replace("}", "}}"))

    def encode_texts(self, texts: Sequence[Cut]) -> Iterator[tuple[array[int], list[int | None]]]:
        """Yield what ChatTokenizer's encode_texts does."""
        return self._words.encode(texts)

    def tokens_before(self, text: str, at: int) -> int:
        """Return what ChatTokenizer's tokens_before does."""
        return self._words.tokens_before(text, at)


class Looked(BaseException):
    """A template looked into a message. No Exception: Jinja's own tests take one of those for an answer."""


class Held:
    """Words that a template may write, alone or joined to others, and of which it can learn nothing else.

    So what it writes around these it writes around all words that are there and have no white space around them.
    """

    __class__ = str  # type: ignore[assignment]  # for isinstance(), as in `content is string`

    def __init__(self, text: str) -> None:
        self.text = text

    def __add__(self, other: Any) -> Held:
        return Held(self.text + text_of(other))

    def __radd__(self, other: Any) -> Held:
        return Held(text_of(other) + self.text)

    def __bool__(self) -> bool:
        return True

    def strip(self, characters: None = None) -> Held:
        """Return the words without white space around them, of which they have none."""
        return Held(self.text.strip()) if characters is None else self._looked()

    def _looked(self, *_: Any) -> Any:
        raise Looked

    __getattr__ = __getitem__ = __iter__ = __len__ = __contains__ = __call__ = __hash__ = __eq__ = __ne__ = _looked
    __lt__ = __le__ = __gt__ = __ge__ = __mul__ = __rmul__ = __mod__ = __rmod__ = __str__ = __repr__ = __format__ = (
        _looked
    )
    __int__ = __float__ = __index__ = __reversed__ = _looked


def text_of(value: Any) -> Any:
    """Return the text that is held; anything else as it is."""
    return value.text if type(value) is Held else value


class Words:
    """A tokenizer that remembers the words it has seen."""

    def __init__(self, tokenizer: Tokenizer) -> None:
        self._tokenizer = tokenizer
        apart = words_apart(tokenizer)
        self._between, self._added = (BETWEEN_WORDS, added_tokens(tokenizer)) if apart else (NEVER, NEVER)
        self._known: dict[str, bytes] = {}  # a word with the space before it: its ids, four bytes each

    def encode(self, texts: Iterable[Cut]) -> Iterator[tuple[array[int], list[int | None]]]:
        """Yield the ids of each text, as the tokenizer gives them for it as a whole, with none added at either end.

        With them, for each cut, how many of them are those of the part before it; None where that alone has others.
        """
        if self._between is NEVER or len(self._known) > KEPT:
            self._known = {}
        pieces = [self._pieces(*text) for text in texts]
        heads = (head for _, cuts in pieces for _, head in cuts)
        new = list({*heads, *chain.from_iterable(part for part, _ in pieces)}.difference(self._known))
        found = self._tokenizer.encode_batch_fast(new, add_special_tokens=False)
        self._known |= {piece: array("I", encoding.ids).tobytes() for piece, encoding in zip(new, found, strict=True)}
        ids_of = self._known.__getitem__
        for part, cuts in pieces:
            counts: list[int | None] = []
            for at, head in cuts:
                before = b"".join(map(ids_of, [*part[:at], head]))
                counts.append(len(before) // 4 if ids_of(part[at]).startswith(ids_of(head)) else None)
            yield array("I", b"".join(map(ids_of, part))), counts

    def _pieces(self, text: str, cuts: Sequence[int]) -> tuple[list[str], list[tuple[int, str]]]:
        """Return a text's pieces; for each cut the piece that it lies in, by index, and what of that is before it."""
        pieces = [*chain.from_iterable(map(self._between.split, self._added.split(text)))]
        ends = [*accumulate(map(len, pieces))] if cuts else []
        inside = [bisect_left(ends, cut) for cut in cuts]
        return pieces, [(at, text[ends[at] - len(pieces[at]) : cut]) for at, cut in zip(inside, cuts, strict=True)]

    def tokens_before(self, text: str, at: int) -> int:
        """Return how many tokens of `text` begin before its character `at`."""
        edges = [0, *(match.start() for match in self._between.finditer(text))]
        begin, end = edges[bisect_right(edges, at) - 1], [*edges, None][bisect_right(edges, at)]
        offsets = self._tokenizer.encode(text[begin:end], add_special_tokens=False).offsets
        return len(next(self.encode([(text[:begin], ())]))[0]) + bisect_left(offsets, (at - begin, 0))


def added_tokens(tokenizer: Tokenizer) -> re.Pattern[str]:
    """Return what finds the tokens that are cut out of a text first of all; NEVER if one could lie over another."""
    found = sorted(token.content for token in tokenizer.get_added_tokens_decoder().values())
    begins = {token[0] for token in found}
    over = any(begins & {*token[1:]} for token in found) or any(map(str.startswith, found[1:], found))
    return re.compile(f"({'|'.join(map(re.escape, found))})") if found and not over else NEVER


def words_apart(tokenizer: Tokenizer) -> bool:
    """Return whether each word's tokens are its own: known for GPT-2's expression, also behind a split at digits."""
    rules: dict[str, Any] = json.loads(tokenizer.to_str())
    before, model = rules["pre_tokenizer"] or {}, rules["model"]
    steps = [step for step in before.get("pretokenizers", [before]) if step.get("type") != "Digits"]
    gpt2 = [{"type": "ByteLevel", "add_prefix_space": False, "use_regex": True}]
    if rules["normalizer"] or model["type"] != "BPE" or model["dropout"]:
        return False
    # An added token is found before the text is cut: one with a space inside, or that looks around itself, would lie
    # across two words.
    wide = any(t["lstrip"] or t["rstrip"] or t["single_word"] or " " in t["content"] for t in rules["added_tokens"])
    return not wide and [{key: step.get(key) for key in gpt2[0]} for step in steps] == gpt2
