"""What a machine or a build of ttml may lack: one message each, with its cure, and before data is touched."""

from __future__ import annotations

import importlib
import json
import os
import re
import sys
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest

pytest.importorskip("torch", reason="the doubles of ttml are torch")

from common.errors import MachineError, RecipeError, TrainingError, UsageError
from common.hardware import get
from common.model.bases import resolve
from engines.ttml import contract, hf_map, tie_groups_for
from engines.ttml.engine import open_ttml, refuse_without_ttml
from engines.ttml.limits import refuse_architecture, refuse_config, rope_of, rope_scaling
from engines.ttml.mesh import check_descriptor, read_descriptor
from tests.support.boards import DESCRIPTOR, TIES, board, board_config, machine
from tests.support.engines import make_batch, state_of

LORA = {"rank": 4, "alpha": 8.0}
generations = pytest.mark.parametrize("generation", ["B", "C"])


def lora_for(generation: str) -> dict[str, Any]:
    return {"model__lora": {**LORA, "tie_groups": TIES[generation]}}


def refusal(call: Any, kind: type[RecipeError], *words: str) -> RecipeError:
    """The error that `call` raises: of one kind, naming these words, saying where and what to do."""
    with pytest.raises(kind) as caught:
        call()
    text = str(caught.value)
    assert all(word in text for word in words), text
    assert caught.value.where
    assert caught.value.todo
    return caught.value


def test_a_machine_without_ttml_is_told_of_the_image(tiny_base, monkeypatch):
    monkeypatch.setitem(sys.modules, "ttml", None)
    monkeypatch.setitem(sys.modules, "ttnn", None)
    error = refusal(
        lambda: refuse_without_ttml(get("n150"), board_config(tiny_base)), MachineError, "ttnn", "pinned image for n150"
    )
    assert error.code == 4


@pytest.mark.parametrize(
    ("switches", "words"),
    [
        ({"impostor": True}, ("another package of that name", "pip uninstall ttml")),
        ({"bad_cast": True}, ("built apart", "build_metal.sh", "image")),
        ({"needs_runtime_root": True}, ("its own folder", "export TT_METAL_RUNTIME_ROOT")),
        ({"without": ["open_device_mesh"]}, ("older", "ttml.open_device_mesh", "pinned image for n150")),
        ({"without": ["sync_gradients", "core.clip_grad_norm"]}, ("ttml.sync_gradients", "ttml.core.clip_grad_norm")),
    ],
    ids=["another ttml", "bad_cast", "no root", "older", "older still"],
)
def test_a_ttml_that_cannot_be_used_is_refused_before_anything_is_opened(tmp_path, tiny_base, switches, words):
    with machine(tmp_path, **switches) as name:
        refusal(lambda: refuse_without_ttml(get(name), board_config(tiny_base)), MachineError, *words)


def test_a_root_that_is_not_there_is_refused_and_home_stands_in_for_it(tmp_path, tiny_base, monkeypatch):
    with machine(tmp_path, needs_runtime_root=True) as name:
        monkeypatch.setenv("TT_METAL_HOME", str(tmp_path))
        assert "ttml.close_device_mesh" in refuse_without_ttml(get(name), board_config(tiny_base)).has
        monkeypatch.setenv("TT_METAL_RUNTIME_ROOT", str(tmp_path / "none"))
        refusal(lambda: refuse_without_ttml(get(name), board_config(tiny_base)), MachineError, "TT_METAL_RUNTIME_ROOT")


DESCRIPTORS = {
    "other dims": (DESCRIPTOR.format(devices=4), "dims [1, 4]"),
    "no dims": ("mesh_descriptors { device_topology { } }", "no device_topology with dims"),
    "two meshes": (DESCRIPTOR.format(devices=2) * 2, "2 mesh_descriptors blocks"),
    "nothing": ("", "0 mesh_descriptors blocks"),
    "types": (DESCRIPTOR.format(devices=2).replace("] }", "] dim_types: [RING] }", 1), "1 dim_types for 2 dims"),
    "missing": (None, "cannot be read"),
}


