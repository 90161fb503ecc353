"""A chat tokenizer for many rows, with the tokens of ChatTokenizer.

Most templates write a message's words as they are, and most tokenizers first cut a text at its spaces. Where their own
rules say so, a row needs no template engine, and no word is tokenized twice; where the template also writes special
tokens around the words, a row's text is never made: its tokens are put together of those of the words and of the form.

An edit of this file makes no token set anew, as one of SHAPERS (common/data/build.py) does, because the tokens are the
same. Whoever mends a token that was another one raises FORMAT in common/data/tokens.py, so that none stays stored.
"""

from __future__ import annotations

import json
import re
import string
from array import array
from bisect import bisect_left, bisect_right
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from itertools import accumulate, chain, islice
from typing import TYPE_CHECKING, Any

import numpy as np

from common.data.chat import AT_ONCE, ChatTokenizer, Cut, compile_template
from common.data.rows import Message, Row
from common.data.tokens import Encoded
from common.errors import DataError

if TYPE_CHECKING:
    from tokenizers import Tokenizer

# Byte-level BPE as of GPT-2 and SmolLM2 cuts a text by a regular expression before it looks at any merge. At a space
# between two printable characters that expression always begins a piece, as its ` ?` alternatives come before those of
# white space: so the tokens of `a b` are those of `a`, then those of ` b`. Only between printable ASCII here, as what
# is white space beyond it differs between libraries and Unicode's versions. The look ahead stands first because Python
# then searches for the space itself, twice as fast.
BETWEEN_WORDS = re.compile(r"(?= [!-~])(?<=[!-~])")
SPACE = re.compile(r" (?=[!-~])(?<=[!-~] )")  # the same places, and the space itself
NEVER = re.compile(r"(?!)")  # whole texts, for any other tokenizer
KEPT = 50_000  # words: some 15 MB


class FastTokenizer(ChatTokenizer):
    """A ChatTokenizer that is faster at many rows."""

    def __init__(self, plain: ChatTokenizer) -> None:
        vars(self).update(vars(plain))  # what it knows takes a tenth of a second to find out anew
        self._words = Words(plain.library)
        self._looking = compile_template(plain.template, finalize=text_of) if plain.template else None
        self._forms: dict[tuple[bool | str, ...], str] = {}
        self._pieces = Pieces(plain.library)
        self._layouts: dict[str, Layout | None] = {}

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

    def encode_rows(
        self, rows: Iterable[Row], system: str | None = None, max_tokens: int | None = None, supervise_all: bool = False
    ) -> Iterator[Encoded | DataError]:
        """Yield what ChatTokenizer's encode_rows does: by the layout of a row's roles, if it has one and all fits."""
        waiting = iter(rows)
        while part := list(islice(waiting, AT_ONCE)):
            found = [None] * len(part) if supervise_all else self._laid_out(part, system, max_tokens)
            others = [row for row, one in zip(part, found, strict=True) if one is None]
            rest = super().encode_rows(others, system, max_tokens, supervise_all)
            yield from (next(rest) if one is None else one for one in found)

    def _laid_out(self, rows: Sequence[Row], system: str | None, max_tokens: int | None) -> list[Encoded | None]:
        """Return the tokens of rows, None for those that ChatTokenizer has to look at itself."""
        found: list[Encoded | None] = []
        if len(self._pieces) > KEPT:
            self._pieces = Pieces(self.library)
        for row in rows:
            layout, words = self._taken(row, system)
            ids, mask = layout.joined(words, self._pieces) if layout else (b"", b"")
            fits = ids and (max_tokens is None or len(mask) <= max_tokens)
            found.append(Encoded(np.frombuffer(ids, np.uint32), np.frombuffer(mask, np.uint8)) if fits else None)
        return found

    def _taken(self, row: Row, system: str | None) -> tuple[Layout | None, list[list[str]]]:
        """Return a row's layout and the words of each message; None where there is no layout, or it is not enough."""
        words: list[list[str]] = []
        roles, texts = row.roles, [str(text, "utf-8") for text in row.words.split(b"\xff")]
        if system and not roles.startswith("system"):
            roles, texts = f"system {roles}", [system, *texts]
        if roles not in self._layouts:
            self._layouts[roles] = self._layout(roles.split(" "))
        layout = self._layouts[roles]
        if layout is None or row.fields or row.tools:
            return None, words
        whole = "\0".join(texts)  # more may be found in it than in the texts, never less
        if self._markers.search(whole) or self._words.added.search(whole):
            return None, words
        for text, lead in zip(texts, layout.leads, strict=True):
            if not text or text != text.strip():
                return None, words
            words.append(SPACE.split(text))
            words[-1][0] = lead + words[-1][0]
        return layout, words

    def _layout(self, roles: list[str]) -> Layout | None:
        """Return the layout of conversations with these roles ("assistant-" is not trained on); None if it has none.

        It has one where the template has a form and writes a special token, perhaps with other text behind it, before
        each text; where what opens an answer is what it writes before one; and where a special token ends each answer.
        """
        added, names = self._words.added, [role.rstrip("-") for role in roles]
        ends = {token for token, text in self.library.get_added_tokens_decoder().items() if added.search(text.content)}
        parts = pieces_of(self._form((False, *names)))
        if len(parts) != len(roles) + 1 or "assistant" not in roles or not {*self.eos_ids} <= ends:
            return None
        leads, fixed, tails = [], [], []
        for at, part in enumerate(parts):
            tail = "" if at == len(parts) - 1 else added.split(part)[-1]
            # Between two texts a special token stands first, so that no word goes on behind a text.
            if (at and not added.match(part)) or self._words.begins & {*tail}:
                return None
            leads.append(f" {tail}")
            fixed.append(array("I", self.encode_text(part[: len(part) - len(tail)])))
            tails.append(array("I", self.encode_text(tail)).tobytes())
        answers: list[int] = []
        for at, role in enumerate(roles):
            if role != "assistant":
                answers.append(0)
                continue
            opened = pieces_of(self._form((True, *names[:at])))
            *before, last = pieces_of(self._form((False, *names[: at + 1]))) or [""]
            inside = [*map(self.eos_ids.__contains__, self.encode_text(last))]
            if (
                opened != parts[: at + 1]
                or before != opened
                or not parts[at + 1].startswith(last)
                or True not in inside
            ):
                return None
            answers.append(inside.index(True) + 1)
        return Layout([ids.tobytes() for ids in fixed], leads[:-1], tails, answers)

    def encode_texts(self, texts: Sequence[Cut]) -> Iterator[tuple[array[int], list[int | None]]]:
        """Yield what ChatTokenizer's encode_texts does."""
        return self._words.encode(texts)

    def tokens_before(self, text: str, at: int) -> int:
        """Return what ChatTokenizer's tokens_before does."""
        return self._words.tokens_before(text, at)


