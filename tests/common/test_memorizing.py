"""Memorizing is said by its margin, and of nothing less."""

from __future__ import annotations

from common.train.memorizing import memorizing


def test_it_is_said_below_the_margin_of_the_lowest_loss():
    said = memorizing([1.7, 1.9], [(3.0, 0), (2.01, 4), (2.5, 8)])
    assert said == (
        "memorizing now: the mean training loss of the last 2 steps, 1.8000, is more than 0.2 below the lowest "
        "held-out loss so far, 2.0100 (step 4)"
    )


def test_it_is_not_said_within_the_margin_or_of_nothing():
    assert memorizing([1.8, 1.9], [(3.0, 0), (2.01, 8)]) is None
    assert memorizing([], [(2.0, 8)]) is None
    assert memorizing([float("nan")], [(2.0, 8)]) is None
