"""The small files of a Llama's folder in the form that every reader understands: the one writer of whatever folder of
ours another program may open - an export, and a base that was converted here.
"""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

from common.data.chat import find_template, settings_in
from common.files import write_json

# What a saved config.json says about the file it came from, not about the model.
STALE = ("quantization_config", "torch_dtype", "transformers_version", "_name_or_path", "_model_name_or_path")
# What newer transformers note in tokenizer_config.json and older ones do not know.
LOCAL = ("backend", "is_local", "local_files_only", "name_or_path")


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
    if template:  # in both places: transformers before 4.52 do not look into the file
        settings["chat_template"] = template
        (folder / "chat_template.jinja").write_text(template, encoding="utf-8")
    write_json(path, settings)
