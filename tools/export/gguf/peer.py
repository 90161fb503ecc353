"""The reader's side of the proof: llama.cpp, as the package xllamacpp has it. Knows nothing of ours.

It runs in an environment of its own, with one argument: a folder with job.json, where it writes out.json.
"""

from __future__ import annotations

import json
import os
import secrets
import sys
import urllib.request
from pathlib import Path
from typing import Any


def main(folder: Path) -> None:
    """Read job.json (model, context, texts, prompts, never, tokens); write the ids of texts and of greedy answers."""
    import xllamacpp

    job = json.loads((folder / "job.json").read_text(encoding="utf-8"))
    params = xllamacpp.CommonParams()
    params.model.path = job["model"]
    key = secrets.token_hex()  # it listens on a port of this machine, whose other users have no business there
    params.hostnames, params.port, params.api_keys = ["127.0.0.1"], 0, [key]
    params.n_ctx, params.n_parallel, params.n_predict = job["context"], 1, job["tokens"]
    # Keys and values as wide as ours, not in llama.cpp's f16: what then differs is the file.
    params.cache_type_k = params.cache_type_v = xllamacpp.ggml_type.GGML_TYPE_F32
    params.flash_attn_type = xllamacpp.llama_flash_attn_type.LLAMA_FLASH_ATTN_TYPE_DISABLED
    params.warmup = False
    if threads := os.environ.get("OMP_NUM_THREADS"):  # as whoever asks wants it of every library; else one a core
        params.cpuparams.n_threads = params.cpuparams_batch.n_threads = int(threads)
    server = xllamacpp.Server(params)

    def ask(path: str, body: dict[str, Any]) -> dict[str, Any]:
        headers = {"Content-Type": "application/json", "Authorization": f"Bearer {key}"}
        request = urllib.request.Request(server.listening_address + path, json.dumps(body).encode(), headers)
        with urllib.request.build_opener(urllib.request.ProxyHandler({})).open(request) as answer:
            return dict(json.loads(answer.read()))

    texts = [
        ask("/tokenize", {"content": text, "add_special": False, "parse_special": True})["tokens"]
        for text in job["texts"]
    ]
    greedy = {"n_predict": job["tokens"], "temperature": 0, "samplers": ["temperature"], "repeat_penalty": 1.0}
    greedy |= {"return_tokens": True, "cache_prompt": False, "logit_bias": [[id, False] for id in job["never"]]}
    answers = [ask("/completion", {**greedy, "prompt": prompt})["tokens"] for prompt in job["prompts"]]
    (folder / "out.json").write_text(json.dumps({"texts": texts, "answers": answers}), encoding="utf-8")


if __name__ == "__main__":
    main(Path(sys.argv[1]))
