"""The bring-up checklist on the doubles: green as they are, and for each line a defect that this line alone sees.

The doubles prove nothing about a board: they prove that a line can fail.
"""

from __future__ import annotations

import gc
import importlib
import json
import os
import re
import sys
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest

pytest.importorskip("torch", reason="the doubles of ttml are torch")

import torch

from common.data.tokens import Batch
from common.errors import MachineError, VerificationError
from common.hardware import get
from engines.ttml import engine as backend
from engines.ttml.engine import TTML
from engines.ttml.hf_map import Entry
from engines.ttml.tensors import Tensors
from tests.support.boards import DESCRIPTOR, machine
from tests.support.engines import config_for, engine
from tests.support.no_torch import run_without_torch
from tools.bringup import numpy_llama, reference_llama
from tools.bringup.run import LINES, bring_up, print_bring_up
from tools.checklist import ChecklistLine, Result, go_through
from tools.verify.tiny_base import write_tiny_base

Patch = pytest.MonkeyPatch
Defect = Callable[[Patch], None]
UNDECIDED = {"base-loss", "killed"}
MESH = {"mesh", "rows", "sync", "replicas", "curve"}
BY_ID = {line.id: line for line in LINES}


@pytest.fixture(autouse=True)
def no_collections(monkeypatch) -> None:
    """Each line closes the backend, which collects garbage: most of a line's time here, and of no use to a double."""
    monkeypatch.setattr(gc, "collect", lambda: 0)


def brought_up(
    folder: Path,
    devices: int = 1,
    generation: str = "B",
    defect: Defect | None = None,
    ids: Any = None,
    **switches: Any,
) -> dict[str, Result]:
    lines = LINES
    if ids is not None:
        among = [line for line in LINES if line.id in ids]
        lines = tuple(replace(line, needs=tuple(need for need in line.needs if need in ids)) for line in among)
    with machine(folder, devices, generation, **switches) as name, Patch.context() as patch:
        importlib.import_module("ttml")
        if defect:
            defect(patch)
        return {result.id: result for result in bring_up(get(name), lines=lines)[1]}


def with_needs(name: str) -> set[str]:
    return {name}.union(*map(with_needs, BY_ID[name].needs))


# --- as it should be ------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("devices", [1, 2])
@pytest.mark.parametrize("generation", ["B", "C"])
def test_every_line_holds_on_the_doubles(tmp_path, generation, devices):
    results = brought_up(tmp_path, devices, generation)
    assert list(results) == [line.id for line in LINES]
    verdicts = {result.id: (result.verdict, result.evidence) for result in results.values()}
    assert {k: v for k, v in verdicts.items() if v[0] == "fail"} == {}
    assert {k for k, v in verdicts.items() if v[0] == "not checkable"} == UNDECIDED
    no_fp32 = NEWER if generation == "B" else set()
    assert {k for k, v in verdicts.items() if v[0] == "skipped"} == no_fp32 | (MESH if devices == 1 else set())
    assert all(evidence for _, evidence in verdicts.values())
    assert ("stale" in results["reads"].evidence) == (generation == "B"), "how this build reads by default is said"


def test_a_descriptor_that_nobody_named_is_known_before_anything_is_opened(tmp_path):
    """Take the larger mesh out of bring_up: `open` touches the devices first, and `mesh` never finds the routers."""
    folder = tmp_path / "tt_metal/fabric/mesh_graph_descriptors"
    folder.mkdir(parents=True)
    (folder / "n300_mesh_graph_descriptor.textproto").write_text(DESCRIPTOR.format(devices=2))

    def unnamed(patch: Patch) -> None:
        patch.delenv("TT_MESH_GRAPH_DESC_PATH")
        patch.setenv("TT_METAL_RUNTIME_ROOT", str(tmp_path))

    results = brought_up(tmp_path, 2, defect=unnamed, ids={"open", "reopen", "mesh", "rows"})
    assert {result.verdict for result in results.values()} == {"pass"}, results["mesh"]


