"""The HTTP side: OpenAI's paths, shapes and errors. What is answered, and by whom, is the batcher's business."""

from __future__ import annotations

import asyncio
import contextlib
import hmac
import json
import re
import secrets
import time
from collections.abc import AsyncIterator, Callable, Collection, Mapping
from dataclasses import dataclass, field
from typing import Any

import anyio.to_thread
from starlette.applications import Starlette
from starlette.datastructures import Headers
from starlette.exceptions import HTTPException
from starlette.middleware import Middleware
from starlette.middleware.cors import CORSMiddleware
from starlette.requests import ClientDisconnect, Request
from starlette.responses import JSONResponse, Response, StreamingResponse
from starlette.routing import Route
from starlette.types import ASGIApp, Message, Receive, Scope, Send

from tools.serve import page, patience
from tools.serve.asked import Asked, Chat, Completion, Refused, parse
from tools.serve.batcher import Answer, Batcher, Chunk, QueueFull, Stopping
from tools.serve.model import Model

LARGEST_BODY = 1 << 20  # bytes: some 250,000 tokens of English, more than any model here has positions
DRAINED = 8 * LARGEST_BODY  # bytes that are read, and dropped, so that a client gets to the answer that it is too much
RETRY_AFTER = "1"  # seconds: a slot is free as soon as any of the answers ends
DONE = "[DONE]"
OPEN = ("/", "/health")  # what needs no key: a browser sends none with an address, and the page asks for it


@dataclass
class Service:
    """What the HTTP side knows of the server: which models there are, and who may ask.

    `models` and `batcher` are set once the weights are there. `hosts` are the names that a Host header may have; None
    is any. `log` takes a line a request, `fault` an exception of ours.
    """

    log: Callable[[str], None]
    fault: Callable[[Exception], None]
    key: str | None = None
    hosts: Collection[str] | None = None
    models: Mapping[str, Model] = field(default_factory=dict)
    batcher: Batcher | None = None

    @property
    def status(self) -> str:
        """Return loading, ok or stopping."""
        if self.batcher is None:
            return "loading"
        return "stopping" if self.batcher.stopping else "ok"

    def ready(self) -> Batcher:
        """Return the batcher. Raises Refused while the weights are read, and once the server ends."""
        if self.batcher is None or self.status != "ok":
            raise unavailable(self.status)
        return self.batcher

    def model(self, name: str | None) -> Model:
        """Return the model of a name; the first one where none is given. Raises Refused."""
        self.ready()
        if name is None:
            return next(iter(self.models.values()))
        if name not in self.models:
            known = ", ".join(self.models)
            raise Refused(f"no model {name!r} here; served: {known}", "model", status=404, code="model_not_found")
        return self.models[name]


def unavailable(status: str) -> Refused:
    """Return the refusal of whatever comes before the weights are there, or once the server ends."""
    headers = {"retry-after": RETRY_AFTER} if status == "loading" else {}
    return Refused(f"the server is {status}", status=503, code=status, kind="server_error", headers=headers)


def refusal(error: Refused) -> Response:
    """Return the response that says why a request is not served."""
    return JSONResponse(error.body(), error.status, error.headers)


def make_app(service: Service, cors: str | None = None) -> Starlette:
    """Return the application; pages of the origin `cors` may read its answers."""
    middleware = [Middleware(Guard, service=service)]
    if cors:
        allowed = Middleware(
            CORSMiddleware,
            allow_origins=[cors],
            allow_methods=["GET", "POST"],
            allow_headers=["authorization", "content-type"],
        )
        middleware.insert(0, allowed)
    routes = [
        Route("/", front),
        Route("/health", health),
        Route("/v1/models", models),
        Route("/v1/models/{name:path}", one_model),
        Route("/v1/chat/completions", chat, methods=["POST"]),
        Route("/v1/completions", completion, methods=["POST"]),
    ]
    app = Starlette(routes=routes, middleware=middleware, exception_handlers={HTTPException: not_served})
    app.router.redirect_slashes = False
    app.state.service = service
    return app


