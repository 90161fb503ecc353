"""The server's parts one by one, with an engine that says what a test wants it to say."""

from __future__ import annotations

import contextlib
import json
import threading
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import uvicorn
from pydantic import ValidationError
from tokenizers import Tokenizer, decoders, models

from common.data.chat import ChatTokenizer
from common.errors import MachineError, UsageError, VerificationError
from tests.support.server import Server as Connected
from tools.generate.chat import Speaker, folder_config
from tools.serve import timeouts
from tools.serve.app import make_app
from tools.serve.batcher import Answer, Batcher, Chunk, Detokenizer, QueueFull, Scheduler, Stopping
from tools.serve.model import Model
from tools.serve.requests import ChatRequest
from tools.serve.service import Service
from tools.serve.start import Log, Options, serve
from tools.serve.target import bind, find_target, free_memory, refuse_too_large
from tools.serve.timeouts import TimeoutProtocol

TEXT = " a fox 🦊 says: the slope, then 🦊🦊"


@pytest.fixture(scope="module")
def tokenizer(tiny_base: Path) -> ChatTokenizer:
    return ChatTokenizer.load(tiny_base)


class Recital:
    """Slots whose every answer is `TEXT`, over and over. A token waits for `go`; a prompt with token 7 is a fault."""

    count, context = 2, 256

    def __init__(self, tokenizer: ChatTokenizer) -> None:
        self.script = tokenizer.encode_text(TEXT)
        self.said: dict[int, int] = {}
        self.go = threading.Semaphore(0)
        self.breaks = False

    def logits(self, slot: int) -> np.ndarray:
        found = np.zeros(512, np.float32)
        found[self.script[self.said[slot] % len(self.script)]] = 1
        self.said[slot] += 1
        return found

    def prefill(self, slot: int, prompt: Sequence[int], tokens: int) -> np.ndarray:
        assert len(prompt) < tokens <= self.context
        if 7 in prompt:
            raise ZeroDivisionError("a prompt's secret text")
        self.said[slot] = 0
        return self.logits(slot)

    def decode(self, tokens: Mapping[int, int]) -> dict[int, np.ndarray]:
        self.go.acquire()
        if self.breaks:
            raise ZeroDivisionError
        return {slot: self.logits(slot) for slot in tokens}

    def free(self, slot: int) -> None:
        self.said.pop(slot, None)


class Heard:
    """An answer to [1, 2], and what was sent of it."""

    def __init__(self, tokenizer: ChatTokenizer, base: Path, tokens: int = 20, prompt: Sequence[int] = (1, 2)) -> None:
        sampling = folder_config(base).with_values(**{"eval.max_new_tokens": tokens}).eval
        self.chunks: list[Chunk] = []
        self.began, self.over = threading.Event(), threading.Event()
        self.answer = Answer(prompt, sampling, 0, tokenizer, self.on_chunk)

    def on_chunk(self, chunk: Chunk) -> None:
        self.chunks.append(chunk)
        self.began.set()
        if chunk.reason or chunk.error:
            self.over.set()

    @property
    def end(self) -> object:
        """Return how it ended."""
        assert self.over.wait(60)
        return self.chunks[-1].reason or type(self.chunks[-1].error)


@contextlib.contextmanager
def served(slots: Recital, queue: int = 1) -> Iterator[tuple[Batcher, Scheduler, list[Exception]]]:
    faults: list[Exception] = []
    scheduler = Scheduler(slots)
    batcher = Batcher([scheduler], queue, faults.append)
    thread = threading.Thread(target=batcher.run, daemon=True)
    thread.start()
    try:
        yield batcher, scheduler, faults
    finally:
        batcher.stop()
        slots.go.release(1000)
        thread.join(60)
    assert not thread.is_alive()
    assert batcher.running == batcher.waiting == 0


# --- the text of an answer ------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "stops", [["says"], ["🦊"], ["🦊🦊"], ["x 🦊 s"], [" a"], ["slope, t", "the"], ["never"], [TEXT[-1:]]]
)
def test_a_stop_string_is_found_wherever_tokens_are_cut_and_never_told(tokenizer, stops):
    text = Detokenizer(tokenizer, stops)
    sent = []
    for token in tokenizer.encode_text(TEXT):
        sent.append(text.add(token))
        assert "\ufffd" not in sent[-1]
        if text.stopped:
            break
    sent.append(text.flush())
    ends = [TEXT.index(stop) for stop in stops if stop in TEXT]
    assert "".join(sent) == TEXT[: min(ends, default=len(TEXT))]
    assert text.stopped == bool(ends)


