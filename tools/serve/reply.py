"""Responses in OpenAI's shape: an answer whole or as server-sent events, its usage and its line in the log."""

from __future__ import annotations

import asyncio
import contextlib
import json
import secrets
import time
from collections.abc import AsyncIterator, Mapping
from typing import Any

from starlette.requests import ClientDisconnect, Request
from starlette.responses import JSONResponse, Response, StreamingResponse
from starlette.types import Receive, Scope, Send

from tools.serve.batcher import Answer, Chunk, QueueFull, Stopping
from tools.serve.errors import RETRY_AFTER, APIError, internal_error, unavailable
from tools.serve.model import Model
from tools.serve.requests import ChatRequest, GenerationRequest
from tools.serve.service import Service


class Reply:
    """The response to a request. Its answer's chunks come from the thread that computes."""

    def __init__(
        self, service: Service, model: Model, request: GenerationRequest, loop: asyncio.AbstractEventLoop
    ) -> None:
        self.service, self.model, self.request, self.loop = service, model, request, loop
        self.chunks: asyncio.Queue[Chunk] = asyncio.Queue()
        self.created = time.time()
        self.reason: str | None = None  # how the answer ended; None while it goes on, and where the client left
        self.is_chat = isinstance(request, ChatRequest)
        self.id = f"{'chatcmpl' if self.is_chat else 'cmpl'}-{secrets.token_hex(12)}"
        self.answer: Answer

    def on_chunk(self, chunk: Chunk) -> None:
        """Hand over a chunk; it may come when nobody listens any more, and the loop has ended."""
        with contextlib.suppress(RuntimeError):
            self.loop.call_soon_threadsafe(self.chunks.put_nowait, chunk)

    def submit(self, answer: Answer) -> None:
        """Let the answer wait for a slot. Raises APIError where there is no room to wait, either."""
        self.answer = answer
        batcher = self.service.ready()
        try:
            batcher.submit(self.model.scheduler, answer)
        except QueueFull:
            raise APIError(
                f"all {self.model.scheduler.slots.count} slots are taken, and the queue is full: try again",
                status=429,
                code="queue_full",
                kind="rate_limit_error",
                headers={"retry-after": RETRY_AFTER},
            ) from None
        except Stopping:
            raise unavailable("stopping") from None

    async def whole(self, http: Request) -> Response:
        """Return the whole answer; nothing is computed on for a client that is gone."""
        text, error = "", None

        async def collect() -> None:
            nonlocal text, error
            while self.reason is None:
                chunk = await self.chunks.get()
                text += chunk.text
                error = self.ended(chunk)

        collecting = asyncio.create_task(collect())
        leaving = asyncio.create_task(disconnected(http))
        try:
            await asyncio.wait({collecting, leaving}, return_when=asyncio.FIRST_COMPLETED)
        finally:
            leaving.cancel()
            collecting.cancel()
            self.end()
        if self.reason is None:
            raise ClientDisconnect
        if error is not None:
            raise error
        return JSONResponse({**self.head(), "choices": [self.choice(text, self.reason)], "usage": self.usage()})

    async def stream(self) -> AsyncIterator[str]:
        """Yield the answer as events of server-sent events."""
        if self.is_chat:
            yield self.event(self.choice("", None, role="assistant"))
        while self.reason is None:
            chunk = await self.chunks.get()
            if chunk.text:
                yield self.event(self.choice(chunk.text, None))
            if (error := self.ended(chunk)) is not None:
                yield server_sent_event(error.body())
                return
        yield self.event(self.choice(None, self.reason))
        if self.request.include_usage:
            yield server_sent_event({**self.head(), "choices": [], "usage": self.usage()})
        yield "data: [DONE]\n\n"

    def ended(self, chunk: Chunk) -> APIError | None:
        """Note how the answer ended, where `chunk` is its last; return the error that ended it, if one did."""
        if chunk.error is None:
            self.reason = chunk.reason
            return None
        stopping = isinstance(chunk.error, Stopping)
        self.reason = "stopping" if stopping else "fault"
        return unavailable("stopping") if stopping else internal_error(chunk.error)

    def end(self) -> None:
        """Free the slot, where the client left, and write the line in the log: never a text."""
        if self.reason is None and self.service.batcher is not None:
            self.service.batcher.cancel(self.answer)
        when = time.strftime("%H:%M:%S", time.localtime(self.created))
        counts = f"{len(self.answer.prompt)} in, {len(self.answer.tokens)} out"
        seconds = f"{time.time() - self.created:.1f} s"
        self.service.log(
            f"{when} {self.model.name}: {counts}, {seconds}, {self.reason or 'disconnected'}, seed {self.answer.seed}"
        )

    # --- shapes ---------------------------------------------------------------------------------------------------

    def head(self) -> dict[str, Any]:
        """Return what begins every response, and every chunk of one."""
        kind = "text_completion"
        if self.is_chat:
            kind = "chat.completion.chunk" if self.request.stream else "chat.completion"
        return {"id": self.id, "object": kind, "created": int(self.created), "model": self.model.name}

    def choice(self, text: str | None, reason: str | None, **delta: str) -> dict[str, Any]:
        """Return the one choice of a response or a chunk; no `text` at the end of a stream."""
        if not self.is_chat:
            said: dict[str, Any] = {"text": text or ""}
        elif self.request.stream:
            said = {"delta": {**delta, **({} if text is None else {"content": text})}}
        else:
            said = {"message": {"role": "assistant", "content": text}}
        return {"index": 0, **said, "logprobs": None, "finish_reason": reason}

    def usage(self) -> dict[str, int]:
        """Return the tokens of prompt and answer; the end token, which has no text, is not counted."""
        prompt, completion = len(self.answer.prompt), len(self.answer.tokens)
        return {"prompt_tokens": prompt, "completion_tokens": completion, "total_tokens": prompt + completion}

    def event(self, choice: Mapping[str, Any]) -> str:
        """Return a chunk of a stream with this choice."""
        usage = {"usage": None} if self.request.include_usage else {}  # as OpenAI's: null in all chunks but the last
        return server_sent_event({**self.head(), "choices": [choice], **usage})


class EventStream(StreamingResponse):
    """An answer as server-sent events. However it ends, sent or not, its slot is freed."""

    def __init__(self, reply: Reply) -> None:
        super().__init__(reply.stream(), media_type="text/event-stream", headers={"cache-control": "no-cache"})
        self.reply = reply

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        try:
            await super().__call__(scope, receive, send)
        finally:
            self.reply.end()


def server_sent_event(value: Mapping[str, Any]) -> str:
    """Return one event of a stream."""
    return f"data: {json.dumps(value, ensure_ascii=False)}\n\n"


async def disconnected(http: Request) -> None:
    """Return when the client is gone."""
    while (await http.receive())["type"] != "http.disconnect":
        pass
