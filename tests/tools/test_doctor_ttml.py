"""`recipe doctor --ttml` on the doubles: what it says of each build, and when it is an error."""

from __future__ import annotations

import importlib
import json
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

pytest.importorskip("torch", reason="the doubles of ttml are torch")

from common.errors import MachineError
from common.hardware import get
from engines.ttml.contract import NEEDS
from tests.doubles.machines import fake_machine
from tests.support.boards import machine
from tools.cli import main
from tools.doctor.ttml import Ttml, examine_ttml, print_ttml

ROOT = Path(__file__).resolve().parents[2]
UNFUSED, FUSED = "attention/q_linear", "attention/qkv_linear"


def examined(folder: Path, device: bool = True, **switches: Any) -> Ttml:
    with machine(folder, **switches) as name:
        return examine_ttml(get(name), device)


def verdicts(found: Ttml) -> dict[str, bool | None]:
    return {finding.id: finding.ok for finding in found.findings}


def statuses(found: Ttml) -> dict[str, str]:
    return {row["name"]: row["status"] for row in found.names}


@pytest.mark.parametrize("generation", ["B", "C"])
def test_a_build_that_has_everything_is_told_as_it_is(tmp_path, generation):
    found = examined(tmp_path, generation=generation)
    assert verdicts(found) == {"ttml.build": True, "ttml.names": True, "ttml.model": True}
    assert [row["name"] for row in found.names] == [need.name for need in NEEDS]
    assert {row["status"] for row in found.names if row["required"]} == {"present"}
    here, absent = (UNFUSED, FUSED) if generation == "B" else (FUSED, UNFUSED)
    assert statuses(found)[f"blocks/0/{here}/weight"] == "present"
    assert statuses(found)[f"blocks/0/{absent}/weight"] == "missing", "and that is no error: it is not required"
    assert set(found.build) == {"tt-metal", "ttnn", "ttml"}


def test_projections_are_fused_one_by_one(tmp_path):
    found = statuses(examined(tmp_path, fused=["gate_up"]))
    assert found["blocks/0/mlp/w_gate_up/weight"] == found[f"blocks/0/{UNFUSED}/weight"] == "present"
    assert found["blocks/0/mlp/w1/weight"] == found[f"blocks/0/{FUSED}/weight"] == "missing"


def test_without_a_device_parameters_cannot_be_told(tmp_path):
    """And none is opened: another process may hold it."""
    found = examined(tmp_path, device=False, busy=True)
    assert verdicts(found) == {"ttml.build": True, "ttml.names": True, "ttml.model": None}
    assert statuses(found)["fc/weight"] == "cannot be told"


def test_everything_that_an_older_build_lacks_is_named(tmp_path):
    without = ["sync_gradients", "core.clip_grad_norm", "Mesh", "NamedParameters", "modules.LoraModel"]
    without += ["autograd.Tensor.set_value", "optimizers.AdamWFullPrecision"]
    found = examined(tmp_path, without=without)
    lacking = {f"ttml.{name}" for name in without} | {"ttml.Mesh.axis_mapper"}
    assert verdicts(found) == {"ttml.build": False, "ttml.names": False, "ttml.model": None}
    assert set(found.missing) == lacking
    names = next(finding for finding in found.findings if finding.id == "ttml.names")
    assert all(name in names.evidence for name in lacking), "not the first five alone"
    assert "v0.74" in str(names.cure)
    assert "image" in str(names.cure)


def test_a_parameter_by_another_name_is_an_error(tmp_path):
    with machine(tmp_path) as name:
        llama = importlib.import_module("ttml.models.llama").Llama
        real = llama.parameters

        def renamed(self: Any) -> Any:
            found = type(real(self))()
            for path, tensor in real(self).items():
                found[path.replace("ln_fc/gamma", "final_norm/gamma")] = tensor
            return found

        llama.parameters = renamed
        found = examine_ttml(get(name), True)
    assert verdicts(found) == {"ttml.build": True, "ttml.names": False, "ttml.model": False}
    assert found.missing == ["ln_fc/gamma"]
    assert "final_norm/gamma" in found.findings[-1].evidence


