"""What pins a model of the Hub: its commit, the sha256 of every file that a run needs, and what it is.

The weights stay where they are: their sha256 is the Hub's own (Git LFS keeps files by it), their shapes stand in the
first bytes of each safetensors file. Small files are downloaded and hashed here.
"""

from __future__ import annotations

import math
import re
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from common.errors import MachineError
from common.files import read_json, sha256_file
from common.model import llama
from engines.ttml.limits import refuse_architecture, rope_of
from tools.bases.hub import refusals

if TYPE_CHECKING:
    from huggingface_hub.hf_api import ModelInfo, RepoSibling

Entry = dict[str, Any]  # of a models.lock.yaml
Files = Mapping[str, "RepoSibling"]  # by name: size, and sha256 where Git LFS keeps the file

WHOLE, INDEX = "model.safetensors", "model.safetensors.index.json"
SHARD = re.compile(r"[\w.-]+\.safetensors")  # a plain name: it becomes a file of the base's folder
BESIDE_WEIGHTS = (
    *("config.json", "generation_config.json", "tokenizer.json", "tokenizer_config.json", "special_tokens_map.json"),
    *("chat_template.jinja", "chat_template.json"),
)
PICKLED = (".bin", ".pt", ".pth", ".ckpt")
DTYPES = ("F32", "F16", "BF16")  # what common.model.weights reads as plain numbers
NUMBERS_OR_NONE = ("rms_norm_eps", "rope_theta")
COMMIT, SHA256 = re.compile(r"[0-9a-f]{40}"), re.compile(r"[0-9a-f]{64}")
TRY_ANOTHER = "choose a Llama whose repository has config.json, tokenizer.json and *.safetensors"


def look_up(repo: str, revision: str | None) -> tuple[Entry, list[str]]:
    """Return the pin of a model of the Hub at a branch, a tag or a commit (None: main), and what follows from it.

    Raises MachineError for what cannot be had, and for what these recipes cannot train.
    """
    info = info_of(repo, revision)
    commit, files = str(info.sha), {file.rfilename: file for file in info.siblings or []}
    where = f"{repo} at {commit[:12]}"
    if "config.json" not in files:
        raise MachineError(without_config(files), where=where, todo=TRY_ANOTHER)
    config = json_of(repo, "config.json", commit)
    refuse_config(config, where)
    weights = weight_files(repo, commit, files, where)
    if "tokenizer.json" not in files:
        raise MachineError(
            "it has no tokenizer.json, the one form of tokenizer that is read here",
            where=where,
            todo="save it once with transformers (AutoTokenizer.from_pretrained(...).save_pretrained(FOLDER)), put the "
            "model's other files beside it, and set model_config.base to that folder",
        )
    refuse_tensors(headers(repo, commit, weights), config, where)
    index = [] if weights == [WHOLE] else [INDEX]
    needed = [*weights, *index, *(name for name in BESIDE_WEIGHTS if name in files)]
    entry = {
        "source": "hub",
        "repo": repo,
        "revision": commit,
        "files": {name: sha256_of(repo, commit, files[name]) for name in needed},
        "origin": repo,
        "parameters": llama.parameters(config),
        "architecture": architecture_of(config),
        "licence": licence_of(info),
        "chat_template": template_file(repo, commit, files),
        "download_mb": math.ceil(sum(files[name].size or 0 for name in needed) / 1e6),
    }
    return entry, what_follows(entry, config)


def info_of(repo: str, revision: str | None) -> ModelInfo:
    """Return what the Hub says of a model at a revision: commit, card, files. Raises MachineError, also for nonsense.

    What is taken from it becomes names of folders and a lock that runs rely on.
    """
    from huggingface_hub import HfApi

    with refusals(repo, revision):
        info = HfApi().model_info(repo, revision=revision, files_metadata=True)
    odd = [] if COMMIT.fullmatch(str(info.sha)) else [f"a commit {str(info.sha)[:60]!r}"]
    for file in info.siblings or []:
        if file.lfs and not SHA256.fullmatch(str(file.lfs.sha256)):
            odd.append(f"{file.rfilename!r} with the sha256 {str(file.lfs.sha256)[:60]!r}")
        if not isinstance(file.size, int | None):
            odd.append(f"{file.rfilename!r} with the size {str(file.size)[:60]!r}")
    if odd:
        raise MachineError(
            f"the Hub's answer about {repo} is none: {odd[0]}",
            where=f"{repo}, revision {revision or 'main'}",
            todo="look at HF_ENDPOINT, and at a proxy in between: this is no Hub's answer",
        )
    return info


