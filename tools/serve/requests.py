"""The requests of OpenAI's API: each field is honored, refused by name, or neutral. None is passed over."""

from __future__ import annotations

import json
from collections import Counter
from collections.abc import Mapping
from typing import Annotated, Any, TypeVar

from pydantic import AfterValidator, BaseModel, BeforeValidator, ConfigDict, FailFast, Field, ValidationError

from common.data.rows import ROLES, Message, kind_of
from tools.serve.errors import APIError

STOPS = 4  # as many as OpenAI's API takes
SEEDS = 1 << 63  # from minus this up to it, as OpenAI's API has them
PENALTY = 100.0  # and its inverse: far beyond what is of use, and no logit times or over it leaves float64
# Below this a temperature is 0: float32 logits that differ at all then differ by 1e12 and more, which exp makes 0;
# smaller ones still would leave float64 when a logit is divided by them.
COLDEST = 1e-20
R = TypeVar("R", bound="GenerationRequest")

# Fields whose work is not done here, with the values that ask for nothing: those pass, any other is refused.
NEUTRAL: dict[str, tuple[Any, ...]] = {
    "n": (None, 1),
    "best_of": (None, 1),
    "tools": (None, []),
    "tool_choice": (None, "none", "auto"),
    "parallel_tool_calls": (None, True, False),
    "functions": (None, []),
    "function_call": (None, "none", "auto"),
    "response_format": (None, {"type": "text"}),
    "logprobs": (None, False),
    "top_logprobs": (None, 0),
    "echo": (None, False),
    "suffix": (None, ""),
    "logit_bias": (None, {}),
    "frequency_penalty": (None, 0),
    "presence_penalty": (None, 0),
    "min_p": (None, 0),
    "modalities": (None, ["text"]),
    "audio": (None,),
    "prediction": (None,),
    "reasoning_effort": (None,),
    "verbosity": (None,),
    "web_search_options": (None,),
    "service_tier": (None, "auto", "default"),
    "store": (None, False),
}
NEUTRAL_IN_MESSAGE: dict[str, tuple[Any, ...]] = {
    "name": (None,),
    "refusal": (None,),
    "annotations": (None, []),
    "audio": (None,),
    "tool_calls": (None, []),
    "function_call": (None,),
    "reasoning_content": (None,),
}


def unicode(text: str) -> str:
    try:
        text.encode("utf-8")
    except UnicodeEncodeError:
        raise ValueError("holds half of a surrogate pair (\\ud800 to \\udfff): not Unicode text") from None
    return text


def text_of(value: Any) -> str:
    """Return a message's content: a string, or the text of its parts. Raises ValueError for anything else."""
    if isinstance(value, str):
        return unicode(value)
    if not isinstance(value, list):
        raise ValueError(f"is {kind_of(value)}, not a string or a list of parts")
    for part in value:
        kind = part.get("type") if isinstance(part, dict) else None
        if kind != "text":
            raise ValueError(f"part of type {kind!r} is not supported: this model reads text")
        if not isinstance(part.get("text"), str) or set(part) != {"type", "text"}:
            raise ValueError('a part is {"type": "text", "text": "..."} and nothing else')
    return unicode("".join(part["text"] for part in value))


def one_prompt(value: Any) -> str:
    if isinstance(value, list) and len(value) == 1 and isinstance(value[0], str):
        (value,) = value
    if isinstance(value, list):
        raise ValueError("several prompts, or token ids, are not supported: one text a request")
    if not isinstance(value, str):
        raise ValueError(f"is {kind_of(value)}, not a string")
    if not value:
        raise ValueError("is empty: there is nothing to continue")
    return unicode(value)


def stops_of(value: Any) -> tuple[str, ...]:
    stops = [value] if isinstance(value, str) else [] if value is None else value
    if not isinstance(stops, list) or not all(isinstance(stop, str) for stop in stops):
        raise ValueError("is a string, or a list of strings")
    if len(stops) > STOPS:
        raise ValueError(f"has {len(stops)} strings, at most {STOPS} are taken")
    if "" in stops:
        raise ValueError("holds an empty string, which would end every answer at once")
    return tuple(map(unicode, stops))


class Strict(BaseModel):
    """Refuses unknown fields, and takes no text for a number."""

    model_config = ConfigDict(extra="forbid", strict=True)


Number = Annotated[float | None, Field(allow_inf_nan=False)]


class StreamOptions(Strict):
    include_usage: bool | None = None


