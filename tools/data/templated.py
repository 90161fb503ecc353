"""Texts that somebody already wrote in a chat template, taken apart into turns.

A text is taken apart only when all of it is accounted for: every turn by the template's own marks, and nothing between
them. Whatever else there is would be left out of the training, so such a text is refused.
"""

from __future__ import annotations

import re
from collections.abc import Iterator

from tools.data.turns import ROLES

# Each template by what opens a turn, whoever speaks as it writes them, and what ends the turn.
MARKS = {
    "ChatML": (r"<\|im_start\|>", r"(\w+)\n", r"<\|im_end\|>"),
    "Llama 3": (r"<\|start_header_id\|>", r"(\w+)<\|end_header_id\|>\n\n", r"<\|eot_id\|>"),
    "Zephyr": (r"<\|(?=(?:system|user|assistant)\|>)", r"(\w+)\|>\n", r"</s>"),
    "Gemma": (r"<start_of_turn>", r"(\w+)\n", r"<end_of_turn>"),
}
# The words of a turn hold no other turn's beginning: one that has lost its end would swallow the next.
TURNS = {name: rf"{opens}{who}((?:(?!{opens}).)*?){ends}" for name, (opens, who, ends) in MARKS.items()}
SYS, WORDS = r"(?:<<SYS>>\n(.*?)\n<</SYS>>\n\n)?", r"((?:(?!\[INST\]).)*?)"
LLAMA2 = rf"\[INST\]\s*{SYS}{WORDS}\s*\[/INST\]\s*{WORDS}\s*(?:</s>|$|(?=\[INST\]))"
EDGES = ("<s>", "</s>", "<|begin_of_text|>", "<|end_of_text|>", "<|endoftext|>", "<bos>", "<eos>")
# At the start of a line; openassistant-guanaco writes its two right behind the words before them.
HEADING = re.compile(
    r"(?:^(?=### ?)|(?=### (?:Human|Assistant):))### ?"
    r"(Instruction|Input|Response|Human|User|Assistant|System):[ \t]*\n?",
    re.MULTILINE,
)
SPOKEN = re.compile(r"(?:^|\n\n)(Human|Assistant): ?")  # Anthropic's hh-rlhf
PREAMBLE = re.compile(  # of Stanford Alpaca's two prompts
    r"Below is an instruction that describes a task(, paired with an input that provides further context)?\. "
    r"Write a response that appropriately completes the request\."
)
Turns = list[tuple[str, str]]


class Untemplated(ValueError):
    """A text that is in no template which is known here."""


def split(text: str) -> tuple[str, Turns]:
    """Return the name of the template that a text is written in, and its turns as (role, words).

    Raises Untemplated where no template is found, ValueError where words stand outside of its turns.
    """
    for name, shape in TURNS.items():
        if turns := re.findall(shape, text, re.DOTALL):
            refuse_rest(re.sub(shape, "", text, flags=re.DOTALL), name)
            return name, [(role_called(who), words.strip()) for who, words in turns]
    if pairs := re.findall(LLAMA2, text, re.DOTALL):
        refuse_rest(re.sub(LLAMA2, "", text, flags=re.DOTALL), "Llama 2")
        return "Llama 2", list(turns_of_pairs(pairs))
    for name, heading in (("### headings", HEADING), ("Human and Assistant", SPOKEN)):
        if len(parts := heading.split(trimmed(text))) > 3:
            return name, turns_of_headings([trimmed(part) for part in parts])
    raise Untemplated("'text' is in no template that is known (a recipe with data_config.corpus trains on plain text)")


def trimmed(text: str) -> str:
    """Return a text without the white space and the marks of begin and end at its edges."""
    before = None
    while text != before:
        before, text = text, text.strip()
        for mark in EDGES:
            text = text.removeprefix(mark).removesuffix(mark)
    return text


def refuse_rest(rest: str, name: str) -> None:
    """Refuse what a text holds besides its turns and the marks at its edges. Raises ValueError."""
    if left := re.sub("|".join(map(re.escape, EDGES)), "", rest).strip():
        raise ValueError(f"'text' looks like {name}, and has words outside of its turns: {left[:40]!r}")


def role_called(name: str) -> str:
    """Return our role for a template's. Raises ValueError for an unknown one."""
    if name.casefold() not in ROLES:
        raise ValueError(f"'text' has a turn of {name!r}; known: {', '.join(ROLES)}")
    return ROLES[name.casefold()]


def turns_of_pairs(pairs: list[tuple[str, str, str]]) -> Iterator[tuple[str, str]]:
    """Yield the turns of (system or "", question, answer)."""
    for system, question, answer in pairs:
        if system:
            yield "system", system.strip()
        yield "user", question
        yield "assistant", answer


def turns_of_headings(parts: list[str]) -> Turns:
    """Return the turns of a text cut at its headings: what stands before the first, then heading and words in turns.

    Raises ValueError where an instruction, its input and the response are out of order.
    """
    before, names, words = parts[0], parts[1::2], parts[2::2]
    turns: Turns = [("system", before)] if before and not PREAMBLE.fullmatch(before) else []
    if not {"Instruction", "Input", "Response"} & set(names):
        return [*turns, *((role_called(name), said) for name, said in zip(names, words, strict=True))]
    if names not in (["Instruction", "Response"], ["Instruction", "Input", "Response"]):
        raise ValueError(f"'text' has the headings {', '.join(names)}, not Instruction, perhaps Input, and Response")
    return [*turns, ("user", "\n\n".join(part for part in words[:-1] if part)), ("assistant", words[-1])]
