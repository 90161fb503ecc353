"""The parsers of this repository, each with documents that are nearly its own, and the call that reads one.

A call gets the bytes of a document and an empty folder. It returns whatever it likes, or raises one of our errors.
Left out are Parquet and Arrow: those bytes are read by other people's C++, which this repository does not test.
"""

from __future__ import annotations

import contextlib
import gzip
import json
import os
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any
from unittest import mock

from hypothesis import strategies as st

from common import config as configs
from common import hardware
from common.config.layers import read_override
from common.data import rows, texts
from common.data.chat import compile_template, special_tokens
from common.errors import DataError, MachineError, UsageError
from common.model import bases, llama
from common.model.weights import Weights
from common.train import checkpoint
from common.train.manifest import Manifest
from engines.ttml import mesh
from tests.doubles.machines import fake_host
from tests.doubles.tiny_recipe import FROM_SCRATCH
from tests.fuzz import documents as of
from tests.fuzz.mutate import json_bytes, of_bytes, of_lines, of_trees
from tests.support import run_folders
from tools.cli.runs import summary
from tools.containers import images
from tools.data import convert
from tools.doctor import machine as doctor
from tools.export.record import damaged, read_record
from tools.machine import detect, lease
from tools.report import facts
from tools.results import schema
from tools.runs.explain import explain
from tools.runs.folder import read_run
from tools.serve.requests import ChatRequest, CompletionRequest, parse
from tools.serve.target import find_target

CPU = hardware.get("cpu")
Call = Callable[[bytes, Path], object]


@dataclass(frozen=True)
class Target:
    """One parser: what it is called, what it is fed, and the call."""

    name: str
    documents: st.SearchStrategy[bytes]
    read: Call


def in_file(name: str, read: Callable[[Path], object]) -> Call:
    """Return the call that reads a document as the file of that name."""

    def written(data: bytes, folder: Path) -> object:
        (folder / name).write_bytes(data)
        return read(folder / name)

    return written


# --- configurations ---------------------------------------------------------------------------------------------------


def config(path: Path) -> object:
    with contextlib.suppress(UsageError):
        configs.load(path.parent, hardware.get("galaxy"))
    return configs.load(path.parent, CPU)


def overrides(data: bytes, _folder: Path) -> object:
    text = data.decode("utf-8", "surrogateescape")  # as Python hands over what was typed
    read_override(text)
    return configs.load(FROM_SCRATCH, CPU, [text], 5)


# --- rows and texts ---------------------------------------------------------------------------------------------------


def every_dialect(path: Path) -> object:
    """Read a file of rows as `recipe data convert` does, with and without a map, and write what was found."""
    form = convert.guess_format(path, "auto")
    read = [convert.scan(path, form, given) for given in ({}, {"prompt": "text"})]
    read += [convert.collect(convert.records(convert.Source(str(path), form)), chosen=True)]
    for number, one in enumerate(read):
        one.lines()
        rows.grouped(one.problems)
        convert.write_rows(path.with_name(f"{number}.out"), one.rows)
    return read


def as_a_recipe(path: Path) -> object:
    with contextlib.suppress(DataError):
        rows.read_prompts(path.name, path.parent)
    found = rows.read_rows(path)
    rows.groups_of(found, None)
    return rows.control_rows(found, "shuffled_words")


# --- a run's folder ---------------------------------------------------------------------------------------------------


def whole_run(changed: str) -> Call:
    """Return the call that looks, as commands do, at a run of which the document is one file."""

    def read(data: bytes, folder: Path) -> object:
        run = run_folders.write_run(folder, "a-run", steps=20, checkpoints=[20])
        (run / changed).write_bytes(data)
        looked_at = read_run(run)
        for look in (summary, facts.tiles, facts.cause, facts.last_lines):
            look(looked_at)
        for name in ("state", "image", "environment", "losses", "tokens_per_second", "history_sha256", "known_config"):
            getattr(looked_at, name)
        looked_at.held_out()
        list(explain(run))
        return read_run(run, strict=True)

    return read


def in_checkpoint(data: bytes, folder: Path) -> object:
    place = folder / "step-00000001"
    place.mkdir()
    (place / "model.safetensors").touch()
    (place / "state.json").write_bytes(data)
    checkpoint.newest(folder, lambda _: None)
    return checkpoint.verify(place).step


def export_of(path: Path) -> object:
    record = read_record(path.parent)
    return record and damaged(path.parent, record)


# --- models and their pins --------------------------------------------------------------------------------------------


def tensors(path: Path) -> object:
    weights = Weights([path])
    return [weights[name].nbytes for name in weights]


def base_folder(path: Path) -> object:
    (path.parent / "model.safetensors").write_bytes(of.safetensors(json_bytes(of.HEADER)))
    (path.parent / "tokenizer.json").write_text("{}")
    with contextlib.suppress(UsageError):
        find_target(path.parent, base=False)
    return llama.parameters(bases.resolve(str(path.parent)).architecture)


def tokenizer_settings(path: Path) -> object:
    settings = bases.settings_in(path)
    special_tokens(settings)
    return bases.find_template(path.parent, settings)


def template(path: Path) -> object:
    return compile_template(bases.find_template(path.parent, {}))


def pins(path: Path) -> object:
    return bases.find("stories-260k", path.parent)


def results(path: Path) -> object:
    folder = path.parent / "from_scratch"
    folder.mkdir()
    path.rename(folder / "results.yaml")
    found = schema.load(folder)
    return found.evidence("cpu"), found.numbers


