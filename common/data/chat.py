"""Chat rows to tokens: the base model's own template, and a mask over what the assistant says.

Rendering equals `apply_chat_template` of `transformers` (a test holds the two together) without importing it,
so that the path to a board needs no torch. The text is tokenized whole, never in pieces, so training sees the
tokens that the model will see; the prompt part of a row must equal, id for id, what generation would feed.
"""

from __future__ import annotations

import contextlib
import hashlib
import itertools
import json
import re
from array import array
from bisect import bisect_left
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import replace
from os.path import commonprefix
from pathlib import Path
from typing import TYPE_CHECKING, Any, NoReturn, TypeVar

import numpy as np

from common.data.rows import ROLES, Message, Row
from common.data.tokens import Encoded
from common.errors import DataError
from common.model.bases import find_template, settings_in

if TYPE_CHECKING:
    from jinja2 import Template
    from tokenizers import Tokenizer

Cut = tuple[str, Sequence[int]]  # a text, and places in it: has what stands before each the same tokens alone?
AT_ONCE = 128  # rows that are tokenized together: enough for every core, and what is made of them stays in its caches
TOKEN_NAMES = ("bos_token", "eos_token", "unk_token", "sep_token", "pad_token", "cls_token", "mask_token")
PROBE = "qzjq"  # a word that no template writes itself
# Of a function or a call to it: what a template must write, beside the names and descriptions of its parameters.
WRITTEN = ("name", "description", "arguments")
PRIVATE_USE = 0xF0000  # the first of 65,534 characters that Unicode leaves without a meaning
T = TypeVar("T")
# What a role marker looks like in this family's templates: <|user|>, </s>, [INST], ### Answer:
MARKER_SHAPES = re.compile(r"<<[^<>\s]+>>|<\|?/?[^<>\s]+\|?>|\[/?[A-Z][A-Z_]+\]|#{2,} ?\w+:")


