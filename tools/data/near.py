"""Prompts in nearly the same words: found exactly, in a time that grows with the prompts and not with their square.

Two sets of n words, NEAR alike, share ceil(NEAR x n) of them. So of each one's rarest words, any n - ceil(NEAR x n) + 2
hold two that both have (prefix filtering: Chaudhuri et al., "A primitive operator for similarity joins in data
cleaning", ICDE 2006; with more than one word in common: Wang et al., "Can we beat the prefix filtering?", SIGMOD 2012).
Only prompts with such a pair in common are compared.
"""

from __future__ import annotations

import heapq
import math
import re
from collections import Counter, defaultdict
from collections.abc import Iterator, Mapping, Sequence
from itertools import combinations, islice
from typing import TypeVar

from common.data.rows import plain
from tools.progress import Watch, unwatched

Place = TypeVar("Place")
NEAR = 0.8  # share of common words (Jaccard) from which two prompts count as nearly the same
NEAR_WORDS = 4  # shorter prompts are too alike by nature: "What is X?"
PAIRED = 100  # words of a prompt: pairs grow with their square, so longer ones are compared by single rare words
EXACT = 20_000  # prompts: up to here all that share a pair are compared, and above the first TRIED of them
TRIED = 1_000


def canonical(text: str) -> str:
    """Return a text for comparison: case, white space and end punctuation do not count."""
    return plain(text).rstrip(" .?!")


def near_pairs(
    ours: Sequence[tuple[str, Place]], theirs: Sequence[tuple[str, Place]], watch: Watch = unwatched
) -> Iterator[tuple[Place, Place]]:
    """Yield the places of every one of ours (text, place) and of the first of theirs that has NEAR of its words.

    Of equal texts the first stands for all. Above EXACT of theirs, only the first TRIED that share a pair of rare words
    are looked at.
    """
    once: dict[str, tuple[str, Place]] = {}
    for text, where in theirs:
        once.setdefault(canonical(text), (text, where))
    known, places = list(once), [where for _, where in once.values()]
    their_words = [words(text) for text, _ in once.values()]
    our_words = their_words if ours is theirs and len(once) == len(ours) else [words(text) for text, _ in ours]
    limit = None if len(once) <= EXACT else TRIED
    for (text, where), part, candidates in zip(
        watch(ours, "comparing prompts", len(ours)),
        our_words,
        sharing(our_words, their_words, ours is theirs),
        strict=True,
    ):
        for at in islice(candidates, limit):
            if overlap(part, their_words[at]) >= NEAR and known[at] != canonical(text):
                yield where, places[at]
                break


def sharing(
    ours: Sequence[frozenset[str]], theirs: Sequence[frozenset[str]], same: bool = False
) -> Iterator[Iterator[int]]:
    """Yield, for each of ours, those of theirs (by index, in order) that can be near it; one may come twice.

    With `same`, ours are theirs, of which equal ones may come more often here.
    """
    frequency = Counter(word for part in (*ours, *theirs) for word in part)
    # A word that one prompt alone has (with `same` it is counted on both sides) is in common with no other: a number, a
    # name, a typing error. Most words of a language are, and an index of all would be twice as large.
    common = [word for word, count in frequency.items() if count > 1 + same]
    order = sorted(common, key=lambda word: (frequency[word], word))
    rank = {word: at for at, word in enumerate(order)}
    index: dict[int, list[int]] = defaultdict(list)
    for at, part in enumerate(theirs):
        for key in keys(part, rank):
            index[key].append(at)
    for part in ours:
        yield heapq.merge(*(index[key] for key in keys(part, rank) if key in index))


def words(text: str) -> frozenset[str]:
    """Return the different words of a text, case folded; none for a text too short to compare."""
    found = frozenset(re.findall(r"\w+", text.casefold()))
    return found if len(found) >= NEAR_WORDS else frozenset()


def keys(part: frozenset[str], rank: Mapping[str, int]) -> list[int]:
    """Return what two similar sets have at least one of in common: pairs of their rarest words, or such words alone.

    Words without a rank are in no other set; they are rarer than all that have one.
    """
    ranked = sorted([rank[word] for word in part if word in rank])
    more = len(ranked) - math.ceil(NEAR * len(part))  # words that a similar set may lack, beside those without a rank
    if more < 0:
        return []
    pairs = [one * len(rank) + other for one, other in combinations(ranked[: more + 2], 2)]
    # Sets of both kinds may meet where sizes differ by NEAR at most: between, a set has keys of both.
    if len(part) <= PAIRED * NEAR:
        return pairs
    alone = [-1 - word for word in ranked[: more + 1]]  # below zero, and so no pair's
    return alone if len(part) > PAIRED else pairs + alone


def overlap(one: frozenset[str], other: frozenset[str]) -> float:
    """Return the Jaccard similarity of two sets of words."""
    common = len(one & other)
    return common / (len(one) + len(other) - common) if common else 0.0