def test_a_device_in_use_is_a_finding_and_the_names_are_told_all_the_same(tmp_path):
    found = examined(tmp_path, busy=True)
    assert verdicts(found) == {"ttml.build": True, "ttml.names": True, "ttml.model": False}
    assert "another process" in found.findings[-1].evidence
    assert statuses(found)["ttml.Mesh"] == "present"
    with machine(tmp_path, busy=True) as name, pytest.raises(MachineError, match="another process") as caught:
        print_ttml(get(name), "", device=True, as_json=False, say=lambda line: None)
    assert caught.value.where == "ttml.model"


@pytest.mark.parametrize(
    ("switches", "words"), [({"impostor": True}, "another package of that name"), ({"bad_cast": True}, "built apart")]
)
def test_a_ttml_that_is_none_is_one_message(tmp_path, switches, words):
    with pytest.raises(MachineError, match=words):
        examined(tmp_path, **switches)


# --- the verbs ------------------------------------------------------------------------------------------------------


@pytest.fixture
def recipe(monkeypatch, capsys, tmp_path):
    """Run the console script on a machine with one n150: its exit code, standard output and standard error."""
    monkeypatch.setenv("RECIPES_SYSFS_ROOT", str(fake_machine(tmp_path / "root", ["n150"])))

    def run(*arguments: str) -> tuple[int, str, str]:
        monkeypatch.setattr(sys, "argv", ["recipe", *arguments])
        with pytest.raises(SystemExit) as ended:
            main.main()
        captured = capsys.readouterr()
        return int(ended.value.code or 0), captured.out, captured.err

    return run


def test_doctor_prints_a_table_or_json(recipe, tmp_path):
    with machine(tmp_path):
        code, out, err = recipe("doctor", "--ttml", "--no-container")
        assert (code, err) == (0, "")
        lines = [line for line in out.splitlines() if line.startswith("present ")]
        assert any(line.split()[1] == "ttml.sync_gradients" and line.endswith("data parallel") for line in lines)
        assert "n150: HW is not set and found 1 x n150" in out
        assert "ok: ttml.names: " in out
        code, out, _ = recipe("doctor", "--ttml", "--no-container", "--json", "--hw", "n150", "--no-device")
    assert code == 0
    found = json.loads(out)
    assert set(found) == {"format", "hw", "why", "build", "findings", "names"}
    assert [set(finding) for finding in found["findings"]] == [{"id", "ok", "evidence", "cure", "warning"}] * 3
    assert len(found["names"]) == len(NEEDS)


def test_doctor_ends_with_code_4_and_prints_all_the_same(recipe, tmp_path):
    with machine(tmp_path, without=["sync_gradients"]):
        code, out, err = recipe("doctor", "--ttml", "--no-container", "--json")
    assert code == 4
    assert {row["name"] for row in json.loads(out)["names"] if row["status"] == "missing"} >= {"ttml.sync_gradients"}
    assert "names that every build has: ttml.sync_gradients" in err
    assert "to do: build tt-metal" in err


def test_without_ttml_each_verb_has_one_message_and_code_4(recipe, monkeypatch):
    monkeypatch.setitem(sys.modules, "ttml", None)
    monkeypatch.setitem(sys.modules, "ttnn", None)
    for arguments in (("doctor", "--ttml", "--no-container"), ("verify", "board", "--no-container")):
        code, out, err = recipe(*arguments)
        assert code == 4
        assert err.startswith("error: ttnn is not in this environment")
        assert "image" in err
        assert len(out.splitlines()) <= 1


def test_on_a_machine_without_a_board_it_says_so(recipe, monkeypatch, tmp_path):
    monkeypatch.setenv("RECIPES_SYSFS_ROOT", str(tmp_path))
    for arguments in (
        ("doctor", "--ttml", "--no-container"),
        ("verify", "board", "--no-container"),
        ("doctor", "--ttml", "--hw", "cpu"),
    ):
        code, _, err = recipe(*arguments)
        assert code == 4
        assert "there is none" in err


def test_neither_imports_torch():
    code = "import sys, tools.doctor.ttml, tools.bringup.run; print(*sorted(sys.modules))"
    done = subprocess.run([sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True, check=True)
    assert not set(done.stdout.split()) & {"torch", "transformers", "peft", "ttml", "ttnn"}
