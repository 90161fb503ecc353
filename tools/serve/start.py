"""`recipe serve RUN`: checks, then the two threads of the server: one has the connections, one computes."""

from __future__ import annotations

import json
import os
import shlex
import signal
import socket
import threading
import time
import traceback
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from types import FrameType
from typing import Any

import uvicorn

from common.errors import UsageError, without_secrets
from common.signals import handled
from tools.serve.app import make_app
from tools.serve.batcher import Batcher
from tools.serve.model import Model
from tools.serve.service import Service
from tools.serve.target import (
    GB,
    Say,
    Target,
    bind,
    cache_of,
    find_target,
    is_loopback,
    key_in,
    open_models,
    refuse_too_large,
)
from tools.serve.timeouts import TimeoutProtocol

INTERRUPTED = 130  # 128 + SIGINT, as shells have it
# Seconds for answers to end after SIGTERM; a client that reads nothing takes them all. `docker stop` kills after 10.
GRACE = 8
LOOPBACK = ("localhost", "127.0.0.1", "[::1]")  # what a Host header may say of a server that only this machine reaches


@dataclass(frozen=True)
class Options:
    """What `recipe serve` is told. `context` None is the model's own; `max_tokens` None is the recipe's."""

    host: str = "127.0.0.1"
    port: int = 8000
    label: str | None = None
    base: bool = False
    key_file: Path | None = None
    max_tokens: int | None = None
    slots: int = 4
    queue: int = 4
    context: int | None = None
    cors: str | None = None


class Log:
    """serve.log: a line a request, without what was asked or answered, and the traceback of each exception of ours."""

    def __init__(self, path: Path, say: Say) -> None:
        self.path, self.say = path, say
        self.lock = threading.Lock()

    def line(self, text: str) -> None:
        """Write a line, on the screen too."""
        self._write(text)
        self.say(text)

    def fault(self, error: Exception) -> None:
        """Write an exception with its traceback; the screen gets its name."""
        self._write(time.strftime("%H:%M:%S ") + "".join(traceback.format_exception(error)).rstrip())
        self.say(f"bug: {type(error).__name__}; its traceback is in {self.path}")

    def _write(self, text: str) -> None:
        with self.lock, self.path.open("a", encoding="utf-8", errors="backslashreplace") as file:
            file.write(without_secrets(text) + "\n")


class Server(uvicorn.Server):
    """uvicorn, with the signals of this command: the first ends it after a token, a second Ctrl-C at once."""

    def __init__(self, config: uvicorn.Config, stop: Callable[[], None]) -> None:
        super().__init__(config)
        self.stop = stop

    def handle_exit(self, sig: int, frame: FrameType | None) -> None:
        """Take SIGTERM or Ctrl-C; uvicorn calls it, too."""
        del frame
        if self.should_exit and sig == signal.SIGINT:
            os._exit(INTERRUPTED)
        self.should_exit = True
        self.stop()


def serve(path: Path, options: Options, say: Say) -> None:
    """Serve what is at `path` until SIGTERM or Ctrl-C. Raises RecipeError for what cannot be served, or not here."""
    target = find_target(path, options.base)
    context = context_of(target, options.context)
    weights, cache = target.weights_bytes(options.base), cache_of(target, options.base, options.slots, context)
    refuse_too_large(weights, cache, options.slots, context)
    bound = bind(options.host, options.port)
    key = None if options.key_file is None else key_in(options.key_file)
    if key is None and not is_loopback(bound):
        bound.close()
        todo = "give one with --api-key-file FILE, or keep --host 127.0.0.1"
        raise UsageError(
            "whoever reaches this host could ask: a key is needed", where=f"--host {options.host}", todo=todo
        )
    sizes = f"weights {weights / GB:.2f} GB; KV cache of {options.slots} slots at most {cache / GB:.2f} GB"
    say(f"memory: {sizes} more")
    log = Log((target.path if target.run else Path.cwd()) / "serve.log", say)
    service = Service(log.line, log.fault, key, LOOPBACK if is_loopback(bound) else None)
    run_threads(target, options, context, bound, service, say)


def context_of(target: Target, wanted: int | None) -> int:
    """Return the tokens that prompt and answer may have together. Raises UsageError for more than the model has."""
    own = int(target.architecture["max_position_embeddings"])
    if wanted is not None and wanted > own:
        raise UsageError(f"the model has {own} positions", where=f"--context {wanted}")
    return wanted or own


