"""`recipe serve --check`: each of its lines is seen to fail, before a server that does that one thing wrong."""

from __future__ import annotations

import http.client
import json
import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from typing import Any

import pytest

pytest.importorskip("torch", reason="the CPU engine is torch")

import openai

from tests.support.server import Server
from tools.serve import check as checks
from tools.serve.check import EXPECTATIONS, FAILED, Endpoint, Unmet, check
from tools.verify.tiny_base import write_tiny_base

Json = dict[str, Any]


@pytest.fixture(scope="module")
def server(tmp_path_factory) -> Iterator[Server]:
    folder = write_tiny_base(tmp_path_factory.mktemp("tiny") / "tiny", heads=4, kv_heads=2, context=2048)
    with Server(folder, cwd=folder) as server:
        yield server


class Wrong:
    """A server that does all as ours does, but for what a subclass does to a request or to a response."""

    refuses = 0  # a status to refuse a request with

    def asked(self, path: str, fields: Json) -> Json:
        """Return the request to pass on."""
        return fields

    def answered(self, value: Json) -> Json:
        """Return the response to give: a whole one, or a chunk of a stream."""
        return value

    def events(self, lines: list[bytes]) -> list[bytes]:
        """Return the events of a stream to give."""
        return lines


def without(*names: str) -> type[Wrong]:
    """A server that passes fields over in silence."""

    class Deaf(Wrong):
        def asked(self, path: str, fields: Json) -> Json:
            return {name: value for name, value in fields.items() if name not in names}

    return Deaf


class Nameless(Wrong):
    def answered(self, value: Json) -> Json:
        return (
            {**value, "data": [{**model, "id": "/a/folder"} for model in value["data"]]} if "data" in value else value
        )


class Uncounted(Wrong):
    def answered(self, value: Json) -> Json:
        return {name: found for name, found in value.items() if name != "usage"}


class Miscounted(Wrong):
    def answered(self, value: Json) -> Json:
        return {**value, "usage": {**value["usage"], "total_tokens": 1}} if value.get("usage") else value


class Endless(Wrong):
    def answered(self, value: Json) -> Json:
        return {**value, "choices": [{**choice, "finish_reason": None} for choice in value.get("choices", [])]}


class Forgetful(Wrong):
    def events(self, lines: list[bytes]) -> list[bytes]:
        return [*lines[:2], *lines[3:]]


class Abrupt(Wrong):
    def events(self, lines: list[bytes]) -> list[bytes]:
        return [line for line in lines if b"[DONE]" not in line]


class Loud(Wrong):
    """The stop string is told with the answer."""

    def asked(self, path: str, fields: Json) -> Json:
        self.stops = fields.get("stop")
        return fields

    def answered(self, value: Json) -> Json:
        if self.stops and value["choices"] and "message" in value["choices"][0]:
            value["choices"][0]["message"]["content"] += self.stops[0]
        return value


class Deafened(without("stop")):  # type: ignore[misc]
    """A stop string works in whole answers, and is passed over in streams."""

    def asked(self, path: str, fields: Json) -> Json:
        return super().asked(path, fields) if fields.get("stream") else fields


class FirstPart(Wrong):
    def asked(self, path: str, fields: Json) -> Json:
        content = fields["messages"][0]["content"] if fields["messages"] else ""
        return (
            fields if isinstance(content, str) else {**fields, "messages": [{"role": "user", "content": content[:1]}]}
        )


class Chatty(Wrong):
    def asked(self, path: str, fields: Json) -> Json:
        self.refuses = 404 if path == "/v1/completions" else 0
        return fields


class AnyName(Wrong):
    def asked(self, path: str, fields: Json) -> Json:
        return {**fields, "model": "tiny"}


class Lenient(Wrong):
    def asked(self, path: str, fields: Json) -> Json:
        return {**fields, "max_tokens": max(1, fields["max_tokens"])}


class Crashing(Wrong):
    def asked(self, path: str, fields: Json) -> Json:
        self.refuses = 500 if not fields["messages"] else 0
        return fields


class Cutting(Wrong):
    def asked(self, path: str, fields: Json) -> Json:
        return {**fields, "messages": [{"role": "user", "content": fields["messages"][0]["content"][:500]}]}


class Blocked(Wrong):
    """Once a stream was closed nothing is answered any more."""

    streamed = False

    def asked(self, path: str, fields: Json) -> Json:
        self.refuses = 503 if self.streamed else 0
        self.streamed = self.streamed or bool(fields.get("stream"))
        return fields


