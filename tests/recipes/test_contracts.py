"""Every recipe keeps every contract, and each contract can be broken."""

from __future__ import annotations

import math
import shutil
from collections.abc import Callable
from pathlib import Path

import pytest

from common.model import llama
from tests.doubles.tiny_recipe import FINE_TUNE, FROM_SCRATCH
from tests.recipes import contracts
from tests.recipes.contracts import CONTRACTS, Broken, hold, layers
from tests.support.shipped import FOLDERS


@pytest.mark.parametrize("contract", CONTRACTS, ids=lambda contract: contract.__name__)
@pytest.mark.parametrize("recipe", FOLDERS, ids=lambda path: path.name)
def test_a_recipe_keeps_it(recipe, contract):
    hold(contract, recipe)


@pytest.mark.parametrize("recipe", FOLDERS, ids=lambda path: path.name)
def test_the_models_of_its_presets_are_built_with_these_tensors(recipe):
    torch = pytest.importorskip("torch", reason="it builds the models that are counted")
    from transformers import LlamaConfig, LlamaForCausalLM

    for shape in filter(None, (layer.get("model_config.architecture") for _, layer in layers(recipe))):
        with torch.device("meta"):
            model = LlamaForCausalLM(LlamaConfig.from_dict(llama.hf_config(shape)))
        built = {name: tuple(parameter.shape) for name, parameter in model.named_parameters()}
        assert built == llama.shapes(shape)
        assert sum(math.prod(size) for size in built.values()) == llama.parameters(shape)


# --- what is caught ---------------------------------------------------------------------------------------------------


def edit(name: str, old: str, new: str) -> Callable[[Path], None]:
    def plant(recipe: Path) -> None:
        path = recipe / name
        text = path.read_text() if path.exists() else ""
        assert old in text
        path.parent.mkdir(exist_ok=True)
        path.write_text(text.replace(old, new, 1) if old else text + new)

    return plant


