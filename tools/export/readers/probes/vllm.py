"""Asks vLLM, of a folder with a model."""

from __future__ import annotations

from typing import Any


def open_model(folder: str) -> Model:
    """Return the model of a folder, in fp32."""
    import vllm

    return Model(vllm.LLM(folder, dtype="float32", enforce_eager=True, max_logprobs=-1, max_num_seqs=1))


class Model:
    """A model of vLLM, with its tokenizer."""

    def __init__(self, llm: Any) -> None:
        self.llm, self.tokenizer = llm, llm.get_tokenizer()

    def ids(self, text: str) -> list[int]:
        """Return the ids of a text, with no token added at either end."""
        return list(self.tokenizer.encode(text, add_special_tokens=False))

    def chat(self, messages: list[dict[str, str]]) -> str:
        """Return a conversation as the template writes it, with the assistant's turn opened."""
        return str(self.tokenizer.apply_chat_template(messages, tokenize=False, add_generation_prompt=True))

    def logits(self, ids: list[int]) -> list[float]:
        """Return the log-probabilities of the token after `ids`."""
        found = self.ask(ids, 1, logprobs=-1).logprobs[0]
        return [float(found[id].logprob) for id in range(len(found))]

    def greedy(self, ids: list[int], limit: int) -> list[int]:
        """Return the likeliest tokens after `ids`, up to `limit`."""
        return list(self.ask(ids, limit).token_ids)

    ends = greedy

    def ask(self, ids: list[int], limit: int, **more: Any) -> Any:
        """Return one greedy answer."""
        import vllm

        settings = vllm.SamplingParams(temperature=0, repetition_penalty=1.0, max_tokens=limit, **more)
        return self.llm.generate({"prompt_token_ids": ids}, settings, use_tqdm=False)[0].outputs[0]
