"""Every lint rule: a choice on which it fires, and one beside it on which it does not."""

from __future__ import annotations

from pathlib import Path

import pytest

from common import config as configs
from common import hardware
from tools.launch.lint import lint

SOUND = """\
training_config: {batch_size: 32, learning_rate: 1e-4, max_steps: 100}
model_config: {base: tiny}
data_config: {source: rows.jsonl}
eval_config: {every: 20, prompts: [Hello]}
checkpoint_config: {every: 50}
"""
SHAPE = "vocab_size: 96, hidden_size: 64, intermediate_size: 128, num_hidden_layers: 2, num_attention_heads: 2"
RANDOM = [
    "model_config.init=random",
    "data_config={source: null, corpus: play.txt, max_length: 64}",
    f"model_config.architecture={{{SHAPE}, num_key_value_heads: 1, max_position_embeddings: 64}}",
]
ROUNDING = "training_config.optimizer.stochastic_rounding=true"
FULL = "training_config.optimizer.type=AdamWFullPrecision"

# id: (board, --set that fires), (board, --set that does not)
CASES = {
    "L001": (
        ("cpu", ["training_config.learning_rate=1e-3"]),
        ("cpu", [*RANDOM, "training_config.learning_rate=1e-3"]),
    ),
    "L002": (
        ("cpu", ["training_config.learning_rate=9e-7"]),
        ("cpu", ["training_config.learning_rate=1e-6"]),
    ),
    "L003": (("cpu", ["training_config.max_grad_norm=0"]), ("cpu", ["training_config.max_grad_norm=0.5"])),
    "L004": (
        ("cpu", ["training_config.scheduler.warmup_steps=100"]),
        ("cpu", ["training_config.scheduler.warmup_steps=99"]),
    ),
    "L005": (
        ("cpu", ["training_config.scheduler.type=constant"]),
        ("cpu", ["training_config.scheduler.type=linear"]),
    ),
    "L006": (
        ("cpu", ["eval_config.every=0"]),
        ("cpu", ["eval_config.every=0", "training_config.max_steps=20"]),
    ),
    "L007": (("cpu", ["data_config.held_out_share=0"]), ("cpu", ["data_config.held_out_share=0.01"])),
    "L008": (
        ("cpu", ["checkpoint_config.every=1"]),
        ("cpu", ["checkpoint_config.every=1", "training_config.max_steps=4"]),
    ),
    "L009": (
        ("cpu", ["checkpoint_config.keep_best=true", "eval_config.every=0"]),
        ("cpu", ["checkpoint_config.keep_best=true"]),
    ),
    "L010": (("n150", []), ("n150", [FULL])),
    "L011": (("n300", [ROUNDING]), ("n150", [ROUNDING])),
    "L012": (("cpu", ["training_config.batch_size=16"]), ("galaxy", [])),
    "L013": (("p100", []), ("n150", [])),
    "L014": (("n150", [*RANDOM, "model_config.architecture.intermediate_size=100"]), ("n150", RANDOM)),
    "L015": (
        ("cpu", ["eval_config.top_k=5"]),
        ("cpu", ["eval_config.top_k=5", "eval_config.temperature=0.7"]),
    ),
    "L016": (
        ("cpu", ["logging_config.use_wandb=true", "logging_config.wandb_mode=online"]),
        ("cpu", ["logging_config.use_wandb=true"]),
    ),
    "L017": (("cpu", ["data_config.control=permuted_responses"]), ("cpu", ["data_config.control=none"])),
}


@pytest.fixture
def ids(tmp_path: Path):
    """The ids of the findings for a board and some --set; p100's overlay changes the learning rate."""
    folder = tmp_path / "demo"
    (folder / "hw").mkdir(parents=True)
    (folder / "config.yaml").write_text(SOUND)
    (folder / "hw/p100.yaml").write_text("training_config: {learning_rate: 2e-4}\n")
    (folder / "hw/cpu-x2.yaml").write_text("training_config: {batch_size: 8}\n")

    def run(board: str, overrides: list[str]) -> set[str]:
        hw = hardware.get(board)
        return {line.partition(":")[0] for line in lint(configs.load(folder, hw, overrides), hw)}

    run.folder = folder  # type: ignore[attr-defined]
    return run


def test_a_sound_recipe_has_no_findings(ids):
    assert ids("cpu", []) == set()
    assert ids("n150", [ROUNDING]) == ids("n300", [FULL]) == set()


@pytest.mark.parametrize("name", CASES)
def test_rule_fires_and_does_not(name, ids):
    bad, good = CASES[name]
    assert name in ids(*bad)
    assert name not in ids(*good)


def test_the_cpu_overlay_may_choose_its_batch_but_a_set_is_told(ids):
    assert "L012" not in ids("cpu-x2", [])
    assert "L012" in ids("cpu", ["training_config.batch_size=8"])
    assert "L012" not in ids("cpu", ["training_config.micro_batch_size=2"])


def test_findings_come_by_id_with_their_key_and_the_line_of_the_overlay(ids):
    hw = hardware.get("p100")
    found = lint(configs.load(ids.folder, hw, ["training_config.max_grad_norm=0"]), hw)
    assert [line.split(": ")[:2] for line in found[:2]] == [
        ["L003", "training_config.max_grad_norm"],
        ["L010", "training_config.optimizer.stochastic_rounding"],
    ]
    assert "p100.yaml:1" in found[2]
