"""The pieces of our code that write, each as small as it goes: no device, no network, no training."""

from __future__ import annotations

import json
import os
from collections.abc import Iterator
from pathlib import Path
from typing import Any
from unittest import mock

import numpy as np
import yaml

from common.data import texts, tokens, vocabulary
from common.data.texts import Document
from common.data.tokens import Encoded, TokenDataset
from common.files import disk_errors, sha256_file, try_lock
from common.model import bases
from common.train import checkpoint, metrics
from common.train.console import Console
from common.train.ending import record_end
from common.train.manifest import Manifest
from tests.doubles.tiny_recipe import FINE_TUNE
from tests.support.engines import config_for
from tests.support.run_folders import write_run
from tests.writes.trials import Piece, State, tree
from tools.bases import lock as pins
from tools.containers import images
from tools.containers import lock as image_lock
from tools.data import convert, fetch
from tools.machine import lease
from tools.report import pages
from tools.results import record, schema
from tools.scaffold import new as scaffold
from tools.serve.board import stage

FACTS = {"training_digest": "t", "tokens_sha256": "d"}
CARD = "0000:01:00.0"
LEASE = f"run/lock/recipes-{CARD}.lock"
ROWS = [{"prompt": f"What is {n}?", "response": f"It is number {n}."} for n in range(60)]


def quiet(_line: str) -> None:
    pass


def instead(module: object, name: str, value: object) -> None:
    """Have another thing by that name for the rest of the process, which is the piece's own."""
    mock.patch.object(module, name, value).start()


# --- a run's own files --------------------------------------------------------------------------------------------


def tensors(step: int) -> Iterator[tuple[str, Any]]:
    yield "model/a.weight", np.full((3, 4), step, np.float32)
    yield "optimizer/exp_avg/a.weight", np.full((3, 4), -step, np.float32)


def save_step(folder: Path, step: int) -> None:
    """As `Run.save`, in a run that keeps one checkpoint."""
    config = config_for(folder, model__lora={"rank": 4, "alpha": 6.0})
    with disk_errors("write the run's files", folder):
        checkpoint.save(folder / "checkpoints", step, tensors(step), config, FACTS)
        checkpoint.prune(folder / "checkpoints", 1, [], newest=step)


def checkpoints(folder: Path) -> State:
    """Which steps have a checkpoint, each whole, and which one `latest` names, which is there."""
    here = folder / "checkpoints"
    steps = checkpoint.steps_saved(here)
    for step in steps:
        checkpoint.verify(checkpoint.folder_of(here, step))
    found = checkpoint.newest(here)
    assert found is not None, "a checkpoint is there"
    return {**dict.fromkeys(map(str, steps), "whole"), "latest": (here / "latest").read_text()}


def change_manifest(folder: Path) -> None:
    (run,) = (path for path in folder.iterdir() if path.is_dir())
    manifest = Manifest.load(run)
    manifest.exit_reason = "stopped: by hand"
    manifest.save(run)


def end_run(folder: Path) -> None:
    (run,) = (path for path in folder.iterdir() if path.is_dir())
    record_end(Manifest.load(run), run, Console("WARNING"), "done", None)


def log_records(folder: Path) -> None:
    """As a run that goes on: cut back to its checkpoint's step, then three more records, and a checkpoint's sync."""
    path = folder / "metrics.jsonl"
    with disk_errors("write the run's files", folder):
        metrics.cut_back(path, 2, path)
        lines = metrics.JsonLines(path)
        for step in (3, 4, 5):
            lines.write({"step": step, "loss": 1 / step, "text": "é" * 9})
        lines.sync()
        lines.close()


def records(folder: Path) -> State:
    """Each record that can be read: a line that was cut off is none, and is the last."""
    return {f"record {number}": record for number, record in enumerate(metrics.read(folder / "metrics.jsonl"))}


def no_gap(_folder: Path, state: State) -> None:
    assert [record["step"] for record in state.values()] == list(range(1, len(state) + 1))
    assert len(state) >= 2, "what the checkpoint relies on is there"


