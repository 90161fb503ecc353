"""What every reader of an export is asked, and what our engine answers to it."""

from __future__ import annotations

import json
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from common.data.chat import ChatTokenizer
from common.data.rows import Message
from common.errors import DataError
from common.train.generate import generate
from tools.export.model_card import example_of
from tools.generate.chat import Speaker, folder_speaker
from tools.runs.trained import TrainedRun

TOKENS = 40  # of a greedy answer
ENDING = 3  # tokens before its end that an answer is cut off at, to see whether a reader ends it there
LONGEST = 256  # tokens that our engine is given to end an answer by itself
# What tokenizers part on: white space, digits, contractions, scripts, combined characters, markup, nothing at all.
TEXTS = (
    "",
    " ",
    "  two spaces, then three   .",
    "\n",
    "line\n\n\nline\r\nline",
    "\ttab\t\ttabs",
    " leading and trailing ",
    "1234567890 3.14159 1,000,000",
    "v2.0-rc1_final(2)",
    "don't, we'll, I'd've, it's, IT'S",
    "naïve café, Straße, ﬁne, Å",
    "e\u0301 is not é",
    "東京とソウル",
    "Привет, мир!",
    "مرحبا بالعالم",
    "🦊 👩‍👩‍👧 🏳️‍🌈",
    "zero\u200bwidth\u00a0no-break\ufeff",
    "<b>bold</b> &amp; <unk> <br/>",
    "if x[i] != y: return {'a': 1}  # why?",
    "https://example.org/a?b=c&d=%20",
    "ALLCAPS camelCase snake_case kebab-case",
    "…–—“”‘’«»",
    "aaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaa",
    "ROMEO.\nO, she doth teach the torches to burn bright!",
)
USER, ASSISTANT, SYSTEM = "user", "assistant", "system"
CHATS = (
    ((USER, "What is a fox?"),),
    ((SYSTEM, "Be brief."), (USER, "What is a fox?")),
    ((USER, "One?"), (ASSISTANT, "1"), (USER, "And two?")),
    ((SYSTEM, "Be brief."), (USER, "One?"), (ASSISTANT, "1"), (USER, "And two?")),
    ((USER, "  spaces, and\nlines\n\n"),),
    ((USER, 'naïve 東京 🦊 <b> & "quotes" {{ braces }}'),),
)


@dataclass(frozen=True)
class Expected:
    """What our engine makes of export/merged: the answers to `asked`, which has a list of arguments a question."""

    asked: dict[str, list[list[Any]]]
    ids: list[list[int]]
    chat: list[str]
    log_probabilities: np.ndarray[Any, Any]  # [V]; -inf for an id that is never chosen
    greedy: list[int]
    ends: list[int]  # what is left of an answer before its end token; empty where no answer ended
    end_ids: tuple[int, ...]
    never_ids: tuple[int, ...]
    printed: str  # what the card's code prints, or begins to
    whole: bool  # whether `printed` is all of it


def expected_of(run: TrainedRun, merged: Path, weights: Mapping[str, Any] | None = None) -> Expected:
    """Return what there is to ask of a run's export, with our engine's answers, in fp32: those of export/merged, or of
    `weights` in its place.
    """
    context = json.loads((merged / "config.json").read_text(encoding="utf-8"))["max_position_embeddings"]
    prompt, _ = example_of(run)  # of the card, whose code prints the answer to it
    with folder_speaker(merged, {"eval.temperature": 0.0, "eval.repetition_penalty": 1.0}, weights) as speaker:
        tokenizer = speaker.tokenizer
        ids = tokenizer.prompt_ids(prompt, run.config.data.system_prompt)
        limit = min(TOKENS, context - len(ids))
        chats = [chat for chat in CHATS if rendered(tokenizer, chat) is not None] if tokenizer.template else []
        logits, _ = speaker.backend.next_token_logits(np.array([ids]), np.array([len(ids)]))
        answer = answered(speaker, ids, min(LONGEST, context - len(ids)))
        ended = len(answer) < min(LONGEST, context - len(ids))
        cut = max(0, len(answer) - ENDING)
        printed, whole = printed_by_card(run, speaker, ids, prompt)
        return Expected(
            asked={
                "ids": [[text] for text in TEXTS],
                "chat": [[[{"role": role, "content": said} for role, said in chat]] for chat in chats],
                "logits": [[ids]],
                "greedy": [[ids, limit]],
                "ends": [[ids + answer[:cut], ENDING + 8]] if ended else [],
                "snippet": [[ids]],
            },
            ids=[tokenizer.encode_text(text) for text in TEXTS],
            chat=[rendered(tokenizer, chat) or "" for chat in chats],
            log_probabilities=log_probabilities(logits[0][: tokenizer.vocab_size], tokenizer.never_ids),
            greedy=answer[:limit],
            ends=answer[cut:] if ended else [],
            end_ids=tuple(tokenizer.eos_ids),
            never_ids=tokenizer.never_ids,
            printed=printed,
            whole=whole,
        )


def rendered(tokenizer: ChatTokenizer, chat: Sequence[tuple[str, str]]) -> str | None:
    """Return a conversation as the template writes it; None for one that it refuses."""
    try:
        return tokenizer.render([Message(role, said) for role, said in chat], answer_next=True)
    except DataError:
        return None


def answered(speaker: Speaker, ids: list[int], limit: int, **sampling: Any) -> list[int]:
    """Return our engine's answer to `ids`, greedy unless `sampling` says otherwise."""
    settings = speaker.config.with_values(**{"eval.max_new_tokens": limit, **sampling}).eval
    tokenizer = speaker.tokenizer
    (answer,) = generate(
        speaker.backend,
        [ids],
        settings,
        eos_ids=tokenizer.eos_ids,
        vocab_size=tokenizer.vocab_size,
        never_ids=tokenizer.never_ids,
    )
    return answer


def printed_by_card(run: TrainedRun, speaker: Speaker, ids: list[int], prompt: str) -> tuple[str, bool]:
    """Return what the code of the card prints, or how it begins, and whether that is all: greedy ends, or is cut."""
    settings = run.config.eval
    if run.base.initial or settings.temperature:
        return (prompt.strip() if run.base.initial else ""), False
    limit = min(settings.max_new_tokens, speaker.context - len(ids))
    answer = answered(speaker, ids, limit, **{"eval.repetition_penalty": settings.repetition_penalty})
    text = speaker.tokenizer.decode(answer, skip_special=True).rstrip("\ufffd")  # half a character where it was cut
    return text.strip(), len(answer) < limit


def log_probabilities(logits: np.ndarray[Any, Any], never: Sequence[int] = ()) -> np.ndarray[Any, Any]:
    """Return logits [V], or log-probabilities, as log-probabilities over all ids but those that are never chosen."""
    values = logits.astype(np.float64)
    values[list(never)] = -np.inf
    return np.asarray(values - values.max() - np.log(np.exp(values - values.max()).sum()))


def code_of(card: str) -> str | None:
    """Return the first block of Python of a model card."""
    found = re.search(r"^```python\n(.*?)^```", card, re.MULTILINE | re.DOTALL)
    return found[1] if found else None