class ChatTokenizer:
    """A tokenizer with its chat template, read from a Hugging Face folder. `load` makes one."""

    suppressed: Sequence[int] = ()  # ids that generation_config.json leaves out of answers

    def __init__(
        self, tokenizer: Tokenizer, template: str, tokens: Mapping[str, str], stop_ids: Sequence[int], sha256: str
    ) -> None:
        self.library = tokenizer
        self.template = template
        self.tokens = dict(tokens)
        self.sha256 = sha256
        self._compiled = compile_template(template) if template else None
        # The largest id and one, not the number of tokens: ids may have holes.
        self.vocab_size = max(tokenizer.get_vocab(with_added_tokens=True).values()) + 1
        added = tokenizer.get_added_tokens_decoder()
        own_text = self._own_text()
        # The special token that closes an answer in the template may be another one than eos_token.
        special = {id for id, token in added.items() if token.special}
        turn_end = [id for id in self.encode_text(own_text[-1] if own_text else "") if id in special][:1]
        named = [tokenizer.token_to_id(self.tokens["eos_token"])] if "eos_token" in self.tokens else []
        stops = [id for id in [*named, *stop_ids, *turn_end] if id is not None]
        self.eos_ids = tuple(dict.fromkeys(stops))
        markers = {added[id].content for id in special}
        markers |= {marker for piece in own_text for marker in MARKER_SHAPES.findall(piece)}
        # The longest first: an alternation takes the first that fits, which could be the beginning of a longer one.
        self._markers = re.compile("|".join(re.escape(m) for m in sorted(markers, key=len, reverse=True)) or r"(?!)")

    @classmethod
    def load(cls, folder: Path) -> ChatTokenizer:
        """Read tokenizer.json, tokenizer_config.json and the chat template of `folder`. Raises DataError."""
        from tokenizers import AddedToken, Tokenizer

        # As the file stands. transformers 5 instead rebuilds the pipeline of a folder whose tokenizer_class is
        # LlamaTokenizer, and where the file puts a space before what follows a special token (Llama-2's layout) its ids
        # differ from the file's own. With `tokenizer_class: PreTrainedTokenizerFast` it reads the file, and they agree.
        path = folder / "tokenizer.json"
        try:
            raw = path.read_bytes()
            tokenizer = Tokenizer.from_str(raw.decode("utf-8"))
        except Exception as error:  # the Rust library raises plain Exception for whatever it cannot parse
            raise DataError(f"cannot read the tokenizer: {error}", where=str(path)) from error
        # tokenizer.json may ask for both, and the rows would be cut or filled without a word.
        tokenizer.no_truncation()
        tokenizer.no_padding()
        settings = settings_in(folder / "tokenizer_config.json")
        tokens = special_tokens({**settings_in(folder / "special_tokens_map.json"), **settings})
        # transformers marks the named tokens as special even where tokenizer.json does not
        known = [text for text in tokens.values() if tokenizer.token_to_id(text) is not None]
        tokenizer.add_special_tokens([AddedToken(text, normalized=False) for text in known])
        template = find_template(folder, settings)
        stop_ids = stop_tokens(folder)
        digest = hashlib.sha256(raw)
        digest.update(json.dumps([template, tokens, stop_ids], sort_keys=True).encode())
        made = cls(tokenizer, template, tokens, stop_ids, digest.hexdigest())
        made.suppressed = settings_in(folder / "generation_config.json").get("suppress_tokens") or ()
        return made

    @property
    def never_ids(self) -> tuple[int, ...]:
        """Return the ids that no answer may hold: the unknown token's, and what generation_config.json suppresses."""
        unknown = self.library.token_to_id(self.tokens.get("unk_token", ""))
        never = {*self.suppressed, *([] if unknown is None or unknown in self.eos_ids else [unknown])}
        return tuple(sorted(id for id in never if id < self.vocab_size))

    def encode_text(self, text: str) -> list[int]:
        """Return the ids of plain text, with no token added at either end."""
        return list(self.library.encode(text, add_special_tokens=False).ids)

    def encode_texts(self, texts: Sequence[Cut]) -> Iterator[tuple[array[int], list[int | None]]]:
        """Yield a text's ids, and how many are those of what is before each cut; None where that alone has others."""
        parts = [part for text, cuts in texts for part in (text, *(text[:cut] for cut in cuts))]
        found = (part.ids for part in self.library.encode_batch_fast(parts, add_special_tokens=False))
        for (_, cuts), ids in zip(texts, found, strict=False):
            heads = list(itertools.islice(found, len(cuts)))
            yield array("I", ids), [len(head) if ids[: len(head)] == head else None for head in heads]

    def tokens_before(self, text: str, at: int) -> int:
        """Return how many tokens of `text` begin before its character `at`."""
        return bisect_left(self.library.encode(text, add_special_tokens=False).offsets, (at, 0))

    def decode(self, ids: Iterable[int], skip_special: bool = False) -> str:
        """Return the text of ids; `skip_special` leaves out end and role tokens."""
        return str(self.library.decode([int(id) for id in ids], skip_special_tokens=skip_special))

    def marker_in(self, text: str) -> str | None:
        """Return the first template marker or special token written out in `text`, which would forge a turn."""
        found = self._markers.search(text)
        return found.group() if found else None

    def render(
        self, messages: Sequence[Message], tools: Sequence[Any] = (), *, answer_next: bool = False, where: str = ""
    ) -> str:
        """Return the conversation as the template writes it; `answer_next` opens the assistant's turn at the end.

        Raises DataError when there is no template or the template refuses the conversation.
        """
        from jinja2.exceptions import TemplateError

        if self._compiled is None:
            raise DataError("the base model has no chat template", where=where, todo="use an instruction-tuned base")
        turns = [{"role": turn.role, "content": turn.content, **(turn.fields or {})} for turn in messages]
        facts = {"tools": list(tools) or None, "documents": None, **self.tokens}
        try:
            return self._compiled.render(messages=turns, add_generation_prompt=answer_next, **facts)
        except (TemplateError, TypeError, ValueError, LookupError, ArithmeticError, AttributeError) as error:
            what = f"the base model's chat template refuses this conversation: {error}"
            raise DataError(what, where=where) from error

    def prompt_ids(self, prompt: str, system: str | None = None) -> list[int]:
        """Return the ids to generate an answer from: the prompt in the template, the assistant's turn opened.

        A tokenizer without a template belongs to a model that continues plain text: the prompt is that text, or this
        raises DataError where there is none.
        """
        if not self.template:
            if system:
                raise DataError("a model without a chat template takes no system prompt", where="the prompt")
            if not prompt:
                raise DataError("it is empty: there is no text to continue", where="the prompt", todo="write its start")
            return self.encode_text(prompt)
        asked = Row(with_system((Message("user", prompt),), system), where="the prompt")
        messages = asked.messages
        self._refuse_markers(asked, messages)
        return self.encode_text(self.render(messages, answer_next=True, where=asked.where))

    def encode_rows(
        self, rows: Iterable[Row], system: str | None = None, max_tokens: int | None = None, supervise_all: bool = False
    ) -> Iterator[Encoded | DataError]:
        """Yield the tokens and mask of each row, ids uint32 [n] and mask uint8 [n], or the error that refuses it.

        mask is 1 on every assistant turn that is trained on, from its first token through its end token, 0 elsewhere
        (1 everywhere with `supervise_all`). `system` is put before a row that has no system message. A row of
        more than `max_tokens` tokens is shortened: words of users and tools first (oldest first, from their end),
        markers and answers last; only when that is not enough is the end cut off.
        """
        waiting = iter(rows)
        while part := list(itertools.islice(waiting, AT_ONCE)):
            talks = [row.but(messages=with_system(row.messages, system)) if system else row for row in part]
            for talk, encoded in zip(talks, self._encode(talks), strict=True):
                yield caught(self._fitted, talk, encoded, max_tokens, supervise_all)

    def _fitted(self, row: Row, found: Encoded | DataError, max_tokens: int | None, supervise_all: bool) -> Encoded:
        encoded = given(found)
        if max_tokens is not None and len(encoded.ids) > max_tokens:
            encoded = self._shorten(encoded, row, max_tokens)
        if supervise_all:
            if not all(message.trained for message in row.messages):
                raise DataError("a message of weight 0, and data_config.supervise_all trains on all", where=row.where)
            encoded = replace(encoded, mask=np.ones_like(encoded.mask))
        if not encoded.mask[1:].any():
            todo = "raise data_config.max_length or shorten the row"
            raise DataError(f"nothing of the answer is left in {len(encoded.ids)} tokens", where=row.where, todo=todo)
        return encoded

    def _encode(self, rows: Sequence[Row]) -> Iterator[Encoded | DataError]:
        written = [caught(self._written, row) for row in rows]
        found = self.encode_texts([text for text in written if not isinstance(text, DataError)])
        for row, text in zip(rows, written, strict=True):
            yield text if isinstance(text, DataError) else caught(self._masked, row, text, *next(found))

    def _written(self, row: Row) -> Cut:
        """Return the whole text, cut where each answer that is trained on begins."""
        messages = row.messages  # once: a row makes them at each look
        self._refuse_markers(row, messages)
        if row.tools or row.fields:
            self._refuse_lost(row, messages)
        text, cuts = self._render(row, messages), list[int]()
        for turn in trained_turns(messages):
            opened = self._render(row, messages[:turn], answer_next=True)
            # A template that strips, or a token that lies across the seam, would teach another prompt.
            cuts.append(len(opened) if text.startswith(opened) else refuse_prompt(row.where))
        return text, cuts

    def _render(self, row: Row, messages: Sequence[Message], answer_next: bool = False) -> str:
        return self.render(messages, row.tools, answer_next=answer_next, where=row.where)

    def _refuse_lost(self, row: Row, messages: Sequence[Message]) -> None:
        """Refuse a row with tools of which the template leaves words out. Raises DataError."""
        words: list[str] = []

        def marked(value: Any) -> Any:
            # A value of JSON in which each text has a character before it that is nowhere else.
            if isinstance(value, str) and value:
                words.append(value)
                return chr(PRIVATE_USE + len(words)) + value
            if isinstance(value, Mapping):
                return {marked(key): marked(inner) for key, inner in value.items()}
            return [*map(marked, value)] if isinstance(value, list) else value

        def described(value: Any, named: bool = False) -> Any:
            # A JSON schema, names of properties and descriptions marked: types may be written in other words.
            if not isinstance(value, Mapping):
                return [*map(described, value)] if isinstance(value, list) else value
            if named:
                return {marked(key): described(inner) for key, inner in value.items()}
            said = {key: marked(value[key]) for key in value if key == "description"}
            return {key: described(inner, key == "properties") for key, inner in value.items()} | said

        def function(entry: Mapping[str, Any]) -> dict[str, Any]:
            held = {key: marked(of) if key in WRITTEN else described(of) for key, of in entry["function"].items()}
            return {**entry, "function": held}

        turns = []
        for turn in messages:
            calls = (turn.fields or {}).get("tool_calls")
            fields = {**(turn.fields or {}), **({"tool_calls": [*map(function, calls)]} if calls else {})}
            turns.append(replace(turn, content=marked(turn.content), fields=fields))
        text = self.render(turns, [*map(function, row.tools)], where=row.where)
        if lost := [word for at, word in enumerate(words, start=1) if chr(PRIVATE_USE + at) not in text]:
            what = f"the base model's chat template leaves out words of a row with tools: {lost[0][:40]!r}"
            todo = "use a base whose template writes tools and the calls to them, or remove the rows with tools"
            raise DataError(what, where=row.where, todo=todo)

    def _masked(self, row: Row, cut: Cut, ids: array[int], starts: Sequence[int | None]) -> Encoded:
        mask, text, messages = np.zeros(len(ids), np.uint8), cut[0], row.messages
        for turn, begin in zip(trained_turns(messages), starts, strict=True):
            start, last = refuse_prompt(row.where) if begin is None else begin, len(ids)
            if turn < len(messages) - 1:  # the turn's own end, not that of what follows
                closed = self._render(row, messages[: turn + 1])
                same = closed if text.startswith(closed) else commonprefix((closed, text))  # noqa: RUF071 - no paths
                last = self.tokens_before(text, len(same))
            mask[start : self._end_of_turn(ids[start:last], row.where) + start] = 1
        return Encoded(np.frombuffer(ids, np.uint32), mask)

    def _end_of_turn(self, ids: array[int], where: str) -> int:
        """Return how many of the ids from an answer's first on are its own, through its end token."""
        # Contents hold no end token: they were checked for markers.
        ends = [ids.index(id) + 1 for id in self.eos_ids if id in ids]
        if not ends:
            what = "the chat template puts no end token after an answer: the model would never learn to stop"
            raise DataError(what, where=where, todo="use a base whose template ends turns with eos_token")
        return min(ends)

    def _shorten(self, encoded: Encoded, row: Row, max_tokens: int) -> Encoded:
        removed = 0
        for at, turn in enumerate(row.messages):
            if turn.role not in ("user", "tool") or len(turn.content) < 2:
                continue
            # By halves: only tokenizing tells how long a text is, and a long row would otherwise cost a pass a
            # character. Where even one character is too many, it stays.
            sizes = range(len(turn.content) - 1, 0, -1)

            def fits(size: int, row: Row = row, at: int = at) -> bool:
                shorter = shortened(row, at, size)
                return len(self.encode_text(self._render(shorter, shorter.messages))) <= max_tokens

            row = shortened(row, at, sizes[bisect_left(sizes, True, hi=len(sizes) - 1, key=fits)])
            removed += len(turn.content) - len(row.messages[at].content)
            encoded = given(*self._encode([row]))
            if len(encoded.ids) <= max_tokens:
                return replace(encoded, cut=f"{removed} characters of the prompt")
        cut = f"{removed} characters of the prompt and the last {len(encoded.ids) - max_tokens} tokens"
        return Encoded(encoded.ids[:max_tokens], encoded.mask[:max_tokens], cut)

    def _refuse_markers(self, row: Row, messages: Sequence[Message]) -> None:
        texts = [(f"the {turn.role}'s text contains", turn.content) for turn in messages]
        called = [row.tools, row.fields] if row.tools or row.fields else ""
        for what, text in [*texts, ("a tool or a call to it contains", json.dumps(called, ensure_ascii=False))]:
            if (marker := self.marker_in(text)) is not None:
                todo = "write the marker another way, for example with a space inside"
                forged = f"{what} {marker!r}: the base model reads that as structure"
                raise DataError(forged, where=row.where, todo=todo)

    def _own_text(self) -> list[str]:
        """Return what the template itself writes around the turns of a conversation; the last is behind an answer.

        Empty where there is no template, or it refuses such a conversation.
        """
        pieces: list[str] = []
        tool = {"type": "function", "function": {"name": PROBE, "arguments": {}}}
        system, user, answer = (Message(role, PROBE) for role in ROLES)
        call = replace(answer, fields={"tool_calls": [tool]})
        # Some templates know no tools, and some no system message.
        for turns in ([user, call, replace(user, role="tool"), answer], [system, user, answer], [user, answer]):
            tools = [tool] if call in turns else []
            with contextlib.suppress(DataError):
                # With the assistant's turn opened and closed: how a template begins an answer, and how it ends one.
                for text in (self.render(turns[:-1], tools, answer_next=True), self.render(turns, tools)):
                    pieces += text.split(PROBE)
        return pieces


