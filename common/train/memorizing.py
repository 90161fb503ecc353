"""When training on a text turns into learning it by heart."""

from __future__ import annotations

import math
from collections.abc import Sequence

# Nats per token. Two texts of one kind differ by less; a training loss that lies further below has seen the words.
MARGIN = 0.2


def memorizing(recent: Sequence[float], held_out: Sequence[tuple[float, int]]) -> str | None:
    """Return a sentence if the mean of `recent` training losses lies MARGIN below the lowest of the `held_out` ones.

    `held_out` has the (loss, step) of every evaluation, step 0 among them.
    Of use for a corpus, whose held-out text is of one kind with the rest; rows held out by topic may be harder.
    """
    floor, step = min(held_out, default=(math.inf, 0))
    mean = math.fsum(recent) / len(recent) if recent else math.inf
    if not mean < floor - MARGIN:
        return None
    below = f"{MARGIN} below the lowest held-out loss so far, {floor:.4f} (step {step})"
    return f"memorizing now: the mean training loss of the last {len(recent)} steps, {mean:.4f}, is more than {below}"
