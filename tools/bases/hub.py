"""The Hugging Face Hub's refusals, and the way's to it, in one message each: what, where, what to do."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator

from common.errors import MachineError, RecipeError

TOKENS = "settings/tokens"  # the Hub's page of a user's tokens


class Gone(MachineError):
    """The Hub has no such repository or revision, or does not show it to this user."""


@contextlib.contextmanager
def refusals(repo: str, revision: str | None) -> Iterator[None]:
    """Raise MachineError for whatever the Hub refuses in the block, Gone for what it does not have.

    `revision` is a branch, a tag or a commit; None is the repository's default branch. No message holds a token.
    """
    try:
        yield
    except RecipeError:
        raise
    except Exception as error:  # the library raises a dozen kinds: network, offline, gated, disk
        raise explained(error, repo, revision) from error


def explained(error: Exception, repo: str, revision: str | None) -> MachineError:
    """Return what an error of huggingface_hub means to a user who asked for a revision of `repo`."""
    from huggingface_hub import constants, errors, get_token

    while isinstance(error, errors.LocalEntryNotFoundError) and isinstance(error.__cause__, Exception):
        error = error.__cause__  # "not in the cache either" hides why the Hub did not answer
    page, token = f"{constants.ENDPOINT}/{repo}", get_token() is not None
    status = getattr(getattr(error, "response", None), "status_code", None)
    if isinstance(error, errors.GatedRepoError) and token:
        return MachineError(
            f"{repo} is gated, and the account of your token has no access to it",
            where=page,
            todo=f"accept its terms on that page with that account, or wait until its owner grants it; "
            f"a fine-grained token also needs the right to read gated repositories: {constants.ENDPOINT}/{TOKENS}",
        )
    if isinstance(error, errors.GatedRepoError):
        return MachineError(
            f"{repo} is gated: its owner wants its terms accepted, and no token was sent",
            where=page,
            todo=f"accept them on that page, make a token at {constants.ENDPOINT}/{TOKENS}, and set HF_TOKEN to it",
        )
    if isinstance(error, errors.RevisionNotFoundError):
        return Gone(
            f"{repo} has no revision {revision!r}",
            where=page,
            todo=f"choose a branch, a tag or a commit of {page}/commits/main, or leave @REVISION out",
        )
    if isinstance(error, errors.RepositoryNotFoundError):
        return Gone(
            f"the Hub has no model {repo}, or does not show it to you",
            where=page,
            todo="look for a misspelling; for a private one, set HF_TOKEN to a token that may read it",
        )
    if status in (401, 403) and token:
        return MachineError(
            f"the Hub refuses your token for {repo} ({status})",
            where="HF_TOKEN, or what `hf auth login` has stored",
            todo=f"make another one at {constants.ENDPOINT}/{TOKENS}; a public model needs none: unset HF_TOKEN",
        )
    if constants.HF_HUB_OFFLINE:
        return MachineError(
            f"could not fetch {repo}: HF_HUB_OFFLINE is set, and the Hub's cache here does not have it",
            where=f"{repo}, revision {revision or 'main'}",
            todo="unset HF_HUB_OFFLINE where there is a network; or copy a machine's Hub cache here that has it",
        )
    return MachineError(
        f"could not fetch {repo}: {type(error).__name__}: {str(error).strip().partition(chr(10))[0]}",
        where=f"{page}, revision {revision or 'main'}",
        todo="check the network (HF_ENDPOINT names another Hub); or copy a machine's Hub cache here that has it, "
        "and set HF_HUB_OFFLINE=1",
    )