def test_a_healthy_card_that_takes_nan_for_a_number_passes(tmp_path):
    """Compare the state with what was loaded, whose NaN has other bits, and it fails."""
    results = brought_up(tmp_path, ids={"reads", "repeat", "non-finite"}, ordinary_specials=True)
    assert {result.verdict for result in results.values()} == {"pass"}, results["non-finite"]
    assert "has overflowed" in results["non-finite"].evidence


@pytest.mark.parametrize("devices", [4, 8])
def test_larger_meshes_have_rows_for_every_device(tmp_path, devices):
    results = brought_up(tmp_path, devices, ids=set().union(*map(with_needs, MESH)))
    assert {result.verdict for result in results.values()} == {"pass"}


@pytest.mark.parametrize("shape", [{}, {"tied": True}, {"rope": True}], ids=["", "tied", "Llama 3's RoPE"])
def test_numpy_computes_what_the_cpu_twin_computes(tmp_path, shape):
    """The judge of a board is judged once, where there is torch."""
    architecture = {**reference_llama.ARCHITECTURE, "tie_word_embeddings": bool(shape.get("tied"))}
    if shape.get("rope"):
        architecture["rope_scaling"] = {**reference_llama.SCALED_ROPE, "rope_theta": 10000.0}
    weights = reference_llama.weights_for(architecture)
    batch = reference_llama.batch_of()
    expected = (numpy_llama.nll(weights, architecture, batch) * batch.loss_mask).sum(axis=1)
    gradient = numpy_llama.gradient(weights, architecture, batch)
    config = config_for(write_tiny_base(tmp_path / "base"), training__optimizer__beta1=0.5, training__max_grad_norm=0.0)
    with engine(config) as twin:
        twin.build(architecture)
        twin.load(weights)
        sums, tokens = twin.eval_nll(batch)
        twin.train_step([batch], 1e-3, 1)
        moments = {n.removeprefix("optimizer/exp_avg/"): a for n, a in twin.state() if "/exp_avg/" in n}
    assert sums == pytest.approx(expected, rel=1e-5)
    assert tokens.tolist() == batch.loss_mask.sum(axis=1).tolist()
    assert set(moments) == set(gradient)
    for name, moment in moments.items():
        assert np.abs(moment / 0.5 - gradient[name]).max() < 1e-4 * np.abs(gradient[name]).max(), name


# --- planted defects ------------------------------------------------------------------------------------------------


def double(module: str) -> Any:
    return importlib.import_module(module)


def around(patch: Patch, owner: Any, name: str, instead: Callable[..., Any]) -> None:
    """Replace a function by `instead`, which gets it as its first argument."""
    real = getattr(owner, name)
    patch.setattr(owner, name, lambda *args, **kwargs: instead(real, *args, **kwargs))


def stays_open(patch: Patch) -> None:
    patch.setattr(TTML, "close", lambda self: None)


def one_parameter_less(patch: Patch) -> None:
    def fewer(real: Any, self: Any) -> Any:
        found = double("ttml").NamedParameters()
        for name, tensor in real(self).items():
            if not name.endswith("ln_fc/gamma"):
                found[name] = tensor
        return found

    around(patch, double("ttml.models.llama").Llama, "parameters", fewer)


def sharp_initial_head(patch: Patch) -> None:
    def sharp(real: Any, self: Any, config: Any) -> None:
        real(self, config)
        self.fc.weight.tensor.get_value().data.mul_(8)

    around(patch, double("ttml.models.llama").Llama, "__init__", sharp)


def labels_shifted(patch: Patch) -> None:
    def shifted(real: Any, prediction: Any, target: Any, reduce: Any) -> Any:
        target.get_value().data.copy_(target.get_value().data.roll(-1, dims=-1))
        return real(prediction, target, reduce)

    around(patch, double("ttml").ops.loss, "cross_entropy_loss", shifted)


