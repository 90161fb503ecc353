"""Asks transformers, of a folder with a model."""

from __future__ import annotations

import contextlib
import io
from typing import Any


def open_model(folder: str) -> Model:
    """Return the model of a folder as a user opens it, in fp32."""
    import transformers

    tokenizer = transformers.AutoTokenizer.from_pretrained(folder)
    return Model(transformers.AutoModelForCausalLM.from_pretrained(folder), tokenizer)


class Model:
    """A model of transformers, with its tokenizer."""

    def __init__(self, model: Any, tokenizer: Any) -> None:
        self.model, self.tokenizer = model.float().eval(), tokenizer

    def ids(self, text: str) -> list[int]:
        """Return the ids of a text, with no token added at either end."""
        return list(self.tokenizer(text, add_special_tokens=False)["input_ids"])

    def chat(self, messages: list[dict[str, str]]) -> str:
        """Return a conversation as the template writes it, with the assistant's turn opened."""
        return str(self.tokenizer.apply_chat_template(messages, tokenize=False, add_generation_prompt=True))

    def logits(self, ids: list[int]) -> list[float]:
        """Return the logits of the token after `ids`."""
        return logits_of(self.model, ids)

    def greedy(self, ids: list[int], limit: int) -> list[int]:
        """Return the likeliest tokens after `ids`, up to `limit`."""
        import torch

        plain: dict[str, Any] = {"do_sample": False, "temperature": None, "top_k": None, "top_p": None}
        asked = torch.tensor([ids])
        found = self.model.generate(
            asked, attention_mask=torch.ones_like(asked), max_new_tokens=limit, repetition_penalty=1.0, **plain
        )
        return list(found[0, len(ids) :].tolist())

    ends = greedy

    def snippet(self, code: str, folder: str, ids: list[int]) -> dict[str, Any]:
        """Run a card's code in the folder of the card; return what it printed, and the logits of its `model`."""
        names: dict[str, Any] = {}
        with contextlib.chdir(folder), contextlib.redirect_stdout(io.StringIO()) as printed:
            exec(compile(code, "README.md", "exec"), names)
        found = {"printed": printed.getvalue(), "silent": "print(" not in code}
        return {**found, "logits": logits_of(names["model"].float().eval(), ids)}


def logits_of(model: Any, ids: list[int]) -> list[float]:
    """Return the logits of the token after `ids`, in fp32."""
    import torch

    with torch.inference_mode():
        return list(model(input_ids=torch.tensor([ids])).logits[0, -1].float().tolist())