EVALUATION = "            if run.evaluation_due(step):\n                run.evaluate(step)\n"
ROWS, TEXT = (FINE_TUNE, "fine_tune"), (FROM_SCRATCH, "from_scratch")
DEFECTS = [
    ("folder", ROWS, edit("config.yaml", "# The rows", "#The rows"), "config.yaml:1"),
    ("folder", ROWS, lambda recipe: (recipe / "dataset.py").unlink(), "dataset.py missing"),
    ("folder", ROWS, edit("results.yaml", "recipe: fine_tune", "recipe: another"), "recipe: fine_tune"),
    ("readme", ROWS, edit("README.md", "# fine_tune", "# another"), "the title is not"),
    (
        "readme",
        ROWS,
        edit("README.md", "recipes/fine_tune", "recipes/from_scratch"),
        "no command in it runs",
    ),
    ("readme", ROWS, edit("README.md", "recipe run tests", "recipe run\nmake nothing-at-all tests"), "No rule to make"),
    ("readme", ROWS, edit("README.md", "| status |", "| |"), "`| status |`"),
    ("licence", ROWS, edit("README.md", "License:", "By"), "nothing names a licence of data/rows.jsonl"),
    ("licence", TEXT, edit("config.yaml", "corpus: shakespeare", "corpus: data/play.txt"), "licence of data/play.txt"),
    ("independent", ROWS, edit("dataset.py", "", "from from_scratch import dataset\n"), "imports the recipe"),
    ("independent", ROWS, edit("dataset.py", "", "from recipes import a\n"), "a recipe imports `common`"),
    ("independent", ROWS, edit("dataset.py", "", "from .other import a\n"), "imports relatively"),
    ("independent", ROWS, edit("train.py", "from .dataset", "from ..from_scratch.dataset"), "imports relatively"),
    ("independent", ROWS, edit("dataset.py", "", "from tools.data import convert\n"), "a recipe imports `common`"),
    ("independent", ROWS, edit("train.py", "", "import numpy\n"), "train.py imports `common` and its own dataset"),
    ("independent", ROWS, edit("train.py", "", "import importlib.util\n"), "and that plainly"),
    ("independent", ROWS, edit("dataset.py", "", "import torch\n"), "which a board's image does not have"),
    ("independent", ROWS, edit("dataset.py", "", "x = Path('../from_scratch/dataset.py')\n"), "reaches for"),
    ("independent", ROWS, edit("dataset.py", "", "x = Path(__file__).parents[1] / 'from_scratch'\n"), "reaches for"),
    ("independent", ROWS, edit("config.yaml", "data/rows.jsonl", "../rows.jsonl"), "data_config.source is outside"),
    (
        "independent",
        ROWS,
        edit("hw/n150.yaml", "", "eval_config: {prompts: /x.jsonl}"),
        "eval_config.prompts is outside",
    ),
    ("loop", ROWS, edit("train.py", EVALUATION, ""), "its loop never calls evaluate"),
    ("loop", ROWS, edit("train.py", "run.save(step)", "pass"), "its loop never calls save"),
    ("loop", ROWS, edit("train.py", "run.evaluate(step=0)", "pass"), "around its loop it never calls evaluate"),
    (
        "loop",
        ROWS,
        edit("train.py", "run.finish()", "run.finish()\n        run.save(1)"),
        "does not end with run.finish()",
    ),
    ("loop", ROWS, edit("train.py", '"export"', '"never_moved"'), "nobody else can load"),
    ("loop", ROWS, edit("train.py", '"before_after"', '"card"'), "no step after a run is called 'card'"),
    ("loop", ROWS, edit("train.py", "in run.steps()", "in range(9)"), "no loop `for step in run.steps"),
    ("schema", ROWS, edit("config.yaml", "num_epochs:", "num_epoch:"), "did you mean num_epochs"),
    ("schema", ROWS, edit("hw/galaxy.yaml", "", "training_config: {lr: 1e-3}"), "hw/galaxy.yaml:1: training_config.lr"),
    ("schema", TEXT, edit("presets/tall.yaml", "", "model_config: {architecture: {layers: 3}}"), "presets/tall.yaml:1"),
    ("schema", ROWS, edit("hw/cpu.yaml", "", "device_config: {mesh_shape: [1, 3]}"), "does not resolve on a CPU"),
    ("dry_runs", ROWS, edit("hw/t3k.yaml", "", "eval_config: {every: never}"), "valid integer"),
    ("counted", TEXT, edit("presets/small.yaml", "5,180,672", "5,000,000"), "`# 5,180,672 parameters`"),
    ("counted", TEXT, edit("presets/small.yaml", "attention_heads: 4", "attention_heads: 16"), "heads of 16"),
    ("overlays", ROWS, edit("hw/n150.yaml", "", "training_config: {seed: 1}"), "n150.yaml:1: training_config.seed"),
    ("overlays", ROWS, edit("hw/cpu.yaml", "", "training_config: {num_epochs: 3}"), "changes nothing on cpu, cpu-x2"),
]


def test_an_overlay_may_restate_the_recipe_where_it_says_why(tmp_path):
    recipe = shutil.copytree(FINE_TUNE, tmp_path / "fine_tune")
    edit("hw/n150.yaml", "", "training_config:\n  seed: 1  # whatever the recipe's becomes\n")(recipe)
    hold(contracts.overlays, recipe)


@pytest.mark.parametrize(
    ("name", "sound", "plant", "says"), DEFECTS, ids=[f"{name}: {says}" for name, _, _, says in DEFECTS]
)
def test_a_planted_defect_breaks_its_contract(tmp_path, name, sound, plant, says):
    for path, kept in (ROWS, TEXT):
        shutil.copytree(path, tmp_path / kept, ignore=shutil.ignore_patterns("__pycache__"))
    recipe = tmp_path / sound[1]
    contract = getattr(contracts, name)
    hold(contract, recipe)
    plant(recipe)
    with pytest.raises(Broken) as broken:
        hold(contract, recipe)
    assert f"{recipe.name} breaks the contract {name!r}" in str(broken.value)
    assert says in str(broken.value)
