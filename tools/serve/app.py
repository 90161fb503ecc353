"""The HTTP side: OpenAI's paths, shapes and errors. What is answered, and by whom, is the batcher's business."""

from __future__ import annotations

import asyncio
import hmac
import re
import secrets

import anyio.to_thread
from starlette.applications import Starlette
from starlette.datastructures import Headers
from starlette.exceptions import HTTPException
from starlette.middleware import Middleware
from starlette.middleware.cors import CORSMiddleware
from starlette.requests import ClientDisconnect, Request
from starlette.responses import JSONResponse, Response
from starlette.routing import Route
from starlette.types import ASGIApp, Message, Receive, Scope, Send

from tools.serve import page, timeouts
from tools.serve.batcher import Answer
from tools.serve.errors import APIError, internal_error
from tools.serve.reply import EventStream, Reply
from tools.serve.requests import ChatRequest, CompletionRequest, GenerationRequest, parse
from tools.serve.service import Service

LARGEST_BODY = 1 << 20  # bytes: some 250,000 tokens of English, more than any model here has positions
DRAINED = 8 * LARGEST_BODY  # bytes that are read, and dropped, so that a client gets to the answer that it is too much
OPEN = ("/", "/health")  # what needs no key: a browser sends none with an address, and the page asks for it


def error_response(error: APIError) -> Response:
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
    app = Starlette(routes=routes, middleware=middleware, exception_handlers={HTTPException: http_error})
    app.router.redirect_slashes = False
    app.state.service = service
    return app


def http_error(request: Request, error: Exception) -> Response:
    """Return OpenAI's shape for a path or a method that is not served."""
    assert isinstance(error, HTTPException)
    what = f"{request.method} {request.url.path}: {error.detail.lower()}"
    return error_response(APIError(what, status=error.status_code, headers=error.headers))


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
        except APIError as error:
            await error_response(error)(scope, receive, send)
        except ClientDisconnect:
            pass
        except Exception as error:
            self.service.fault(error)
            if not began:
                await error_response(internal_error(error))(scope, receive, send)

    def check(self, method: str, path: str, headers: Headers) -> None:
        """Raise APIError for two lengths of a body, a foreign Host, a wrong key, or a body that is not called JSON."""
        if "transfer-encoding" in headers and "content-length" in headers:
            # A proxy before this server may go by the other of the two, and see other requests (RFC 9112, 6.1).
            message = "content-length and transfer-encoding: a body has one length"
            raise APIError(message, headers={"connection": "close"})
        host = headers.get("host", "")
        if self.service.hosts is not None and host and name_of(host) not in self.service.hosts:
            raise APIError(f"this server is not {name_of(host)!r}", status=403, code="foreign_host")
        if self.service.key is not None and path not in OPEN:
            scheme, _, given = headers.get("authorization", "").partition(" ")
            if scheme.lower() != "bearer" or not hmac.compare_digest(given.strip().encode(), self.service.key.encode()):
                raise APIError(
                    "a key is needed: Authorization: Bearer KEY",
                    status=401,
                    code="invalid_api_key",
                    kind="authentication_error",
                    headers={"www-authenticate": "Bearer"},
                )
        kind = headers.get("content-type", "").partition(";")[0].strip().lower()
        if method == "POST" and kind != "application/json":
            raise APIError(f"content-type is {kind!r}, must be application/json", status=415)


def name_of(host: str) -> str:
    """Return a Host header's name, less its port."""
    return re.sub(r":\d*$", "", host).lower()


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
    return await answered(request, ChatRequest)


async def completion(request: Request) -> Response:
    """Continue a text."""
    return await answered(request, CompletionRequest)


async def answered(http: Request, form: type[GenerationRequest]) -> Response:
    """Return the answer to a request, whole or as a stream. Raises APIError."""
    service: Service = http.app.state.service
    request = parse(await body_of(http), form)
    model = service.model(request.model)
    prompt = await anyio.to_thread.run_sync(model.prompt, request)  # a long text takes a while, and others are answered
    sampling = model.sampling(request, prompt)
    reply = Reply(service, model, request, asyncio.get_running_loop())
    seed = secrets.randbits(32) if request.seed is None else request.seed % 2**64  # the counter's key has no sign
    tokenizer = model.speaker.tokenizer
    reply.submit(Answer(prompt, sampling, seed, tokenizer, reply.on_chunk, request.stop))
    return EventStream(reply) if request.stream else await reply.whole(http)


async def body_of(request: Request) -> bytes:
    """Return the body. Raises APIError for one that is too large, or does not come in time."""
    size, chunks = 0, []
    too_large = APIError(f"the body has more than {LARGEST_BODY} bytes", status=413, headers={"connection": "close"})
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
        await asyncio.wait_for(read(), timeouts.REQUEST_TIMEOUT)
    except asyncio.TimeoutError:
        raise APIError("the body did not come in time", status=408, headers={"connection": "close"}) from None
    if size > LARGEST_BODY:
        raise too_large
    return b"".join(chunks)
