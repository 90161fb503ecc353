"""`recipe serve --check URL`: what a user expects of an OpenAI-compatible server, asked by OpenAI's own client.

Whatever serves there is asked: this repository's server, vLLM on a board, llama.cpp, transformers. Each line is one
expectation and what came; the exit code is 6 where one does not hold.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from common.data.chat import ChatTokenizer
from common.errors import MachineError, UsageError
from common.train.generate import generate
from tools.generate.chat import Speaker, open_speakers, within
from tools.runs.folder import is_run, read_run
from tools.serve.batcher import UNFINISHED

Say = Callable[[str], None]
TIMEOUT = 300.0  # seconds for one answer: a CPU that does other things may need them
SOON = 60.0  # seconds for a refusal, which needs no computing
SHORT, LONG = 8, 24  # tokens of the answers that are asked for
COMPARED = 32  # tokens of a greedy answer that is held against ours
PROMPTS = ("Hello!", "What is a learning rate?", "Write a short poem about the sea.", "Count to ten.")
HELD, FAILED = 0, 6


class Unmet(Exception):
    """An expectation does not hold; its text is what came."""


@dataclass(frozen=True)
class Endpoint:
    """The server that is asked: OpenAI's client, the model's name, and whether it takes conversations."""

    client: Any
    model: str
    chats: bool

    def ask(self, text: str, **fields: Any) -> Any:
        """Return the response to one prompt, as a conversation where the server takes those."""
        fields = {"model": self.model, "max_tokens": SHORT, "temperature": 0, **fields}
        if self.chats:
            return self.client.chat.completions.create(messages=[{"role": "user", "content": text}], **fields)
        return self.client.completions.create(prompt=text, **fields)

    def said(self, choice: Any) -> str:
        """Return the text of a choice."""
        return (choice.message.content if self.chats else choice.text) or ""

    def streamed(self, text: str, **fields: Any) -> tuple[str, list[Any]]:
        """Return a streamed answer's text, and its chunks."""
        chunks = list(self.ask(text, stream=True, **fields))
        choices = [chunk.choices[0] for chunk in chunks if chunk.choices]
        pieces = [(choice.delta.content if self.chats else choice.text) or "" for choice in choices]
        return "".join(pieces), chunks


# --- what is expected -----------------------------------------------------------------------------------------------


def named(endpoint: Endpoint) -> str:
    """GET /v1/models names the model."""
    known = [model.id for model in endpoint.client.models.list()]
    expect(endpoint.model in known, f"it has {', '.join(known) or 'none'}")
    return f"{len(known)} named"


def whole_answer(endpoint: Endpoint) -> str:
    """An answer has a text, a reason of its end, and the tokens that it took."""
    response = endpoint.ask(PROMPTS[0])
    expect(
        response.choices[0].finish_reason in ("stop", "length"), f"it ended by {response.choices[0].finish_reason!r}"
    )
    usage = response.usage
    expect(usage is not None and usage.prompt_tokens > 0, "no usage")
    expect(usage.total_tokens == usage.prompt_tokens + usage.completion_tokens, f"usage does not add up: {usage}")
    return f"{usage.prompt_tokens} tokens in, {usage.completion_tokens} out"


def limit(endpoint: Endpoint) -> str:
    """max_tokens is kept, and the answer says that it was cut off."""
    response = endpoint.ask(PROMPTS[2], max_tokens=3)
    tokens, reason = response.usage.completion_tokens, response.choices[0].finish_reason
    expect(tokens <= 3 and (reason == "length" or tokens < 3), f"{tokens} tokens, ended by {reason!r}")
    return f"{tokens} tokens, {reason}"


def newer_limit(endpoint: Endpoint) -> str:
    """max_completion_tokens is kept."""
    if not endpoint.chats:
        return "of conversations only"
    response = endpoint.ask(PROMPTS[2], max_tokens=omitted(), max_completion_tokens=3)
    expect(response.usage.completion_tokens <= 3, f"{response.usage.completion_tokens} tokens")
    return f"{response.usage.completion_tokens} tokens"


def stream(endpoint: Endpoint) -> str:
    """A stream says what the whole answer says, ends with its reason, and has no usage that nobody asked for."""
    expected = endpoint.said(endpoint.ask(PROMPTS[1], max_tokens=LONG).choices[0])
    found, chunks = endpoint.streamed(PROMPTS[1], max_tokens=LONG)
    expect(found == expected, f"{found!r}, the whole answer is {expected!r}")
    expect(any(chunk.choices and chunk.choices[0].finish_reason for chunk in chunks), "no chunk has a finish_reason")
    return f"{len(chunks)} chunks"


