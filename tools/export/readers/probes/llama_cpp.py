"""Asks llama.cpp, as the package xllamacpp has it, of a GGUF file."""

from __future__ import annotations

import json
import os
import secrets
import urllib.error
import urllib.request
from typing import Any


def open_model(file: str, context: int, never: list[int]) -> Model:
    """Return a server of the file, on a port of this machine; `never` are ids that no answer may hold."""
    import xllamacpp

    params = xllamacpp.CommonParams()
    params.model.path = file
    key = secrets.token_hex()  # other users of this machine have no business at its port
    params.hostnames, params.port, params.api_keys = ["127.0.0.1"], 0, [key]
    params.n_ctx, params.n_parallel = context, 1
    # Keys and values as wide as ours, not in llama.cpp's f16: what then differs is the file.
    params.cache_type_k = params.cache_type_v = xllamacpp.ggml_type.GGML_TYPE_F32
    params.flash_attn_type = xllamacpp.llama_flash_attn_type.LLAMA_FLASH_ATTN_TYPE_DISABLED
    params.warmup = False
    if threads := os.environ.get("OMP_NUM_THREADS"):  # as whoever asks wants it of every library; else one a core
        params.cpuparams.n_threads = params.cpuparams_batch.n_threads = int(threads)
    return Model(xllamacpp.Server(params), key, never)


class Model:
    """A server of llama.cpp."""

    def __init__(self, server: Any, key: str, never: list[int]) -> None:
        self.server, self.key, self.never = server, key, never

    def ids(self, text: str) -> list[int]:
        """Return the ids of a text, with no token added at either end; special tokens written out are those tokens."""
        return list(self.post("/tokenize", {"content": text, "add_special": False, "parse_special": True})["tokens"])

    def chat(self, messages: list[dict[str, str]]) -> str:
        """Return a conversation as the template in the file writes it, with the assistant's turn opened."""
        return str(self.post("/apply-template", {"messages": messages})["prompt"])

    def logits(self, ids: list[int]) -> list[float | None]:
        """Return the log-probabilities of the token after `ids`; None for an id that it does not list."""
        found = self.complete(ids, 1, n_probs=1 << 20)["completion_probabilities"][0]["top_logprobs"]
        values = {one["id"]: one["logprob"] for one in found}
        return [values.get(id) for id in range(max(values) + 1)]

    def greedy(self, ids: list[int], limit: int) -> list[int]:
        """Return the likeliest tokens after `ids`, up to `limit`."""
        return list(self.complete(ids, limit)["tokens"])

    ends = greedy

    def complete(self, ids: list[int], limit: int, **more: Any) -> dict[str, Any]:
        """Return one greedy answer."""
        greedy = {"temperature": 0, "samplers": ["temperature"], "repeat_penalty": 1.0}
        never = {"logit_bias": [[id, False] for id in self.never]}
        rest = {"n_predict": limit, "return_tokens": True, "cache_prompt": False}
        return self.post("/completion", {"prompt": ids, **greedy, **never, **rest, **more})

    def post(self, path: str, body: dict[str, Any]) -> dict[str, Any]:
        """Return what the server answers. Raises ValueError with what it said in place of an answer."""
        headers = {"Content-Type": "application/json", "Authorization": f"Bearer {self.key}"}
        request = urllib.request.Request(self.server.listening_address + path, json.dumps(body).encode(), headers)
        try:
            with urllib.request.build_opener(urllib.request.ProxyHandler({})).open(request) as answer:
                return dict(json.loads(answer.read()))
        except urllib.error.HTTPError as error:
            raise ValueError(error.read().decode(errors="replace")[:300]) from None
