"""Asks ONNX Runtime's generate(), of a folder with a model, which its model builder converts first."""

from __future__ import annotations

import functools
import json
import subprocess
import sys
import tempfile
from typing import Any


def open_model(folder: str) -> Model:
    """Return the converted model, in fp32. Raises RuntimeError with what the builder said last where it fails."""
    import onnxruntime_genai

    made = tempfile.mkdtemp()
    builder = [sys.executable, "-I", "-m", "onnxruntime_genai.models.builder", "-p", "fp32", "-e", "cpu"]
    done = subprocess.run(
        [*builder, "-i", folder, "-o", made, "-c", tempfile.mkdtemp()], capture_output=True, text=True
    )
    if done.returncode:
        raise RuntimeError((done.stderr.strip().splitlines() or ["the model builder failed"])[-1])
    return Model(onnxruntime_genai.Model(made))


class Model:
    """A model of ONNX Runtime's generate(), with its own tokenizer."""

    def __init__(self, model: Any) -> None:
        self.model = model

    @functools.cached_property
    def tokenizer(self) -> Any:
        """Return its own tokenizer, of which it knows fewer kinds than of models."""
        import onnxruntime_genai

        return onnxruntime_genai.Tokenizer(self.model)

    def ids(self, text: str) -> list[int]:
        """Return the ids of a text. Raises ValueError where one is -1, which it gives for what it cannot look up.

        It takes every tokenizer for BPE over the letters of bytes, and at some openings a list of characters, too.
        """
        found = [int(id) for id in self.tokenizer.encode(text)]
        if min(found, default=0) < 0:
            raise ValueError("no id for a part of the text")
        return found

    def chat(self, messages: list[dict[str, str]]) -> str:
        """Return a conversation as the template writes it, with the assistant's turn opened."""
        return str(self.tokenizer.apply_chat_template(json.dumps(messages), add_generation_prompt=True))

    def logits(self, ids: list[int]) -> list[float]:
        """Return the logits of the token after `ids`."""
        found = self.generator(ids, len(ids) + 1).get_logits()  # [1, T or 1, V]
        return [float(one) for one in found[0, -1]]

    def greedy(self, ids: list[int], limit: int) -> list[int]:
        """Return the likeliest tokens after `ids`, up to `limit`."""
        generator, found = self.generator(ids, len(ids) + limit), []
        while not generator.is_done():
            generator.generate_next_token()
            found.append(int(generator.get_next_tokens()[0]))
        return found

    ends = greedy

    def generator(self, ids: list[int], length: int) -> Any:
        """Return a greedy generator that has read `ids`, for `length` tokens in all."""
        import onnxruntime_genai

        settings = onnxruntime_genai.GeneratorParams(self.model)
        settings.set_search_options(do_sample=False, max_length=length, repetition_penalty=1.0)
        generator = onnxruntime_genai.Generator(self.model, settings)
        generator.append_tokens(ids)
        return generator
