"""A recipe's configuration: schema, layers, the split of the batch over devices, and two digests.

Layers, each over the one before: defaults, config.yaml, presets/<preset>.yaml, hw/<board>.yaml, --set, --steps.
"""

from __future__ import annotations

import dataclasses
import difflib
import functools
import hashlib
import json
import math
import re
import typing
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from pydantic import BaseModel, Field, PrivateAttr, ValidationError

from common import hardware
from common.config.layers import Key, Layer, Problem, dotted, flatten, nest, read_file, read_override, shown, to_yaml
from common.config.schema import (
    Checkpoint,
    Data,
    Device,
    Evaluation,
    Export,
    Logging,
    Model,
    Section,
    Training,
    converted_name,
    is_converted,
)
from common.errors import UsageError
from common.hardware import Hardware

MOST = 50  # mistakes that are listed at once
FORMAT = 2  # of config.resolved.yaml; 1 had one micro-batch as `batch_size` (_from_format_1)


@dataclass(frozen=True)
class _Origin:
    """Where each key was set. Ignored by ==, hash and digests."""

    where: Mapping[Key, str] = field(default_factory=dict, compare=False)
    overlay: str | None = field(default=None, compare=False)
    recipe_batch: int | None = field(default=None, compare=False)


class Config(Section):
    """A valid configuration. YAML has long names (`training_config`), code short ones (`training`)."""

    recipe: str
    """Name of the recipe's folder; filled by `load`."""
    hw: str
    """Name of the board in hardware.yaml; filled by `load`."""
    training: Training = Field(alias="training_config")
    """Optimization."""
    model: Model = Field(alias="model_config")
    """The network and its initial weights."""
    data: Data = Field(alias="data_config")
    """Rows, their split and their tokens."""
    eval: Evaluation = Field(alias="eval_config")
    """Held-out loss and samples."""
    checkpoint: Checkpoint = Field(alias="checkpoint_config")
    """Saved states."""
    device: Device = Field(default=Device(), alias="device_config")
    """Devices, processes and compilation."""
    logging: Logging = Field(default=Logging(), alias="logging_config")
    """Console and trackers."""
    export: Export = Field(default=Export(), alias="export_config")
    """The Hugging Face folder at the end of a run."""

    _origin: _Origin = PrivateAttr(default_factory=_Origin)

    def mistakes(self) -> Iterator[tuple[str, str]]:
        shape, rows = self.model.architecture, self.data.source is not None
        if (self.model.init == "random") == rows:
            text = "init: random trains on a corpus, a pretrained base on rows (data_config.source)"
            yield f"data_config.{'source' if rows else 'corpus'}", text
        if shape and (self.data.max_length or 0) > shape.max_position_embeddings:
            yield "data_config.max_length", f"longer than max_position_embeddings {shape.max_position_embeddings}"
        if shape and (self.data.tokenizer.vocab_size or 0) > shape.vocab_size:
            yield "data_config.tokenizer.vocab_size", f"larger than the model's vocabulary of {shape.vocab_size}"

    @property
    def micro_batch(self) -> int:
        """Return the rows that one device holds at once; all of its share where no micro_batch_size is set."""
        share = self.training.batch_size // self.device.devices
        return min(self.training.micro_batch_size or share, share)

    @property
    def accumulation(self) -> int:
        """Return the micro-batches of one optimizer step: batch_size / (micro_batch x devices)."""
        return self.training.batch_size // (self.micro_batch * self.device.devices)

    @property
    def batch_equation(self) -> str:
        """Return `batch_size 64 = micro_batch_size 16 x 2 devices x 2 accumulated`."""
        devices = f" x {self.device.devices} devices" if self.device.devices > 1 else ""
        parts = f"micro_batch_size {self.micro_batch}{devices} x {self.accumulation} accumulated"
        return f"batch_size {self.training.batch_size} = {parts}"

    @property
    def recipe_batch(self) -> int | None:
        """Return the batch_size of config.yaml and preset, before overlay and --set; None where that is not known."""
        return self._origin.recipe_batch

    def where(self, key: str) -> str:
        """Return the file:line or option that set a long dotted key, or `(default)`."""
        return self._origin.where.get(tuple(key.split(".")), "(default)")

    def departures(self) -> list[str]:
        """Return what hw/<board>.yaml changes of the training itself; with any, this is another experiment."""
        keys = {dotted(key): value for key, value in flatten(self._training_tree())}
        overlay = self._origin.overlay
        from_overlay = [key for key in keys if overlay and self.where(key).startswith(f"{overlay}/")]
        return [f"{key}: {_text(keys[key])} ({self.where(key)})" for key in from_overlay]

    def with_values(self, place: str = "set by the run", /, **values: Any) -> Config:
        """Return a validated copy with dotted keys set, e.g. `with_values(**{"training.precision": "fp32"})`.

        Sections may have their short or long names. Setting one of max_steps and num_epochs clears the other. `place`
        is what `where` says of the keys.
        """
        changes = []
        for name, value in values.items():
            section, *rest = name.split(".")
            info = Config.model_fields.get(section)
            key = ((info.alias if info else None) or section, *rest)
            changes.append(Layer(nest(key, value), {key: place}))
        merged = _stack(Layer(self.dump(), dict(self._origin.where)), changes)
        copy = _validate(merged, f"the configuration of {self.recipe}")
        copy._origin = dataclasses.replace(self._origin, where=merged.where)
        return copy

    def dump(self) -> dict[str, Any]:
        """Return all values under their YAML names, ready for JSON."""
        return self.model_dump(mode="json", by_alias=True)

    def to_yaml(self) -> str:
        """Return the text of config.resolved.yaml, which `load_resolved` reads."""
        return to_yaml({"format": FORMAT, **self.dump()})

    def changes(self, other: Config) -> list[str]:
        """List what differs in `other`, a line for each key: `training_config.learning_rate: 0.0001 -> 0.0002`."""
        old, new = ({key: _text(value) for key, value in flatten(config.dump())} for config in (self, other))
        values = {key: (old.get(key, "(absent)"), new.get(key, "(absent)")) for key in {**old, **new}}
        return [f"{dotted(key)}: {was} -> {now}" for key, (was, now) in values.items() if was != now]

    def config_digest(self) -> str:
        """Return the sha256 over every value, for the record."""
        return _sha256(self.dump())

    def training_digest(self, facts: Mapping[str, str]) -> str:
        """Return the sha256 over what fixes the next update, with `facts` such as the identity of the base's weights.

        Left out: the split into micro-batches, hardware, mesh, threads, compilation, checkpoints, evaluation, logging,
        export, and the preset's name (its values are in). Raise ValueError while a value is left to the run.
        """
        ties = self.model.lora and self.model.lora.tie_groups
        if self.training.precision == "auto" or self.training.max_steps is None or ties == "build":
            raise ValueError("not resolved yet: precision, max_steps or lora.tie_groups: set them by with_values")
        tree = self._training_tree()
        del tree["model_config"]["preset"]
        # The batch and the keys of conversion stand where they always stood, so that runs made before can be resumed.
        batch = tree["training_config"].pop("batch_size")
        tree["data_config"] |= _CONVERSION
        return _sha256({**tree, "effective_batch": batch, "facts": dict(facts)})

    def _training_tree(self) -> dict[str, dict[str, Any]]:
        tree = self.dump()
        del tree["training_config"]["micro_batch_size"]
        del tree["model_config"]["gradient_checkpointing"], tree["data_config"]["num_proc"]
        return {key: tree[key] for key in ("training_config", "model_config", "data_config")}


