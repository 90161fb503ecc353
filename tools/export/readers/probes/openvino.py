"""Asks OpenVINO, of a folder with a model, which optimum-intel converts first."""

from __future__ import annotations

import tempfile
from typing import Any


def open_model(folder: str) -> Model:
    """Return the converted model, in fp32, as OpenVINO GenAI opens it."""
    import openvino_genai
    from optimum.exporters.openvino import main_export

    made = tempfile.mkdtemp()
    main_export(folder, made, task="text-generation-with-past", convert_tokenizer=True)
    return Model(made, openvino_genai.Tokenizer(made))


class Model:
    """A pipeline of OpenVINO GenAI, with its own tokenizer."""

    def __init__(self, folder: str, tokenizer: Any) -> None:
        import openvino_genai

        self.folder, self.tokenizer = folder, tokenizer
        self.pipeline = openvino_genai.LLMPipeline(folder, "CPU", INFERENCE_PRECISION_HINT="f32")

    def ids(self, text: str) -> list[int]:
        """Return the ids of a text, with no token added at either end."""
        return [int(id) for id in self.tokenizer.encode(text, add_special_tokens=False).input_ids.data.reshape(-1)]

    def chat(self, messages: list[dict[str, str]]) -> str:
        """Return a conversation as the template writes it, with the assistant's turn opened."""
        return str(self.tokenizer.apply_chat_template(messages, add_generation_prompt=True))

    def logits(self, ids: list[int]) -> list[float]:
        """Return the logits of the token after `ids`, from optimum-intel: the pipeline gives none."""
        import torch
        from optimum.intel import OVModelForCausalLM

        model = OVModelForCausalLM.from_pretrained(self.folder, ov_config={"INFERENCE_PRECISION_HINT": "f32"})
        asked = torch.tensor([ids])
        return list(model(input_ids=asked, attention_mask=torch.ones_like(asked)).logits[0, -1].tolist())

    def greedy(self, ids: list[int], limit: int) -> list[int]:
        """Return the likeliest tokens after `ids`, up to `limit`."""
        import numpy as np
        import openvino
        import openvino_genai

        asked = openvino.Tensor(np.array([ids], np.int64))
        settings = self.pipeline.get_generation_config()
        settings.do_sample, settings.repetition_penalty, settings.max_new_tokens = False, 1.0, limit
        inputs = openvino_genai.TokenizedInputs(asked, openvino.Tensor(np.ones((1, len(ids)), np.int64)))
        return [int(id) for id in self.pipeline.generate(inputs, settings).tokens[0]]

    ends = greedy