def json_of(repo: str, name: str, commit: str) -> dict[str, Any]:
    """Return the JSON object in a file of a commit. Raises MachineError where it is none."""
    path = download(repo, name, commit)
    try:
        return read_json(path)
    except MachineError as error:
        raise MachineError(error.what, where=f"{repo} at {commit[:12]}", todo=TRY_ANOTHER) from error


def download(repo: str, name: str, commit: str) -> Path:
    """Return a file of a commit in the Hub's cache on this machine, where it is put if need be."""
    from huggingface_hub import hf_hub_download

    with refusals(repo, commit):
        return Path(hf_hub_download(repo, name, revision=commit))


def sha256_of(repo: str, commit: str, file: RepoSibling) -> str:
    """Return a file's sha256: the Hub's where Git LFS keeps it, else that of the downloaded file."""
    return str(file.lfs.sha256) if file.lfs else sha256_file(download(repo, file.rfilename, commit))


# --- what can be trained ------------------------------------------------------------------------------------------


def without_config(files: Files) -> str:
    """Return what a repository without a config.json is."""
    if "adapter_config.json" in files:
        return "it is a PEFT adapter, not a whole model"
    if any(name.endswith(".gguf") for name in files):
        return "it has GGUF files, quantised weights for inference, and no config.json"
    return "it has no config.json"


def refuse_config(config: Mapping[str, Any], where: str) -> None:
    """Raise MachineError for a config.json that is not that of a plain Llama, with all that is not."""
    if config.get("model_type") != "llama":
        named = config.get("architectures")
        names = ", ".join(map(str, named)) if isinstance(named, list) else ""
        raise MachineError(
            f"it is a {config.get('model_type')} model ({names or 'unnamed'}); these recipes train Llama models",
            where=f"{where}, config.json",
            todo='choose a model whose config.json says "model_type": "llama"',
        )
    unknown = llama.lacks(config)
    unknown += [name for name in NUMBERS_OR_NONE if not isinstance(config.get(name), int | float | None)]
    if unknown:
        raise MachineError(f"its config.json has no number for {', '.join(unknown)}", where=where, todo=TRY_ANOTHER)
    scalings = [config.get(name) or {} for name in ("rope_scaling", "rope_parameters")]
    flat = all(isinstance(one, dict) and not any(isinstance(v, dict) for v in one.values()) for one in scalings)
    rope = rope_of(config)["rope_type"] if flat else "one for each kind of layer"
    limits = {
        f"RoPE of type {rope} (default and llama3 are known)": rope not in ("default", "llama3"),
        "projections with biases": bool(config.get("attention_bias") or config.get("mlp_bias")),
        f"the activation {config.get('hidden_act')} (silu is known)": config.get("hidden_act", "silu") != "silu",
        "quantised weights": bool(config.get("quantization_config")),
    }
    if lacking := [what for what, holds in limits.items() if holds]:
        raise MachineError(
            f"it has what the models here lack: {'; '.join(lacking)}",
            where=f"{where}, config.json",
            todo="choose a plain Llama in bf16, fp16 or fp32",
        )


def weight_files(repo: str, commit: str, files: Files, where: str) -> list[str]:
    """Return the names of the safetensors files that hold the weights: one, or those of the index."""
    if WHOLE in files:
        return [WHOLE]
    if INDEX in files:
        index = json_of(repo, INDEX, commit).get("weight_map")
        shards = sorted(set(map(str, index.values()))) if isinstance(index, dict) else []
        odd = [name for name in shards if name not in files or not SHARD.fullmatch(name)]
        if not shards or odd:
            raise MachineError(
                f"its {INDEX} names {odd[0] if odd else 'no files'}, which the repository lacks",
                where=where,
                todo="choose another revision, or tell the model's owner",
            )
        return shards
    pickled = sorted(name for name in files if name.endswith(PICKLED))
    if pickled:
        raise MachineError(
            f"its weights are pickled ({pickled[0]}), and a pickle can run any code when it is read: none is here",
            where=where,
            todo="choose a revision that has *.safetensors: REPO@REVISION",
        )
    raise MachineError(f"it has neither {WHOLE} nor {INDEX}", where=where, todo=TRY_ANOTHER)


