"""The recipes through the real command on boards that are not there: device files and the ttml double.

This shows that the same train scripts, configs, data and files reach the engine for boards and come back from it. It
shows nothing about a card.
"""

from __future__ import annotations

import contextlib
import json
import os
import subprocess
import sys
from collections.abc import Callable
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest

pytest.importorskip("torch", reason="the double computes with torch")

from common import config as configs
from common import hardware
from common import recipe as recipes
from common.model.weights import Weights
from common.train import checkpoint, metrics
from common.train.checkpoint import read_tensors
from engines.ttml.engine import TTML
from tests.doubles.machines import MACHINES, fake_machine
from tests.doubles.tiny_recipe import FROM_SCRATCH, make_tiny_recipe, tiny_scratch
from tests.support import boards
from tests.support.boards import DESCRIPTOR, TIES, machine
from tests.support.no_torch import run_without_torch
from tests.support.runs import folders, log, manifest, outcome
from tests.support.shipped import FOLDERS, that_name
from tools.cli import main
from tools.launch.resolve import resolve
from tools.verify.tiny_base import write_tiny_base

ROOT = Path(__file__).resolve().parents[2]
HERE = "tests/runs/test_boards.py"
SCRATCH = str(FROM_SCRATCH)
CURVE = 1e-3  # of the loss: how far a board's may be from the twin's in bf16, at any of 20 steps
QUICK = ("eval_config.every=0", "eval_config.max_new_tokens=2", "checkpoint_config.every=2", "device_config.threads=1")


@dataclass(frozen=True)
class Ended:
    """How a command ended, and what it printed."""

    code: int
    screen: str


Run = Callable[..., Ended]


@pytest.fixture(scope="module")
def base(tmp_path_factory) -> Path:
    return write_tiny_base(tmp_path_factory.mktemp("base") / "tiny", context=512)


@pytest.fixture
def run(tmp_path, monkeypatch, capsys) -> Run:
    """`recipe run`, in this process, on a faked machine with that board; the double stands for ttml."""
    monkeypatch.setenv("RECIPES_HOME", str(tmp_path / "home"))
    monkeypatch.setattr(os, "fsync", lambda descriptor: None)  # no test pulls the plug, and the disk is slow

    def command(name: str, hw: str, *options: str, generation: str = "C", **faults: Any) -> Ended:
        words = ["recipe", "run", name, "--hw", hw, "--no-container", "--out", str(tmp_path / "runs"), *options]
        monkeypatch.setattr(sys, "argv", words)
        root = tmp_path / hw
        if hw in MACHINES and not root.is_dir():
            fake_machine(root, MACHINES[hw])
        monkeypatch.setenv("RECIPES_SYSFS_ROOT", str(root))
        here = machine(tmp_path, {"n300": 2}.get(hw, 1), generation, **faults)
        with here if hw in MACHINES else contextlib.nullcontext(), pytest.raises(SystemExit) as ended:
            main.main()
        said = capsys.readouterr()
        return Ended(int(ended.value.code or 0), said.out + said.err)

    return command


def sets(*overrides: str) -> list[str]:
    return [word for override in overrides for word in ("--set", override)]


def ended(done: Ended, code: int = 0) -> str:
    assert done.code == code, done.screen
    assert "Traceback" not in done.screen
    return done.screen


@pytest.mark.parametrize(
    ("recipe", "hw"), [pytest.param(*found, id=f"{found[0].name}-{found[1]}") for found in that_name(HERE)]
)
def test_a_recipe_whose_results_name_this_file_trains_resumes_and_exports(run, base, tmp_path, recipe, hw):
    from_rows = configs.load(recipe, hardware.get(hw)).model.base
    small = (f"model_config.base={base}", "data_config.max_length=64") if from_rows else tiny_scratch(tmp_path / "play")
    generation = {"n150": "B", "n300": "C"}[hw]
    ended(run(recipe.name, hw, "--steps", "4", "--stop-at", "2", *sets(*QUICK, *small), generation=generation), 75)
    screen = ended(run(recipe.name, hw, "--steps", "4", *sets(*QUICK, *small), generation=generation))
    (folder,) = folders(tmp_path / "runs")
    values = manifest(folder)
    assert "resuming" in screen
    assert values["exit_reason"] == "done"
    assert values["backend"]["backend"] == "ttml"
    assert values["backend"]["world"] == {"n150": 1, "n300": 2}[hw]
    assert values["backend"]["precision"] == "bf16"
    assert [r["step"] for r in metrics.read(folder / "metrics.jsonl") if "loss" in r] == [1, 2, 3, 4]
    assert values["export"]["status"] == "verified", values["export"]
    if hw == "n300":
        assert "replicas: the same bits on 2 devices after step" in log(folder)
        assert json.loads((folder / "checkpoints/step-00000004/state.json").read_text())["replica"] == "the first of 2"


