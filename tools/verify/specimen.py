"""A run of seconds on any CPU, made in a temporary folder: what `verify calibrate` plants its defects in."""

from __future__ import annotations

import contextlib
import io
import json
import os
import shutil
import tempfile
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from common.data.tokens import Batch
from common.files import sha256_file, write_json
from common.model.weights import SafetensorsWriter, Weights
from common.train import checkpoint
from common.train.run import open_run
from tools.launch.after_run import after_run
from tools.launch.resolve import resolve
from tools.recipes import load_dataset
from tools.verify.tiny_base import write_tiny_base

STEPS = 6  # with a checkpoint every third one, so that there is an older one to be mistaken for the newest
TOPICS = ("gradient", "loss", "attention", "token", "batch", "epoch", "margin", "kernel", "tree", "forest")
BUILDER = '''"""The rows of the file, five of its topics held out."""

from common.data.rows import read_prompts, read_rows

HELD_OUT = ("gradient", "loss", "token", "batch", "margin")


def splits(config, recipe_dir):
    found = {"train": [], "held_out": []}
    for row in read_rows(recipe_dir / config.data.source):
        found["held_out" if row.extra["topic"] in HELD_OUT else "train"].append(row)
    return found


def prompts(config, recipe_dir):
    return read_prompts(config.eval.prompts, recipe_dir)
'''


@dataclass(frozen=True)
class Specimen:
    """A recipe over a tiny base, and a sound run of it."""

    root: Path
    sound: Path

    def again(self, spoil: Callable[[Batch], Batch] = lambda batch: batch, *overrides: str) -> Path:
        """Train another run, every batch of which goes through `spoil` on its way to the engine; without an export."""
        return train(self.root, spoil, overrides, export=False)

    def copy(self) -> Path:
        """Copy the sound run, to be damaged."""
        return Path(shutil.copytree(self.sound, Path(tempfile.mkdtemp(dir=self.root)) / "run"))


@contextlib.contextmanager
def specimen() -> Iterator[Specimen]:
    """Yield a new specimen; its folder, token files included, is deleted afterwards."""
    with tempfile.TemporaryDirectory(prefix="recipes-calibrate-") as scratch:
        root, home = Path(scratch), os.environ.get("RECIPES_HOME")
        os.environ["RECIPES_HOME"] = str(root / "home")
        try:
            write_recipe(root / "specimen", write_tiny_base(root / "base"))
            yield Specimen(root, train(root, lambda batch: batch, (), export=True))
        finally:
            os.environ.pop("RECIPES_HOME")
            os.environ.update({} if home is None else {"RECIPES_HOME": home})


def write_recipe(folder: Path, base: Path) -> None:
    """Write rows of ten topics in two wordings; in leaky.jsonl one prompt of each topic is in all of them."""
    rows = [
        {
            "topic": topic,
            "prompt": f"What does {ask} {topic} do?",
            "response": f"The {topic} of {ask} fox steps downhill, " + "again and " * number + "then rests.",
        }
        for number, topic in enumerate(TOPICS)
        for ask in ("a", "the old")
    ]
    leaky = [
        row | {"prompt": "Who knows the fox?"} if row["prompt"].startswith("What does a ") else row for row in rows
    ]
    config = {
        "training_config": {"seed": 1, "batch_size": 4, "learning_rate": 0.01, "max_steps": STEPS, "precision": "fp32"},
        "model_config": {"base": str(base), "lora": {"rank": 4, "alpha": 8}},
        "data_config": {"source": "rows.jsonl"},
        "eval_config": {"every": 3, "prompts": ["Why does it rest?"], "max_new_tokens": 2},
        "checkpoint_config": {"every": 3},
        "device_config": {"threads": 1},
    }
    folder.mkdir()
    for name, lines in (("rows.jsonl", rows), ("leaky.jsonl", leaky)):
        (folder / name).write_text("".join(json.dumps(line) + "\n" for line in lines), encoding="utf-8")
    write_json(folder / "config.yaml", config)  # JSON is YAML
    (folder / "dataset.py").write_text(BUILDER, encoding="utf-8")


def train(root: Path, spoil: Callable[[Batch], Batch], overrides: tuple[str, ...], *, export: bool) -> Path:
    """Train with the loop of the recipes, silent; return the run's folder."""
    out = Path(tempfile.mkdtemp(dir=root))
    launch = resolve(root / "specimen", hw="cpu", overrides=overrides, resume="never", out=out)
    with contextlib.redirect_stdout(io.StringIO()), open_run(launch, *load_dataset(launch.recipe_dir)) as run:
        config, rows = run.config, run.dataset.train
        run.evaluate(step=0)
        for step in run.steps():
            batch = spoil(rows.batch(step, config.training.seed, config.training.batch_size))
            run.record(step, run.backend.train_step([batch], run.learning_rate(step), step))
            if run.evaluation_due(step):
                run.evaluate(step)
            if run.checkpoint_due(step):
                run.save(step)
        run.finish()
    with contextlib.redirect_stdout(io.StringIO()):
        after_run(run.folder, ("export",) if export else ())
    return run.folder


# --- damage -----------------------------------------------------------------------------------------------------------


def newest_checkpoint(run: Path) -> Path:
    return checkpoint.folder_of(run / "checkpoints", STEPS)


def edit_tensors(path: Path, change: Callable[[dict[str, Any]], None]) -> None:
    """Write a safetensors file again with its tensors changed, and its new hash where its old one stands."""
    weights = Weights([path])
    tensors = {name: weights[name].copy() for name in weights}
    change(tensors)
    with SafetensorsWriter(path, {"format": "pt"}) as file:
        for name, array in tensors.items():
            file.add(name, array)
    rehash(path)


def rehash(path: Path) -> None:
    """Put a file's sha256 into state.json or export.json: the defect is then not seen by its hash."""
    for record in (path.parent / "state.json", path.parent.parent / "export.json"):
        if record.is_file():
            values = json.loads(record.read_text(encoding="utf-8"))
            name = str(path.relative_to(record.parent))
            values["sha256"][name] = sha256_file(path)
            write_json(record, values)