def some_records(folder: Path) -> None:
    lines = [json.dumps({"step": step, "loss": 1 / step}) for step in (1, 2)]
    (folder / "metrics.jsonl").write_text("\n".join(lines) + "\n")


def take_run(folder: Path) -> None:
    lock = try_lock(folder, "a-run")
    assert lock is not None


def take_board(folder: Path) -> None:
    os.environ["RECIPES_SYSFS_ROOT"] = str(folder)
    with lease.taken([CARD], lease.Owner("n150", os.getpid(), "a-run")):
        print("taken")


def free_run(folder: Path) -> State:
    if not (folder / ".lock").exists():
        return {}
    lock = try_lock(folder)
    assert lock is not None, "the lock outlived its process"
    lock.close()
    return {}


def free_board(folder: Path) -> State:
    with mock.patch.dict(os.environ, {"RECIPES_SYSFS_ROOT": str(folder)}):
        assert lease.free(CARD), "the lease outlived its process"
    return {}


# --- data and bases -----------------------------------------------------------------------------------------------


def write_tokens(folder: Path) -> None:
    rows = [Encoded(np.arange(n, dtype=np.uint32), np.ones(n, np.uint8)) for n in (9, 17, 31)]
    places = {"train": [f"rows.jsonl:{n}" for n in (1, 2, 3)]}
    with disk_errors("write the run's files", folder):
        (folder / "tokens").mkdir(exist_ok=True)
        made = tokens.pack(rows, folder / "tokens")
        tokens.write(folder / "tokens" / "key", {"train": made}, source_key="key", info={"places": places})


def whole_tokens(folder: Path) -> State:
    for path in folder.glob("tokens/*"):
        if not path.name.startswith("."):
            TokenDataset.open(path)
    return tree(folder)


def make_tokenizer(folder: Path) -> None:
    vocabulary.train("char", 64, [Document("a text", "play.txt")], folder / "tokenizers" / "key")


def hub_entry(folder: Path) -> dict[str, Any]:
    files = {path.name: sha256_file(path) for path in sorted((folder / "snapshot").iterdir())}
    facts = {"source": "hub", "repo": "someone/tiny", "revision": "0" * 40, "files": files, "origin": "someone/tiny"}
    return {**facts, "parameters": None, "licence": "MIT", "download_mb": 1}


def hub_copy(folder: Path) -> None:
    (folder / "snapshot").mkdir()
    (folder / "snapshot" / "model.safetensors").write_bytes(bytes(9000))
    (folder / "snapshot" / "config.json").write_text("{}")
    (folder / "home").mkdir()


def at_home(folder: Path) -> None:
    os.environ["RECIPES_HOME"] = str(folder / "home")


def get_base(folder: Path) -> None:
    import huggingface_hub

    at_home(folder)
    instead(huggingface_hub, "snapshot_download", lambda *_, **__: str(folder / "snapshot"))
    lock = folder.parent / "models.lock.yaml"
    lock.write_text(yaml.safe_dump({"format": 1, "bases": {"tiny": hub_entry(folder)}}))
    instead(bases, "LOCK", lock)
    fetch.fetch_base("tiny", quiet)


def whole_bases(folder: Path) -> State:
    for path in folder.glob("home/bases/[!.]*"):
        bases.verify(path, hub_entry(folder))
    return tree(folder)


def old_base(folder: Path) -> None:
    """A base that an earlier version converted."""
    base = folder / "home" / "bases" / "tiny"
    base.mkdir(parents=True)
    (base / "model.safetensors").write_bytes(bytes(900))
    config = {"model_type": "llama", "max_position_embeddings": 64, "rope_parameters": {"rope_theta": 54321.0}}
    (base / "config.json").write_text(json.dumps(config))
    (base / "tokenizer_config.json").write_text('{"chat_template": "x"}')
    (base / "chat_template.jinja").write_text("x")
    record = {"format": 1, "pinned": {}, "sha256": {path.name: sha256_file(path) for path in base.iterdir()}}
    (base / "base.json").write_text(json.dumps(record))