@pytest.mark.slow  # twelve runs of 20 steps, and the twin's
@pytest.mark.parametrize("generation", ["B", "C"], ids=["unfused, raw weights", "fused"])
@pytest.mark.parametrize("hw", ["n150", "n300"])
@pytest.mark.parametrize("recipe", FOLDERS, ids=lambda folder: folder.name)
def test_a_recipe_as_it_is_shipped_trains_every_tensor_along_the_cpu_twin_s_curve(
    run, base, tmp_path, recipe, hw, generation
):
    """Nothing is changed but the sizes: 20 steps of a tiny model. Adapters are tied as each build ties them.

    Norms may stand still: at 1, an update below half a bf16 step is lost; that is said.
    """
    small = tiny_scratch(tmp_path / "play")
    if configs.load(recipe, hardware.get(hw)).model.base:
        small = (f"model_config.base={base}", "data_config.max_length=64")
    quick = sets(*QUICK, "checkpoint_config.keep_best=false", *small)
    screen = ended(run(recipe.name, hw, "--steps", "20", *quick, generation=generation))
    (folder,) = folders(tmp_path / "runs")
    still = manifest(folder)["never_moved"]
    assert all("norm" in name for name in still), still
    assert ("never moved, of" in screen) == bool(still)

    launch = resolve(recipe, hw="cpu", steps=20, out=tmp_path / "twin", resume="never")
    on_cpu = {"hw": "cpu", "device.mesh_shape": (1, 1), "device.enable_ddp": False}
    config = configs.load_resolved(folder / "config.resolved.yaml").with_values(**on_cpu)
    recipes.load(recipe, "train").train(replace(launch, config=config))
    (twin,) = folders(tmp_path / "twin")
    assert manifest(twin)["training_digest"] == manifest(folder)["training_digest"]
    expected, found = ([r["loss"] for r in metrics.read(f / "metrics.jsonl") if "loss" in r] for f in (twin, folder))
    gap = max(abs(a / b - 1) for a, b in zip(found, expected, strict=True))
    print(f"{recipe.name} {hw} {generation}: largest gap {gap:.3%}, still {len(still)}")
    assert gap < CURVE
    assert found[-1] < found[0] - 0.1, "it does learn"


@pytest.mark.parametrize("generation", ["B", "C"])
def test_random_weights_train_and_are_exported(run, tmp_path, generation):
    small = sets(*QUICK, *tiny_scratch(tmp_path / "play.txt"))
    ended(run(SCRATCH, "n150", "--steps", "4", *small, generation=generation))
    (folder,) = folders(tmp_path / "runs")
    first = metrics.read(folder / "metrics.jsonl")[1]
    assert first["step"] == 1
    assert first["loss"] == pytest.approx(4.6, abs=0.6), "the gate of random weights was passed: ln 96 = 4.56"
    assert manifest(folder)["export"]["status"] == "verified"
    assert "ttml.close_device_mesh" in manifest(folder)["backend"]["versions"]["ttml"]