def test_a_character_that_never_gets_whole_is_told_at_the_end(tokenizer):
    text = Detokenizer(tokenizer, [])
    cut = tokenizer.encode_text("a🦊")[:-1]
    assert "".join(text.add(token) for token in cut) == "a"
    assert text.flush().startswith("\ufffd")


def test_a_text_that_is_continued_keeps_its_space():
    """Llama-2's kind of tokenizer drops the space before the first word of whatever it decodes."""
    pieces = Tokenizer(models.WordLevel({"\u2581a": 0, "\u2581fox": 1, "es": 2}, unk_token="es"))
    pieces.decoder = decoders.Metaspace()
    tokenizer = ChatTokenizer(pieces, "", {}, [], "")
    text = Detokenizer(tokenizer, [], after=[0])
    assert [text.add(1), text.add(2), text.flush()] == [" fox", "es", ""]


# --- who is answered when -------------------------------------------------------------------------------------------


def test_a_request_joins_between_tokens_and_the_queue_is_bounded(tokenizer, tiny_base):
    slots = Recital(tokenizer)
    heard = [Heard(tokenizer, tiny_base, tokens) for tokens in (20, 3, 4)]
    with served(slots) as (batcher, scheduler, _):
        batcher.submit(scheduler, heard[0].answer)
        slots.go.release(5)
        for other in heard[1:]:
            batcher.submit(scheduler, other.answer)
        with pytest.raises(QueueFull):
            batcher.submit(scheduler, Heard(tokenizer, tiny_base).answer)
        slots.go.release(12)
        assert [other.end for other in heard[1:]] == ["length", "length"]
        assert not heard[0].over.is_set()
        slots.go.release(20)
        assert heard[0].end == "length"
    texts = ["".join(chunk.text for chunk in one.chunks) for one in heard]
    assert texts[1] == texts[0][: len(texts[1])] == TEXT[: len(texts[1])]


def test_a_slot_is_free_before_the_end_of_its_answer_is_sent(tokenizer, tiny_base):
    """Else a client that asks again at once may find it taken."""
    slots, heard, taken = Recital(tokenizer), Heard(tokenizer, tiny_base, 3), []
    with served(slots) as (batcher, scheduler, _):

        def on_chunk(chunk: Chunk) -> None:
            taken.append(batcher.running)
            heard.on_chunk(chunk)

        heard.answer.on_chunk = on_chunk
        slots.go.release(3)
        batcher.submit(scheduler, heard.answer)
        assert heard.end == "length"
    assert taken == [1, 1, 0]


def test_nothing_is_computed_for_whoever_has_gone(tokenizer, tiny_base):
    slots = Recital(tokenizer)
    first, second, queued = (Heard(tokenizer, tiny_base, 100) for _ in range(3))
    with served(slots) as (batcher, scheduler, _):
        for heard in (first, second):
            batcher.submit(scheduler, heard.answer)
            slots.go.release()
            assert heard.began.wait(60), "it has a slot"
        batcher.submit(scheduler, queued.answer)
        batcher.cancel(queued.answer)
        assert batcher.waiting == 0
        batcher.cancel(first.answer)
        slots.go.release(50)
        other = Heard(tokenizer, tiny_base, 3)
        batcher.submit(scheduler, other.answer)
        assert other.end == "length"
        batcher.cancel(second.answer)
    assert len(first.answer.tokens) <= 4, "a token or two when it began, and one that was on its way"
    assert queued.answer.tokens == []


