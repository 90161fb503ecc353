"""Files of a model as the Hub has them."""

from __future__ import annotations

import json


def in_shards(files: dict[str, bytes]) -> dict[str, bytes]:
    """The same model with its weights in two files and an index, as the Hub has larger ones."""
    from safetensors.numpy import load, save

    tensors = load(files["model.safetensors"])
    names = sorted(tensors)
    parts = {"model-00001-of-00002.safetensors": names[::2], "model-00002-of-00002.safetensors": names[1::2]}
    index = {"metadata": {}, "weight_map": {name: part for part, held in parts.items() for name in held}}
    made = {part: save({name: tensors[name] for name in held}) for part, held in parts.items()}
    rest = {name: content for name, content in files.items() if name != "model.safetensors"}
    return {**rest, **made, "model.safetensors.index.json": json.dumps(index).encode()}