def given(found: T | DataError) -> T:
    """Return what was found. Raises it where it is an error."""
    if isinstance(found, DataError):
        raise found
    return found


def trained_turns(messages: Sequence[Message]) -> list[int]:
    """Return which messages are answers that are trained on, by index."""
    return [at for at, turn in enumerate(messages) if turn.role == "assistant" and turn.trained]


def refuse_prompt(where: str) -> NoReturn:
    """Raise DataError for a row whose answer stands behind other tokens than it would be generated from."""
    what = "the prompt part of this row has other tokens than generation would feed"
    raise DataError(what, where=where, todo="take white space off the answer's start, or use another base")


def caught(work: Callable[..., T], row: Row, *arguments: Any) -> T | DataError:
    """Return what `work` gives for a row and the other arguments, or the DataError that it raises."""
    try:
        return work(row, *arguments)
    except (DataError, RecursionError) as error:
        return error if isinstance(error, DataError) else DataError("nested too deeply", where=row.where)


def shortened(row: Row, at: int, size: int) -> Row:
    """Return a row with the first `size` characters of turn `at`, less white space at their end; one at least."""
    text = row.messages[at].content
    kept = replace(row.messages[at], content=text[:size].rstrip() or text.strip()[:1])
    return row.but(messages=(*row.messages[:at], kept, *row.messages[at + 1 :]))


