"""Recipes small enough to be trained in a test: two dozen rows, four answers; or a written text.

The tests have recipes of their own, so that no folder of recipes/ is needed to test the rest of the repository.
"""

from __future__ import annotations

import json
import re
import shutil
from pathlib import Path

OWN = Path(__file__).parent / "recipes"
FINE_TUNE, FROM_SCRATCH = OWN / "fine_tune", OWN / "from_scratch"  # from rows and a base, and from a text and nothing
TOPICS = (
    "gradient",
    "loss",
    "attention",
    "token",
    "batch",
    "epoch",
    "margin",
    "kernel",
    "tree",
    "forest",
    "prior",
    "bias",
)
PROMPTS = [json.loads(line)["prompt"] for line in (FINE_TUNE / "data" / "prompts.jsonl").read_text().splitlines()]


def make_tiny_recipe(folder: Path, base: Path) -> Path:
    """The tests' recipe of rows in `folder`, over the base model in `base`. One step of it takes milliseconds."""
    shutil.copytree(FINE_TUNE, folder, ignore=shutil.ignore_patterns("__pycache__", "results.yaml"))
    settings = {
        "training_config": {
            "seed": 1,
            "batch_size": 4,
            "learning_rate": 0.01,
            "max_steps": 6,
            "precision": "fp32",
        },
        "model_config": {"base": str(base), "lora": {"rank": 4, "alpha": 8}},
        "data_config": {"source": "data/rows.jsonl", "split_by": "topic", "held_out_share": 0.3},
        "eval_config": {"every": 3, "prompts": "data/prompts.jsonl", "max_new_tokens": 8},
        "checkpoint_config": {"every": 2},
        "device_config": {"threads": 1},
    }
    (folder / "config.yaml").write_text(json.dumps(settings, indent=1) + "\n", encoding="utf-8")  # JSON is YAML
    return folder


def without_after_run(folder: Path) -> Path:
    """The recipe in `folder`, whose runs are done when they are trained: no export, no card."""
    path = folder / "train.py"
    path.write_text(re.sub(r"^AFTER_RUN = .*", "AFTER_RUN = ()", path.read_text(), flags=re.MULTILINE))
    return folder


def write_play(path: Path, scenes: int = 60) -> Path:
    """A text of short scenes, 150 characters each, that is no two times the same; return its path."""
    lines = [
        f"SCENE {scene}.\n\nFOX.\nThe {TOPICS[scene % 12]} goes downhill {scene} times,\nand rests.\n\nOWL.\n"
        f"{PROMPTS[scene % 4]} Nobody knows the {TOPICS[scene * 5 % 12]}.\n\n[Exit the {TOPICS[scene * 7 % 12]}.]\n\n"
        for scene in range(scenes)
    ]
    path.write_text("".join(lines), encoding="utf-8")
    return path


def tiny_scratch(corpus: Path) -> tuple[str, ...]:
    """Overrides that make a recipe with random weights small: a written corpus and steps of milliseconds."""
    shape = {
        "vocab_size": 96,
        "hidden_size": 64,
        "intermediate_size": 96,
        "num_hidden_layers": 2,
        "num_attention_heads": 2,
        "num_key_value_heads": 1,
        "max_position_embeddings": 64,
    }
    return (
        f"data_config.corpus={write_play(corpus)}",
        "data_config.tokenizer={type: char}",
        "data_config.max_length=64",
        f"model_config.architecture={json.dumps(shape)}",
        "training_config.batch_size=8",
        "eval_config.prompts=[FOX.]",
        "eval_config.max_rows=4",
    )