@pytest.mark.parametrize("generation", ["B", "C"])
@pytest.mark.parametrize(("first", "then"), [("n150", "cpu"), ("cpu", "n150")])
def test_a_checkpoint_of_one_engine_goes_on_in_the_other(run, tiny_base, tmp_path, first, then, generation):
    """The twin ties as newer builds do, or as the run that it goes on with; for another build its groups are named."""
    recipe = make_tiny_recipe(tmp_path / "tiny", tiny_base)
    same = sets("training_config.precision=bf16", "training_config.learning_rate=1e-3", "eval_config.max_new_tokens=2")
    named = {"cpu": sets(f"model_config.lora.tie_groups={json.dumps(TIES['B'])}") if generation == "B" else []}

    def command(hw: str, *options: str) -> Ended:
        return run(str(recipe), hw, *same, *named.get(hw, []), *options, generation=generation)

    ended(command(first, "--stop-at", "2"), 75)
    (parent,) = folders(tmp_path / "runs")
    if generation == "B":
        tied = sets(f"model_config.lora.tie_groups={json.dumps(TIES['C'])}")
        other = run(str(recipe), "cpu", *same, *tied, "--resume", str(parent))
        assert "another training: model_config.lora.tie_groups: " in ended(other, 2)
    # The twin takes the groups of the run that it goes on with; a board has those of its build.
    screen = ended(run(str(recipe), then, *same, "--resume", str(parent), generation=generation))
    child = next(folder for folder in folders(tmp_path / "runs") if folder != parent)
    assert manifest(child)["parent"] == f"{parent.name}/step-00000002"
    assert "changed: backend: " in screen
    assert "not bit-exact from here" in screen
    records = [r for r in metrics.read(child / "metrics.jsonl") if "loss" in r]
    assert [record["step"] for record in records] == [1, 2, 3, 4, 5, 6]
    whole = ended(command(then, "--resume", "never"))
    assert whole
    unbroken = max(folders(tmp_path / "runs"), key=lambda folder: (folder / "manifest.json").stat().st_mtime_ns)
    own = [r["loss"] for r in metrics.read(unbroken / "metrics.jsonl") if "loss" in r]
    # bf16 weights, moments and logits: two engines' losses differ by a few steps of 2^-8 of themselves
    assert [r["loss"] for r in records] == pytest.approx(own, rel=4 * 2**-8)
    assert set(read_tensors(checkpoint.folder_of(child / "checkpoints", 6))) == set(
        read_tensors(checkpoint.folder_of(unbroken / "checkpoints", 6))
    )


def test_two_devices_and_one_train_the_same(run, tmp_path):
    small = sets(*QUICK, *tiny_scratch(tmp_path / "play.txt"))
    full = sets("training_config.optimizer.type=AdamWFullPrecision")
    losses = {}
    for hw in ("n150", "n300"):
        ended(run(SCRATCH, hw, "--steps", "4", "--resume", "never", *small, *full))
        newest = max(folders(tmp_path / "runs"), key=lambda folder: (folder / "manifest.json").stat().st_mtime_ns)
        assert manifest(newest)["hw"] == hw
        losses[hw] = [record["loss"] for record in outcome(newest)["metrics"] if "loss" in record]
    assert losses["n300"] == pytest.approx(losses["n150"], rel=2**-8)


@pytest.mark.parametrize("generation", ["B", "C"])
def test_adapters_share_what_the_build_fuses_unless_the_config_names_it(run, tiny_base, tmp_path, generation):
    """The groups are in the run's config, as its digest sees them; the adapter that leaves is PEFT's in any case."""
    recipe = make_tiny_recipe(tmp_path / "tiny", tiny_base)
    small = sets(*QUICK, "training_config.precision=bf16")
    screen = ended(run(str(recipe), "n150", "--stop-at", "2", *small, generation=generation), 75)
    assert f"tie_groups: build is {TIES[generation]}, of this build of ttml, whose layers are attention/" in screen
    (folder,) = folders(tmp_path / "runs")
    resolved = configs.load_resolved(folder / "config.resolved.yaml")
    assert resolved.model.lora is not None
    assert resolved.model.lora.tie_groups == TIES[generation]
    named = f"model_config.lora.tie_groups={json.dumps(TIES[generation])}"
    assert "resuming" in ended(run(str(recipe), "n150", *small, *sets(named), generation=generation)), (
        "the same training"
    )
    assert folders(tmp_path / "runs") == [folder]
    assert manifest(folder)["export"]["status"] == "verified"
    adapter = dict(Weights([folder / "export/adapter/adapter_model.safetensors"]))
    assert len(adapter) == 2 * 7 * 2, "A and B of seven projections in two blocks"
    shared = [adapter[f"base_model.model.model.layers.0.self_attn.{name}_proj.lora_A.weight"] for name in "qkv"]
    assert np.array_equal(shared[1], shared[2])
    assert np.array_equal(shared[0], shared[1]) == (generation == "C")


