"""The learning rate as a pure function of the step: nothing to save, nothing to restore."""

from __future__ import annotations

import math

from common.config.schema import Training


def warmup_steps(training: Training) -> int:
    """Return the steps of the warm-up, clamped to the run's."""
    return min(training.scheduler.warmup_steps, training.max_steps or 0)


def learning_rate(step: int, training: Training) -> float:
    """Return the learning rate of `step`, which counts from 1 to max_steps.

    A linear warm-up reaches the peak at its last step; from there `linear` and `cosine` (Loshchilov and Hutter,
    2017, one cycle) fall to min_lr_ratio x peak at the last step of the run.
    """
    assert training.max_steps is not None, "a run's plan sets it (common/train/plan.py, with_steps)"
    peak, scheduler = training.learning_rate, training.scheduler
    warmup = warmup_steps(training)
    if step <= warmup:
        return peak * step / warmup
    if scheduler.type == "constant":
        return peak
    progress = (step - warmup) / max(1, training.max_steps - warmup)  # 1 at the last step: the floor is reached
    shape = 1 - progress if scheduler.type == "linear" else 0.5 * (1 + math.cos(math.pi * progress))
    return peak * (scheduler.min_lr_ratio + (1 - scheduler.min_lr_ratio) * shape)