def end_of_stream(endpoint: Endpoint) -> str:
    """A stream ends with the line `data: [DONE]`."""
    fields: dict[str, Any] = {"model": endpoint.model, "max_tokens": 2, "stream": True}
    api = endpoint.client.with_streaming_response
    if endpoint.chats:
        asked = api.chat.completions.create(messages=[{"role": "user", "content": PROMPTS[0]}], **fields)
    else:
        asked = api.completions.create(prompt=PROMPTS[0], **fields)
    with asked as response:
        lines = [line for line in response.iter_lines() if line.startswith("data:")]
    expect(bool(lines) and lines[-1].removeprefix("data:").strip() == "[DONE]", f"it ends with {lines[-1:]}")
    return f"{len(lines)} events"


def usage_in_stream(endpoint: Endpoint) -> str:
    """stream_options.include_usage brings a last chunk with usage and without choices."""
    _, chunks = endpoint.streamed(PROMPTS[0], stream_options={"include_usage": True})
    expect(bool(chunks) and chunks[-1].usage is not None, "the last chunk has no usage")
    expect(not chunks[-1].choices, "the chunk with usage has choices")
    return f"{chunks[-1].usage.total_tokens} tokens"


def stop(endpoint: Endpoint) -> str:
    """A stop string ends the answer and is not part of it, streamed or not."""
    for prompt in PROMPTS:
        text = endpoint.said(endpoint.ask(prompt, max_tokens=LONG).choices[0])
        if string := stop_string(text):
            break
    else:
        raise Unmet("no answer has three whole characters to be stopped at")
    before = text[: text.index(string)]
    found = endpoint.ask(prompt, max_tokens=LONG, stop=[string]).choices[0]
    expect(endpoint.said(found) == before, f"stopped at {string!r} it is {endpoint.said(found)!r}, must be {before!r}")
    expect(found.finish_reason == "stop", f"it ended by {found.finish_reason!r}")
    streamed, _ = endpoint.streamed(prompt, max_tokens=LONG, stop=[string])
    expect(streamed == before, f"streamed, it is {streamed!r}, must be {before!r}")
    return f"{string!r}"