def load(recipe_dir: Path, hw: Hardware, overrides: Sequence[str] = (), steps: int | None = None) -> Config:
    """Return the configuration of a recipe on a board, all layers merged, the batch split over the board's devices.

    `overrides` are `section.key=value`; `steps` replaces max_steps or num_epochs as the last layer. Raise one
    UsageError that lists every mistake with its file:line.
    """
    base = read_file(recipe_dir / "config.yaml")
    overlay = _overlay(recipe_dir / "hw", hw)
    sets = [read_override(text) for text in overrides]
    preset = _preset(recipe_dir / "presets", [base, *overlay, *sets])
    last = [] if steps is None else [Layer(nest(_STOP[0], steps), {_STOP[0]: f"--steps {steps}"})]

    # The preset lies over config.yaml and below the rest, which may name it: it is found before anything is stacked.
    recipe = _stack(_stack(Layer(), [base]), preset)
    groups = [*([layer] for layer in overlay), sets, last]
    merged = functools.reduce(_stack, groups, recipe)
    ours = {"recipe": recipe_dir.name, "hw": hw.name}
    merged.problems += [Problem(merged.where[(name,)], name, "unknown key") for name in ours if name in merged.tree]
    # After the check: a YAML file must not name its own recipe or board.
    merged.tree |= ours
    config, batch = _validate(merged, f"the configuration of {recipe_dir.name}"), recipe.get(_BATCH)
    place = shown(recipe_dir / "hw") if overlay else None
    config._origin = _Origin(merged.where, overlay=place, recipe_batch=batch if type(batch) is int else None)
    return split_over_devices(config, hw)


