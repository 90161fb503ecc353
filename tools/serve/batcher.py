"""Answers requests together: one thread computes, and a request joins between two tokens of the others.

What an answer is does not depend on who is answered beside it (engines/cpu/places.py), nor on when it came.
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


class Full(Exception):
    """Every place is taken, and so is the queue."""


class Stopping(Exception):
    """The server ends: no answer begins, and none goes on."""


class Places(Protocol):
    """What an engine offers: room for `count` answers of at most `context` tokens, prompts included."""

    count: int
    context: int

    def join(self, place: int, prompt: Sequence[int], tokens: int) -> Array:
        """Put a prompt into a free place, for `tokens` together with its answer; return the logits [V] after it."""

    def step(self, tokens: Mapping[int, int]) -> Mapping[int, Array]:
        """Append a token to each place in `tokens`; return the logits [V] after it, by place."""

    def leave(self, place: int) -> None:
        """Free a place."""


class Text:
    """An answer's text as its tokens come: whole characters only, and nothing that may be the begin of a stop string.

    `after` is the last token before the answer: some tokenizers drop a space at the begin of a text, and an answer
    that continues one has to keep it.
    """

    def __init__(self, tokenizer: ChatTokenizer, stops: Sequence[str], after: Sequence[int] = ()) -> None:
        self.tokenizer, self.stops = tokenizer, stops
        self.ids = list(after)
        self.told = self.begin = len(tokenizer.decode(self.ids, skip_special=True))
        self.stopped = False

    def add(self, token: int) -> str:
        """Take a token; return what can be told of the text from it on. `stopped` is set where a stop string came."""
        self.ids.append(token)
        return self._tell(self.tokenizer.decode(self.ids, skip_special=True).rstrip(UNFINISHED), hold=True)

    def rest(self) -> str:
        """Return what was held back, at the end of an answer; up to a stop string that it holds."""
        return "" if self.stopped else self._tell(self.tokenizer.decode(self.ids, skip_special=True), hold=False)

    def _tell(self, text: str, hold: bool) -> str:
        found = [at for stop in self.stops if (at := text.find(stop, self.told)) >= 0]
        self.stopped = bool(found)
        end = min(found) if found else len(text) - (held(text[self.told :], self.stops) if hold else 0)
        told, self.told = text[self.told : end], max(end, self.told)
        return told


def held(text: str, stops: Sequence[str]) -> int:
    """Return how many characters at the end of `text` may be the begin of a stop string."""

    def begun(stop: str) -> int:
        lengths = range(min(len(stop) - 1, len(text)), 0, -1)
        return next((length for length in lengths if text.endswith(stop[:length])), 0)

    return max(map(begun, stops), default=0)


@dataclass
class Part:
    """A piece of an answer. The last one has `reason`: "stop" or "length", or `error`, why there is no more."""

    text: str = ""
    reason: str | None = None
    error: Exception | None = None


@dataclass(eq=False)
class Answer:
    """A request for an answer, and how far it has come. `tell` gets its parts, on the thread that computes."""

    prompt: Sequence[int]
    sampling: Evaluation
    seed: int
    tokenizer: ChatTokenizer
    tell: Callable[[Part], None]
    stops: Sequence[str] = ()
    tokens: list[int] = field(default_factory=list)
    gone: bool = False  # nobody waits for it any more

    def __post_init__(self) -> None:
        self.text = Text(self.tokenizer, self.stops, self.prompt[-1:])

    def take(self, logits: Array) -> Part:
        """Choose the next token from `logits` [V]; return what it adds to the answer, and whether it ends it.

        Draws are those of `common.train.generate`: the same seed gives the same answer there.
        """
        logits[list(self.tokenizer.never_ids)] = float("-inf")
        draw = float(uniforms(self.seed, len(self.tokens), 1)[0])
        seen = [*self.prompt, *self.tokens]
        token = choose(logits[: self.tokenizer.vocab_size], self.sampling, seen, draw)
        if token in self.tokenizer.eos_ids:
            return Part(self.text.rest(), "stop")
        self.tokens.append(token)
        text = self.text.add(token)
        if len(self.tokens) == self.sampling.max_new_tokens and not self.text.stopped:
            return Part(text + self.text.rest(), "stop" if self.text.stopped else "length")
        return Part(text, "stop" if self.text.stopped else None)


@dataclass(eq=False)
class Lane:
    """One model: its places, who sits in them and who waits. `mode` is entered to compute: adapters on, or off."""

    places: Places
    mode: Callable[[], AbstractContextManager[None]] = field(default=nullcontext)
    waiting: deque[Answer] = field(default_factory=deque)
    sitting: dict[int, Answer] = field(default_factory=dict)

    def seat_next(self) -> int | None:
        """Give a free place to whoever waits longest; return it, or None where nobody waits or none is free."""
        free = [place for place in range(self.places.count) if place not in self.sitting]
        if not (self.waiting and free):
            return None
        self.sitting[free[0]] = self.waiting.popleft()
        return free[0]

    def join(self, place: int) -> None:
        """Compute the prompt of the answer that has just been given `place`, and its first token."""
        answer = self.sitting[place]
        with self.mode():
            tokens = len(answer.prompt) + answer.sampling.max_new_tokens
            logits = self.places.join(place, answer.prompt, tokens)
        self.give(place, logits)

    def step(self) -> None:
        """Give every answer its next token."""
        for place in [place for place, answer in self.sitting.items() if answer.gone]:
            self.leave(place)
        if not self.sitting:
            return
        with self.mode():
            logits = self.places.step({place: answer.tokens[-1] for place, answer in self.sitting.items()})
        for place in list(self.sitting):
            self.give(place, logits[place])

    def give(self, place: int, logits: Array) -> None:
        """Give the answer in `place` the token that `logits` [V] choose.

        At its end the place is free before the client knows: whoever asks again at once must not find it taken.
        """
        answer = self.sitting[place]
        part = answer.take(logits)
        if part.reason:
            self.leave(place)
        if part.text or part.reason:
            answer.tell(part)

    def leave(self, place: int) -> None:
        self.places.leave(place)
        del self.sitting[place]

    def end(self, places: Collection[int], error: Exception) -> None:
        """End the answers in `places`, for the reason that `error` is."""
        for place in places:
            answer = self.sitting[place]
            self.leave(place)
            answer.tell(Part(error=error))


class Batcher:
    """Serves the answers of all lanes. `submit`, `cancel` and `stop` may be called from any thread."""

    def __init__(self, lanes: Sequence[Lane], queue: int, fault: Callable[[Exception], None]) -> None:
        self.lanes, self.queue, self.fault = lanes, queue, fault
        self.stopping = False
        self.changed = threading.Condition()  # held for moments, never while a token is computed

    @property
    def answering(self) -> int:
        """Return how many answers have a place."""
        return sum(len(lane.sitting) for lane in self.lanes)

    @property
    def waiting(self) -> int:
        """Return how many wait for one."""
        return sum(len(lane.waiting) for lane in self.lanes)

    def submit(self, lane: Lane, answer: Answer) -> None:
        """Let an answer wait for a place. Raises Full or Stopping."""
        with self.changed:
            if self.stopping:
                raise Stopping
            free = lane.places.count - len(lane.sitting)
            if len(lane.waiting) >= free + self.queue:
                raise Full
            lane.waiting.append(answer)
            self.changed.notify()

    def cancel(self, answer: Answer) -> None:
        """End an answer that nobody waits for: in the queue at once, in a place before its next token."""
        with self.changed:
            answer.gone = True
            for lane in self.lanes:
                if answer in lane.waiting:
                    lane.waiting.remove(answer)

    def stop(self) -> None:
        """End every answer before its next token, and then `run`."""
        with self.changed:
            self.stopping = True
            self.changed.notify()

    def run(self) -> None:
        """Compute until `stop`. A fault ends the answers that it happened to, not the server."""
        while self._wait():
            for lane in self.lanes:
                with self.changed:
                    place = lane.seat_next()  # one between two tokens: the others wait for one prompt at most
                if place is not None:
                    self._guarded(lane, [place], functools.partial(lane.join, place))
                self._guarded(lane, lane.sitting, lane.step)
        with self.changed:
            for lane in self.lanes:
                lane.end(list(lane.sitting), Stopping())
                while lane.waiting:
                    lane.waiting.popleft().tell(Part(error=Stopping()))

    def _guarded(self, lane: Lane, places: Collection[int], compute: Callable[[], None]) -> None:
        try:
            compute()
        except Exception as error:
            self.fault(error)
            lane.end([place for place in places if place in lane.sitting], error)

    def _wait(self) -> bool:
        """Wait until there is something to compute; return False once the server ends."""
        with self.changed:
            self.changed.wait_for(lambda: self.stopping or self.answering or self.waiting)
            return not self.stopping
