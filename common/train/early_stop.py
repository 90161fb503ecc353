"""Which step was the best, and when there is no use in going on; by the (held-out loss, step) of each evaluation.

The evaluation of step 0 is not among them: the untrained model is no result.
"""

from __future__ import annotations

import math
from collections.abc import Sequence


def best_step(losses: Sequence[tuple[float, int]]) -> int:
    """Return the step with the lowest loss, of equal ones the first; 0 before any was evaluated."""
    return min(losses, default=(0.0, 0))[1]


def early_stop(losses: Sequence[tuple[float, int]], patience: int | None, start: int) -> int | None:
    """Return the step that ended the run: the `patience`-th evaluation in a row without a new lowest loss.

    None while there is none. A resume may have set a shorter patience: steps before its `start` are trained, and the
    run then ends at the first evaluated step from there on.
    """
    best, since = math.inf, 0
    for loss, step in losses:
        best, since = (loss, 0) if loss < best else (best, since + 1)  # an equal or NaN loss is no new lowest
        if patience is not None and since >= patience and step >= start:
            return step
    return None