@pytest.mark.parametrize(("hw", "generation", "groups"), [("n150", "B", TIES["C"]), ("n300", "C", TIES["B"])])
def test_groups_that_the_build_has_not_are_refused_before_the_run_has_a_folder(
    run, tiny_base, tmp_path, hw, generation, groups
):
    recipe = make_tiny_recipe(tmp_path / "tiny", tiny_base)
    named = sets(*QUICK, "training_config.precision=bf16", f"model_config.lora.tie_groups={json.dumps(groups)}")
    said = ended(run(str(recipe), hw, *named, "--set", "data_config.source=nowhere.jsonl", generation=generation), 2)
    assert f"one adapter for each of {TIES[generation]}" in said
    assert f"tie_groups is {groups}" in said
    assert "nowhere.jsonl" not in said, "the data was not looked at"
    assert not folders(tmp_path / "runs")


@pytest.mark.parametrize("hw", ["n150", "n300"])
def test_adapters_that_a_build_ignores_end_the_run_after_its_first_step(run, tiny_base, tmp_path, monkeypatch, hw):
    """A build that hands the weights of the MLP's layers to one op, and an engine that lets it."""
    monkeypatch.setattr(TTML, "_call_mlp_layers", lambda self: None)
    recipe = make_tiny_recipe(tmp_path / "tiny", tiny_base)
    small = sets(
        *QUICK,
        "training_config.precision=bf16",
    )
    said = ended(run(str(recipe), hw, *small, generation="B"), 5)
    assert "no gradient reaches 12 trained tensors" in said
    assert "model.layers.0.mlp.gate_proj.lora_A" in said
    assert "step 1, which is not saved" in said
    (folder,) = folders(tmp_path / "runs")
    assert manifest(folder)["exit_reason"].startswith("failed: no gradient reaches 12 trained tensors")
    assert not checkpoint.steps_saved(folder / "checkpoints")


# --- what is refused, before data is touched ------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("hw", "faults", "texts"),
    [
        ("n150", {"impostor": True}, ("another package of that name", "pip uninstall ttml")),
        ("n150", {"bad_cast": True}, ("were built apart", "build_metal.sh --build-tt-train")),
        ("n150", {"needs_runtime_root": True}, ("does not know its own folder", "TT_METAL_RUNTIME_ROOT")),
        ("n150", {"without": ["sync_gradients"]}, ("older than the recipes need", "ttml.sync_gradients")),
    ],
)
def test_a_ttml_that_cannot_train_is_refused_before_the_data(run, tmp_path, hw, faults, texts):
    said = ended(run(SCRATCH, hw, *sets(*QUICK, "data_config.corpus=nowhere.txt"), **faults), 4)
    for text in texts:
        assert text in said
    assert "nowhere.txt" not in said, "the data was not looked at"
    assert not folders(tmp_path / "runs")


def test_no_ttml_at_all_says_where_it_is(tmp_path):
    """In a process of its own, where nothing stands for ttml."""
    values = os.environ | {"RECIPES_SYSFS_ROOT": str(fake_machine(tmp_path / "n150", MACHINES["n150"]))}
    command = [
        sys.executable,
        "-m",
        "tools.cli",
        "run",
        SCRATCH,
        "--hw",
        "n150",
        "--no-container",
        "--out",
        str(tmp_path),
    ]
    done = subprocess.run(command, cwd=ROOT, env=values, capture_output=True, text=True, check=False)
    said = ended(Ended(done.returncode, done.stdout + done.stderr), 4)
    assert "is not in this environment" in said
    assert "build_metal.sh --build-tt-train" in said