def one_value_of_each_tensor_off(patch: Patch) -> None:
    def off(real: Any, self: Entry, tensors: Any, dtype: Any, prefix: str = "") -> Any:
        array = real(self, tensors, dtype, prefix)
        array.flat[0] *= 1.01
        return array

    around(patch, Entry, "from_hf", off)


def attention_without_an_order(patch: Patch) -> None:
    def unmasked(real: Any, query: Any, key: Any, value: Any, _mask: Any = None) -> Any:
        length, io = query.shape()[-2], double("ttml").autograd.Tensor
        return real(query, key, value, io.from_numpy(np.ones((1, 1, length, length), np.float32)))

    around(patch, double("ttml._ops"), "scaled_dot_product_attention", unmasked)


def rows_not_paired(patch: Patch) -> None:
    """ttml's RoPE turns what Hugging Face's does, which is what leaving rows as they are amounts to."""

    def halves(real: Any, tensor: Any, params: Any) -> Any:
        ops, width = double("ttml._ops"), tensor.shape()[-1]
        order = torch.arange(width).view(2, -1).t().flatten()
        pairs = ops.apply(lambda x: x[..., order], tensor)
        return ops.apply(lambda x: x[..., order.argsort()], real(pairs, params))

    around(patch, double("ttml._ops"), "rope", halves)


def for_a(patch: Patch, field: str, value: Any) -> None:
    """Logits a fifth too large where the model's config has that value."""

    def scaled(real: Any, self: Any, ids: Any, mask: Any) -> Any:
        found = getattr(self.config, field)
        return real(self, ids, mask) * (1.2 if getattr(found, "name", found) == value else 1.0)

    around(patch, double("ttml.models.llama").Llama, "forward", scaled)


def no_rope_scaling(patch: Patch) -> None:
    patch.setattr(backend, "rope_scaling", lambda rope: {})


def loss_a_hundredth_off(patch: Patch) -> None:
    def off(real: Any, self: TTML, batch: Batch) -> Any:
        sums, tokens = real(self, batch)
        return sums * 1.01, tokens

    around(patch, TTML, "eval_nll", off)


def stale_reads(patch: Patch) -> None:
    def default(self: Tensors, tensor: Any) -> Any:
        return tensor.to_numpy(tensor.get_value().dtype, self._composer)

    patch.setattr(Tensors, "read", default)


def mask_left_out(patch: Patch) -> None:
    def all_of_it(real: Any, self: TTML, batch: Batch, supervised: int) -> Any:
        ones = np.ones_like(batch.loss_mask)
        return real(self, Batch(batch.input_ids, batch.labels, ones, batch.rows), supervised)

    around(patch, TTML, "_backward", all_of_it)


def each_micro_batch_by_itself(patch: Patch) -> None:
    def alone(real: Any, self: TTML, batch: Batch, _supervised: int) -> Any:
        return real(self, batch, int(batch.loss_mask.sum()))

    around(patch, TTML, "_backward", alone)


def norm_after_clipping(patch: Patch) -> None:
    def after(real: Any, parameters: Any, limit: float, *rest: Any) -> Any:
        norm = real(parameters, limit, *rest)
        norm.get_value().data.clamp_(max=limit)
        return norm

    around(patch, double("ttml").core, "clip_grad_norm", after)


def no_weight_decay(patch: Patch, kind: str) -> None:
    def plain(real: Any, self: Any, *args: Any) -> Any:
        self._config.weight_decay = 0.0
        return real(self, *args)

    around(patch, getattr(double("ttml").optimizers, kind), "_adamw", plain)


def no_weight_decay_in_fp32(patch: Patch) -> None:
    def plain(real: Any, self: Any, name: str, tensor: Any) -> Any:
        kept, fp32 = self._config.weight_decay, tensor._native.dtype.name == "FLOAT32"
        self._config.weight_decay = 0.0 if fp32 else kept
        real(self, name, tensor)
        self._config.weight_decay = kept

    around(patch, double("ttml").optimizers.AdamW, "_update", plain)