def not_served(request: Request, error: Exception) -> Response:
    """Return OpenAI's shape for a path or a method that is not served."""
    assert isinstance(error, HTTPException)
    what = f"{request.method} {request.url.path}: {error.detail.lower()}"
    return refusal(Refused(what, status=error.status_code, headers=error.headers))


class Guard:
    """Lets in who may ask, and turns every error into OpenAI's shape.

    A page in a browser can send a form to localhost, or give localhost a name of its own: such requests have another
    content type than JSON, or a foreign Host.
    """

    def __init__(self, app: ASGIApp, service: Service) -> None:
        self.app, self.service = app, service

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        began = False

        async def sends(message: Message) -> None:
            nonlocal began
            began = True
            await send(message)

        try:
            self.check(scope["method"], scope["path"], Headers(scope=scope))
            await self.app(scope, receive, sends)
        except Refused as error:
            await refusal(error)(scope, receive, send)
        except ClientDisconnect:
            pass
        except Exception as error:
            self.service.fault(error)
            if not began:
                await refusal(ours(error))(scope, receive, send)

    def check(self, method: str, path: str, headers: Headers) -> None:
        """Raise Refused for two lengths of a body, a foreign Host, a wrong key, or a body that is not called JSON."""
        if "transfer-encoding" in headers and "content-length" in headers:
            # A proxy before this server may go by the other of the two, and see other requests (RFC 9112, 6.1).
            message = "content-length and transfer-encoding: a body has one length"
            raise Refused(message, headers={"connection": "close"})
        host = headers.get("host", "")
        if self.service.hosts is not None and host and name_of(host) not in self.service.hosts:
            raise Refused(f"this server is not {name_of(host)!r}", status=403, code="foreign_host")
        if self.service.key is not None and path not in OPEN:
            scheme, _, given = headers.get("authorization", "").partition(" ")
            if scheme.lower() != "bearer" or not hmac.compare_digest(given.strip().encode(), self.service.key.encode()):
                raise Refused(
                    "a key is needed: Authorization: Bearer KEY",
                    status=401,
                    code="invalid_api_key",
                    kind="authentication_error",
                    headers={"www-authenticate": "Bearer"},
                )
        kind = headers.get("content-type", "").partition(";")[0].strip().lower()
        if method == "POST" and kind != "application/json":
            raise Refused(f"content-type is {kind!r}, must be application/json", status=415)


def name_of(host: str) -> str:
    """Return a Host header's name, less its port."""
    return re.sub(r":\d*$", "", host).lower()


def ours(error: Exception) -> Refused:
    """Return what a client is told of an exception of ours: its kind, nothing of its text."""
    message = f"the server failed ({type(error).__name__}); its log says where"
    return Refused(message, status=500, code="internal_error", kind="server_error")


# --- what is served -------------------------------------------------------------------------------------------------


async def front(request: Request) -> Response:
    """Return the page to talk to the models in a browser."""
    service: Service = request.app.state.service
    return page.response(loading=service.status == "loading", needs_key=service.key is not None)


async def health(request: Request) -> Response:
    """Return whether requests are answered, and how many are."""
    service: Service = request.app.state.service
    counts = {}
    if service.batcher is not None:
        counts = {"running": service.batcher.running, "waiting": service.batcher.waiting}
    return JSONResponse({"status": service.status, **counts}, 200 if service.status == "ok" else 503)


async def models(request: Request) -> Response:
    """Return the models that can be asked by name."""
    service: Service = request.app.state.service
    service.ready()
    return JSONResponse({"object": "list", "data": [model.card() for model in service.models.values()]})


async def one_model(request: Request) -> Response:
    """Return one model by its name."""
    return JSONResponse(request.app.state.service.model(request.path_params["name"]).card())


async def chat(request: Request) -> Response:
    """Answer a conversation."""
    return await answered(request, Chat)


