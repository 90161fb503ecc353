"""Asks CTranslate2, of a folder with a model, which it converts first. Its users take the ids from transformers."""

from __future__ import annotations

import tempfile
from pathlib import Path
from typing import Any


def open_model(folder: str) -> Model:
    """Return the converted model, in fp32."""
    import ctranslate2
    import transformers

    made = Path(tempfile.mkdtemp()) / "ctranslate2"
    ctranslate2.converters.TransformersConverter(folder, copy_files=["tokenizer.json"]).convert(str(made))
    tokenizer = transformers.AutoTokenizer.from_pretrained(folder)
    return Model(ctranslate2.Generator(str(made), compute_type="float32"), tokenizer)


class Model:
    """A generator of CTranslate2, which is asked in tokens."""

    def __init__(self, generator: Any, tokenizer: Any) -> None:
        self.generator, self.tokenizer = generator, tokenizer

    def logits(self, ids: list[int]) -> list[float]:
        """Return the logits of the token after `ids`."""
        import numpy as np

        found = self.generator.forward_batch([self.tokenizer.convert_ids_to_tokens(ids)])
        return [float(one) for one in np.array(found)[0, -1]]

    def greedy(self, ids: list[int], limit: int) -> list[int]:
        """Return the likeliest tokens after `ids`, up to `limit`."""
        asked = [self.tokenizer.convert_ids_to_tokens(ids)]
        found = self.generator.generate_batch(asked, max_length=limit, include_prompt_in_result=False, sampling_topk=1)
        return [int(id) for id in found[0].sequences_ids[0]]

    ends = greedy