def rounding_to_nearest(patch: Patch) -> None:
    patch.setattr(double("ttml").optimizers.AdamW, "_stochastically_rounded", lambda self, values: values)


def half_tiles_allowed(patch: Patch) -> None:
    patch.setattr(backend, "TILE", 16)


def every_other_step_differs(patch: Patch) -> None:
    calls: list[int] = []

    def uneven(real: Any, self: Any) -> None:
        real(self)
        calls.append(1)
        if len(calls) % 2:
            next(iter(self._parameters.values())).get_value().data[..., :8].mul_(1.004)

    around(patch, double("ttml").optimizers.AdamW, "step", uneven)


def bias_correction_begun_anew(patch: Patch) -> None:
    def forgetful(real: Any, self: TTML, state: Any) -> None:
        real(self, state)
        self.optimizer._beta1_power = self.optimizer._beta2_power = 1.0

    around(patch, TTML, "load_state", forgetful)


def anything_is_trained_on(patch: Patch) -> None:
    patch.setattr(TTML, "_refuse_not_finite", lambda *args: None)


def left_open_on_an_interrupt(patch: Patch) -> None:
    def unless_interrupted(real: Any, self: TTML) -> None:
        if not isinstance(sys.exc_info()[1], KeyboardInterrupt):
            real(self)

    around(patch, TTML, "close", unless_interrupted)


def a_norm_not_frozen(patch: Patch) -> None:
    def thawed(real: Any, self: TTML) -> None:
        real(self)
        next(w for name, w in self.weights.items() if name.endswith("ln_fc/gamma")).set_requires_grad(True)

    around(patch, TTML, "_add_lora", thawed)


def adapters_at_half_scale(patch: Patch) -> None:
    def half(real: Any, self: Any, *args: Any) -> None:
        real(self, *args)
        self.scaling /= 2

    around(patch, double("ttml.modules").LoraLinear, "__init__", half)


def seed_ignored(patch: Patch) -> None:
    patch.setattr(double("ttml").autograd.AutoContext, "set_seed", lambda self, seed: None)


def no_descriptor(patch: Patch) -> None:
    patch.delenv("TT_MESH_GRAPH_DESC_PATH")


def every_row_on_every_device(patch: Patch) -> None:
    around(patch, double("ttml").Mesh, "axis_mapper", lambda real, self, name, dim: real(self, "_0", dim))


def from_sync(patch: Patch, call: int, instead: Callable[[Any], None]) -> None:
    """From that call on, counted over the whole checklist, `instead` takes the place of the synchronisation."""
    calls: list[int] = []

    def sync(real: Any, parameters: Any, axis_names: Any) -> None:
        calls.append(1)
        real(parameters, axis_names)
        if len(calls) >= call:
            instead(parameters)

    def silent(parameters: Any, axis_names: Any) -> None:
        del parameters, axis_names

    if call == 1:
        patch.setattr(double("ttml"), "sync_gradients", silent)
    else:
        around(patch, double("ttml"), "sync_gradients", sync)


def devices_apart(parameters: Any) -> None:
    for tensor in parameters.values():
        tensor.get_grad().data[1].mul_(-1)


def no_gradients(parameters: Any) -> None:
    for tensor in parameters.values():
        tensor.get_grad().data.zero_()


def kernel_fault(name: str) -> Defect:
    return lambda patch: patch.setattr(double("ttnn")._switches, "KERNEL_FAULTS", [name])


