"""Errors as OpenAI's API says them: a status, and a body with message, type, param and code."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

QUOTED = 300  # characters of a request that an error says back, at its begin and at its end
RETRY_AFTER = "1"  # seconds: a slot is free as soon as any of the answers ends


class APIError(Exception):
    """Why a request is not served. `kind` is the body's `type`."""

    def __init__(
        self,
        message: str,
        param: str | None = None,
        *,
        status: int = 400,
        code: str | None = None,
        kind: str = "invalid_request_error",
        headers: Mapping[str, str] | None = None,
    ) -> None:
        super().__init__(message)
        self.message, self.param, self.status, self.code, self.kind = message, param, status, code, kind
        self.headers = dict(headers or {})

    def body(self) -> dict[str, Any]:
        """Return the body of the response."""
        error = {"message": printable(self.message), "type": self.kind, "param": None, "code": self.code}
        return {"error": error if self.param is None else {**error, "param": printable(self.param)}}


def printable(text: str) -> str:
    """Return `text` shortened and as UTF-8 can carry it: a name that a request made up may be a megabyte of anything.

    The begin and the end stay, where what is wrong and what would be right are said.
    """
    if len(text) > 2 * QUOTED:
        text = f"{text[:QUOTED]} ... {text[-QUOTED:]}"
    return text.encode("utf-8", "backslashreplace").decode("utf-8")


def unavailable(status: str) -> APIError:
    """Return the error of whatever is asked while the server is loading, or once it is stopping."""
    headers = {"retry-after": RETRY_AFTER} if status == "loading" else {}
    return APIError(f"the server is {status}", status=503, code=status, kind="server_error", headers=headers)


def internal_error(error: Exception) -> APIError:
    """Return what a client gets of an exception of ours: its kind, nothing of its text."""
    message = f"the server failed ({type(error).__name__}); its log says where"
    return APIError(message, status=500, code="internal_error", kind="server_error")