def test_a_fault_ends_the_answers_that_it_happened_to(tokenizer, tiny_base):
    slots = Recital(tokenizer)
    fine, poisoned, later = (
        Heard(tokenizer, tiny_base, 9),
        Heard(tokenizer, tiny_base, 9, [7]),
        Heard(tokenizer, tiny_base, 3),
    )
    with served(slots) as (batcher, scheduler, faults):
        batcher.submit(scheduler, fine.answer)
        batcher.submit(scheduler, poisoned.answer)
        slots.go.release(100)
        assert (poisoned.end, fine.end) == (ZeroDivisionError, "length")
        slots.breaks = True
        broken = Heard(tokenizer, tiny_base, 9)
        batcher.submit(scheduler, broken.answer)
        assert broken.end is ZeroDivisionError
        slots.breaks = False
        batcher.submit(scheduler, later.answer)
        assert later.end == "length"
        assert len(faults) == 2


def test_stopping_ends_those_in_slots_and_those_that_wait(tokenizer, tiny_base):
    slots = Recital(tokenizer)
    heard = [Heard(tokenizer, tiny_base, 100) for _ in range(3)]
    with served(slots) as (batcher, scheduler, _):
        for one in heard:
            batcher.submit(scheduler, one.answer)
        batcher.stop()
        slots.go.release(100)
        assert [one.end for one in heard] == [Stopping] * 3
        with pytest.raises(Stopping):
            batcher.submit(scheduler, Heard(tokenizer, tiny_base).answer)
    assert all(len(one.answer.tokens) < 10 for one in heard)


# --- the HTTP side --------------------------------------------------------------------------------------------------


@contextlib.contextmanager
def listening(slots: Recital, tokenizer: ChatTokenizer, base: Path, log: Path) -> Iterator[Connected]:
    """The app in this process, in front of `slots`."""
    lines: list[str] = []
    notes = Log(log, lines.append)
    speaker: Any = Speaker("tiny", None, tokenizer, folder_config(base), 256)  # type: ignore[arg-type]
    with served(slots) as (batcher, scheduler, _):
        batcher.fault = notes.fault
        service = Service(notes.line, notes.fault, models={"tiny": Model("tiny", speaker, scheduler)}, batcher=batcher)
        config = uvicorn.Config(
            make_app(service), http=TimeoutProtocol, lifespan="off", log_config=None, log_level="critical", ws="none"
        )
        server, bound = uvicorn.Server(config), bind("127.0.0.1", 0)
        thread = threading.Thread(target=server.run, args=([bound],))
        thread.start()
        connected = Connected()
        connected.url, connected.lines = "http://{}:{}".format(*bound.getsockname()), lines
        try:
            yield connected
        finally:
            server.should_exit = True
            thread.join(60)
    assert not thread.is_alive()


def test_our_own_exception_is_a_500_whose_traceback_is_in_the_log(tokenizer, tiny_base, tmp_path):
    slots = Recital(tokenizer)
    slots.go.release(1000)
    fault = tokenizer.decode([7])
    with listening(slots, tokenizer, tiny_base, tmp_path / "serve.log") as server:
        status, answer, _ = server.ask("/v1/completions", {"prompt": fault})
        assert (status, answer["error"]["type"]) == (500, "server_error")
        assert "ZeroDivisionError" in answer["error"]["message"]
        assert "secret" not in answer["error"]["message"]
        status, answer, _ = server.ask("/v1/completions", {"prompt": "Hello", "max_tokens": 12})
        assert (status, answer["choices"][0]["text"]) == (200, TEXT[: len(answer["choices"][0]["text"])])
        with server.socket() as connection:
            body = json.dumps({"prompt": fault, "stream": True})
            head = "POST /v1/completions HTTP/1.1\r\nhost: localhost\r\ncontent-type: application/json\r\n"
            connection.sendall(f"{head}connection: close\r\ncontent-length: {len(body)}\r\n\r\n{body}".encode())
            events = b"".join(iter(lambda: connection.recv(65536), b"")).decode()
        assert '"error"' in events
        assert "[DONE]" not in events
    log = (tmp_path / "serve.log").read_text()
    assert log.count("Traceback") == 2
    assert "in prefill" in log, "the traceback names the function"
    assert log.count("fault, seed") == 2


