"""A user's error is one message - what, where, what to do - and one exit code."""

from __future__ import annotations

import os
import re
from urllib.parse import unquote

# Variables whose values are nobody's to read, by their names; TOKENIZERS_PARALLELISM is none.
SECRET = re.compile(r"TOKEN(?!IZ)|SECRET|PASSW|CREDENTIAL|API_?KEY|ACCESS_KEY", re.IGNORECASE)
SHORTEST = 8  # characters of a secret: a shorter value (1, true, none) is a word of any text


def without_secrets(text: str) -> str:
    """Return `text` without the logins of addresses, and without what secret variables and proxies hold."""
    hidden = {value for name, value in os.environ.items() if SECRET.search(name)}
    for login in [os.environ[name].rpartition("@")[0] for name in os.environ if name.lower().endswith("_proxy")]:
        hidden |= {login.rpartition("//")[2], login.rpartition(":")[2]}
    for value in sorted({*hidden, *map(unquote, hidden)}, key=len, reverse=True):
        text = text.replace(value, "***") if len(value) >= SHORTEST else text
    return re.sub(r"(?<=//)[^/\s@]+@", "***@", text)


class RecipeError(Exception):
    """An error whose reader is the user: printed without a traceback, with its exit code.

    `what` happened, `where` (file:line, key, row), and what `todo` about it; secrets of the environment are left out.
    """

    code = 1

    def __init__(self, what: str, *, where: str | None = None, todo: str | None = None) -> None:
        self.what = without_secrets(what)
        self.where, self.todo = (text and without_secrets(text) for text in (where, todo))
        super().__init__(self.what)

    def __str__(self) -> str:
        rest = [f"  {name}: {text}" for name, text in (("where", self.where), ("to do", self.todo)) if text]
        return "\n".join([self.what, *rest])


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
