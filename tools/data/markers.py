"""Marks of chat templates in a row's own words: where they stand, and how they are written so that they mean nothing.

A base's own tokenizer knows its marks exactly (`ChatTokenizer.marker_in`); these are known without one, so that a file
can be looked at before a base is chosen.
"""

from __future__ import annotations

import re
from collections.abc import Mapping
from dataclasses import replace
from typing import Any

from common.data.rows import Row
from tools.data.turns import words_of

# Marks by the base that reads them as structure. Those of the bases that the recipes here train on, whose runs refuse
# them: SmolLM2's are the added tokens of its tokenizer.json, TinyLlama's those of its template and its three own.
SMOLLM2 = (
    "<|im_start|> <|im_end|> <|endoftext|> <repo_name> <reponame> <file_sep> <filename> <gh_stars> <issue_start> "
    "<issue_comment> <issue_closed> <jupyter_start> <jupyter_text> <jupyter_code> <jupyter_output> <jupyter_script> "
    "<empty_output>"
)
TINYLLAMA = "<|user|> <|assistant|> <|system|> <unk> <s> </s>"
HERE = dict.fromkeys(SMOLLM2.split(), "SmolLM2") | dict.fromkeys(TINYLLAMA.split(), "TinyLlama")
ELSEWHERE = {
    "<|begin_of_text|>": "Llama 3",
    "<|end_of_text|>": "Llama 3",
    "<|start_header_id|>": "Llama 3",
    "<|end_header_id|>": "Llama 3",
    "<|eot_id|>": "Llama 3",
    "<tool_call>": "Qwen 2.5",
    "</tool_call>": "Qwen 2.5",
    "<tool_response>": "Qwen 2.5",
    "</tool_response>": "Qwen 2.5",
    "[INST]": "Llama 2",
    "[/INST]": "Llama 2",
    "<<SYS>>": "Llama 2",
    "<</SYS>>": "Llama 2",
    "<start_of_turn>": "Gemma",
    "<end_of_turn>": "Gemma",
}
ALL = {**HERE, **ELSEWHERE}
# And whatever is written as most of them are.
SHAPE = re.compile("|".join([*map(re.escape, ALL), r"<\|[^<>\s|]+\|>"]))


def found_in(row: Row) -> tuple[str, str] | None:
    """Return the first mark in a row's words and the name of a base that reads it, or None."""
    for turn in row.messages:
        if mark := SHAPE.search(words_of(turn)):
            return mark.group(), ALL.get(mark.group(), "any base that has it as a token")
    return None


def escaped(text: str) -> str:
    """Return a text with a space behind the first character of every mark in it: `<|im_end|>` as `< |im_end|>`."""
    while SHAPE.search(text):  # again, as one may lie inside of another: <|[INST]|>
        text = SHAPE.sub(lambda mark: f"{mark.group()[0]} {mark.group()[1:]}", text)
    return text


def escape(row: Row) -> Row:
    """Return a row whose words hold no mark of a chat template any more."""
    turns = [replace(turn, content=escaped(turn.content), fields=in_all(turn.fields)) for turn in row.messages]
    return row.but(messages=turns, tools=in_all(row.tools))


def in_all(value: Any) -> Any:
    """Return a value of JSON with every text in it escaped."""
    if isinstance(value, Mapping):
        return {escaped(key): in_all(inner) for key, inner in value.items()}
    if isinstance(value, list | tuple):
        return [*map(in_all, value)]
    return escaped(value) if isinstance(value, str) else value
