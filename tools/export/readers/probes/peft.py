"""Asks PEFT, of a folder with an adapter: over the base that it names, or over a copy of it."""

from __future__ import annotations

import importlib.util
import json
from pathlib import Path
from typing import Any


def open_model(folder: str, base: str) -> Any:
    """Return the adapter over the folder that it names; over `base` where that is a name on the Hub."""
    import peft
    import transformers

    spec = importlib.util.spec_from_file_location("plain", Path(__file__).with_name("transformers.py"))
    assert spec
    assert spec.loader
    plain = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(plain)
    named = json.loads((Path(folder) / "adapter_config.json").read_text(encoding="utf-8"))["base_model_name_or_path"]
    if Path(named).is_dir():
        model = peft.AutoPeftModelForCausalLM.from_pretrained(folder)
    else:
        model = peft.PeftModel.from_pretrained(transformers.AutoModelForCausalLM.from_pretrained(base), folder)
    return plain.Model(model, transformers.AutoTokenizer.from_pretrained(folder))