class GenerationRequest(Strict):
    """What both kinds of request have in common. A field that is left out, or null, is the server's to choose."""

    model: str | None = None
    max_tokens: int | None = Field(default=None, ge=1)
    temperature: Number = Field(default=None, ge=0, le=2)
    top_p: Number = Field(default=None, gt=0, le=1)
    top_k: int | None = Field(default=None, ge=-1)
    repetition_penalty: Number = Field(default=None, ge=1 / PENALTY, le=PENALTY)
    seed: int | None = Field(default=None, ge=-SEEDS, lt=SEEDS)
    stop: Annotated[tuple[str, ...], BeforeValidator(stops_of)] = ()
    stream: bool | None = None
    stream_options: StreamOptions | None = None
    # About who asks, not about the answer; kept nowhere.
    user: str | None = None
    safety_identifier: str | None = None
    prompt_cache_key: str | None = None
    metadata: dict[str, str] | None = None

    @property
    def token_limit(self) -> tuple[int | None, str]:
        """Return the most tokens that the answer may have, and the field that says so."""
        return self.max_tokens, "max_tokens"

    @property
    def include_usage(self) -> bool:
        """Return whether a stream ends with a chunk that has the usage."""
        return bool(self.stream_options and self.stream_options.include_usage)

    def sampling(self) -> dict[str, Any]:
        """Return what is asked of the choice of tokens, by the names of the config's eval section."""
        names = ("temperature", "top_p", "top_k", "repetition_penalty")
        found = {name: value for name in names if (value := getattr(self, name)) is not None}
        if found.get("top_k") == -1:  # what other servers call "off"
            found["top_k"] = 0
        if found.get("temperature", 1) < COLDEST:
            found["temperature"] = 0.0
        return found


class Turn(Strict):
    role: str
    content: Annotated[str, BeforeValidator(text_of)]


def conversation(turns: list[Turn]) -> list[Turn]:
    if not turns:
        raise ValueError("is empty: there is nothing to answer")
    if turns[-1].role != "user" or not turns[-1].content.strip():
        raise ValueError("must end with what the user says, and that must not be empty")
    return turns


class ChatRequest(GenerationRequest):
    """The body of POST /v1/chat/completions."""

    messages: Annotated[list[Turn], FailFast(), AfterValidator(conversation)]
    max_completion_tokens: int | None = Field(default=None, ge=1)

    @property
    def token_limit(self) -> tuple[int | None, str]:
        """Return the most tokens that the answer may have, and the field that says so: the newer one first."""
        if self.max_completion_tokens is not None:
            return self.max_completion_tokens, "max_completion_tokens"
        return super().token_limit

    def turns(self) -> tuple[Message, ...]:
        """Return the conversation as the tokenizer takes it."""
        return tuple(Message(turn.role, turn.content) for turn in self.messages)


class CompletionRequest(GenerationRequest):
    """The body of POST /v1/completions."""

    prompt: Annotated[str, BeforeValidator(one_prompt)]


def parse(body: bytes, form: type[R]) -> R:
    """Return the request in `body`. Raises APIError, which names the field that is at fault."""
    try:
        fields = json.loads(body, object_pairs_hook=once_each)
    except (ValueError, RecursionError) as error:
        raise APIError(f"the body is not JSON: {error}") from None
    if not isinstance(fields, dict):
        raise APIError(f"the body is {kind_of(fields)}, not an object")
    fields = without_neutral(fields, NEUTRAL, "")
    if isinstance(fields.get("messages"), list):
        fields["messages"] = [
            without_neutral(turn, NEUTRAL_IN_MESSAGE, f"messages[{at}].") if isinstance(turn, dict) else turn
            for at, turn in enumerate(fields["messages"])
        ]
        for at, turn in enumerate(fields["messages"]):
            if isinstance(turn, dict) and isinstance(turn.get("role"), str) and turn["role"] not in ROLES:
                raise APIError(f"unknown role {turn['role']!r}; known: {', '.join(ROLES)}", f"messages[{at}].role")
    try:
        request = form.model_validate(fields)
    except ValidationError as error:
        raise validation_error(error) from None
    if request.stream_options and not request.stream:
        raise APIError("stream_options is for answers that are streamed: set stream to true", "stream_options")
    if request.max_tokens not in (None, request.token_limit[0]):
        raise APIError("max_tokens and max_completion_tokens differ: give one of them", "max_tokens")
    return request


def once_each(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    """Return a JSON object. Raises APIError where it has a name twice: one of the two would be passed over."""
    found = dict(pairs)
    if len(found) < len(pairs):
        ((twice, _),) = Counter(name for name, _ in pairs).most_common(1)
        raise APIError(f"{twice!r} is there twice", twice)
    return found


def without_neutral(fields: Mapping[str, Any], neutral: Mapping[str, tuple[Any, ...]], where: str) -> dict[str, Any]:
    """Return `fields` less those that ask for nothing. Raises APIError for one that asks for what is not done here."""
    for name in fields.keys() & neutral.keys():
        if not any(same(fields[name], value) for value in neutral[name]):
            raise APIError(f"{where}{name} is not supported", where + name, code="unsupported_parameter")
    return {name: value for name, value in fields.items() if name not in neutral}


def same(one: Any, other: Any) -> bool:
    """Return whether two JSON values are equal; 1 and true are not, 0 and 0.0 are."""
    return bool(one == other) and isinstance(one, bool) == isinstance(other, bool)


def validation_error(error: ValidationError) -> APIError:
    """Return the first fault of a request, as OpenAI's API says it."""
    first = error.errors(include_url=False, include_input=False)[0]
    param = "".join(f"[{key}]" if isinstance(key, int) else f".{key}" for key in first["loc"]).lstrip(".")
    if first["type"] == "extra_forbidden":
        return APIError(f"{param} is not supported: unknown field", param, code="unsupported_parameter")
    if first["type"] == "missing":
        return APIError(f"{param} is required", param)
    if first["type"] == "model_type":
        return APIError(f"{param} is not an object", param)
    return APIError(f"{param}: {first['msg'].removeprefix('Value error, ')}", param)
