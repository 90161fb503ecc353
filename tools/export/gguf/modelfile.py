"""A Modelfile: what Ollama must be told beside a GGUF file. Its template, sampling and limits are its own without."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from common.config.schema import Evaluation
from common.data.chat import ChatTokenizer
from common.data.rows import Message
from common.errors import DataError, UsageError


@dataclass(frozen=True)
class Turns:
    """A family of chat templates: each turn in the same marks, which name its role."""

    opening: str  # {role} in it
    closing: str

    def text(self, messages: Sequence[Message]) -> str:
        """Return a conversation with the assistant's turn opened, as these templates write it."""
        said = (self.opening.format(role=turn.role) + turn.content + self.closing for turn in messages)
        return "".join(said) + self.opening.format(role="assistant")

    def go(self) -> str:
        """Return the same in the language of Ollama's templates, Go's text/template."""
        opening = self.opening.format(role="{{ .Role }}")
        answer = self.opening.format(role="assistant")
        return "{{- range .Messages }}" + opening + "{{ .Content }}" + self.closing + "{{ end }}" + answer


FAMILIES = (
    Turns("<|im_start|>{role}\n", "<|im_end|>\n"),  # ChatML: SmolLM2
    Turns("<|{role}|>\n", "</s>\n"),  # Zephyr: TinyLlama
)
PLAIN = "{{ .Prompt }}"
QUESTIONS = (
    (Message("user", "One?"),),
    (Message("user", "One?"), Message("assistant", "1."), Message("user", "  Two,\nthen? ")),
)


def modelfile(
    gguf: str, tokenizer: ChatTokenizer, sampling: Evaluation, context: int, system: str | None, unknown: bool
) -> str | None:
    """Return the Modelfile of the file `gguf` beside it, or None for a chat template that is not known here.

    `system` is the recipe's system prompt; `unknown` says that there are characters that have no token.
    """
    lines = [f"# ollama create NAME -f {gguf.removesuffix('.gguf')}.Modelfile"]
    if unknown:
        lines += [
            "# It knows the characters of its corpus alone. Any other one is an error in llama.cpp: put U+FFFD in its",
            "# place before you ask.",
        ]
    lines.append(f"FROM ./{gguf}")
    if tokenizer.template:
        known = family(tokenizer, system)
        if known is None:
            return None
        turns, system = known
        lines += [f'TEMPLATE """{turns.go()}"""', *([f"SYSTEM {quoted(system)}"] if system else [])]
    else:
        lines.append(f'TEMPLATE """{PLAIN}"""')
    settings = {
        "num_ctx": context,
        "num_predict": sampling.max_new_tokens,
        "temperature": sampling.temperature,
        "top_k": sampling.top_k,
        "top_p": sampling.top_p,
        "min_p": 0.0,
        "repeat_penalty": sampling.repetition_penalty,
        "repeat_last_n": -1,  # the penalty looks at all there is, as ours
    }
    lines += [f"PARAMETER {name} {value}" for name, value in settings.items()]
    lines += [f"PARAMETER stop {quoted(tokenizer.decode([id]))}" for id in tokenizer.eos_ids]
    return "\n".join(lines) + "\n"


def family(tokenizer: ChatTokenizer, system: str | None) -> tuple[Turns, str | None] | None:
    """Return the family that writes what the template writes, and the system prompt, which may be the template's own.

    None where no family does.
    """
    for turns in FAMILIES:
        prompt = system or own_system(tokenizer, turns)
        before = (Message("system", prompt),) if prompt else ()
        given = before if system else ()  # the template's own comes by itself
        try:
            rendered = [tokenizer.render((*given, *asked), answer_next=True) for asked in QUESTIONS]
        except DataError:
            continue
        if rendered == [turns.text((*before, *asked)) for asked in QUESTIONS]:
            return turns, prompt
    return None


def own_system(tokenizer: ChatTokenizer, turns: Turns) -> str | None:
    """Return the system prompt that the template itself puts before a conversation; None for none."""
    try:
        text = tokenizer.render(QUESTIONS[0], answer_next=True)
    except DataError:
        return None
    end = text.find(turns.closing + turns.text(QUESTIONS[0]))
    start = turns.opening.format(role="system")
    return text[len(start) : end] if text.startswith(start) and end >= 0 else None


def quoted(text: str) -> str:
    """Return a text as a Modelfile quotes it. Raises UsageError for one that it cannot hold."""
    if '"""' in text or text.endswith('"'):
        todo = "set data_config.system_prompt to a text without them, and train with it"
        raise UsageError("a Modelfile cannot hold a text with such quotation marks", where=repr(text), todo=todo)
    return f'"""{text}"""'
