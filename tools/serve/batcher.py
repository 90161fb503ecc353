"""Answers requests together: one thread computes, and a request joins between two tokens of the others.

What an answer is does not depend on who is answered beside it (engines/cpu/slots.py), nor on when it came.
"""

from __future__ import annotations

import functools
import threading
from collections import deque
from collections.abc import Callable, Collection, Mapping, Sequence
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass, field
from typing import Protocol

from common.config.schema import Evaluation
from common.data.chat import ChatTokenizer
from common.engine import Array
from common.train.generate import choose, uniforms

UNFINISHED = "\ufffd"  # what the bytes of a character decode to as long as some of them are missing


class QueueFull(Exception):
    """Every slot is taken, and so is the queue."""


class Stopping(Exception):
    """The server ends: no answer begins, and none goes on."""


class Slots(Protocol):
    """What an engine offers: room for `count` answers of at most `context` tokens, prompts included."""

    count: int
    context: int

    def prefill(self, slot: int, prompt: Sequence[int], tokens: int) -> Array:
        """Put a prompt into a free slot, for `tokens` together with its answer; return the logits [V] after it."""

    def decode(self, tokens: Mapping[int, int]) -> Mapping[int, Array]:
        """Append a token to each slot in `tokens`; return the logits [V] after it, by slot."""

    def free(self, slot: int) -> None:
        """Free a slot."""


class Detokenizer:
    """Turns tokens into text as they come: whole characters only, and nothing that may be the begin of a stop string.

    `after` is the last token before the answer: some tokenizers drop a space at the begin of a text, and an answer
    that continues one has to keep it.
    """

    def __init__(self, tokenizer: ChatTokenizer, stops: Sequence[str], after: Sequence[int] = ()) -> None:
        self.tokenizer, self.stops = tokenizer, stops
        self.ids = list(after)
        self.sent = len(tokenizer.decode(self.ids, skip_special=True))
        self.stopped = False

    def add(self, token: int) -> str:
        """Take a token; return what can be sent of the text from it on. `stopped` is set where a stop string came."""
        # All tokens are decoded anew, for what one says may depend on those before it: at the 2,000th of SmolLM2's that
        # takes 0.5 ms (tokenizers 0.23.3, a busy EPYC), and computing a token some 50 (tools/serve/start.py).
        self.ids.append(token)
        return self._release(self.tokenizer.decode(self.ids, skip_special=True).rstrip(UNFINISHED), hold=True)

    def flush(self) -> str:
        """Return what was held back, at the end of an answer; up to a stop string that it holds."""
        return "" if self.stopped else self._release(self.tokenizer.decode(self.ids, skip_special=True), hold=False)

    def _release(self, text: str, hold: bool) -> str:
        found = [at for stop in self.stops if (at := text.find(stop, self.sent)) >= 0]
        self.stopped = bool(found)
        end = min(found) if found else len(text) - (held(text[self.sent :], self.stops) if hold else 0)
        released, self.sent = text[self.sent : end], max(end, self.sent)
        return released


def held(text: str, stops: Sequence[str]) -> int:
    """Return how many characters at the end of `text` may be the begin of a stop string."""

    def begun(stop: str) -> int:
        lengths = range(min(len(stop) - 1, len(text)), 0, -1)
        return next((length for length in lengths if text.endswith(stop[:length])), 0)

    return max(map(begun, stops), default=0)


@dataclass
class Chunk:
    """A piece of an answer. The last one has `reason`: "stop" or "length", or `error`, why there is no more."""

    text: str = ""
    reason: str | None = None
    error: Exception | None = None


@dataclass(eq=False)
class Answer:
    """A request for an answer, and how far it has come. `on_chunk` gets its chunks, on the thread that computes."""

    prompt: Sequence[int]
    sampling: Evaluation
    seed: int
    tokenizer: ChatTokenizer
    on_chunk: Callable[[Chunk], None]
    stops: Sequence[str] = ()
    tokens: list[int] = field(default_factory=list)
    canceled: bool = False  # nobody waits for it any more

    def __post_init__(self) -> None:
        self.detokenizer = Detokenizer(self.tokenizer, self.stops, self.prompt[-1:])

    def take(self, logits: Array) -> Chunk:
        """Choose the next token from `logits` [V]; return what it adds to the answer, and whether it ends it.

        Draws are those of `common.train.generate`: the same seed gives the same answer there.
        """
        logits[list(self.tokenizer.never_ids)] = float("-inf")
        draw = float(uniforms(self.seed, len(self.tokens), 1)[0])
        seen = [*self.prompt, *self.tokens]
        token = choose(logits[: self.tokenizer.vocab_size], self.sampling, seen, draw)
        if token in self.tokenizer.eos_ids:
            return Chunk(self.detokenizer.flush(), "stop")
        self.tokens.append(token)
        text = self.detokenizer.add(token)
        if len(self.tokens) == self.sampling.max_new_tokens and not self.detokenizer.stopped:
            return Chunk(text + self.detokenizer.flush(), "stop" if self.detokenizer.stopped else "length")
        return Chunk(text, "stop" if self.detokenizer.stopped else None)