def stop_string(text: str) -> str:
    """Return three characters about the middle of an answer, to stop it at; "" where it has none that are whole.

    Bytes that make no character, of which a random model writes many, are none: each server stands for them by as many
    U+FFFD as it likes, and whether a stop string may begin within them nobody has promised.
    """
    whole = [at for at in range(1, len(text) - 2) if UNFINISHED not in text[at - 1 : at + 3]]
    # Rather what was not there before, as in an answer of line breaks: else nothing is left before the stop.
    at = min(whole, key=lambda at: (text.index(text[at : at + 3]) < at, abs(at - len(text) // 2)), default=None)
    return "" if at is None else text[at : at + 3]


def seeds(endpoint: Endpoint) -> str:
    """At a temperature, one seed gives one answer, and other seeds give others."""
    hot = {"max_tokens": LONG, "temperature": 1.5}
    first, again, *others = [
        endpoint.said(endpoint.ask(PROMPTS[2], seed=seed, **hot).choices[0]) for seed in (1, 1, 2, 3)
    ]
    expect(first == again, f"seed 1 gave {first!r}, then {again!r}")
    expect(any(other != first for other in others), "three seeds gave one answer: temperature or seed does nothing")
    return "repeats, and differs"


def parts(endpoint: Endpoint) -> str:
    """A message's content may be a list of text parts."""
    if not endpoint.chats:
        return "of conversations only"
    pieces = [{"type": "text", "text": PROMPTS[1][:6]}, {"type": "text", "text": PROMPTS[1][6:]}]
    fields = {"model": endpoint.model, "max_tokens": SHORT, "temperature": 0}
    found = endpoint.client.chat.completions.create(messages=[{"role": "user", "content": pieces}], **fields)
    expected = endpoint.ask(PROMPTS[1])
    expect(
        endpoint.said(found.choices[0]) == endpoint.said(expected.choices[0]),
        "the answer is another one than to the text",
    )
    return "as the text"


def completions(endpoint: Endpoint) -> str:
    """/v1/completions continues a text."""
    response = endpoint.client.completions.create(
        model=endpoint.model, prompt="Once upon a", max_tokens=SHORT, temperature=0
    )
    expect(response.choices[0].text is not None, "no text")
    return f"{response.usage.completion_tokens} tokens"


def unknown_model(endpoint: Endpoint) -> str:
    """A model that is not served is refused with 404."""
    return refused(lambda: endpoint.ask(PROMPTS[0], extra_body={"model": "no-such-model"}), (404,))


def bad_input(endpoint: Endpoint) -> str:
    """Wrong fields are refused with 400 or 422: no messages, max_tokens 0, a temperature below 0."""
    asked: list[dict[str, Any]] = [{"max_tokens": 0}, {"temperature": -1}]
    asked.append({"messages": []} if endpoint.chats else {"prompt": ""})
    found, unmet = [], []
    for body in asked:
        try:
            found.append(refused(lambda body=body: endpoint.ask(PROMPTS[0], extra_body=body), (400, 422)))  # type: ignore[misc]
        except Unmet as error:
            unmet.append(f"{json.dumps(body)}: {error}")
    expect(not unmet, "; ".join(unmet))
    return ", ".join(found)


def too_long(endpoint: Endpoint) -> str:
    """A prompt longer than any context is refused with 400 or 413, not cut or run."""
    impatient = replace(endpoint, client=endpoint.client.with_options(timeout=SOON, max_retries=0))
    return refused(lambda: impatient.ask("word " * 180_000), (400, 413, 422))


def no_silence(endpoint: Endpoint) -> str:
    """n=2, log-probabilities and JSON are given or refused; none is passed over in silence."""
    found = []
    logprobs: dict[str, Any] = {"logprobs": True, "top_logprobs": 2} if endpoint.chats else {"logprobs": 2}
    wanted: list[tuple[str, dict[str, Any], Callable[[Any], bool]]] = [
        ("n", {"n": 2}, lambda response: len(response.choices) == 2),
        ("logprobs", logprobs, lambda response: response.choices[0].logprobs is not None),
    ]
    if endpoint.chats:
        form = {"response_format": {"type": "json_object"}}
        wanted.append(("response_format", form, lambda response: begins_json(endpoint.said(response.choices[0]))))
    passed_over: list[str] = []
    for name, fields, given in wanted:
        try:
            response = endpoint.ask(PROMPTS[0], **fields)
        except Exception as error:
            found.append(f"{name} {refusal_of(error, (400, 422, 501))}")
            continue
        (found if given(response) else passed_over).append(f"{name} {'given' if given(response) else 'passed over'}")
    expect(not passed_over, ", ".join(passed_over))
    return ", ".join(found)


def goes_on(endpoint: Endpoint) -> str:
    """After a stream that was closed at its first chunk, the next request is answered."""
    with endpoint.ask(PROMPTS[2], max_tokens=LONG, stream=True) as chunks:
        next(iter(chunks))
    return whole_answer(endpoint)


EXPECTATIONS: tuple[Callable[[Endpoint], str], ...] = (
    named,
    whole_answer,
    limit,
    newer_limit,
    stream,
    end_of_stream,
    usage_in_stream,
    stop,
    seeds,
    parts,
    completions,
    unknown_model,
    bad_input,
    no_silence,
    goes_on,
    too_long,  # the last: who runs such a prompt answers nothing else for long
)


def expect(holds: bool, otherwise: str) -> None:
    if not holds:
        raise Unmet(otherwise)


def omitted() -> Any:
    import openai

    return openai.omit


def begins_json(text: str) -> bool:
    """Return whether an answer is the begin of a JSON object: it is cut off after a few tokens."""
    return text.lstrip()[:1] == "{"


def refused(ask: Callable[[], Any], statuses: Sequence[int]) -> str:
    """Return how a request was refused. Raises Unmet where it was not, or in another way."""
    try:
        ask()
    except Exception as error:
        return refusal_of(error, statuses)
    raise Unmet("it was answered")


def refusal_of(error: Exception, statuses: Sequence[int]) -> str:
    status = getattr(error, "status_code", None)
    expect(status in statuses, f"{type(error).__name__}{f' {status}' if status else ''}: {error}"[:200])
    return str(status)


# --- the command ----------------------------------------------------------------------------------------------------


def check(url: str, name: str | None, key_file: Path | None, against: Path | None, say: Say) -> int:
    """Print what holds of the server at `url`, and how its greedy answers compare with those of the run `against`.

    Returns 6 where an expectation does not hold or a first token differs, else 0. Raises MachineError where nothing
    answers there.
    """
    endpoint = reached(url, name, key_file)
    say(f"{url}: model {endpoint.model}, {'conversations and completions' if endpoint.chats else 'completions only'}")
    unmet = 0
    for expectation in EXPECTATIONS:
        sentence = (expectation.__doc__ or "").strip()
        try:
            say(f"  holds  {sentence} ({expectation(endpoint)})")
        except Unmet as error:
            unmet += 1
            say(f"  FAILS  {sentence} {error}")
        except Exception as error:  # whatever the client raises: a user would meet it, too
            unmet += 1
            say(f"  FAILS  {sentence} {type(error).__name__}: {error}")
    say(f"{len(EXPECTATIONS) - unmet} of {len(EXPECTATIONS)} hold")
    agrees = against is None or compare(endpoint, against, say)
    return HELD if agrees and not unmet else FAILED


def reached(url: str, name: str | None, key_file: Path | None) -> Endpoint:
    """Return the server at `url`, asked for its models. Raises MachineError where it does not answer."""
    import openai

    from tools.serve.target import key_in

    if not url.startswith(("http://", "https://")):
        raise UsageError("not a URL", where=url, todo="such as http://127.0.0.1:8000/v1")
    key = key_in(key_file) if key_file else "none"
    base = url.rstrip("/") if url.rstrip("/").endswith("/v1") else f"{url.rstrip('/')}/v1"
    client = openai.OpenAI(base_url=base, api_key=key, timeout=TIMEOUT)  # it tries twice again, as users' clients do
    try:
        known = [model.id for model in client.models.list()]
    except openai.OpenAIError as error:
        if name is None or not isinstance(error, openai.APIStatusError):
            todo = "look whether it runs, or say the model's name with --name"
            raise MachineError(f"no models there: {error}", where=f"{base}/models", todo=todo) from error
        known = []
    if not (known or name):
        raise MachineError("the server names no model", where=f"{base}/models", todo="say its name with --name")
    model = name or known[0]
    try:
        Endpoint(client, model, True).ask(PROMPTS[0], max_tokens=1)
    except openai.BadRequestError:
        return Endpoint(client, model, False)  # a model without a chat template
    except openai.OpenAIError:
        pass  # the expectations say what is wrong with it
    return Endpoint(client, model, True)


def compare(endpoint: Endpoint, against: Path, say: Say) -> bool:
    """Print how far the server's greedy answers are those of our engine; return whether all begin with the same token.

    Its first token differs where the weights, the tokenizer or the template are others. Later ones may part where two
    tokens are as likely as each other: another engine, or bf16, sums in another order.
    """
    same, begun = 0, True
    target = against / "export" / "merged" if is_run(against) else against
    with open_speakers(target, False, {"eval.max_new_tokens": COMPARED, "eval.temperature": 0.0}, say) as (speaker,):
        system = system_of(against)
        for prompt in PROMPTS:
            ids = prompt_ids(speaker.tokenizer, prompt, system, endpoint.chats)
            ours = answer_of(speaker, ids)
            fields: dict[str, Any] = {"max_tokens": COMPARED}
            theirs = endpoint.said(endpoint.ask(prompt, **fields).choices[0])
            shared = agreement(speaker.tokenizer, ids, ours, theirs)
            same += shared == len(ours)
            begun = begun and (shared > 0 or not ours)
            say(f"  {shared} of {len(ours)} tokens as ours: {prompt!r}")
    say(f"{same} of {len(PROMPTS)} greedy answers are ours")
    return begun


def system_of(against: Path) -> str | None:
    """Return the system prompt of a run's recipe; None for a folder."""
    return read_run(against).config.data.system_prompt if is_run(against) else None


def prompt_ids(tokenizer: ChatTokenizer, prompt: str, system: str | None, chats: bool) -> list[int]:
    return tokenizer.prompt_ids(prompt, system) if chats else tokenizer.encode_text(prompt)


def answer_of(speaker: Speaker, ids: Sequence[int]) -> list[int]:
    """Return the tokens that our engine answers with, greedy, as `recipe generate` does."""
    tokenizer = speaker.tokenizer
    sampling = within(speaker.config, speaker.context - len(ids))
    options: dict[str, Any] = {"eos_ids": tokenizer.eos_ids, "vocab_size": tokenizer.vocab_size}
    (answer,) = generate(speaker.backend, [ids], sampling, never_ids=tokenizer.never_ids, **options)
    return answer


def agreement(tokenizer: ChatTokenizer, ids: Sequence[int], ours: Sequence[int], theirs: str) -> int:
    """Return how many of our tokens the text of the other answer begins with, white space at its begin aside.

    A token without a text of its own, or a part of a character, is counted with the next that has one.
    """
    after = list(ids[-1:])
    skipped = len(tokenizer.decode(after, skip_special=True))
    texts = [tokenizer.decode([*after, *ours[:n]], skip_special=True)[skipped:].lstrip() for n in range(len(ours) + 1)]
    theirs = theirs.lstrip()
    if theirs.rstrip() == texts[-1].rstrip():
        return len(ours)
    shared, known = 0, 0
    for count, text in enumerate(texts):
        text = text.rstrip(UNFINISHED)
        if not theirs.startswith(text):
            break
        if len(text) > known:
            shared, known = count, len(text)
    return shared