@dataclass(frozen=True)
class Layout:
    """The tokens that a template writes around each text of a conversation, as bytes, four an id.

    `fixed` are those before each text and behind the last, but for what no special token parts from the text: of that
    `leads` has the words, and `tails` the tokens that it has alone. `answers` says for each text how many of the tokens
    behind it are trained on with it, 0 for one that is not.
    """

    fixed: Sequence[bytes]
    leads: Sequence[str]
    tails: Sequence[bytes]
    answers: Sequence[int]

    def joined(self, texts: Sequence[Sequence[str]], ids_of: Mapping[str, bytes]) -> tuple[bytes, bytes]:
        """Return a row's ids and mask, of the words of its texts; none where an answer begins inside of a token."""
        ids, mask = self.fixed[0], b""
        for words, fixed, tail, trained in zip(texts, self.fixed[1:], self.tails, self.answers, strict=False):
            said = b"".join(map(ids_of.__getitem__, words))
            if trained:
                if not said.startswith(tail):
                    return b"", b""
                # A byte for each id of four: 0 up to the answer, 1 from there through its end.
                mask = mask.ljust((len(ids) + len(tail)) // 4, b"\0").ljust(
                    (len(ids) + len(said)) // 4 + trained, b"\1"
                )
            ids += said + fixed
        return ids, mask.ljust(len(ids) // 4, b"\0")


def pieces_of(form: str) -> list[str]:
    """Return what a form has around its texts, if it holds each of them once and in their order, else []."""
    pieces = [""] if form else []
    for literal, field, *_ in string.Formatter().parse(form):
        pieces[-1] += literal
        if field is not None:
            if field != str(len(pieces) - 1):
                return []
            pieces.append("")
    return pieces


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


class Pieces(dict[str, bytes]):
    """The ids, four bytes each, of every word that was asked for, where it stands behind a space.

    A word with a space before it in here is another one, without any.
    """

    def __init__(self, tokenizer: Tokenizer) -> None:
        self._tokenizer = tokenizer
        super().__init__()

    def __missing__(self, word: str) -> bytes:
        # By itself: for single words the library's batches take half as long again.
        text = word[1:] if word[0] == " " else f" {word}"
        self[word] = ids = array("I", self._tokenizer.encode(text, add_special_tokens=False).ids).tobytes()
        return ids


class Words:
    """A tokenizer that remembers the words it has seen."""

    def __init__(self, tokenizer: Tokenizer) -> None:
        self._tokenizer = tokenizer
        apart = words_apart(tokenizer)
        self._between, self.added = (BETWEEN_WORDS, added_tokens(tokenizer)) if apart else (NEVER, NEVER)
        self.begins = {token.content[0] for token in tokenizer.get_added_tokens_decoder().values()}
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
        pieces = [*chain.from_iterable(map(self._between.split, self.added.split(text)))]
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