WRONG: list[tuple[str, type[Wrong], str]] = [
    ("named", Nameless, "it has /a/folder"),
    ("whole_answer", Uncounted, "no usage"),
    ("whole_answer", Miscounted, "does not add up"),
    ("whole_answer", Endless, "ended by None"),
    ("limit", without("max_tokens"), "tokens, ended by"),
    ("newer_limit", without("max_completion_tokens"), "tokens"),
    ("stream", Forgetful, "the whole answer is"),
    ("stream", Endless, "no chunk has a finish_reason"),
    ("end_of_stream", Abrupt, "it ends with"),
    ("usage_in_stream", without("stream_options"), "no usage"),
    ("stop", without("stop"), "must be"),
    ("stop", Loud, "must be"),
    ("stop", Deafened, "streamed, it is"),
    ("seeds", without("seed"), "seed 1 gave"),
    ("seeds", without("temperature"), "does nothing"),
    ("parts", FirstPart, "another one"),
    ("completions", Chatty, "404"),
    ("unknown_model", AnyName, "it was answered"),
    ("bad_input", Lenient, "it was answered"),
    ("bad_input", without("temperature"), "it was answered"),
    ("bad_input", Crashing, "500"),
    ("too_long", Cutting, "it was answered"),
    ("no_silence", without("n"), "n passed over"),
    ("no_silence", without("logprobs", "top_logprobs"), "logprobs passed over"),
    ("no_silence", without("response_format"), "response_format passed over"),
    ("goes_on", Blocked, "503"),
]


@contextmanager
def before(server: Server, wrong: Wrong) -> Iterator[str]:
    """Yield the URL of a server that passes on to `server` what `wrong` makes of each request, and back."""
    host = server.url.removeprefix("http://")

    class Handler(BaseHTTPRequestHandler):
        def do_GET(self) -> None:
            self.pass_on(b"")

        def do_POST(self) -> None:
            fields = json.loads(self.rfile.read(int(self.headers["content-length"])))
            self.pass_on(json.dumps(wrong.asked(self.path, fields)).encode())

        def pass_on(self, body: bytes) -> None:
            if wrong.refuses:
                return self.give(wrong.refuses, "application/json", b'{"error": {"message": "no"}}')
            behind = http.client.HTTPConnection(host, timeout=60)
            behind.request(self.command, self.path, body or None, {"content-type": "application/json"})
            response = behind.getresponse()
            kind, data = response.headers["content-type"], response.read()
            behind.close()
            if "event-stream" in kind:
                events = [self.spoiled(event) for event in data.split(b"\n\n") if event]
                data = b"".join(event + b"\n\n" for event in wrong.events(events))
            elif response.status == 200:
                data = json.dumps(wrong.answered(json.loads(data))).encode()
            return self.give(response.status, kind, data)

        def spoiled(self, event: bytes) -> bytes:
            if b"[DONE]" in event:
                return event
            return b"data: " + json.dumps(wrong.answered(json.loads(event.removeprefix(b"data: ")))).encode()

        def give(self, status: int, kind: str, data: bytes) -> None:
            self.send_response(status)
            self.send_header("content-type", kind)
            self.send_header("content-length", str(len(data)))
            self.end_headers()
            self.wfile.write(data)

        def log_message(self, format: str, *args: object) -> None:
            pass

    double = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
    thread = threading.Thread(target=double.serve_forever, args=(0.05,))
    thread.start()
    try:
        yield f"http://127.0.0.1:{double.server_port}/v1"
    finally:
        double.shutdown()
        double.server_close()
        thread.join()


def expectation(name: str) -> Callable[[Endpoint], str]:
    found: Callable[[Endpoint], str] = getattr(checks, name)
    return found


@pytest.mark.parametrize(
    ("name", "wrong", "words"), WRONG, ids=[f"{name}-{wrong.__name__}" for name, wrong, _ in WRONG]
)
def test_each_line_fails_where_its_expectation_does_not_hold(server, name, wrong, words):
    with before(server, wrong()) as url:
        endpoint = Endpoint(openai.OpenAI(base_url=url, api_key="none", max_retries=0), "tiny", chats=True)
        with pytest.raises((Unmet, openai.OpenAIError), match=words):
            expectation(name)(endpoint)


def test_no_answer_is_stopped_at_bytes_that_make_no_character():
    assert checks.stop_string("\n\n\ufffd\ufffdabcd\ufffd") == "bcd"
    assert checks.stop_string("one two three") == "o t"
    assert checks.stop_string("\n" * 20 + "abc\ufffd") == "\n\na"
    assert checks.stop_string("ab\ufffd" * 9) == checks.stop_string("abc") == ""


def test_every_line_is_tested_so_and_holds_where_nothing_is_wrong(server):
    assert {name for name, _, _ in WRONG} == {line.__name__ for line in EXPECTATIONS}
    said: list[str] = []
    with before(server, Wrong()) as url:
        assert check(url, None, None, None, said.append) == 0
    assert said[-1] == f"{len(EXPECTATIONS)} of {len(EXPECTATIONS)} hold"


def test_what_fails_is_said_with_the_rest_and_is_the_exit_code(server):
    said: list[str] = []
    with before(server, Abrupt()) as url:
        assert check(url, None, None, None, said.append) == FAILED
    assert [line for line in said if line.startswith("  FAILS  A stream ends with the line `data: [DONE]`.")]
    assert said[-1] == f"{len(EXPECTATIONS) - 1} of {len(EXPECTATIONS)} hold"
