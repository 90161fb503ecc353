"""Prompts in nearly the same words: what a comparison of all with all finds, without one."""

from __future__ import annotations

import random

import pytest

from tools.data import near

WORDS = [f"w{at}" for at in range(400)]
Prompts = list[tuple[str, str]]


def prompts(sizes: tuple[int, int], count: int, name: str, seed: int) -> Prompts:
    """Prompts of so many words, a third of them an earlier one with a few words taken out, put in or put elsewhere."""
    draw = random.Random(seed)
    made: list[list[str]] = []
    for _ in range(count):
        found = draw.sample(WORDS, draw.randint(*sizes))
        if made and draw.random() < 1 / 3:
            found = list(draw.choice(made))
            for _ in range(draw.randint(0, max(1, len(found) // 6))):
                found[draw.randrange(len(found))] = draw.choice(WORDS)
            draw.shuffle(found)
            found = found[: len(found) - draw.randint(0, len(found) // 6)]
        made.append(found)
    return [(" ".join(words), f"{name}{at}") for at, words in enumerate(made)]


def compared_with_all(ours: Prompts, theirs: Prompts) -> list[tuple[str, str]]:
    """The first of theirs near each of ours, by comparing every pair."""
    found = []
    for text, where in ours:
        for other, place in theirs:
            one, two = near.words(text), near.words(other)
            if near.canonical(text) != near.canonical(other) and len(one & two) >= near.NEAR * len(one | two) > 0:
                found.append((where, place))
                break
    return found


RARE = prompts((8, 30), 60, "a", 5)


@pytest.mark.parametrize("sizes", [(1, 8), (15, 30), (70, 130)], ids=["short", "usual", "long"])
def test_every_near_pair_is_found_that_a_full_comparison_finds(sizes):
    """Long ones lie on both sides of the size from which single words are compared by."""
    ours, theirs = prompts(sizes, 150, "a", 1), prompts(sizes, 150, "a", 1)[::2] + prompts(sizes, 75, "b", 2)
    expected = compared_with_all(ours, theirs)
    assert list(near.near_pairs(ours, theirs)) == expected
    assert 5 < len(expected) < 150


def test_words_that_one_prompt_alone_has_change_nothing():
    """Among themselves and with others, equal prompts among them, and each word in at most a few."""
    alone = [(f"{text} only{at} other{at // 2}" if at % 3 else text, where) for at, (text, where) in enumerate(RARE)]
    same = [*alone, *((text, f"again {where}") for text, where in alone[::5])]
    for ours, theirs in ((alone, alone), (same, same), (same, list(alone)), (list(alone), same)):
        expected = compared_with_all(ours, theirs)
        assert list(near.near_pairs(ours, theirs)) == expected
        assert len(expected) > 15


def test_words_that_two_prompts_alone_have_count():
    one, two = ("amber birch cedar delta ember", "x"), ("amber birch cedar delta ember flint", "y")
    assert list(near.near_pairs([one], [two])) == [("x", "y")]
    assert list(near.near_pairs([one, two], [one, two])) == [("x", "y"), ("y", "x")]
    both = [one, two, one]
    assert list(near.near_pairs(both, both)) == [("x", "y"), ("y", "x"), ("x", "y")]


def test_above_a_number_of_prompts_only_some_are_looked_at(monkeypatch):
    same = prompts((15, 30), 300, "a", 3)
    whole = list(near.near_pairs(same, same))
    monkeypatch.setattr(near, "EXACT", 100)
    assert list(near.near_pairs(same, same)) == whole, "a thousand are enough here"
    monkeypatch.setattr(near, "TRIED", 0)
    assert not list(near.near_pairs(same, same))


def test_few_prompts_are_compared(monkeypatch):
    compared: list[int] = []
    overlap = near.overlap

    def counted(one, other):
        compared.append(1)
        return overlap(one, other)

    monkeypatch.setattr(near, "overlap", counted)
    same = prompts((15, 30), 600, "a", 4)
    list(near.near_pairs(same, same))
    assert len(compared) < 600 * 600 / 10


def test_equal_prompts_are_compared_once(monkeypatch):
    sizes: list[int] = []
    sharing = near.sharing

    def counted(ours, theirs, same):
        sizes.append(len(theirs))
        return sharing(ours, theirs, same)

    monkeypatch.setattr(near, "sharing", counted)
    three = (
        "What is the gradient of a loss",
        "what is the gradient of a loss?",
        "Say, what is the gradient of a loss?",
    )
    texts = [three[at % 3] for at in range(300)]
    pairs = near.near_pairs([(text, "a") for text in texts], [(text, f"b{at}") for at, text in enumerate(texts)])
    assert list(pairs) == [("a", "b2"), ("a", "b2"), ("a", "b0")] * 100
    assert sizes == [2], "300 prompts, two of them different"


def test_a_share_of_words_is_rounded_up_as_in_whole_numbers():
    """No float makes a set of n words need more than four fifths of them."""
    rank = {word: at for at, word in enumerate(WORDS)}
    for size in range(101, 400):
        assert len(near.keys(frozenset(WORDS[:size]), rank)) == size // 5 + 1
