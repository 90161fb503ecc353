"""samples.md: what the model answers to the evaluation prompts as training goes on."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from common.config import Config
from common.data.chat import ChatTokenizer
from common.engine import Backend
from common.train.generate import generate


def answers(backend: Backend, prompts: Sequence[str], tokenizer: ChatTokenizer, config: Config) -> list[dict[str, Any]]:
    """Return the model's answer of now to each prompt, drawn as eval_config says: prompt, answer, tokens of it."""
    ids = generate(
        backend,
        [tokenizer.prompt_ids(prompt, config.data.system_prompt) for prompt in prompts],
        config.eval,
        eos_ids=tokenizer.eos_ids,
        vocab_size=tokenizer.vocab_size,
        never_ids=tokenizer.never_ids,
        seed=config.training.seed,
    )
    told = zip(prompts, ids, strict=True)
    return [{"prompt": asked, "answer": tokenizer.decode(said).strip(), "tokens": len(said)} for asked, said in told]


def markdown(records: Sequence[dict[str, Any]]) -> str:
    """Return samples.md for the records of evaluations.jsonl: under each prompt of the last one, every answer to it."""
    lines = ["# Samples", ""]
    for prompt in [sample["prompt"] for sample in records[-1]["samples"]]:
        lines += [f"## {' '.join(prompt.split())}", ""]
        for record in records:
            name = "untrained" if record["step"] == 0 else f"step {record['step']}"
            found = [sample["answer"] for sample in record["samples"] if sample["prompt"] == prompt]
            for answer in found:
                lines += [f"**{name}**", "", "> " + (answer.replace("\n", "\n> ") or "(nothing)"), ""]
    return "\n".join(lines)