def renew_base(folder: Path) -> None:
    fetch.renew(folder / "home" / "bases" / "tiny", print)


def usable_base(folder: Path) -> State:
    """The renewed files as they are understood; which of them base.json vouches for may change on the way."""
    base = folder / "home/bases/tiny"
    bases.verify(base, {})
    return {name: json.loads((base / name).read_text()) for name in ("config.json", "tokenizer_config.json")}


def get_corpus(folder: Path) -> None:
    at_home(folder)
    entry = {"source": "url", "url": f"file://{folder}/play.txt", "sha256": sha256_file(folder / "play.txt")}
    instead(texts, "locked", lambda: {"play": {**entry, "download_mb": 1}})
    instead(texts, "corpus_folder", lambda name: folder / "home" / "corpora" / f"{name}-key")
    fetch.fetch_corpus("play", quiet)


def a_play(folder: Path) -> None:
    (folder / "play.txt").write_text("FOX.\nA word.\n" * 99)
    (folder / "home").mkdir()


def a_table(folder: Path) -> None:
    lines = ["prompt,response", *(f"{row['prompt']},{row['response']}" for row in ROWS)]
    (folder / "rows.csv").write_text("\n".join(lines) + "\n")


def convert_table(folder: Path) -> None:
    convert.convert(folder / "rows.csv", folder / "rows.jsonl")


# --- what is kept in the repository -------------------------------------------------------------------------------


def a_recipe(folder: Path) -> None:
    recipe = folder / "recipes" / "mine"
    recipe.mkdir(parents=True)
    (recipe / "config.yaml").write_text("# Mine.\nmodel_config: {base: tinyllama-1.1b-chat}\n")
    (recipe / schema.FILE).write_text("# by hand\nformat: 1\nrecipe: mine\nentries: []\n")
    (recipe / bases.OWN_LOCK).write_text("format: 1\nbases:\n  a/b: {source: hub, files: {}}\n")


def record_result(folder: Path) -> None:
    import datetime

    facts = {"board": "cpu", "evidence": "measured", "what": "recipe run mine", "overrides": [], "commit": "0123abc"}
    figures = {"date": datetime.date(2026, 1, 1), "machine": "one core", "loss_at": {1: 2.5}}
    record.write(folder / "recipes" / "mine", {**facts, **figures}, quiet)


def pin_base(folder: Path) -> None:
    entry = {"source": "hub", "repo": "c/d", "revision": "1" * 40, "files": {"model.safetensors": "2" * 64}}
    pins.put(folder / "recipes" / "mine", "c/d", entry, replace=False)


def unpin_base(folder: Path) -> None:
    recipe = folder / "recipes" / "mine"
    if (recipe / bases.OWN_LOCK).exists():
        pins.take_out(recipe, "a/b")


def parent_recipe(folder: Path) -> None:
    import shutil

    shutil.copytree(FINE_TUNE, folder / "recipes" / "parent", ignore=shutil.ignore_patterns("__pycache__"))
    lines = ["prompt,response", *(f"{row['prompt']},{row['response']}" for row in ROWS)]
    (folder / "rows.csv").write_text("\n".join(lines) + "\n")


def new_recipe(folder: Path) -> None:
    from tools import recipes

    instead(recipes, "RECIPES", folder / "recipes")
    at_home(folder)
    own = scaffold.Own(folder / "rows.csv", {}, "auto")
    scaffold.new("mine", "parent", own, quiet)


def image_pins(folder: Path) -> None:
    pinned = json.loads(images.LOCK.read_text())
    for target in pinned["pins"].values():
        target["python"] = dict.fromkeys(target["python"], "0" * 64)
    (folder / "images.lock.json").write_text(json.dumps(pinned))


def renew_image_lock(folder: Path) -> None:
    for module in (images, image_lock):
        instead(module, "LOCK", folder / "images.lock.json")
    for name in ("_follow_tag", "_read_digest", "_hash_openmpi", "_learn"):
        instead(image_lock, name, lambda *_, **__: None)
    image_lock.renew(quiet)


