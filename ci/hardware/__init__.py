"""The hardware job: train a recipe on this host's board, grade it, leave the board fit for the next. See README.md."""

from __future__ import annotations

from dataclasses import dataclass

TRAIN_MINUTES = 180


@dataclass(frozen=True)
class Step:
    """A phase, the `if:` of its step in the workflow (empty: after success alone), and what it may take at most.

    The workflow's own limit must not be shorter: a phase that is killed leaves a board open.
    """

    phase: str
    when: str
    minutes: int

    def due(self, failed: bool, cancelled: bool) -> bool:
        """Whether the step runs after steps of which one failed, or that were cancelled."""
        return {"": not (failed or cancelled), ALWAYS: True, AFTER_FAILURE: failed or cancelled}[self.when]


ALWAYS, AFTER_FAILURE = "always()", "failure() || cancelled()"
STEPS = (
    Step("preflight", "", 5),
    Step("train", "", TRAIN_MINUTES + 8),  # stopping takes two minutes, killing what does not listen as long again
    Step("grade", "", 15),
    Step("recover", AFTER_FAILURE, 20),
    Step("collect", ALWAYS, 10),
)
