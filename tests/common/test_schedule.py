from __future__ import annotations

import math

import pytest

from common.config.schema import Scheduler, Training
from common.train.schedule import learning_rate, warmup_steps


def rates(steps: int, **scheduler) -> list[float]:
    """The learning rate of each step of a run with a peak of 2."""
    training = Training(batch_size=1, learning_rate=2.0, max_steps=steps, scheduler=Scheduler(**scheduler))
    return [learning_rate(step, training) for step in range(1, steps + 1)]


def test_constant():
    assert rates(3, type="constant") == [2.0, 2.0, 2.0]


def test_linear_falls_to_its_share_at_the_last_step():
    assert rates(4, type="linear", min_lr_ratio=0.0) == [1.5, 1.0, 0.5, 0.0]
    assert rates(4, type="linear", min_lr_ratio=0.5) == [1.75, 1.5, 1.25, 1.0]


def test_cosine_falls_to_its_share_at_the_last_step():
    assert rates(4, type="cosine", min_lr_ratio=0.0) == pytest.approx(
        [1 + math.sqrt(0.5), 1.0, 1 - math.sqrt(0.5), 0.0]
    )
    assert rates(2, type="cosine", min_lr_ratio=0.1) == pytest.approx([1.1, 0.2])


@pytest.mark.parametrize("kind", ["constant", "linear", "cosine"])
def test_warm_up_reaches_the_peak_at_its_last_step(kind):
    found = rates(10, type=kind, warmup_steps=4, min_lr_ratio=0.1)
    assert found[:4] == [0.5, 1.0, 1.5, 2.0]
    assert found[-1] == (2.0 if kind == "constant" else pytest.approx(0.2))
    assert all(0 < rate <= 2.0 for rate in found)


def test_a_warm_up_longer_than_the_run_is_clamped():
    assert rates(2, warmup_steps=50) == [1.0, 2.0]
    training = Training(batch_size=1, learning_rate=1.0, max_steps=2, scheduler=Scheduler(warmup_steps=50))
    assert warmup_steps(training) == 2


def test_a_single_step_has_a_rate():
    assert rates(1, type="cosine", min_lr_ratio=0.1) == pytest.approx([0.2])
    assert rates(1, warmup_steps=1) == [2.0]
