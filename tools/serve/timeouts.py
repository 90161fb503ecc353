"""Timeouts of requests: closes connections whose request does not come, or is no HTTP.

uvicorn itself waits for the rest of a header for ever, and says in plain text that something is no HTTP.
"""

from __future__ import annotations

import asyncio
import json
from http import HTTPStatus
from typing import Any

import h11
from uvicorn.protocols.http.h11_impl import H11Protocol

from tools.serve.errors import APIError

REQUEST_TIMEOUT = 30.0  # seconds for a header, and again for a body; nginx gives a header 60, Apache 20 to 40


def raw_response(error: APIError) -> bytes:
    """Return a response that needs no application: an error, and the end of the connection."""
    status = f"{error.status} {HTTPStatus(error.status).phrase}"
    head = f"HTTP/1.1 {status}\r\ncontent-type: application/json\r\nconnection: close\r\n\r\n"
    return head.encode() + json.dumps(error.body()).encode()


class TimeoutProtocol(H11Protocol):
    """HTTP/1.1 whose headers have to be there within REQUEST_TIMEOUT of the connection, or of the response before."""

    timer: asyncio.TimerHandle | None = None

    def connection_made(self, transport: Any) -> None:
        super().connection_made(transport)
        self._watch()

    def data_received(self, data: bytes) -> None:
        super().data_received(data)
        self._watch()

    def on_response_complete(self) -> None:
        super().on_response_complete()
        self._watch()

    def connection_lost(self, exc: Exception | None) -> None:
        super().connection_lost(exc)
        self._unwatch()

    def send_400_response(self, msg: str) -> None:
        """Refuse what is no HTTP; where a response has begun nothing can be said any more, and h11 would raise."""
        del msg
        if self.conn.our_state in (h11.IDLE, h11.SEND_RESPONSE):
            self.transport.write(raw_response(APIError("the request is no valid HTTP/1.1")))
        self.transport.close()

    def _watch(self) -> None:
        if self.conn.their_state is not h11.IDLE or self.transport.is_closing():
            self._unwatch()
        elif self.timer is None:  # not anew with every byte
            self.timer = self.loop.call_later(REQUEST_TIMEOUT, self._give_up)

    def _unwatch(self) -> None:
        if self.timer is not None:
            self.timer.cancel()
            self.timer = None

    def _give_up(self) -> None:
        if self.conn.trailing_data[0]:  # a part of a header is there, so somebody may read why
            self.transport.write(raw_response(APIError("the request did not come in time", status=408)))
        self.transport.close()