# --- machines and images ----------------------------------------------------------------------------------------------


def image_lock(path: Path) -> object:
    with mock.patch.object(images, "LOCK", path), mock.patch.object(images, "LOCAL", path.with_name("none")):
        lock = images.read_lock()
        for board in hardware.table().values():
            images.images_of(board)
            images.unknown_pins(lock, board.image)
        return images.image_for(hardware.get("n150"))


def local_images(path: Path) -> object:
    with mock.patch.object(images, "LOCAL", path):
        return images.images_of(hardware.get("n150"))


def device_tree(data: bytes, folder: Path) -> object:
    """Write a machine, and the document's paths and texts over it; look at it as doctor and launcher do."""
    fake_host(folder, "n300")
    tree: Any = {}
    with contextlib.suppress(ValueError, RecursionError):  # no object of files: the machine stays as it is
        tree = json.loads(data)
    tree = tree if isinstance(tree, dict) else {}
    for name, text in tree.items():
        with contextlib.suppress(OSError, ValueError):  # what no file system takes
            path = folder / os.path.normpath(f"/{name}").lstrip("/")
            path.parent.mkdir(parents=True, exist_ok=True)
            path.write_text(str(text), encoding="utf-8", errors="surrogateescape")
    environment = {"RECIPES_SYSFS_ROOT": str(folder)}
    visible = tree.get("visible")
    if isinstance(visible, str) and visible.isascii() and "\0" not in visible:
        environment["TT_VISIBLE_DEVICES"] = visible
    with mock.patch.dict(os.environ, environment):
        with contextlib.suppress(MachineError):
            detect.choose(None)
        choice = detect.choose("n300", require_present=False)
        lease.all_held()
        doctor.refuse_unready(choice.hardware, choice.nodes)
    return choice


def mesh_file(path: Path) -> object:
    mesh.check_descriptor(path, (1, 8))
    return path


# --- the table --------------------------------------------------------------------------------------------------------

FORMATS = [{"format": number, **of.RESOLVED} for number in (1, 2)]
TARGETS: tuple[Target, ...] = (
    Target("config", of_bytes(*of.CONFIGS), in_file("config.yaml", config)),
    Target("config-tree", of_trees(of.RESOLVED), in_file("config.yaml", config)),
    Target("config-resolved", of_trees(*FORMATS), in_file("config.resolved.yaml", configs.load_resolved)),
    Target("set", of_bytes(*of.SETS), overrides),
    Target("rows", of_lines(*of.OURS), in_file("rows.jsonl", as_a_recipe)),
    Target("dialects", of_lines(*of.ROWS), in_file("rows.jsonl", every_dialect)),
    Target("json-list", of_trees(*([row, row] for row in of.ROWS)), in_file("rows.json", every_dialect)),
    Target("csv", of_bytes(*of.TABLES), in_file("rows.csv", every_dialect)),
    Target("text", of_bytes(of.MARKED), in_file("rows.txt", every_dialect)),
    Target("gzip", of_bytes(gzip.compress(of.TABLE, mtime=0)), in_file("rows.csv.gz", every_dialect)),
    Target("corpus", of_bytes(of.MARKED), in_file("a.txt", lambda path: texts.read_texts("a.txt", path.parent))),
    Target("safetensors", of_trees(of.HEADER).map(of.safetensors), in_file("model.safetensors", tensors)),
    Target("state", of_trees(of.STATE), in_checkpoint),
    Target("manifest", of_trees(of.MANIFEST), in_file("manifest.json", lambda path: Manifest.load(path.parent))),
    Target("run-manifest", of_trees(of.MANIFEST), whole_run("manifest.json")),
    Target("run-config", of_trees(*FORMATS), whole_run("config.resolved.yaml")),
    Target("run-metrics", of_lines(*of.RECORDS), whole_run("metrics.jsonl")),
    Target("run-evaluations", of_lines(*of.EVALUATIONS), whole_run("evaluations.jsonl")),
    Target("run-log", of_bytes(of.LOG), whole_run("train.log")),
    Target("log", of_bytes(of.LOG), in_file("train.log", lambda path: list(explain(path)))),
    Target("export", of_trees(of.EXPORT), in_file("export.json", export_of)),
    Target("base", of_trees(of.ARCHITECTURE), in_file("config.json", base_folder)),
    Target("tokenizer-config", of_trees(of.TOKENIZER), in_file("tokenizer_config.json", tokenizer_settings)),
    Target("template", of_bytes(of.TEMPLATE), in_file("chat_template.jinja", template)),
    Target("pins", of_bytes(of.PINS), in_file("models.lock.yaml", pins)),
    Target("results", of_bytes(*of.RESULTS), in_file("results.yaml", results)),
    Target("image-lock", of_trees(of.IMAGES), in_file("images.lock.json", image_lock)),
    Target("images-local", of_trees(of.LOCAL), in_file("images.local.json", local_images)),
    Target("descriptor", of_bytes(*of.DESCRIPTORS), in_file("mesh.textproto", mesh_file)),
    Target("device-tree", of_trees(of.TREE), device_tree),
    Target("chat-request", of_trees(of.CHAT), lambda data, _: parse(data, ChatRequest)),
    Target("completion-request", of_trees(of.COMPLETION), lambda data, _: parse(data, CompletionRequest)),
)