@pytest.mark.parametrize("verb", ["run", "plan"])
def test_a_head_too_wide_for_the_kernels_is_refused_before_the_corpus_is_there(tmp_path, monkeypatch, capsys, verb):
    """The pinned corpus is not on this machine, and neither is a board."""
    monkeypatch.setenv("RECIPES_HOME", str(tmp_path / "home"))
    shape = "model_config.architecture={hidden_size: 640, num_attention_heads: 4, num_key_value_heads: 2}"
    words = ["recipe", verb, SCRATCH, "--hw", "n150", *sets("data_config.corpus=shakespeare", shape)]
    monkeypatch.setattr(sys, "argv", words + ["--dry-run"] * (verb == "run"))
    with pytest.raises(SystemExit) as stopped:
        main.main()
    assert stopped.value.code == 4
    said = capsys.readouterr().err
    assert "head_dim 160 is above 128, where its RoPE with fp32 accumulation stops" in said
    assert "HW=cpu" in said
    assert not (tmp_path / "home").exists()


def test_a_descriptor_of_another_mesh_is_refused(run, tmp_path, monkeypatch):
    monkeypatch.setitem(vars(boards), "DESCRIPTOR", DESCRIPTOR.replace("{devices}", "4"))
    assert "dims [1, 4], the mesh is [1, 2]: training would hang" in ended(run(SCRATCH, "n300", *sets(*QUICK)), 4)


def test_a_busy_device_ends_the_run_with_4_and_its_cure(run, tmp_path):
    small = sets(*QUICK, *tiny_scratch(tmp_path / "play.txt"))
    said = ended(run(SCRATCH, "n150", "--steps", "2", *small, busy=True), 4)
    assert "another process holds the device" in said
    assert "failed: another process" in manifest(folders(tmp_path / "runs")[0])["exit_reason"]


def test_no_memory_in_a_step_ends_the_run_with_5_and_keeps_what_was_saved(run, tmp_path):
    small = sets(*QUICK, *tiny_scratch(tmp_path / "play.txt"))
    said = ended(run(SCRATCH, "n150", "--steps", "4", *small, oom_at_step=3), 5)
    assert "the device has no memory left" in said
    assert "halve training_config.micro_batch_size" in said
    assert outcome(folders(tmp_path / "runs")[0])["step"] == 2


def test_a_precision_that_boards_do_not_have_is_a_mistake_of_the_config(run):
    said = ended(run(SCRATCH, "n150", *sets(*QUICK, "training_config.precision=fp32")), 2)
    assert "n150 trains in bf16, not in fp32" in said


WITHOUT_TORCH = """
import importlib.util, json, os
from pathlib import Path

find_spec = importlib.util.find_spec
importlib.util.find_spec = lambda name, *rest: None if name.partition(".")[0] in HEAVY else find_spec(name, *rest)

from tools.verify.tiny_base import write_tiny_base
from tests.doubles.tiny_recipe import FROM_SCRATCH, make_tiny_recipe, tiny_scratch
from tools.launch.after_run import train_here
from tools.launch.resolve import resolve
from tests.doubles.machines import fake_machine

folder, recipe = Path(sys.argv[1]), FROM_SCRATCH
os.environ.update(RECIPES_HOME=str(folder / "home"), RECIPES_SYSFS_ROOT=str(fake_machine(folder / "n150", ["n150"])))
small = ["training_config.precision=bf16", "eval_config.every=0", "eval_config.max_new_tokens=2"]
if sys.argv[2] == "from_scratch":
    small += tiny_scratch(folder / "play.txt")
else:
    recipe = make_tiny_recipe(folder / "tiny", write_tiny_base(folder / "base"))
train_here(resolve(recipe, hw="n150", overrides=tuple(small), steps=2, out=folder / "runs"))
(path,) = (folder / "runs").glob("*/manifest.json")
manifest = json.loads(path.read_text())
assert manifest["exit_reason"] == "done", manifest["exit_reason"]
assert manifest["export"]["status"] == "unverified", manifest["export"]
assert "names and shapes were checked" in manifest["export"]["reason"], manifest["export"]
"""


@pytest.mark.parametrize("recipe", ["fine_tune", "from_scratch"])
def test_a_whole_run_on_a_board_needs_no_torch(tmp_path, recipe):
    """Config, data, tokenizer, weights, loop, checkpoint, samples, export and card."""
    run_without_torch(WITHOUT_TORCH, "C", str(tmp_path), recipe)