async def completion(request: Request) -> Response:
    """Continue a text."""
    return await answered(request, Completion)


async def answered(request: Request, form: type[Asked]) -> Response:
    """Return the answer to a request, whole or as a stream. Raises Refused."""
    service: Service = request.app.state.service
    asked = parse(await body_of(request), form)
    model = service.model(asked.model)
    prompt = await anyio.to_thread.run_sync(model.prompt, asked)  # a long text takes a while, and others are answered
    sampling = model.sampling(asked, prompt)
    exchange = Exchange(service, model, asked, asyncio.get_running_loop())
    seed = secrets.randbits(32) if asked.seed is None else asked.seed % 2**64  # the counter's key has no sign
    tokenizer = model.speaker.tokenizer
    answer = Answer(prompt, sampling, seed, tokenizer, exchange.on_chunk, asked.stop)
    exchange.submit(answer)
    if asked.stream:
        return Stream(exchange)
    return await exchange.whole(request)


async def body_of(request: Request) -> bytes:
    """Return the body. Raises Refused for one that is too large, or does not come in time."""
    size, chunks = 0, []
    too_large = Refused(f"the body has more than {LARGEST_BODY} bytes", status=413, headers={"connection": "close"})
    if int(request.headers.get("content-length", 0)) > DRAINED:
        raise too_large

    async def read() -> None:
        nonlocal size
        async for chunk in request.stream():
            size += len(chunk)
            if size <= LARGEST_BODY:
                chunks.append(chunk)
            elif size > DRAINED:
                return

    try:
        await asyncio.wait_for(read(), patience.PATIENCE)
    except asyncio.TimeoutError:
        raise Refused("the body did not come in time", status=408, headers={"connection": "close"}) from None
    if size > LARGEST_BODY:
        raise too_large
    return b"".join(chunks)


