"""The small files of a Llama's folder in the form that every reader understands: the one writer of whatever folder of
ours another program may open - an export, and a base that was converted here.
"""

from __future__ import annotations

import json
import shutil
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from common.files import read_json, write_atomic, write_json
from common.model.bases import find_template, settings_in

TOKENIZER_FILES = (
    "tokenizer.json",
    "tokenizer_config.json",
    "special_tokens_map.json",
    "added_tokens.json",
    "chat_template.jinja",
    "chat_template.json",
)
# What a saved config.json says about the file it came from, not about the model.
STALE = ("quantization_config", "torch_dtype", "transformers_version", "_name_or_path", "_model_name_or_path")
# What newer transformers note in tokenizer_config.json and older ones do not know.
LOCAL = ("backend", "is_local", "local_files_only", "name_or_path")
# What a tokenizer gives the model. Where it is left out, transformers 4 give token_type_ids, too, which no Llama takes:
# model.generate(**inputs) is then an error.
INPUTS = ["input_ids", "attention_mask"]


def plain_config(architecture: Mapping[str, Any], dtype: str) -> dict[str, Any]:
    """Return a config.json as that of a plain Llama in `dtype` (fp32 or bf16), readable by transformers 4 and 5.

    transformers 5 keep the rotary base in `rope_parameters` alone, where 4 and mlx-lm do not look: they would take
    10000, without a word.
    """
    # Order matters below: what is the same for every Llama overwrites what the base said.
    config = {key: value for key, value in architecture.items() if key not in STALE}
    rope = dict(config.get("rope_parameters") or {})
    if theta := rope.pop("rope_theta", None):
        config["rope_theta"] = theta
    if rope.get("rope_type", "default") != "default":
        config["rope_scaling"] = rope
    kind = "float32" if dtype == "fp32" else "bfloat16"
    return {
        **config,
        "architectures": ["LlamaForCausalLM"],
        "model_type": "llama",
        "dtype": kind,
        "torch_dtype": kind,  # what transformers before 4.56 read
        "use_cache": True,
    }


def write_tokenizer(source: Path, folder: Path, context: int) -> None:
    """Write the tokenizer and chat template of `source` to `folder`, whose model has a context of `context` tokens."""
    for name in TOKENIZER_FILES:
        if (source / name).is_file():
            shutil.copyfile(source / name, folder / name)
    path = folder / "tokenizer.json"
    spec = read_json(path)
    write_atomic(path, json.dumps(spec | {"model": with_plain_merges(spec["model"])}, ensure_ascii=False))
    write_tokenizer_config(folder, context)


def with_plain_merges(model: Mapping[str, Any]) -> dict[str, Any]:
    """Return a tokenizer's model with each merge as one text, "a b", as every version of `tokenizers` reads it.

    Since 0.20 it writes pairs, which older ones (transformers before 4.45) do not read. Pairs stay where a token has a
    space, which the text could not say.
    """
    merges = [merge if isinstance(merge, str) else " ".join(merge) for merge in model.get("merges") or []]
    return dict(model) | ({"merges": merges} if merges and all(merge.count(" ") == 1 for merge in merges) else {})


def write_tokenizer_config(folder: Path, context: int) -> None:
    """Rewrite tokenizer_config.json in `folder`, whose model has a context of `context` tokens; the template, if any,
    stands there and in a file of its own.
    """
    path = folder / "tokenizer_config.json"
    settings = settings_in(path)
    template = find_template(folder, settings)
    settings = {key: value for key, value in settings.items() if key not in LOCAL}
    if settings.get("tokenizer_class", "TokenizersBackend") == "TokenizersBackend":  # transformers 5's own name for it
        settings["tokenizer_class"] = "PreTrainedTokenizerFast"
    settings["model_max_length"] = context
    settings["model_input_names"] = INPUTS
    if isinstance(extra := settings.get("extra_special_tokens"), list):  # transformers 4 want an object by that name
        settings["additional_special_tokens"] = extra
        del settings["extra_special_tokens"]
    if template:  # in both places: transformers before 4.52 do not look into the file
        settings["chat_template"] = template
        write_atomic(folder / "chat_template.jinja", template)
    write_json(path, settings)