@pytest.mark.parametrize("case", DESCRIPTORS)
def test_a_descriptor_that_would_hang_training_is_refused_before_the_import(tmp_path, tiny_base, case):
    """Take away check_descriptor: ttml warns at most, and the second step hangs."""
    text, words = DESCRIPTORS[case]
    path = tmp_path / "mesh.textproto"
    if text is not None:
        path.write_text(text)
    config = board_config(tiny_base, hw="n300", device__mesh_shape=(1, 2))
    with machine(tmp_path, 2) as name:
        os.environ["TT_MESH_GRAPH_DESC_PATH"] = str(path)
        refusal(lambda: refuse_without_ttml(get(name), config), MachineError, words, str(path), "[1, 2]")
        assert "ttml" not in sys.modules


def test_several_devices_without_a_descriptor_are_refused_and_the_board_s_own_is_found(tmp_path, tiny_base):
    config = board_config(tiny_base, hw="n300", device__mesh_shape=(1, 2))
    with machine(tmp_path, 2) as name:
        del os.environ["TT_MESH_GRAPH_DESC_PATH"]
        refusal(lambda: refuse_without_ttml(get(name), config), MachineError, "export TT_MESH_GRAPH_DESC_PATH")
        folder = tmp_path / "tt_metal/fabric/mesh_graph_descriptors"
        folder.mkdir(parents=True)
        (folder / "n300_mesh_graph_descriptor.textproto").write_text(DESCRIPTOR.format(devices=2))
        os.environ["TT_METAL_RUNTIME_ROOT"] = str(tmp_path)
        refuse_without_ttml(get(name), config)
        assert os.environ["TT_MESH_GRAPH_DESC_PATH"].startswith(str(folder))


def test_both_spellings_of_a_repeated_field_are_read(tmp_path):
    listed = DESCRIPTOR.format(devices=8)
    assert read_descriptor(listed) == ((1, 8), ())
    assert read_descriptor(listed.replace("dims: [ 1, 8 ]", "dims: 1 dims: 8 dim_types: LINE dim_types: RING", 1)) == (
        (1, 8),
        ("LINE", "RING"),
    )
    (tmp_path / "a").write_text("# dims: [1, 2]\n" + listed)
    check_descriptor(tmp_path / "a", (1, 8))


def test_a_device_in_use_and_one_that_is_not_there_are_told_apart(tmp_path, tiny_base):
    config = board_config(tiny_base)
    with machine(tmp_path, busy=True) as name:
        refusal(lambda: open_ttml(get(name), config).__enter__(), MachineError, "another process", "tt-smi -r")
    two = board_config(tiny_base, hw="n300", device__mesh_shape=(1, 2))
    with machine(tmp_path, 2) as name:
        os.environ["TTML_DOUBLE_DEVICES"] = "1"
        refusal(lambda: refuse_without_ttml(get(name), two), MachineError, "asks for 2 devices", "finds 1")
        ttnn: Any = sys.modules["ttnn"]
        ttnn.get_num_devices = lambda: 2  # and a card was lost since
        refusal(lambda: open_ttml(get(name), two).__enter__(), MachineError, "more devices than there are", "tt-smi")


def test_a_machine_where_tt_metal_finds_no_card_is_told_so(tmp_path, tiny_base):
    def none() -> int:
        raise RuntimeError("TT_FATAL: num_chips > 0 info: No chips detected in the cluster")

    with machine(tmp_path) as name:
        importlib.import_module("ttnn").get_num_devices = none  # type: ignore[attr-defined]
        refusal(
            lambda: refuse_without_ttml(get(name), board_config(tiny_base)), MachineError, "no Tenstorrent", "tt-smi"
        )


def test_a_device_without_memory_is_told_in_one_message(tmp_path, tiny_base):
    with board(board_config(tiny_base), tmp_path, oom_at_step=2) as backend:
        backend.train_step([make_batch()], 1e-3, 1)
        error = refusal(
            lambda: backend.train_step([make_batch()], 1e-3, 2),
            TrainingError,
            "no memory",
            "batch_size",
            "checkpointing",
        )
        assert error.code == 5
        assert "step 2" in str(error.where)


@generations
def test_adapters_tied_otherwise_are_refused_before_a_device_is_opened(tmp_path, tiny_base, generation):
    """With both layouts named; and where a build is made otherwise, by the model itself."""
    other = {"B": "C", "C": "B"}[generation]
    config = board_config(tiny_base, **lora_for(other))
    words = (f"has one adapter for each of {TIES[generation]}", f"tie_groups is {TIES[other]}", "tie_groups=build")
    with machine(tmp_path, 1, generation) as name:
        assert refusal(lambda: refuse_without_ttml(get(name), config), UsageError, *words).code == 2
    untold = machine(tmp_path, 1, generation, without=["models.llama.LlamaMLP"])
    with untold as name, open_ttml(get(name), config) as backend:
        base = resolve(str(tiny_base))
        backend.build(base.architecture)
        refusal(lambda: backend.load(base.weights()), UsageError, *words)