def load_resolved(path: Path) -> Config:
    """Return the configuration of a run, from its config.resolved.yaml. Raise UsageError if it is not valid."""
    layer = read_file(path)
    version = layer.tree.pop("format", None)
    if version == 1:
        _from_format_1(layer)
    elif version != FORMAT:
        text = f"unknown format {version!r}, this version reads formats 1 and {FORMAT}"
        raise UsageError(text, where=shown(path))
    config = _validate(layer, shown(path))
    config._origin = _Origin(layer.where)
    return config


_STOP: tuple[Key, Key] = (("training_config", "max_steps"), ("training_config", "num_epochs"))
_BATCH, _MICRO_BATCH = "training_config.batch_size", "training_config.micro_batch_size"
_ACCUMULATION = "training_config.gradient_accumulation_steps"  # no key any more, and told apart from a typing mistake
# Keys of the data section that there were once, with what they said where nothing was to convert: a training's digest
# still has them.
_CONVERSION: dict[str, Any] = {"revision": None, "format": "auto", "map": {}}
# Names that other training tools use, and ours.
_SYNONYMS = {
    "lr": "training_config.learning_rate",
    "epochs": "training_config.num_epochs",
    "steps": "training_config.max_steps",
    "clip_grad_norm": "training_config.max_grad_norm",
}


def _stack(below: Layer, group: Sequence[Layer]) -> Layer:
    """Put the layers of one group (a file, or all --set) over `below`; max_steps clears num_epochs, or back."""
    set_in = {key: layer for layer in group for key in _STOP if layer.get(dotted(key)) is not None}
    merged = functools.reduce(Layer.merge, group, below)
    if len(set_in) == 2:
        places = " and ".join(layer.where[key] for key, layer in set_in.items())
        text = f"both max_steps and num_epochs are set in one layer ({places}): keep one"
        merged.problems.append(Problem(set_in[_STOP[1]].where[_STOP[1]], dotted(_STOP[1]), text))
    if set_in and isinstance(merged.tree["training_config"], dict):
        cleared = _STOP[1] if _STOP[0] in set_in else _STOP[0]
        merged.tree["training_config"].pop(cleared[-1], None)
    return merged


def _overlay(folder: Path, hw: Hardware) -> list[Layer]:
    """Read hw/<board>.yaml if there is one, over hw/cpu.yaml for cpu-x2. Refuse a file named after no board."""
    files = sorted(folder.iterdir()) if folder.is_dir() else []
    for path in files:
        if path.suffix != ".yaml" or path.stem not in hardware.table():
            text, known = "this overlay is named after no board and would never be read", hardware.table()
            raise UsageError(text, where=shown(path), todo=", ".join(f"{name}.yaml" for name in known))
    names = ("cpu", hw.name) if hw.is_cpu else (hw.name,)  # however many processes: one experiment on a CPU
    return [read_file(path) for name in dict.fromkeys(names) for path in files if path.stem == name]