def headers(repo: str, commit: str, weights: Sequence[str]) -> dict[str, tuple[str, tuple[int, ...]]]:
    """Return (dtype, shape) of every tensor by name, of the first bytes of each file."""
    from huggingface_hub import HfApi
    from huggingface_hub.errors import SafetensorsParsingError

    found: dict[str, tuple[str, tuple[int, ...]]] = {}
    for name in weights:
        try:
            with refusals(repo, commit):
                tensors = HfApi().parse_safetensors_file_metadata(repo, name, revision=commit).tensors
        except MachineError as error:
            # The others are what the library makes of a header that is JSON of another kind.
            if isinstance(
                error.__cause__, SafetensorsParsingError | AttributeError | LookupError | TypeError | ValueError
            ):
                error.what, error.todo = f"{name} is no safetensors file", TRY_ANOTHER
            raise
        found |= {tensor: (str(info.dtype), tuple(info.shape)) for tensor, info in tensors.items()}
    return found


def refuse_tensors(given: Mapping[str, tuple[str, tuple[int, ...]]], config: Mapping[str, Any], where: str) -> None:
    """Raise MachineError where the tensors are not exactly those of a Llama of this config.json, as plain numbers.

    A tied output head may be among them once more, as both engines allow.
    """
    if config["num_hidden_layers"] > len(given):  # before a name is made for each of a billion layers
        raise MachineError(
            f"its config.json has {config['num_hidden_layers']} layers, and its weights are {len(given)} tensors",
            where=where,
            todo=TRY_ANOTHER,
        )
    expected = llama.shapes(config)
    extra = set(given) - set(expected) - ({llama.HEAD} if config.get("tie_word_embeddings") else set())
    odd = [f"{name} is missing" for name in expected if name not in given]
    odd += [f"{name} is unknown" for name in sorted(extra)]
    odd += [
        f"{name} is {given[name][1]}, expected {expected[name]}"
        for name in expected
        if name in given and given[name][1] != expected[name]
    ]
    odd += [f"{name} has numbers of type {kind}" for name, (kind, _) in given.items() if kind not in DTYPES]
    if odd:
        more = f"; and {len(odd) - 5} more" if len(odd) > 5 else ""
        raise MachineError(
            f"its weights are not those of a Llama of its config.json: {'; '.join(odd[:5])}{more}",
            where=where,
            todo="choose a plain Llama in bf16, fp16 or fp32",
        )


# --- what it is ---------------------------------------------------------------------------------------------------


def architecture_of(config: Mapping[str, Any]) -> dict[str, Any]:
    """Return the shape that `recipe plan` reckons with before the base is here, in config.json's own names."""
    heads = config["num_attention_heads"]
    *sizes, context = llama.SIZES
    found = {name: config[name] for name in sizes}
    found |= {"num_key_value_heads": llama.kv_heads(config), context: config[context]}
    if (config.get("head_dim") or config["hidden_size"] // heads) * heads != config["hidden_size"]:
        found["head_dim"] = config["head_dim"]
    return found | {"tie_word_embeddings": bool(config.get("tie_word_embeddings"))}


def licence_of(info: ModelInfo) -> str:
    """Return the licence that the model's card names, by the Hub's short name; "unknown" where it names none."""
    card: Any = info.card_data if hasattr(info.card_data, "get") else {}
    short, name = card.get("license"), card.get("license_name")
    named = name if short == "other" and name else short or "unknown"
    text = ", ".join(map(str, named)) if isinstance(named, list) else str(named)
    return "".join(letter if letter.isprintable() else " " for letter in text)  # it is shown on a terminal


def template_file(repo: str, commit: str, files: Files) -> str | None:
    """Return the name of the file that has the chat template; None where there is none."""
    if "chat_template.jinja" in files:
        return "chat_template.jinja"
    for name in ("tokenizer_config.json", "chat_template.json"):
        if name in files and json_of(repo, name, commit).get("chat_template"):
            return name
    return None


def what_follows(entry: Entry, config: Mapping[str, Any]) -> list[str]:
    """Return what a user should know of a pinned model before it is trained, a line each."""
    lines = []
    if entry["chat_template"] is None:
        lines.append(
            "it has no chat template: a run on rows of prompts and answers is refused until it has one. Its -Instruct "
            "relative usually does; or put the files in a folder with a chat_template.jinja and name that folder"
        )
    if entry["licence"] == "unknown":
        lines.append("its card names no licence: ask its owner before you give away what you train from it")
    try:
        refuse_architecture(config)
    except MachineError as error:
        lines.append(f"it trains on the CPU only: {error.what}")
    return lines