def with_system(messages: Sequence[Message], system: str | None) -> tuple[Message, ...]:
    """Return the conversation with `system` before it, unless it brings its own system message."""
    if system and messages[0].role != "system":
        return (Message("system", system), *messages)
    return tuple(messages)


def compile_template(source: str, **settings: Any) -> Template:
    """Compile a chat template in the sandbox, with the filters and functions that `transformers` gives it.

    One thing is left out on purpose: `strftime_now`. A template that asks for today's date would make other
    tokens every day; the templates that use it fall back to a fixed date when it is missing.
    """
    from jinja2 import ext
    from jinja2.exceptions import TemplateError
    from jinja2.sandbox import ImmutableSandboxedEnvironment

    def raise_exception(message: str) -> None:
        raise TemplateError(message)

    def tojson(value: Any, ensure_ascii: bool = False, **options: Any) -> str:
        return json.dumps(value, ensure_ascii=ensure_ascii, **options)

    # The settings of transformers' own renderer (utils/chat_template_utils.py): blocks leave no line and no indent.
    environment = ImmutableSandboxedEnvironment(
        trim_blocks=True, lstrip_blocks=True, extensions=[ext.loopcontrols], **settings
    )
    environment.filters["tojson"] = tojson
    environment.globals["raise_exception"] = raise_exception
    # `{% generation %}` marks what the assistant says; it changes nothing in the text.
    source = re.sub(r"(?<={%)([-+]?\s*)generation\b", r"\1if true", source)
    source = re.sub(r"(?<={%)([-+]?\s*)endgeneration\b", r"\1endif", source)
    try:
        return environment.from_string(source)
    except (TemplateError, RecursionError) as error:
        raise DataError(f"the base model's chat template does not parse: {error}") from error


def special_tokens(settings: Mapping[str, Any]) -> dict[str, str]:
    """Return the named tokens of a tokenizer config, which templates may use: {"eos_token": "</s>", ...}."""
    named = {name: settings.get(name) for name in TOKEN_NAMES}
    texts = {name: token.get("content") if isinstance(token, dict) else token for name, token in named.items()}
    return {name: text for name, text in texts.items() if isinstance(text, str)}


def stop_tokens(folder: Path) -> list[int]:
    """Return the end ids that the model's configs name: generation_config.json's, else config.json's."""
    named = [settings_in(folder / name).get("eos_token_id") for name in ("generation_config.json", "config.json")]
    found: Any = next((ids for ids in named if ids is not None), [])
    return [int(id) for id in (found if isinstance(found, list) else [found])]
