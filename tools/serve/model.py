"""A model under its name: requests to tokens, and how its answers are chosen."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from common.config.schema import Evaluation
from common.data.chat import with_system
from common.data.rows import Message
from common.errors import DataError
from tools.generate.chat import Speaker
from tools.serve.batcher import Scheduler
from tools.serve.errors import APIError
from tools.serve.requests import ChatRequest, CompletionRequest, GenerationRequest


@dataclass(frozen=True)
class Model:
    """One of the models that a server answers as, under `name`.

    `parent` is the name of the untuned model, where that is served beside it. `examples` are prompts to try it with.
    """

    name: str
    speaker: Speaker
    scheduler: Scheduler
    parent: str | None = None
    examples: Sequence[str] = ()

    @property
    def context(self) -> int:
        """Return the most tokens of a prompt and its answer together."""
        return self.scheduler.slots.context

    def card(self) -> dict[str, Any]:
        """Return what /v1/models says of it: OpenAI's keys, vLLM's `parent` and `max_model_len`, and the page's."""
        chosen, tokenizer = self.speaker.config.eval, self.speaker.tokenizer
        return {
            "id": self.name,
            "object": "model",
            "created": 0,
            "owned_by": "recipe",
            "parent": self.parent,
            "max_model_len": self.context,
            "chat": bool(tokenizer.template),
            "defaults": {
                "temperature": chosen.temperature,
                "top_p": chosen.top_p,
                "top_k": chosen.top_k,
                "repetition_penalty": chosen.repetition_penalty,
                "max_tokens": chosen.max_new_tokens,
            },
            "system_prompt": self.speaker.config.data.system_prompt,
            "examples": list(self.examples),
        }

    def prompt(self, request: GenerationRequest) -> list[int]:
        """Return the ids to answer or to continue. Raises APIError."""
        if isinstance(request, ChatRequest):
            ids, field = self.chat_prompt(request.turns()), "messages"
        else:
            assert isinstance(request, CompletionRequest)
            ids, field = self.speaker.tokenizer.encode_text(request.prompt), "prompt"
        if not ids:
            raise APIError(f"{field}: no token comes of it", field)
        if len(ids) >= self.context:
            message = (
                f"the prompt has {len(ids)} tokens, of the {self.context} that prompt and answer may have together"
            )
            raise APIError(message, field, code="context_length_exceeded")
        return ids

    def chat_prompt(self, turns: Sequence[Message]) -> list[int]:
        """Return the ids of a conversation with the assistant's turn opened, the recipe's system prompt before it."""
        tokenizer = self.speaker.tokenizer
        if not tokenizer.template:
            message = f"{self.name} has no chat template: it continues text, at /v1/completions"
            raise APIError(message, "messages", code="no_chat_template")
        for at, turn in enumerate(turns):
            if marker := tokenizer.marker_in(turn.content):
                message = f"messages[{at}].content holds {marker!r}, which this model reads as structure, not as text"
                raise APIError(message, f"messages[{at}].content")
        try:
            text = tokenizer.render(with_system(turns, self.speaker.config.data.system_prompt), answer_next=True)
        except DataError as error:  # some templates take no system message, or want turns to alternate
            raise APIError(error.what, "messages") from None
        return tokenizer.encode_text(text)

    def sampling(self, request: GenerationRequest, prompt: Sequence[int]) -> Evaluation:
        """Return how the answer is chosen: what is asked for, else the recipe's own way. Raises APIError."""
        room = self.context - len(prompt)
        most, field = request.token_limit
        if most is not None and most > room:
            message = f"{field} is {most}, but the prompt has {len(prompt)} of {self.context} tokens: {room} are left"
            raise APIError(message, field, code="context_length_exceeded")
        default = self.speaker.config.eval
        limit = min(default.max_new_tokens, room) if most is None else most
        return default.model_copy(update={**request.sampling(), "max_new_tokens": limit})
