"""Eight clients at once, of every kind of manners: each answer is the one it gets alone, and no slot is lost.

SOAK_SECONDS sets how long they go on; SOAK_SEED repeats what they do, though not when.
"""

from __future__ import annotations

import json
import os
import random
import signal
import socket
import struct
import time
from collections import Counter
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import pytest

pytest.importorskip("torch", reason="the CPU engine is torch")

import openai

from tests.runs.test_serve import raw
from tests.support.server import Server
from tools.verify.tiny_base import write_tiny_base

CLIENTS, QUESTIONS = 8, 40
SECONDS = float(os.environ.get("SOAK_SECONDS", "40"))
ROUNDS = 4  # after each of them nothing may be left; memory is compared between the second and the last
CHAT = "/v1/chat/completions"
WORDS = ["fox", "market", "gradient", "loss", "step", "attention", "🦊", "exam", "learning", "downhill"]
BAD: list[Any] = [
    b"{",
    {},
    {"messages": []},
    {"messages": [{"role": "user", "content": "x"}], "n": 2},
    b"\xff" * 10_000,
    b"[" * 100_000,
    b'{"seed": ' + b"9" * 100_000 + b"}",
    b'{"messages": [' + b"1, " * 100_000 + b"1]}",
    {"messages": [{"role": "user", "content": "x"}], "k" * 100_000: 1},
]
# Bytes of growth from half of the time to its end, for whatever a heap does; an answer that leaked only its own
# tokens and text would not show here, one that leaked a response, a connection or logits (V x 8 bytes a token) would.
GROWTH = 16 << 20


def question(rng: random.Random) -> dict[str, Any]:
    words = " ".join(rng.choices(WORDS, k=rng.choice((1, 5, 40, 200))))
    asked = {"messages": [{"role": "user", "content": words}], "max_tokens": rng.randint(1, 80)}
    asked |= {"temperature": rng.choice((0, 1.0, 1.9)), "seed": rng.randrange(1000)}
    if rng.random() < 0.3:
        asked["stop"] = rng.sample(["th", "e", " a", "fox", "\n"], 2)
    return asked


def whole(client: Any, asked: dict[str, Any]) -> tuple[str, str, int]:
    response = client.chat.completions.create(model="tiny", **asked)
    return response.choices[0].message.content, response.choices[0].finish_reason, response.usage.completion_tokens


def streamed(client: Any, asked: dict[str, Any]) -> tuple[str, str, int]:
    chunks = list(client.chat.completions.create(model="tiny", stream=True, stream_options=USAGE, **asked))
    text = "".join(chunk.choices[0].delta.content or "" for chunk in chunks[:-1])
    return text, chunks[-2].choices[0].finish_reason, chunks[-1].usage.completion_tokens


USAGE = {"include_usage": True}


class Visitor:
    """A client that asks, breaks off, aborts and errs as its random numbers say; `seen` counts what it did."""

    def __init__(self, server: Server, known: list[tuple[dict[str, Any], tuple[str, str, int]]], seed: str) -> None:
        self.server, self.known, self.rng = server, known, random.Random(seed)
        self.client = server.client(max_retries=0)
        self.seen: Counter[str] = Counter()

    def visit(self, seconds: float) -> Counter[str]:
        end = time.monotonic() + seconds
        while time.monotonic() < end:
            act = self.rng.choices((self.listen, self.break_off, self.abort, self.err), (6, 2, 2, 1))[0]
            try:
                act(*self.rng.choice(self.known))
            except openai.RateLimitError:
                self.seen["full"] += 1
                time.sleep(self.rng.random() * 0.2)
        return self.seen

    def listen(self, asked: dict[str, Any], expected: tuple[str, str, int]) -> None:
        ask = self.rng.choice((whole, streamed))
        assert ask(self.client, asked) == expected, asked
        self.seen[ask.__name__] += 1

    def break_off(self, asked: dict[str, Any], expected: tuple[str, str, int]) -> None:
        with self.client.chat.completions.create(model="tiny", stream=True, **asked) as chunks:
            told = ""
            for chunk, _ in zip(chunks, range(self.rng.randint(1, 20)), strict=False):
                told += chunk.choices[0].delta.content or ""
        assert expected[0].startswith(told), asked
        self.seen["broken off"] += 1

    def abort(self, asked: dict[str, Any], _expected: object) -> None:
        """Send a request, or a part of one, and reset the connection at once or after a moment."""
        data = raw(self.server, CHAT, json.dumps({**asked, "stream": self.rng.random() < 0.5}))
        with self.server.socket() as connection:
            connection.sendall(data[: self.rng.choice((20, len(data) - 1, len(data)))])
            time.sleep(self.rng.choice((0, 0.05)))
            if self.rng.random() < 0.5:
                connection.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, struct.pack("ii", 1, 0))
        self.seen["aborted"] += 1

    def err(self, *_: object) -> None:
        assert self.server.ask(CHAT, self.rng.choice(BAD))[0] == 400
        self.seen["bad"] += 1


@pytest.mark.slow
def test_no_answer_is_wrong_and_no_slot_is_lost(tmp_path: Path) -> None:
    seed = os.environ.get("SOAK_SEED") or str(random.randrange(10**6))
    print(f"SOAK_SEED={seed}")
    folder = write_tiny_base(tmp_path / "tiny", heads=4, kv_heads=2, context=2048)
    rng = random.Random(seed)
    with Server(folder, "--slots", 4, "--queue", 2, cwd=tmp_path) as server:
        alone = server.client()
        questions = [question(rng) for _ in range(QUESTIONS)]
        known = [(asked, whole(alone, asked)) for asked in questions]
        visitors = [Visitor(server, known, f"{seed} {number}") for number in range(CLIENTS)]
        sizes = []
        for _ in range(ROUNDS):
            with ThreadPoolExecutor(CLIENTS) as pool:
                list(pool.map(lambda visitor: visitor.visit(SECONDS / ROUNDS), visitors))
            server.until(running=0, waiting=0)
            sizes.append(server.resident())
        assert [(asked, whole(alone, asked)) for asked in questions] == known
        streams = [alone.completions.create(model="tiny", prompt="x", max_tokens=2000, stream=True) for _ in range(4)]
        server.until(running=4)
        began = time.monotonic()
        server.process.send_signal(signal.SIGTERM)
        assert server.ended() == 0
        print(f"SIGTERM to the end, with 4 answers in slots: {time.monotonic() - began:.1f} s")
        for stream in streams:
            with pytest.raises(openai.APIError, match="stopping"):
                list(stream)
    seen = sum((visitor.seen for visitor in visitors), Counter())
    print(dict(seen), "MiB after each round:", [size >> 20 for size in sizes])
    assert seen.keys() == {"whole", "streamed", "broken off", "aborted", "bad", "full"}
    assert len({answer for _, (answer, _, _) in known}) > QUESTIONS // 2, "answers that are alike could be mixed up"
    assert sizes[-1] - sizes[1] < GROWTH
    assert not any("bug:" in line or "Traceback" in line for line in server.lines)
