"""Asks mlx-lm, of a folder with a model."""

from __future__ import annotations

from typing import Any


def open_model(folder: str) -> Model:
    """Return the model of a folder, in fp32."""
    import mlx.core as mx
    import mlx_lm

    mx.set_default_device(mx.cpu)
    model, tokenizer = mlx_lm.load(folder)[:2]
    model.set_dtype(mx.float32)
    return Model(model, tokenizer)


class Model:
    """A model of mlx-lm, with its tokenizer."""

    def __init__(self, model: Any, tokenizer: Any) -> None:
        self.model, self.tokenizer = model, tokenizer

    def ids(self, text: str) -> list[int]:
        """Return the ids of a text, with no token added at either end."""
        return list(self.tokenizer.encode(text, add_special_tokens=False))

    def chat(self, messages: list[dict[str, str]]) -> str:
        """Return a conversation as the template writes it, with the assistant's turn opened."""
        return str(self.tokenizer.apply_chat_template(messages, tokenize=False, add_generation_prompt=True))

    def logits(self, ids: list[int]) -> list[float]:
        """Return the logits of the token after `ids`."""
        import mlx.core as mx

        return list(self.model(mx.array([ids]))[0, -1].tolist())

    def greedy(self, ids: list[int], limit: int) -> list[int]:
        """Return the likeliest tokens after `ids`, up to `limit`; mlx-lm's default is greedy."""
        import mlx_lm

        return [int(one.token) for one in mlx_lm.stream_generate(self.model, self.tokenizer, ids, max_tokens=limit)]

    ends = greedy
