"""Texts to tokens, many at once: on all cores, and each word once where a tokenizer's rules make words independent."""

from __future__ import annotations

import json
import re
from bisect import bisect_left, bisect_right
from collections.abc import Sequence
from itertools import chain
from typing import TYPE_CHECKING, Any

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


class Words:
    """A tokenizer that remembers the words it has seen."""

    def __init__(self, tokenizer: Tokenizer) -> None:
        self._tokenizer = tokenizer
        self._between = BETWEEN_WORDS if words_apart(tokenizer) else NEVER
        self._known: dict[str, list[int]] = {}  # a word with the space before it: its ids

    def encode(self, texts: Sequence[str]) -> list[list[int]]:
        """Return the ids of each text: what the tokenizer gives for it as a whole, no token added at either end."""
        if self._between is NEVER or len(self._known) > KEPT:
            self._known = {}
        pieces = [self._between.split(text) for text in texts]
        new = list({*chain.from_iterable(pieces)}.difference(self._known))
        found = self._tokenizer.encode_batch(new, add_special_tokens=False)
        self._known |= {piece: encoding.ids for piece, encoding in zip(new, found, strict=True)}
        return [list(chain.from_iterable(map(self._known.__getitem__, part))) for part in pieces]

    def tokens_before(self, text: str, at: int) -> int:
        """Return how many tokens of `text` begin before its character `at`."""
        edges = [0, *(match.start() for match in self._between.finditer(text))]
        begin, end = edges[bisect_right(edges, at) - 1], [*edges, None][bisect_right(edges, at)]
        offsets = self._tokenizer.encode(text[begin:end], add_special_tokens=False).offsets
        return len(self.encode([text[:begin]])[0]) + bisect_left(offsets, (at - begin, 0))


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
