"""A recipe of which only the data is wanted: it has no train.py."""

from __future__ import annotations

import json
from pathlib import Path

DATASET = """
from common.data.rows import groups_of, hold_out, read_prompts, read_rows

def splits(config, recipe_dir):
    rows = read_rows(recipe_dir / config.data.source)
    groups = groups_of(rows, config.data.split_by)
    held_out = hold_out(groups, config.data.held_out_share)
    pairs = list(zip(rows, groups))
    return {
        "train": [row for row, group in pairs if group not in held_out],
        "held_out": [row for row, group in pairs if group in held_out],
    }

def prompts(config, recipe_dir):
    return read_prompts(config.eval.prompts, recipe_dir)
"""
CONFIG = """
training_config: {batch_size: 4, learning_rate: 1e-3, max_steps: 2}
model_config: {base: /nowhere}
data_config: {source: rows.jsonl, split_by: topic}
eval_config: {every: 0, prompts: ["What is a fox?"]}
checkpoint_config: {every: 0}
"""


def make_recipe(folder: Path, rows: int = 24, answer: str = "It is number {n}, and a fox knows it.") -> Path:
    folder.mkdir(parents=True, exist_ok=True)
    (folder / "dataset.py").write_text(DATASET)
    (folder / "config.yaml").write_text(CONFIG)
    lines = [
        {"prompt": f"What is number {n}?", "response": answer.format(n=n), "topic": f"t{n // 2}"} for n in range(rows)
    ]
    (folder / "rows.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines))
    return folder