def built_image(folder: Path) -> None:
    (folder / "images.local.json").write_text('{"format": 1, "images": {}}')


def record_image(folder: Path) -> None:
    instead(images, "LOCAL", folder / "images.local.json")
    facts = {"id": "sha256:1", "lock_sha256": "2" * 64, "base": "debian", "commit": "0123abc"}
    images.record_local("cpu", {**facts, "created": "2026-01-01T00:00:00Z"})


# --- what is made of runs -----------------------------------------------------------------------------------------


def write_page(folder: Path) -> None:
    pages.write(folder / "report.html", f"<!doctype html><!-- {pages.OURS} -->{'a run ' * 999}")


def an_export(folder: Path) -> None:
    merged = folder / "export" / "merged"
    merged.mkdir(parents=True)
    (merged / "model.safetensors").write_bytes(bytes(900))
    (merged / stage.GENERATION).write_text(json.dumps({stage.CAP: 9, "eos_token_id": 2}))


def stage_export(folder: Path) -> None:
    stage.stage(folder / "export" / "merged", folder / "serve" / "llama", quiet)


def stage_copies(folder: Path) -> None:
    import errno

    def refused(*_: object, **__: object) -> None:
        raise OSError(errno.EXDEV, "another disk")

    instead(os, "link", refused)
    stage_export(folder)


def ran(folder: Path) -> None:
    """A run whose manifest has all its keys."""
    run = write_run(folder)
    text = json.loads((run / "manifest.json").read_text())
    base = {"name": "tiny", "identity": "1", "origin": "here", "licence": "MIT"}
    facts = {**text, "exit_reason": "running", "config_digest": "1", "base": base}
    (run / "manifest.json").write_text(json.dumps(facts))


def nothing(_folder: Path) -> None:
    pass


PIECES = (
    Piece(
        "checkpoint",
        lambda folder: save_step(folder, 1),
        lambda folder: save_step(folder, 2),
        checkpoints,
        apart=True,
        again=lambda folder: save_step(folder, 3),
    ),
    Piece("manifest", ran, change_manifest),
    Piece("end of a run", ran, end_run),
    Piece(
        "metrics and evaluations",
        some_records,
        log_records,
        records,
        apart=True,
        check=no_gap,
        in_place=("metrics.jsonl",),
    ),
    Piece("lock of a run", nothing, take_run, free_run, harmless=lambda done: done.failed.kind == "close"),
    Piece(
        "lease of a board",
        nothing,
        take_board,
        free_board,
        harmless=lambda done: "taken" in done.screen,
        in_place=(LEASE,),
    ),
    # An unnamed file is made in another way where the first fails, and nothing is lost with its end.
    Piece(
        "token files", nothing, write_tokens, whole_tokens, harmless=lambda done: done.failed.kind in ("open", "close")
    ),
    Piece("tokenizer of a corpus", nothing, make_tokenizer),
    Piece("base from the Hub", hub_copy, get_base, whole_bases),
    Piece(
        "base of an earlier version",
        old_base,
        renew_base,
        usable_base,
        apart=True,
        harmless=lambda done: "cannot be renewed" in done.screen,
    ),
    Piece("corpus", a_play, get_corpus),
    Piece("rows from a table", a_table, convert_table, refused_again=True),
    Piece("results.yaml", a_recipe, record_result),
    Piece("pin of a base", a_recipe, pin_base),
    Piece("pin of a base taken out", a_recipe, unpin_base),
    Piece("image lock", image_pins, renew_image_lock),
    Piece("image built here", built_image, record_image),
    Piece("page of a run", nothing, write_page),
    Piece("export staged for a board", an_export, stage_export),
    Piece("export staged as copies", an_export, stage_copies),
)
# Half a second each time: it looks at its rows as a first run would.
LARGE = (Piece("new recipe", parent_recipe, new_recipe, refused_again=True),)