def run_threads(
    target: Target, options: Options, context: int, bound: socket.socket, service: Service, say: Say
) -> None:
    """Listen at once, say /health while the weights are read, then answer; return when a signal has ended it all."""
    failures: list[BaseException] = []
    stopping = threading.Event()

    def stop() -> None:
        stopping.set()
        if service.batcher is not None:
            service.batcher.stop()

    config = uvicorn.Config(
        make_app(service, options.cors),
        http=TimeoutProtocol,
        ws="none",
        loop="asyncio",
        lifespan="off",
        log_config=None,
        log_level="critical",  # what fails is in serve.log
        server_header=False,
        timeout_graceful_shutdown=GRACE,
    )
    server = Server(config, stop)

    def compute() -> None:
        # All of torch is on this thread: how many threads a product takes is a setting of the thread that asks for it.
        try:
            name = options.label or target.name
            opened = open_models(target, name, options.base, options.max_tokens, options.slots, context, say)
            with opened as models:
                service.models = {model.name: model for model in models}
                service.batcher = Batcher([model.scheduler for model in models], options.queue, service.fault)
                if stopping.is_set():
                    return
                for line in ready_lines(target, models, bound, options):
                    say(line)
                service.batcher.run()
        except BaseException as error:
            failures.append(error)
        finally:
            server.should_exit = True

    # Threads that wait for each other spin for some 0.1 ms (10,000 pauses), then sleep. On two busy cores a token's
    # matrices took 0.1 to 0.6 s so, and 0.5 to 0.8 with libgomp's own 300,000; asleep at once (OMP_WAIT_POLICY=PASSIVE)
    # a token on idle cores takes twice as long. (SmolLM2-135M, torch 2.13 on an EPYC; OpenMP reads it when torch is
    # imported, on the thread below.)
    if "OMP_WAIT_POLICY" not in os.environ:
        os.environ.setdefault("GOMP_SPINCOUNT", "10000")
    thread = threading.Thread(target=compute, name="compute")
    with handled([signal.SIGINT, signal.SIGTERM], server.handle_exit):
        say(f"listening at {url_of(bound)}; reading the weights")
        thread.start()
        server.run(sockets=[bound])
        stop()
        thread.join()  # torch aborts where a thread of its is cut off by the end of the process
    if failures:
        raise failures[0]


def ready_lines(target: Target, models: list[Model], bound: socket.socket, options: Options) -> list[str]:
    """Return what is served, how it answers, where, and a command to try it."""
    lines = []
    for at, model in enumerate(models):
        step = f", step {target.step}" if target.step is not None and at == 0 else ""
        kind = "chat template" if model.speaker.tokenizer.template else "no chat template: /v1/completions only"
        lines.append(f"serving {model.name}{step}: {model.context} tokens of context, {kind}")
    chosen = models[0].speaker.config.eval
    how = f"temperature {chosen.temperature:g}, top_k {chosen.top_k}, top_p {chosen.top_p:g}"
    penalty = f"repetition_penalty {chosen.repetition_penalty:g}"
    lines.append(f"unless a request says otherwise: {how}, {penalty}, at most {chosen.max_new_tokens} tokens")
    url = url_of(bound)
    lines.append(f"ready at {url}/v1, and in a browser at {url}; a development server on the CPU: Ctrl-C ends it")
    return [*lines, curl(url, models[0], options.key_file)]


def url_of(bound: socket.socket) -> str:
    """Return the address of a socket, as a client writes it."""
    host, port = bound.getsockname()[:2]
    return f"http://{f'[{host}]' if ':' in host else host}:{port}"


def curl(url: str, model: Model, key_file: Path | None) -> str:
    """Return a command that asks the server something."""
    asked: dict[str, Any]
    if model.speaker.tokenizer.template:
        path, asked = "chat/completions", {"messages": [{"role": "user", "content": "Hello!"}]}
    else:
        path, asked = "completions", {"prompt": "Hello"}
    key = f' -H "Authorization: Bearer $(cat {shlex.quote(str(key_file))})"' if key_file else ""
    body = shlex.quote(json.dumps({"model": model.name, **asked}))
    return f"try: curl {url}/v1/{path}{key} -H 'Content-Type: application/json' -d {body}"
