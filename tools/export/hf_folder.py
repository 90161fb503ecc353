"""Hugging Face folders from a trained run: the merged model, and the adapter in PEFT's format.

Nothing here needs torch or transformers: weights are read, merged and written one tensor at a time.
"""

from __future__ import annotations

import json
import shutil
from collections.abc import Iterable, Iterator, Sequence
from pathlib import Path
from typing import Any

import numpy as np

from common.config.schema import Evaluation
from common.errors import MachineError
from common.files import write_json
from common.model import bases
from common.model.llama import HEAD, PREFIX
from common.model.weights import SafetensorsWriter, Shapes, Weights
from common.train.checkpoint import read_tensors
from tools.bases.plain import plain_config, write_tokenizer
from tools.export.end_token import declare_end
from tools.runs.trained import TrainedRun

Array = np.ndarray[Any, Any]

ENTRY = 128  # bytes that a tensor takes in a safetensors header, beside its name; at most


def export_dtype(run: TrainedRun) -> str:
    """Return `fp32` or `bf16`: export_config.dtype, where `auto` is what the trained weights are stored in."""
    if run.config.export.dtype != "auto":
        return run.config.export.dtype
    return "bf16" if run.config.training.precision == "bf16" else "fp32"


# --- weights --------------------------------------------------------------------------------------------------------


def merged_shapes(run: TrainedRun) -> Shapes:
    """Return names and shapes of the merged model: the base's, without a second copy of a tied output head."""
    tied = run.base.architecture.get("tie_word_embeddings", False)
    return {name: shape for name, shape in run.base.weights().shapes.items() if not (tied and name == HEAD)}


def merged_tensors(run: TrainedRun, names: Iterable[str], held: str) -> Iterator[tuple[str, Array]]:
    """Yield (name, fp32 array) of the trained model with its adapter merged in: W + alpha / rank x B A.

    W is the base as a run of the precision `held` holds it, so rounded to bf16 where that stores bf16. Raises
    MachineError when an adapter's layer is not in the base.
    """
    if run.config.model.lora is None:
        trained = Weights([run.checkpoint.folder / "model.safetensors"])
        for name in names:
            yield name, trained[name].astype(np.float32)
        return
    base, adapters = run.base.weights(), adapters_of(run)
    for name in names:
        weight = stored(base[name], held).astype(np.float32)
        if update := adapters.pop(name.removesuffix(".weight"), None):
            # In fp32, and rounded to the export's dtype once, when it is written.
            weight = weight + low_rank_update(*update, scale=run.config.model.lora.alpha / run.config.model.lora.rank)
        yield name, weight
    if adapters:
        raise MachineError(f"the adapter's layer {next(iter(adapters))} is not in the base", where=str(run.base.folder))


def low_rank_update(a: Array, b: Array, *, scale: float) -> Array:
    """Return scale x B A in fp32: `a` [rank, in], `b` [out, rank] -> [out, in] (Hu et al., 2021)."""
    return np.float32(scale) * (b.astype(np.float32) @ a.astype(np.float32))


def adapters_of(run: TrainedRun) -> dict[str, tuple[Array, Array]]:
    """Return (A, B) of every adapted layer, by the layer's name in the base."""
    tensors = read_tensors(run.checkpoint.folder)
    end = ".lora_A.weight"
    layers = [name.removesuffix(end) for name in tensors if name.startswith("model/") and name.endswith(end)]
    return {
        layer.removeprefix(f"model/{PREFIX}"): (
            tensors[f"{layer}.lora_A.weight"],
            tensors[f"{layer}.lora_B.weight"],
        )
        for layer in layers
    }


def stored(array: Array, precision: str) -> Array:
    """Return the values of `array` as a run of this precision keeps them."""
    import ml_dtypes

    return array.astype(ml_dtypes.bfloat16) if precision == "bf16" else array


def write_safetensors(path: Path, shapes: Shapes, tensors: Iterable[tuple[str, Array]], dtype: str) -> None:
    """Write tensors in the order of `shapes`, one in memory at a time; `dtype` is fp32 or bf16."""
    import ml_dtypes

    kind = np.dtype(np.float32) if dtype == "fp32" else np.dtype(ml_dtypes.bfloat16)
    room = sum(len(name) + ENTRY for name in shapes) + ENTRY
    with SafetensorsWriter(path, {"format": "pt"}, room) as file:
        for (name, array), expected in zip(tensors, shapes, strict=True):
            if name != expected or array.shape != shapes[name]:
                raise MachineError(f"{name} {array.shape} does not fit the base's {expected} {shapes[expected]}")
            file.add(name, array.astype(kind))