@pytest.mark.parametrize("fused", [[], ["qkv"], ["gate_up"], ["qkv", "gate_up"]])
def test_what_a_build_fuses_is_told_without_a_device(tmp_path, tiny_base, fused):
    with machine(tmp_path, fused=fused) as name:
        by_name, groups = contract.linears_by_name(), tie_groups_for(get(name))[0]
        assert not importlib.import_module("ttml").autograd.AutoContext.get_instance()._device, "none was opened"
    with board(board_config(tiny_base), tmp_path, fused=fused) as backend:
        assert by_name == hf_map.linears_of(backend.entries)
    ties = [["q_proj", "k_proj", "v_proj"] if "qkv" in fused else ["k_proj", "v_proj"]]
    assert groups == ties + [["gate_proj", "up_proj"]] * ("gate_up" in fused)


def test_a_build_whose_layers_cannot_be_told_wants_the_groups_named(tmp_path, tiny_base):
    with machine(tmp_path, without=["models.llama.LlamaMLP"]) as name:
        error = refusal(
            lambda: tie_groups_for(get(name)), MachineError, "cannot be told", "tie_groups=[[k_proj,v_proj]]"
        )
        assert error.code == 4
        refuse_without_ttml(get(name), board_config(tiny_base, **lora_for("B")))


@pytest.mark.parametrize(
    ("values", "words"),
    [
        ({"training__precision": "fp32"}, "training_config.precision"),
        ({"training__precision": "bf16-mixed"}, "AdamWFullPrecision"),
        ({"training__batch_size": 7}, "multiple of 2"),
        (
            {
                "training__optimizer__type": "AdamWFullPrecision",
                "training__optimizer__stochastic_rounding": True,
            },
            "no stochastic rounding",
        ),
    ],
)
def test_keys_that_ttml_cannot_honour_are_refused(tiny_base, values, words):
    config = board_config(tiny_base, hw="n300", device__mesh_shape=(1, 2), **values)
    assert refusal(lambda: refuse_config(get("n300"), config), UsageError, words).code == 2


def test_a_key_without_meaning_is_said(tmp_path, tiny_base):
    with board(board_config(tiny_base, device__compile="always"), tmp_path) as backend:
        assert any("compile is of no effect" in note for note in backend.info.notes)


@pytest.mark.parametrize(
    ("values", "words"),
    [
        ({"rms_norm_eps": 1e-6}, "rms_norm_eps is 1e-06"),
        ({"head_dim": 64}, "head_dim is not hidden_size / heads"),
        ({"hidden_size": 320, "num_attention_heads": 2}, "head_dim 160 is above 128"),
        ({"num_attention_heads": 4, "head_dim": 16}, "head_dim 16 is no multiple of 32"),
        ({"attention_bias": True}, "biases"),
        ({"rope_scaling": {"rope_type": "yarn", "factor": 2.0}}, "rope_type is yarn"),
        ({"max_position_embeddings": 200}, "max_position_embeddings 200 is no multiple"),
        ({"model_type": "qwen2"}, "qwen2"),
    ],
)
def test_an_architecture_that_ttml_would_compute_as_another_is_refused(tiny_base, values, words):
    architecture = {**resolve(str(tiny_base)).architecture}
    refuse_architecture(architecture)
    refusal(lambda: refuse_architecture({**architecture, **values}), MachineError, words)


def test_rope_is_read_from_either_form_of_config():
    old = {"rope_theta": 500000.0, "rope_scaling": {"type": "llama3", "factor": 8.0}}
    new = {"rope_parameters": {"rope_theta": 500000.0, "rope_type": "llama3", "factor": 8.0}}
    for found in (rope_of(old), rope_of(new)):
        assert (found["rope_theta"], found["rope_type"], found["factor"]) == (500000.0, "llama3", 8.0)
    assert rope_of({"rope_theta": 100000.0, "rope_scaling": None})["rope_type"] == "default"
    llama3 = {"rope_type": "llama3", "factor": 8, "high_freq_factor": 4, "low_freq_factor": 1}
    assert rope_scaling({**llama3, "original_max_position_embeddings": 8192}) == {
        "scaling_factor": 8.0,
        "high_freq_factor": 4.0,
        "low_freq_factor": 1.0,
        "original_context_length": 8192,
    }