def _preset(folder: Path, stack: Sequence[Layer]) -> list[Layer]:
    """Read the preset that the last layer to name one names."""
    key = ("model_config", "preset")
    naming = [layer for layer in stack if key in layer.where]
    name = naming[-1].get(dotted(key)) if naming else None
    if not isinstance(name, str):
        return []  # none, or not text: the schema says so
    files = {path.stem: path for path in sorted(folder.glob("*.yaml"))}
    if name not in files:
        known = ", ".join(files) or "none, there is no presets/ folder"
        raise UsageError(f"unknown preset {name!r}", where=naming[-1].where[key], todo=f"presets here: {known}")
    layer = read_file(files[name])
    if key in layer.where:
        raise UsageError("a preset cannot name a preset", where=layer.where[key])
    return [layer]


def split_over_devices(config: Config, hw: Hardware) -> Config:
    """Fill in the mesh and the rows that a device holds at once. Raise UsageError where the batch does not divide."""
    device, training, places = config.device, config.training, config.where
    mesh = device.mesh_shape or ((1, 1) if device.enable_ddp is False else hw.mesh_shape)
    devices = math.prod(mesh)
    if devices > hw.chips and not hw.is_cpu:  # a CPU takes any number of processes
        text = f"the mesh {list(mesh)} has {devices} devices, {hw.name} has {hw.chips}"
        raise UsageError(text, where=places("device_config.mesh_shape"), todo=f"use {list(hw.mesh_shape)} or less")
    if device.enable_ddp not in (None, devices > 1):
        text = f"enable_ddp: {_text(device.enable_ddp)} contradicts the mesh {list(mesh)} of {hw.name}"
        todo = "leave enable_ddp out: data parallel is on where there is more than one device"
        raise UsageError(text, where=places("device_config.enable_ddp"), todo=todo)
    share, rest = divmod(training.batch_size, devices)
    if rest:
        text = f"batch_size {training.batch_size} does not divide by the {devices} devices of {hw.name}"
        near = " or ".join(str(devices * rows) for rows in (share, share + 1) if rows)
        raise UsageError(text, where=places(_BATCH), todo=f"use a multiple of {devices}: {near}")
    rows = min(training.micro_batch_size or hw.micro_batch, share)
    # Micro-batches are equal: where the table's number of rows does not divide the share, it is the next smaller one.
    small = [size for size in range(1, math.isqrt(share) + 1) if share % size == 0]
    divide = sorted({*small, *(share // size for size in small)})
    if training.micro_batch_size is None:
        rows = max(size for size in divide if size <= rows)
    if rows not in divide:
        text = f"micro_batch_size {rows} does not divide batch_size / devices = {training.batch_size} / {devices}"
        raise UsageError(text, where=places(_MICRO_BATCH), todo=f"use one of {', '.join(map(str, divide))}")
    values: dict[str, Any] = {"device.mesh_shape": mesh, "device.enable_ddp": devices > 1}
    values |= {} if rows == training.micro_batch_size else {"training.micro_batch_size": rows}
    return config.with_values(f"hardware.yaml ({hw.name})", **values)


def _from_format_1(layer: Layer) -> None:
    """Rewrite the config of a run made before format 2.

    `batch_size` was one micro-batch of all devices together, and training itself converted rows of other forms.
    """
    data = layer.tree.get("data_config", {})
    for name in _CONVERSION:
        data.pop(name, None)
    if is_converted(source := str(data.get("source") or "")):
        data["source"] = converted_name(source)
    at_once, parts = layer.get(_BATCH), layer.get(_ACCUMULATION)
    if isinstance(at_once, int) and isinstance(parts, int):
        rows = at_once // math.prod(layer.get("device_config.mesh_shape") or (1, 1))
        del layer.tree["training_config"]["gradient_accumulation_steps"]
        layer.tree["training_config"] |= {"batch_size": at_once * parts, "micro_batch_size": rows}


def _instead_of(key: str, layer: Layer) -> str:
    """Return what to write in place of a key that there was once; empty for any other key."""
    if key.startswith("data_config.") and key.rpartition(".")[2] in _CONVERSION:
        return "is no key: recipe data convert, with --format, --map, --revision, makes the rows of data_config.source"
    if key != _ACCUMULATION:
        return ""
    at_once, parts, mesh = layer.get(_BATCH), layer.get(_ACCUMULATION), layer.get("device_config.mesh_shape")
    if not isinstance(mesh, list):
        mesh = hardware.get(layer.tree["hw"]).mesh_shape if "hw" in layer.tree else (1, 1)
    rule = "is no key: accumulation is batch_size / (micro_batch_size x devices)"
    if not all(type(number) is int and number > 0 for number in (at_once, parts, *mesh)):
        return rule
    new = f"{_BATCH}={at_once * parts}; {_MICRO_BATCH}={max(1, at_once // math.prod(mesh))}"
    return f"{rule}; batch_size: {at_once} x {parts} -> {new}"


def _validate(layer: Layer, what: str) -> Config:
    """Return the config that a layer holds. Raise one UsageError that lists every mistake in it."""
    problems = list(layer.problems)
    try:
        config = Config.model_validate(layer.tree)
    except ValidationError as error:
        problems += _explain(error, layer)
    if found := list(dict.fromkeys(problems)):
        count = f"{len(found)} mistake{'s' if len(found) > 1 else ''} in {what}"
        lines = [f"  {item.where}: {item.key + ': ' if item.key else ''}{item.message}" for item in found[:MOST]]
        raise UsageError("\n".join([count, *lines]))
    return config


def _explain(error: ValidationError, layer: Layer) -> Iterator[Problem]:
    """Yield pydantic's errors with the file:line of the key and the words of this project."""
    texts: dict[tuple[str, str], list[str]] = {}
    for item in error.errors(include_url=False)[:MOST]:
        # A union puts the names of its members into the location.
        key: Key = tuple(part for part in item["loc"] if not re.match(r"str$|list\[|literal\[", str(part)))
        if item["type"] == "missing":
            text = "is required"
        elif item["type"] == "extra_forbidden":
            text = _instead_of(dotted(key), layer) or f"unknown key{_nearest(key)}"
        elif item["type"] == "model_type":
            text = f"should be a section with keys below it, got {_text(item['input'])}"
        elif item["type"] == "rule":
            text = item["msg"]
        else:
            text = f"{item['msg'].replace('Input should', 'should')}, got {_text(item['input'])}"
        texts.setdefault((layer.locate(key), dotted(key)), []).append(text)
    for (place, name), parts in texts.items():
        yield Problem(place, name, ", or ".join(parts))


def _nearest(key: Key) -> str:
    """Return the valid key that an unknown one may stand for, or those beside it."""
    name = str(key[-1])
    siblings = [path[-1] for path in _keys(Config) if path[:-1] == key[:-1]]
    if near := difflib.get_close_matches(name, siblings, n=1):
        return f"; did you mean {near[0]}?"
    elsewhere = [dotted(path) for path in _keys(Config) if path[-1] == name]
    if elsewhere or name in _SYNONYMS:
        return f"; did you mean {(elsewhere or [_SYNONYMS[name]])[0]}?"
    return f"; valid keys here: {', '.join(siblings)}" if siblings else ""


def _keys(section: type[BaseModel], path: tuple[str, ...] = ()) -> Iterator[tuple[str, ...]]:
    """Yield every key that a YAML file may hold, sections included."""
    for name, info in section.model_fields.items():
        if section is Config and name in ("recipe", "hw"):
            continue
        here = (*path, info.alias or name)
        yield here
        for kind in (info.annotation, *typing.get_args(info.annotation)):
            if isinstance(kind, type) and issubclass(kind, BaseModel):
                yield from _keys(kind, here)


def _text(value: Any) -> str:
    return json.dumps(value, ensure_ascii=False, default=str)


def _sha256(tree: Mapping[str, Any]) -> str:
    # One text for one value: neither the order of the keys nor how a number was spelled in YAML is in the digest.
    canonical = json.dumps(tree, sort_keys=True, separators=(",", ":"), ensure_ascii=True, allow_nan=False)
    return hashlib.sha256(canonical.encode("ascii")).hexdigest()
