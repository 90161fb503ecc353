from __future__ import annotations

from collections import Counter
from typing import Any

import numpy as np
import pytest

from common.config.schema import Evaluation
from common.train.generate import choose, generate, penalize, uniforms

LOGITS = np.log(np.array([0.4, 0.05, 0.3, 0.2, 0.05]))


def sampling(**values) -> Evaluation:
    return Evaluation(every=0, prompts=[], **values)


def drawn(count: int = 4000, **values) -> dict[int, float]:
    """How often each token is chosen over an even grid of draws."""
    found = Counter(choose(LOGITS, sampling(**values), [], (n + 0.5) / count) for n in range(count))
    return {token: n / count for token, n in sorted(found.items())}


def test_temperature_zero_is_greedy():
    assert {choose(LOGITS, sampling(), [], draw) for draw in (0.0, 0.5, 0.999)} == {0}


def test_temperature_one_samples_the_distribution():
    assert drawn(temperature=1.0) == pytest.approx({0: 0.4, 1: 0.05, 2: 0.3, 3: 0.2, 4: 0.05}, abs=1e-3)


def test_temperature_sharpens_and_flattens():
    squares = np.array([0.4, 0.05, 0.3, 0.2, 0.05]) ** 2
    assert drawn(temperature=0.5) == pytest.approx(dict(enumerate(squares / squares.sum())), abs=1e-3)
    assert drawn(temperature=100.0)[1] > 0.19


def test_top_k_keeps_the_k_likeliest_and_their_proportions():
    assert drawn(temperature=1.0, top_k=2) == pytest.approx({0: 4 / 7, 2: 3 / 7}, abs=1e-3)
    assert drawn(temperature=1.0, top_k=1) == {0: 1.0}
    assert drawn(temperature=1.0, top_k=99) == drawn(temperature=1.0)


def test_top_p_keeps_the_smallest_set_that_holds_the_share():
    assert drawn(temperature=1.0, top_p=0.6) == pytest.approx({0: 4 / 7, 2: 3 / 7}, abs=1e-3)
    assert set(drawn(temperature=1.0, top_p=0.75)) == {0, 2, 3}
    assert drawn(temperature=1.0, top_p=0.01) == {0: 1.0}


def test_top_k_and_top_p_hold_together():
    assert set(drawn(temperature=1.0, top_k=3, top_p=0.7)) == {0, 2}, "top_p of what top_k left: 4/9 + 3/9"


def test_repetition_penalty_divides_positive_and_multiplies_negative_logits():
    logits = np.array([2.0, -2.0, 1.5, 0.0])
    assert penalize(logits, [0, 1, 0], 2.0).tolist() == [1.0, -4.0, 1.5, 0.0]
    assert logits[0] == 2.0, "the caller's logits are its own"
    assert choose(logits, sampling(repetition_penalty=2.0), [0], 0.0) == 2
    assert choose(logits, sampling(repetition_penalty=2.0), [], 0.0) == 0


@pytest.mark.parametrize("draw", [0.0, 1 - 2**-53])
def test_the_ends_of_the_draw_are_tokens(draw):
    tiny = np.array([0.0, -800.0, -900.0])  # probabilities that underflow to zero
    assert choose(tiny, sampling(temperature=1.0), [], draw) == 0


def test_draws_are_a_function_of_seed_position_and_row():
    draws = np.stack([uniforms(seed, position, 3) for seed in (0, 1) for position in (0, 1, 2)])
    assert len(np.unique(draws)) == 18
    assert ((draws >= 0) & (draws < 1)).all()
    assert np.array_equal(uniforms(1, 2, 3), uniforms(1, 2, 3))
    assert np.array_equal(uniforms(1, 2, 2), uniforms(1, 2, 3)[:2]), "a row does not depend on those after it"


class Counting:
    """A backend whose next token is the last one plus one; it checks how it is called."""

    vocabulary = 12

    def next_token_logits(self, ids: Any, lengths: Any, cache: Any = None) -> tuple[Any, Any]:
        last = ids[np.arange(len(ids)), lengths - 1] if cache is None else ids[:, 0]
        assert cache is None or ids.shape == (len(lengths), 1)
        logits = np.ones((len(ids), self.vocabulary), np.float32)
        logits[np.arange(len(ids)), last + 1] = 5.0
        logits[:, 11] = 99.0  # padding of the embedding
        return logits, "cache"


def counted(prompts, eos_ids=(), **values) -> list[list[int]]:
    return generate(Counting(), prompts, sampling(**values), eos_ids=eos_ids, vocab_size=11)  # type: ignore[arg-type]


def test_rows_of_different_lengths_go_on_from_their_own_end():
    assert counted([[1], [1, 2, 3], [5, 4]], max_new_tokens=3) == [[2, 3, 4], [4, 5, 6], [5, 6, 7]]


def test_an_end_token_ends_its_row_and_is_not_returned():
    assert counted([[1], [4], [7]], eos_ids={5, 9}, max_new_tokens=3) == [[2, 3, 4], [], [8]]


def test_the_backend_is_told_which_rows_have_ended():
    told = []

    class Told(Counting):
        def next_token_logits(self, ids: Any, lengths: Any, cache: Any = None) -> tuple[Any, Any]:
            told.append([bool(length) for length in lengths])
            return super().next_token_logits(ids, lengths, cache)

    prompts, options = [[1], [4], [7]], sampling(max_new_tokens=9)
    generate(Told(), prompts, options, eos_ids={5, 9}, vocab_size=11)  # type: ignore[arg-type]
    assert told == [[True, True, True], [True, False, True], [True, False, False], [True, False, False]]


def test_padding_of_the_vocabulary_is_never_chosen():
    assert all(token < 11 for token in counted([[0]], max_new_tokens=10)[0])
    for values in ({"temperature": 1.0}, {"temperature": 2.0, "top_k": 5}):
        assert all(token < 11 for row in counted([[0], [0]], max_new_tokens=5, **values) for token in row)


def test_the_repetition_penalty_sees_the_prompt_and_the_answer():
    seen_prompt = counted([[3, 2]], max_new_tokens=1, repetition_penalty=100.0)
    assert seen_prompt == [[0]], "3 would follow, and stands in the prompt: the first of the rest is taken"


def test_tokens_are_handed_over_as_they_come():
    heard: list[tuple[int, int]] = []
    generate(
        Counting(),  # type: ignore[arg-type]
        [[1], [4]],
        sampling(max_new_tokens=2),
        eos_ids={6},
        vocab_size=11,
        on_token=lambda row, token: heard.append((row, token)),
    )
    assert heard == [(0, 2), (1, 5), (0, 3)]


def test_the_same_seed_gives_the_same_answer():
    class Flat(Counting):
        def next_token_logits(self, ids: Any, lengths: Any, cache: Any = None) -> tuple[Any, Any]:
            return np.zeros((len(ids), 12), np.float32), "cache"

    def answer(seed: int) -> list[list[int]]:
        options = sampling(temperature=1.0, max_new_tokens=8)
        return generate(Flat(), [[1], [1]], options, eos_ids=(), vocab_size=11, seed=seed)  # type: ignore[arg-type]

    assert answer(1) == answer(1)
    assert answer(1) != answer(2)
    assert answer(1)[0] != answer(1)[1], "two rows have draws of their own"