# --- the contract ---------------------------------------------------------------------------------------------------


@generations
def test_every_name_the_backend_relies_on_is_looked_for(tmp_path, tiny_base, generation):
    with board(board_config(tiny_base), tmp_path, 1, generation) as backend:
        rows = contract.contract(backend.weights)
        assert ("ttml.reset_metal_env" in backend.info.versions["ttml"]) == (generation == "C")
        assert ("qkv_linear" in backend.info.versions["ttml linears"]) == (generation == "C")
    assert json.loads(json.dumps(rows)) == rows
    assert {row["kind"] for row in rows} == {"attribute", "argument", "parameter"}
    lacking = {row["name"] for row in rows if row["found"] is not True}
    assert lacking == {row["name"] for row in rows if row["generations"] == {"B": "C", "C": "B"}[generation]}


def test_a_build_is_refused_by_what_it_lacks_and_nothing_else(tmp_path, tiny_base):
    with machine(tmp_path, without=["close_device_mesh"]) as name:
        older = {"ttnn.get_num_devices", "ttml.core.distributed.disable_fabric"}
        assert refuse_without_ttml(get(name), board_config(tiny_base)).has == older
        rows = {row["name"]: row for row in contract.contract()}
        assert rows["ttml.close_device_mesh"]["found"] is False
        assert rows["blocks/0/mlp/w2/weight"]["found"] is None, "without a model it cannot be told"
    for need in contract.NEEDS:
        if need.required and need.kind == "attribute" and need.name.startswith("ttml.autograd.Tensor."):
            with machine(tmp_path, without=[need.name.removeprefix("ttml.")]) as name:
                refusal(lambda: refuse_without_ttml(get("n150"), board_config(tiny_base)), MachineError, need.name)


def test_nothing_of_ttml_is_used_that_the_contract_does_not_name(tmp_path, tiny_base):
    """The names that the backend's own code takes from ttml's modules while it trains, on two devices, with LoRA."""
    named = {need.name.partition("(")[0] for need in contract.NEEDS}
    prefixes = {name.rsplit(".", i)[0] for name in named for i in range(name.count(".") + 1)}
    used: set[str] = set()
    with machine(tmp_path, 2) as name:
        config = board_config(tiny_base, hw=name, device__mesh_shape=(1, 2), **lora_for("B"))
        refuse_without_ttml(get(name), config)
        spies = {module: Spy(sys.modules[module], module, used) for module in ("ttml", "ttnn")}
        with pytest.MonkeyPatch.context() as patch:
            real = importlib.import_module
            patch.setattr(importlib, "import_module", lambda module: spies.get(module) or real(module))
            with open_ttml(get(name), config) as backend:
                base = resolve(str(tiny_base))
                backend.build(base.architecture)
                backend.load(base.weights())
                backend.train_step([make_batch()], 1e-3, 1)
                backend.eval_nll(make_batch())
                backend.load_state(state_of(backend))
    assert used, "the spy sees something"
    assert used <= prefixes, used - prefixes


def test_a_binding_tells_its_arguments_in_its_docstring_or_not_at_all():
    to_numpy = SimpleNamespace(__doc__="to_numpy(self, composer: object = None, precision: Precision = ...) -> ndarray")
    assert contract._accepts(to_numpy, "precision") is True
    assert contract._accepts(to_numpy, "layout") is False
    assert contract._accepts(SimpleNamespace(__doc__="Read to the host"), "precision") is None, "not refused for it"


def test_the_manifest_says_which_tree_ttml_was_built_from(tmp_path, tiny_base, monkeypatch):
    with machine(tmp_path) as name:
        monkeypatch.setenv("TT_METAL_HOME", str(Path(__file__).parent))
        versions = refuse_without_ttml(get(name), board_config(tiny_base)).versions()
    assert re.fullmatch(r"\S*[0-9a-f]{7}\S*|unknown", versions["tt-metal"])


class Spy:
    """A module that notes which of its attributes are asked for."""

    def __init__(self, target: Any, path: str, used: set[str]) -> None:
        self.__dict__.update(_target=target, _path=path, _used=used)

    def __getattr__(self, name: str) -> Any:
        value = getattr(self._target, name)
        path = f"{self._path}.{name}"
        self._used.add(path)
        return Spy(value, path, self._used) if isinstance(value, type(sys)) else value