class Exchange:
    """A request and its answer: takes the chunks from the thread that computes, and gives them OpenAI's shape."""

    def __init__(self, service: Service, model: Model, asked: Asked, loop: asyncio.AbstractEventLoop) -> None:
        self.service, self.model, self.asked, self.loop = service, model, asked, loop
        self.chunks: asyncio.Queue[Chunk] = asyncio.Queue()
        self.began, self.reason = time.time(), "gone"
        self.is_chat = isinstance(asked, Chat)
        self.id = f"{'chatcmpl' if self.is_chat else 'cmpl'}-{secrets.token_hex(12)}"
        self.answer: Answer

    def on_chunk(self, chunk: Chunk) -> None:
        """Hand over a chunk; it may come when nobody listens any more, and the loop has ended."""
        with contextlib.suppress(RuntimeError):
            self.loop.call_soon_threadsafe(self.chunks.put_nowait, chunk)

    def submit(self, answer: Answer) -> None:
        """Let the answer wait for a slot. Raises Refused where there is no room to wait, either."""
        self.answer = answer
        batcher = self.service.ready()
        try:
            batcher.submit(self.model.scheduler, answer)
        except QueueFull:
            message = f"all {self.model.scheduler.slots.count} slots are taken, and the queue is full: try again"
            refused = Refused(message, status=429, code="queue_full", kind="rate_limit_error")
            refused.headers["retry-after"] = RETRY_AFTER
            raise refused from None
        except Stopping:
            raise unavailable("stopping") from None

    async def whole(self, request: Request) -> Response:
        """Return the whole answer; nothing is computed on for a client that is gone."""
        text, error = "", None

        async def collect() -> None:
            nonlocal text, error
            while self.reason == "gone":
                chunk = await self.chunks.get()
                text += chunk.text
                error = self.ended(chunk)

        collecting = asyncio.create_task(collect())
        leaving = asyncio.create_task(until_gone(request))
        try:
            await asyncio.wait({collecting, leaving}, return_when=asyncio.FIRST_COMPLETED)
        finally:
            leaving.cancel()
            collecting.cancel()
            self.end()
        if self.reason == "gone":
            raise ClientDisconnect
        if error is not None:
            raise error
        return JSONResponse({**self.head(), "choices": [self.choice(text, self.reason)], "usage": self.usage()})

    async def stream(self) -> AsyncIterator[str]:
        """Yield the answer as events of server-sent events."""
        if self.is_chat:
            yield self.event(self.choice("", None, role="assistant"))
        while self.reason == "gone":
            chunk = await self.chunks.get()
            if chunk.text:
                yield self.event(self.choice(chunk.text, None))
            if (error := self.ended(chunk)) is not None:
                yield data(error.body())
                return
        yield self.event(self.choice(None, self.reason))
        if self.asked.tells_usage:
            yield data({**self.head(), "choices": [], "usage": self.usage()})
        yield f"data: {DONE}\n\n"

    def ended(self, chunk: Chunk) -> Refused | None:
        """Note how the answer ended, where `chunk` is its last; return the error that ended it."""
        if chunk.error is None:
            self.reason = chunk.reason or "gone"
            return None
        stopping = isinstance(chunk.error, Stopping)
        self.reason = "stopping" if stopping else "fault"
        return unavailable("stopping") if stopping else ours(chunk.error)

    def end(self) -> None:
        """Free what the answer holds, and log it: never its text."""
        if self.reason == "gone" and self.service.batcher is not None:
            self.service.batcher.cancel(self.answer)
        when = time.strftime("%H:%M:%S", time.localtime(self.began))
        counts = f"{len(self.answer.prompt)} in, {len(self.answer.tokens)} out"
        seconds = f"{time.time() - self.began:.1f} s"
        self.service.log(f"{when} {self.model.name}: {counts}, {seconds}, {self.reason}, seed {self.answer.seed}")

    # --- shapes ---------------------------------------------------------------------------------------------------

    def head(self) -> dict[str, Any]:
        """Return what begins every response, and every chunk of one."""
        kind = (
            "text_completion"
            if not self.is_chat
            else "chat.completion.chunk"
            if self.asked.stream
            else "chat.completion"
        )
        return {"id": self.id, "object": kind, "created": int(self.began), "model": self.model.name}

    def choice(self, text: str | None, reason: str | None, **delta: str) -> dict[str, Any]:
        """Return the one choice of a response or a chunk; no `text` at the end of a stream."""
        if not self.is_chat:
            said: dict[str, Any] = {"text": text or ""}
        elif self.asked.stream:
            said = {"delta": {**delta, **({} if text is None else {"content": text})}}
        else:
            said = {"message": {"role": "assistant", "content": text}}
        return {"index": 0, **said, "logprobs": None, "finish_reason": reason}

    def usage(self) -> dict[str, int]:
        """Return the tokens of prompt and answer; the end token, which has no text, is not counted."""
        asked, given = len(self.answer.prompt), len(self.answer.tokens)
        return {"prompt_tokens": asked, "completion_tokens": given, "total_tokens": asked + given}

    def event(self, choice: Mapping[str, Any]) -> str:
        usage = {"usage": None} if self.asked.tells_usage else {}  # as OpenAI's: null in all chunks but the last
        return data({**self.head(), "choices": [choice], **usage})


class Stream(StreamingResponse):
    """An answer as server-sent events. However it ends, sent or not, its slot is freed."""

    def __init__(self, exchange: Exchange) -> None:
        super().__init__(exchange.stream(), media_type="text/event-stream", headers={"cache-control": "no-cache"})
        self.exchange = exchange

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        try:
            await super().__call__(scope, receive, send)
        finally:
            self.exchange.end()


def data(value: Mapping[str, Any]) -> str:
    return f"data: {json.dumps(value, ensure_ascii=False)}\n\n"


async def until_gone(request: Request) -> None:
    """Return when the client is gone."""
    while (await request.receive())["type"] != "http.disconnect":
        pass
