"""An end token for a model that has none, because other programs want one: CTranslate2, onnxruntime-genai and OpenVINO
GenAI refuse a folder that names no end.

A model that was trained from random weights continues text, and its tokenizer has no special token. Its export names an
id that stands for no text: the first row of the embedding behind the tokenizer's ids, or, where BPE fills the
vocabulary, the id of the byte 0xFF, which no UTF-8 text holds. No training text had it, and generation_config.json
suppresses it.
"""

from __future__ import annotations

import json
from pathlib import Path

from common.data.chat import ChatTokenizer
from common.files import read_json, write_atomic, write_json

END = "<|endoftext|>"  # GPT-2's name, which readers know
NAMES = ("bos_token", "eos_token", "pad_token")  # as GPT-2, one token: CTranslate2 wants a first, batches a padding
NO_BYTE = "\u00ff"  # 0xFF in the letters that byte-level BPE writes bytes with


def declare_end(folder: Path, tokenizer: ChatTokenizer, rows: int) -> int | None:
    """Name an end token in the tokenizer's files in `folder`; return its id, below the embedding's `rows`.

    Returns None, and changes nothing, where there is an end already, or no id that stands for no text: characters that
    fill the vocabulary. The ids of every text stay as they were, but for END itself, which is one token from now on.
    """
    path = folder / "tokenizer.json"
    spec = read_json(path)
    vocab, id = spec["model"]["vocab"], tokenizer.vocab_size
    if tokenizer.eos_ids or END in vocab:
        return None
    if id >= rows:
        merged = any(NO_BYTE in letters for merge in spec["model"].get("merges", []) for letters in merge)
        if spec["model"]["type"] != "BPE" or NO_BYTE not in vocab or merged:
            return None
        id = vocab[END] = vocab.pop(NO_BYTE)
    flags = dict.fromkeys(("single_word", "lstrip", "rstrip", "normalized"), False)
    spec["added_tokens"].append({"id": id, "content": END, **flags, "special": True})
    write_atomic(path, json.dumps(spec, ensure_ascii=False))
    settings = folder / "tokenizer_config.json"
    write_json(settings, read_json(settings) | dict.fromkeys(NAMES, END))
    return int(id)