def test_what_does_not_come_is_not_waited_for(tokenizer, tiny_base, tmp_path, monkeypatch):
    monkeypatch.setattr(timeouts, "REQUEST_TIMEOUT", 0.3)
    slots = Recital(tokenizer)
    slots.go.release(1000)
    head = b"POST /v1/completions HTTP/1.1\r\nhost: localhost\r\ncontent-type: application/json\r\n"
    whole = head + b'content-length: 32\r\n\r\n{"prompt": "x", "max_tokens": 3}'
    said = {}
    with listening(slots, tokenizer, tiny_base, tmp_path / "serve.log") as server:
        parts = {"nothing": b"", "half a header": head[:30], "half a body": whole[:-5], "a second header": whole + head}
        for name, data in parts.items():
            with server.socket() as connection:
                connection.sendall(data)
                said[name] = b"".join(iter(lambda: connection.recv(65536), b"")).decode()
        assert server.ask("/v1/completions", {"prompt": "x", "max_tokens": 3})[0] == 200
    assert said["nothing"] == ""
    assert said["half a header"].startswith("HTTP/1.1 408")
    assert json.loads(said["half a header"].partition("\r\n\r\n")[2])["error"]["type"] == "invalid_request_error"
    assert said["half a body"].startswith("HTTP/1.1 408")
    assert said["a second header"].startswith("HTTP/1.1 200")
    assert "HTTP/1.1 408" in said["a second header"]


def test_the_first_fault_of_a_request_is_looked_for_and_not_all():
    """A megabyte of wrong turns would else be as many faults, listed for seconds while nobody else is answered."""
    with pytest.raises(ValidationError) as caught:
        ChatRequest.model_validate({"messages": [1] * 1000})
    assert caught.value.error_count() == 1


# --- what is refused at the start -----------------------------------------------------------------------------------


def test_what_cannot_be_served_is_said_before_anything_is_loaded(tiny_base, tmp_path):
    for name, content in {"adapter_config.json": "{}", "config.json": '{"model_type": "gpt2"}'}.items():
        (tmp_path / name).mkdir()
        (tmp_path / name / name).write_text(content)
    for folder, words in {"adapter_config.json": "adapter", "config.json": "gpt2", ".": "no run"}.items():
        with pytest.raises(UsageError, match=words):
            find_target(tmp_path / folder, False)
    with pytest.raises(UsageError, match="no untuned model"):
        find_target(tiny_base, True)
    (tmp_path / "state.json").write_text("{}")
    with pytest.raises(UsageError, match="checkpoint"):
        find_target(tmp_path, False)


def test_a_run_needs_a_verified_export_as_it_was_verified(tmp_path):
    (tmp_path / "manifest.json").write_text("{}")
    with pytest.raises(UsageError, match="no export") as caught:
        find_target(tmp_path, False)
    assert f"recipe export {tmp_path}" in str(caught.value)
    (tmp_path / "export" / "merged").mkdir(parents=True)
    record = {
        "format": 1,
        "verified": False,
        "status": "failed",
        "reason": "too far",
        "step": 1,
        "sha256": {"merged/x": "0" * 64},
    }
    (tmp_path / "export" / "export.json").write_text(json.dumps(record))
    with pytest.raises(VerificationError, match="the export is failed: too far"):
        find_target(tmp_path, False)
    (tmp_path / "export" / "export.json").write_text(json.dumps({**record, "verified": True}))
    with pytest.raises(VerificationError, match="merged/x is missing"):
        find_target(tmp_path, False)
    (tmp_path / "export" / "merged" / "x").write_text("other")
    with pytest.raises(VerificationError, match="merged/x is damaged"):
        find_target(tmp_path, False)


def test_memory_port_key_and_context_are_looked_at_first(tiny_base, tmp_path):
    free = free_memory()
    refuse_too_large(free // 4, free // 4, 4, 256)
    with pytest.raises(MachineError, match="--slots 1"):
        refuse_too_large(free // 2, free, 4, 256)
    with bind("127.0.0.1", 0) as taken, pytest.raises(MachineError, match="Address already in use"):
        serve(tiny_base, Options(port=taken.getsockname()[1]), print)
    with pytest.raises(UsageError, match="a key is needed"):
        serve(tiny_base, Options(host="0.0.0.0", port=0), print)
    with pytest.raises(UsageError, match="256 positions"):
        serve(tiny_base, Options(port=0, context=257), print)
    for text in ("", "two words", "schlüssel"):
        (tmp_path / "key").write_text(text)
        with pytest.raises(UsageError, match="one key"):
            serve(tiny_base, Options(port=0, key_file=tmp_path / "key"), print)
