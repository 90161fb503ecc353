"""What follows from the held-out losses of a run: its best step, and its end."""

from __future__ import annotations

import pytest

from common.train.early_stop import best_step, early_stop

LOSSES = [(3.0, 4), (2.0, 8), (2.5, 12), (2.0, 16), (1.0, 20)]


def test_the_best_step_is_the_first_of_equals():
    assert best_step(LOSSES[:4]) == 8
    assert best_step(LOSSES) == 20
    assert best_step([]) == 0


@pytest.mark.parametrize(("patience", "step"), [(1, 12), (2, 16), (3, None), (None, None)])
def test_patience_counts_evaluations_since_the_lowest(patience, step):
    assert early_stop(LOSSES, patience, start=0) == step


def test_a_shorter_patience_on_resume_untrains_nothing():
    assert early_stop(LOSSES[:4], 1, start=16) == 16
    assert early_stop(LOSSES[:4], 1, start=18) is None