# --- folders --------------------------------------------------------------------------------------------------------


def write_merged(folder: Path, run: TrainedRun, dtype: str) -> None:
    """Write a plain LlamaForCausalLM with its tokenizer, as transformers load it."""
    folder.mkdir()
    shapes = merged_shapes(run)
    tensors = merged_tensors(run, shapes, run.config.training.precision)
    write_safetensors(folder / "model.safetensors", shapes, tensors, dtype)
    architecture = run.base.architecture
    write_tokenizer(run.base.folder, folder, architecture["max_position_embeddings"])
    end = declare_end(folder, run.tokenizer, architecture["vocab_size"]) if run.base.initial else None
    ends = {} if end is None else dict.fromkeys(("bos_token_id", "eos_token_id", "pad_token_id"), end)
    write_json(folder / "config.json", plain_config({**architecture, **ends}, dtype))
    never = [] if end is None else [end]
    write_json(folder / "generation_config.json", generation_config(run, never) | ends)


def write_adapter(folder: Path, run: TrainedRun) -> None:
    """Write the checkpoint's adapter, as PEFT loads it; A is written once per projection, tied or not."""
    folder.mkdir()
    shutil.copyfile(run.checkpoint.folder / "adapter_model.safetensors", folder / "adapter_model.safetensors")
    config = json.loads((run.checkpoint.folder / "adapter_config.json").read_text(encoding="utf-8"))
    name, revision = base_for_peft(run)
    write_json(folder / "adapter_config.json", {**config, "base_model_name_or_path": name, "revision": revision})
    write_tokenizer(run.base.folder, folder, run.base.architecture["max_position_embeddings"])


def base_for_peft(run: TrainedRun) -> tuple[str, str | None]:
    """Return (name, revision) of the very weights the adapter belongs to: on the Hub, or this machine's folder."""
    entry = bases.locked(run.known_recipe_dir).get(run.config.model.base or "", {})
    if entry.get("source") == "hub":
        return str(entry["repo"]), str(entry["revision"])
    return str(run.base.folder), None


def generation_config(run: TrainedRun, never: Sequence[int]) -> dict[str, Any]:
    """Return the settings of generation: the recipe's sampling, ended by every token that ends a turn.

    The ids `never` are suppressed, with those that the run never samples.

    Every reader must take them alike. vLLM (vllm/config/model.py) reads temperature, top_k, top_p, min_p,
    repetition_penalty and max_new_tokens, and nothing else. Without a temperature it takes 1, whatever `do_sample`
    says, so greedy is temperature 0; transformers 4.57 and 5.23 decode greedily with that where `do_sample` is left
    out, and still sample where a caller asks for it, which a `top_k` of 1 would prevent. `max_new_tokens` would cap
    each of vLLM's answers without a word, but without a limit transformers stop at 20 tokens: so there is `max_length`,
    which vLLM does not read, the most tokens of prompt and answer together: the context.
    """
    tokenizer, architecture = run.tokenizer, run.base.architecture
    pad = tokenizer.encode_text(tokenizer.tokens["pad_token"]) if "pad_token" in tokenizer.tokens else []
    padding = range(tokenizer.vocab_size, architecture["vocab_size"])  # rows of the embedding that are no token
    never = sorted({*never, *tokenizer.never_ids, *padding})
    return {
        "bos_token_id": architecture.get("bos_token_id"),
        "eos_token_id": list(tokenizer.eos_ids) or None,
        "pad_token_id": pad[0] if len(pad) == 1 else next(iter(tokenizer.eos_ids), None),
        **sampling(run.config.eval),
        "max_length": architecture["max_position_embeddings"],
        **({"suppress_tokens": never} if padding or run.base.initial else {}),
    }


def sampling(settings: Evaluation) -> dict[str, Any]:
    """Return a recipe's sampling as generation_config.json has it; its limit of new tokens is not part of it."""
    penalty = {} if settings.repetition_penalty == 1 else {"repetition_penalty": settings.repetition_penalty}
    if settings.temperature == 0:
        return {"temperature": 0.0, **penalty}
    chosen = {name: getattr(settings, name) for name in ("temperature", "top_k", "top_p")}
    return {"do_sample": True, **chosen, **penalty}  # top_k is said even when it is off: transformers' own is 50