# The lines that look for a kernel's fault, and the fault of the doubles that each is to see.
KERNEL_FAULTS = {
    "gradient-heads": "grouped-heads",
    "gradient-wide": "transposed-a",
    "gradient-padded": "padded-columns",
    "gradient-long": "dk-in-bf16",
}
DEFECTS: dict[str, Defect] = {
    **{line: kernel_fault(name) for line, name in KERNEL_FAULTS.items()},
    "reopen": stays_open,
    "parameters": one_parameter_less,
    "first-loss": sharp_initial_head,
    "labels": labels_shifted,
    "weights": one_value_of_each_tensor_off,
    "causality": attention_without_an_order,
    "forward": rows_not_paired,
    "tied": lambda patch: for_a(patch, "weight_tying", "Enabled"),
    "rope-scaling": no_rope_scaling,
    "loss": loss_a_hundredth_off,
    "padded": lambda patch: for_a(patch, "vocab_size", 300),
    "reads": stale_reads,
    "gradient": mask_left_out,
    "accumulation": each_micro_batch_by_itself,
    "recompute": lambda patch: for_a(patch, "runner_type", "MemoryEfficient"),
    "clipping": norm_after_clipping,
    "update": lambda patch: no_weight_decay(patch, "AdamW"),
    "update-fp32": lambda patch: no_weight_decay(patch, "AdamWFullPrecision"),
    "update-gains": no_weight_decay_in_fp32,
    "rounding": rounding_to_nearest,
    "row-length": half_tiles_allowed,
    "repeat": every_other_step_differs,
    "checkpoint": bias_correction_begun_anew,
    "non-finite": anything_is_trained_on,
    "interrupt": left_open_on_an_interrupt,
    "lora": a_norm_not_frozen,
    "lora-merged": adapters_at_half_scale,
    "seeds": seed_ignored,
    "mesh": no_descriptor,
    "rows": every_row_on_every_device,
    "sync": lambda patch: from_sync(patch, 1, no_gradients),
    "replicas": lambda patch: from_sync(patch, 2, devices_apart),
    "curve": lambda patch: from_sync(patch, 5, no_gradients),
}


NEWER = {"update-gains"}  # lines that builds of generation B skip


def build_for(line: str) -> str:
    return "C" if line in NEWER else "B"


def test_every_line_that_can_fail_has_a_planted_defect():
    assert set(DEFECTS) | UNDECIDED | {"build", "open"} == set(BY_ID)


@pytest.mark.parametrize("line", DEFECTS)
def test_a_planted_defect_is_seen_by_its_line(tmp_path, line):
    """And not by what the line needs, of which only the last links are gone through, to be quick."""
    ids = with_needs(line) if line in MESH else {line, *BY_ID[line].needs}
    ids |= {"parameters"} if "lora" in ids else set()  # which says how the build fuses
    results = brought_up(tmp_path, 2 if line in MESH else 1, build_for(line), defect=DEFECTS[line], ids=ids)
    failed = {result.id: result.evidence for result in results.values() if result.verdict == "fail"}
    assert set(failed) == {line}, failed
    assert {result.verdict for result in results.values()} <= {"pass", "fail"}


def test_in_one_tile_of_tokens_no_kernel_fault_shows(tmp_path):
    """Which is why the lines above take longer rows and wider matrices."""
    results = brought_up(tmp_path, ids={"gradient"}, kernel_faults=list(KERNEL_FAULTS.values()))
    assert results["gradient"].verdict == "pass", results["gradient"]


@pytest.mark.parametrize("line", KERNEL_FAULTS)
def test_a_line_that_sees_a_kernel_fault_names_it_upstream(tmp_path, line):
    result = brought_up(tmp_path, ids={line}, kernel_faults=[KERNEL_FAULTS[line]])[line]
    assert re.search(r"tt-metal \d{5}", result.todo)
    assert str(result).endswith(result.todo)
    assert not brought_up(tmp_path, ids={line})[line].todo


@pytest.mark.slow  # minutes: the whole list for each defect
@pytest.mark.parametrize("line", DEFECTS)
def test_a_planted_defect_is_seen_by_no_other_line(tmp_path, line):
    results = brought_up(tmp_path, 2 if line in MESH else 1, build_for(line), defect=DEFECTS[line])
    assert {r.id: r.evidence for r in results.values() if r.verdict == "fail"}.keys() == {line}
    for result in results.values():
        stands_on_it = line in with_needs(result.id) - {result.id}
        too_new = result.id in NEWER and line not in NEWER
        if stands_on_it or too_new or (line not in MESH and result.id in MESH):
            assert result.verdict == "skipped", result
        elif result.id != line:
            assert result.verdict == ("not checkable" if result.id in UNDECIDED else "pass"), result


