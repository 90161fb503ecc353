"""A user's error is one message - what, where, what to do - and one exit code."""

from __future__ import annotations


class RecipeError(Exception):
    """An error whose reader is the user: printed without a traceback, with its exit code.

    `what` happened, `where` (file:line, key, row), and what `todo` about it.
    """

    code = 1

    def __init__(self, what: str, *, where: str | None = None, todo: str | None = None) -> None:
        super().__init__(what)
        self.what = what
        self.where = where
        self.todo = todo

    def __str__(self) -> str:
        lines = [self.what]
        if self.where:
            lines.append(f"  where: {self.where}")
        if self.todo:
            lines.append(f"  to do: {self.todo}")
        return "\n".join(lines)


class UsageError(RecipeError):
    """The command line or the config is wrong."""

    code = 2


class DataError(RecipeError):
    """The data cannot be trained on as it is."""

    code = 3


class MachineError(RecipeError):
    """The environment or the device is not as it must be."""

    code = 4


class TrainingError(RecipeError):
    """Training itself failed: non-finite, hung, out of memory, a dead rank."""

    code = 5


class RankLost(TrainingError):
    """A process of a data-parallel run died or stopped answering; the parameters are those of the last whole step."""


class VerificationError(RecipeError):
    """A check ran and did not hold."""

    code = 6


class Stopped(RecipeError):
    """Ended on request after a checkpoint was saved; the same command resumes."""

    code = 75