@dataclass(eq=False)
class Scheduler:
    """One model: its slots, the answers in them and in its queue. `mode` is entered to compute: adapters on, or off."""

    slots: Slots
    mode: Callable[[], AbstractContextManager[None]] = field(default=nullcontext)
    waiting: deque[Answer] = field(default_factory=deque)
    running: dict[int, Answer] = field(default_factory=dict)

    def admit(self) -> int | None:
        """Give a free slot to the answer that waits longest; return it, or None where nobody waits or none is free."""
        free = [slot for slot in range(self.slots.count) if slot not in self.running]
        if not (self.waiting and free):
            return None
        self.running[free[0]] = self.waiting.popleft()
        return free[0]

    def prefill(self, slot: int) -> None:
        """Compute the prompt of the answer that has just been given `slot`, and its first token."""
        answer = self.running[slot]
        with self.mode():
            tokens = len(answer.prompt) + answer.sampling.max_new_tokens
            logits = self.slots.prefill(slot, answer.prompt, tokens)
        self.advance(slot, logits)

    def decode(self) -> None:
        """Give every answer its next token."""
        for slot in [slot for slot, answer in self.running.items() if answer.canceled]:
            self.free(slot)
        if not self.running:
            return
        with self.mode():
            logits = self.slots.decode({slot: answer.tokens[-1] for slot, answer in self.running.items()})
        for slot in list(self.running):
            self.advance(slot, logits[slot])

    def advance(self, slot: int, logits: Array) -> None:
        """Give the answer in `slot` the token that `logits` [V] choose.

        At its end the slot is free before the client knows: whoever asks again at once must not find it taken.
        """
        answer = self.running[slot]
        chunk = answer.take(logits)
        if chunk.reason:
            self.free(slot)
        if chunk.text or chunk.reason:
            answer.on_chunk(chunk)

    def free(self, slot: int) -> None:
        """Free a slot whose answer has ended."""
        self.slots.free(slot)
        del self.running[slot]

    def abort(self, slots: Collection[int], error: Exception) -> None:
        """End the answers in `slots`, for the reason that `error` is."""
        for slot in slots:
            answer = self.running[slot]
            self.free(slot)
            answer.on_chunk(Chunk(error=error))


class Batcher:
    """Computes the answers of all models, in turns. `submit`, `cancel` and `stop` may be called from any thread."""

    def __init__(self, schedulers: Sequence[Scheduler], queue: int, fault: Callable[[Exception], None]) -> None:
        self.schedulers, self.queue, self.fault = schedulers, queue, fault
        self.stopping = False
        self.changed = threading.Condition()  # held for moments, never while a token is computed

    @property
    def running(self) -> int:
        """Return how many answers have a slot."""
        return sum(len(scheduler.running) for scheduler in self.schedulers)

    @property
    def waiting(self) -> int:
        """Return how many wait for one."""
        return sum(len(scheduler.waiting) for scheduler in self.schedulers)

    def submit(self, scheduler: Scheduler, answer: Answer) -> None:
        """Let an answer wait for a slot. Raises QueueFull or Stopping."""
        with self.changed:
            if self.stopping:
                raise Stopping
            free = scheduler.slots.count - len(scheduler.running)
            if len(scheduler.waiting) >= free + self.queue:
                raise QueueFull
            scheduler.waiting.append(answer)
            self.changed.notify()

    def cancel(self, answer: Answer) -> None:
        """End an answer that nobody waits for: in the queue at once, in a slot before its next token."""
        with self.changed:
            answer.canceled = True
            for scheduler in self.schedulers:
                if answer in scheduler.waiting:
                    scheduler.waiting.remove(answer)

    def stop(self) -> None:
        """End every answer before its next token, and then `run`."""
        with self.changed:
            self.stopping = True
            self.changed.notify()

    def run(self) -> None:
        """Compute until `stop`. A fault ends the answers that it happened to, not the server."""
        while self._wait():
            for scheduler in self.schedulers:
                with self.changed:
                    slot = scheduler.admit()  # one between two tokens: the others wait for one prompt at most
                if slot is not None:
                    self._guarded(scheduler, [slot], functools.partial(scheduler.prefill, slot))
                self._guarded(scheduler, scheduler.running, scheduler.decode)
        with self.changed:
            for scheduler in self.schedulers:
                scheduler.abort(list(scheduler.running), Stopping())
                while scheduler.waiting:
                    scheduler.waiting.popleft().on_chunk(Chunk(error=Stopping()))

    def _guarded(self, scheduler: Scheduler, slots: Collection[int], compute: Callable[[], None]) -> None:
        try:
            compute()
        except Exception as error:
            self.fault(error)
            scheduler.abort([slot for slot in slots if slot in scheduler.running], error)

    def _wait(self) -> bool:
        """Wait until there is something to compute; return False once the server ends."""
        with self.changed:
            self.changed.wait_for(lambda: self.stopping or self.running or self.waiting)
            return not self.stopping
