"""Texts that somebody already wrote in a chat template, taken apart into turns.

A text is taken apart only when all of it is accounted for: every turn by the template's own marks, and nothing between
them. Whatever else there is would be left out of the training, so such a text is refused.
"""

from __future__ import annotations

import re
from collections.abc import Iterator

from tools.data.turns import ROLES

# Each template with the shape of one of its turns: the names of whoever speaks as it writes them, and the words.
TURNS = {
    "ChatML": r"<\|im_start\|>(\w+)\n(.*?)<\|im_end\|>",
    "Llama 3": r"<\|start_header_id\|>(\w+)<\|end_header_id\|>\n\n(.*?)<\|eot_id\|>",
    "Zephyr": r"<\|(system|user|assistant)\|>\n(.*?)</s>",
    "Gemma": r"<start_of_turn>(\w+)\n(.*?)<end_of_turn>",
}
LLAMA2 = r"\[INST\]\s*(?:<<SYS>>\n(.*?)\n<</SYS>>\n\n)?(.*?)\s*\[/INST\]\s*(.*?)\s*(?:</s>|$)"
EDGES = re.compile(r"<s>|</s>|<\|begin_of_text\|>|<\|end_of_text\|>|<\|endoftext\|>|<bos>|<eos>")
HEADING = re.compile(r"^(?:### ?)(Instruction|Input|Response|Human|User|Assistant|System):[ \t]*\n?", re.MULTILINE)
SPOKEN = re.compile(r"(?:^|\n\n)(Human|Assistant): ?")  # Anthropic's hh-rlhf
PREAMBLE = "Below is an instruction that describes a task"  # Stanford Alpaca's two prompts begin with it
Turns = list[tuple[str, str]]


def split(text: str) -> tuple[str, Turns]:
    """Return the name of the template that a text is written in, and its turns as (role, words).

    Raises ValueError where no template is found, or where words stand outside of its turns.
    """
    for name, shape in TURNS.items():
        if turns := re.findall(shape, text, re.DOTALL):
            refuse_rest(re.sub(shape, "", text, flags=re.DOTALL), name)
            return name, [(role_called(who), words.strip()) for who, words in turns]
    if pairs := re.findall(LLAMA2, text, re.DOTALL):
        refuse_rest(re.sub(LLAMA2, "", text, flags=re.DOTALL), "Llama 2")
        return "Llama 2", list(turns_of_pairs(pairs))
    for name, heading in (("### headings", HEADING), ("Human and Assistant", SPOKEN)):
        if len(parts := heading.split(EDGES.sub("", text))) > 3:
            return name, turns_of_headings(parts)
    raise ValueError("'text' is in no template that is known (a recipe with data_config.corpus trains on plain text)")


def refuse_rest(rest: str, name: str) -> None:
    """Refuse what a text holds besides its turns and the marks at its edges. Raises ValueError."""
    if left := EDGES.sub("", rest).strip():
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
    before, names, words = parts[0].strip(), parts[1::2], [part.strip() for part in parts[2::2]]
    turns: Turns = [("system", before)] if before and not before.startswith(PREAMBLE) else []
    if not {"Instruction", "Input", "Response"} & set(names):
        return [*turns, *((role_called(name), said) for name, said in zip(names, words, strict=True))]
    if names not in (["Instruction", "Response"], ["Instruction", "Input", "Response"]):
        raise ValueError(f"'text' has the headings {', '.join(names)}, not Instruction, perhaps Input, and Response")
    return [*turns, ("user", "\n\n".join(part for part in words[:-1] if part)), ("assistant", words[-1])]