def test_a_device_in_use_fails_the_first_line_that_opens_it(tmp_path):
    results = brought_up(tmp_path, busy=True)
    assert results["open"].verdict == "fail"
    assert "another process holds the device" in results["open"].evidence
    assert {r.verdict for r in results.values() if r.id not in ("build", "open")} == {"skipped"}


NO_TORCH = """
import gc
gc.collect = lambda: 0
from common.hardware import get
from tools.bringup.run import bring_up
print(*(result.id for result in bring_up(get("n150"))[1] if result.verdict == "fail"))
"""


def test_the_list_needs_no_torch():
    """In a process where nobody but the doubles may import it."""
    assert run_without_torch(NO_TORCH, "C").split() == []


# --- the list and the report ----------------------------------------------------------------------------------------


def test_a_line_needs_only_lines_before_it():
    seen: set[str] = set()
    for line in LINES:
        assert set(line.needs) <= seen, line.id
        assert line.id not in seen
        seen.add(line.id)


def test_the_list_goes_on_after_a_failure_and_whatever_is_raised():
    def broken(_subject: Any) -> str:
        raise RuntimeError("TT_FATAL:\n  deep inside")

    lines = [
        ChecklistLine("a", "", broken),
        ChecklistLine("b", "", lambda _s: "1", ("a",)),
        ChecklistLine("c", "", lambda s: s),
    ]
    said: list[str] = []
    results = go_through(lines, "5", said.append)
    assert [(r.verdict, r.evidence) for r in results] == [
        ("fail", "RuntimeError: TT_FATAL: deep inside"),
        ("skipped", "needs a, which is: fail"),
        ("pass", "5"),
    ]
    assert said[::2] == ["a:  ...", "b:  ...", "c:  ..."]
    assert said[-1] == "  PASS: 5"


@pytest.fixture
def short(monkeypatch) -> None:
    """A list of two lines, the second of which fails where the loss shifts labels."""
    monkeypatch.setattr("tools.bringup.run.LINES", tuple(BY_ID[name] for name in ("build", "open", "reopen", "labels")))


@pytest.mark.parametrize("as_json", [False, True])
def test_the_report_names_what_failed_and_ends_with_code_6(tmp_path, short, as_json):
    said: list[str] = []
    with machine(tmp_path) as name, Patch.context() as patch:
        print_bring_up(get(name), "as named", as_json, said.append)
        before = len(said)
        labels_shifted(patch)
        with pytest.raises(VerificationError) as caught:
            print_bring_up(get(name), "as named", as_json, said.append)
    assert caught.value.code == 6
    assert "1 of 4 lines of the bring-up failed: labels" in str(caught.value)
    if as_json:
        found = json.loads(said[-1])
        assert (found["format"], found["hw"], found["why"]) == (1, "n150", "as named")
        assert [(line["id"], line["verdict"]) for line in found["lines"]][2:] == [
            ("reopen", "pass"),
            ("labels", "fail"),
        ]
        assert set(found["build"]) == {"tt-metal", "ttnn", "ttml"}
        assert os.environ.get("TT_LOGGER_LEVEL") is None, "set for the run alone"
    else:
        assert said[before - 1] == "  PASS: largest 0.0144 nats, expected 0.0144; shifted it is above 9"
        assert said[-2] == "labels: the loss takes labels[t] for position t ..."
        assert said[-1].startswith("  FAIL: largest ")


def test_without_ttml_there_is_one_message(monkeypatch):
    monkeypatch.setitem(sys.modules, "ttml", None)
    monkeypatch.setitem(sys.modules, "ttnn", None)
    with pytest.raises(MachineError, match="ttnn is not in this environment") as caught:
        bring_up(get("n150"))
    assert caught.value.code == 4
