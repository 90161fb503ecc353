"""The ttml that is installed here: everything the backend relies on, looked up instead of read off a version.

There is no version to ask: tt-train is built from tt-metal's tree, and names move between builds. NEEDS is the one list
of what we use; `contract` looks for each line of it, and a build that lacks one is refused by name.
"""

from __future__ import annotations

import contextlib
import importlib
import importlib.metadata
import inspect
import os
import re
import subprocess
import sys
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from typing import Any, get_args

from common import known_errors
from common.config.schema import Projection
from common.errors import MachineError, RecipeError
from common.hardware import Hardware
from engines.ttml.hf_map import LINEARS, tail_of, ties_of
from engines.ttml.mesh import HOME, ROOT, image_hint

ALL, LATE, NEW = "B, C", "late B, C", "C"  # API generations: B is about v0.74 to v0.79, C is newer


@dataclass(frozen=True)
class Need:
    """A name the backend uses: `a.b.c`, or `a.b.c(argument)`, or the path of a parameter of the Llama."""

    name: str
    needed_for: str
    generations: str = ALL

    @property
    def kind(self) -> str:
        if not self.name.startswith(("ttml.", "ttnn.")):
            return "parameter"
        return "argument" if self.name.endswith(")") else "attribute"

    @property
    def required(self) -> bool:
        """In every build we support. What only newer ones have is used where it is there."""
        return self.generations == ALL and self.kind != "parameter"


def _needs(purpose: str, names: str, generations: str = ALL) -> list[Need]:
    return [Need(name, purpose, generations) for name in names.split()]


def _arguments(purpose: str, function: str, names: str, generations: str = ALL) -> list[Need]:
    return [Need(f"{function}({name})", purpose, generations) for name in names.split()]


_CONTEXT, _TENSOR, _LLAMA = "ttml.autograd.AutoContext.", "ttml.autograd.Tensor.", "ttml.models.llama."
_OPTIMIZERS = "ttml.optimizers."
NEEDS: tuple[Need, ...] = (
    *_needs("opening the mesh", "ttml.Mesh ttml.open_device_mesh"),
    *_needs("closing it", f"{_CONTEXT}close_device"),
    *_needs("closing it, and forgetting it", "ttml.close_device_mesh ttml.core.distributed.disable_fabric", LATE),
    *_needs("naming a descriptor after the first touch of the devices", "ttml.reset_metal_env", NEW),
    *_needs("counting devices", "ttnn.get_num_devices", LATE),
    *_needs("the process-wide context", f"{_CONTEXT}get_instance {_CONTEXT}get_device {_CONTEXT}reset_graph"),
    *_needs("dropout and stochastic rounding", f"{_CONTEXT}set_seed"),
    *_needs("evaluation without a graph", f"{_CONTEXT}set_gradient_mode"),
    *_needs("evaluation without a graph", "ttml.autograd.GradMode.ENABLED ttml.autograd.GradMode.DISABLED"),
    *_needs("tensors in", f"{_TENSOR}from_numpy {_TENSOR}set_value {_TENSOR}get_value"),
    *_needs("tensors in", "ttnn.Layout.TILE ttnn.Layout.ROW_MAJOR"),
    *_needs("tensors in and out", "ttnn.DataType.BFLOAT16 ttnn.DataType.FLOAT32 ttnn.DataType.UINT32"),
    *_needs("tensors out", f"{_TENSOR}to_numpy {_TENSOR}shape"),
    *_arguments("reading weights as they are", f"{_TENSOR}to_numpy", "composer precision"),
    *_needs("reading weights as they are", "ttml.autograd.PreferredPrecision.NATIVE"),
    *_needs("reading from several devices", "ttml.core.distributed.concat_mesh_to_tensor_composer"),
    *_needs("generation", "ttnn.slice ttml.autograd.create_tensor"),
    *_needs("data parallel", "ttml.Mesh.axis_mapper ttml.sync_gradients"),
    *_needs("the model", f"{_LLAMA}Llama {_LLAMA}LlamaConfig {_LLAMA}LlamaRopeScalingConfig"),
    *_arguments("the model's shape", f"{_LLAMA}LlamaConfig", "hidden_size intermediate_size num_hidden_layers"),
    *_arguments("the model's shape", f"{_LLAMA}LlamaConfig", "num_attention_heads num_key_value_heads vocab_size"),
    *_arguments("positions", f"{_LLAMA}LlamaConfig", "max_position_embeddings rope_theta rope_scaling"),
    *_arguments("tied embeddings", f"{_LLAMA}LlamaConfig", "weight_tying"),
    *_needs("tied embeddings", "ttml.models.WeightTyingType.Enabled ttml.models.WeightTyingType.Disabled"),
    *_arguments("gradient checkpointing", f"{_LLAMA}LlamaConfig", "runner_type"),
    *_needs("gradient checkpointing", "ttml.models.RunnerType.Default ttml.models.RunnerType.MemoryEfficient"),
    *_needs("LoRA", "ttml.modules.LoraModel ttml.ops.unary.silu"),
    *_arguments("LoRA", "ttml.modules.LoraConfig", "rank alpha target_modules lora_dropout"),
    *_needs("choosing what is trained", f"ttml.NamedParameters {_TENSOR}get_requires_grad {_TENSOR}set_requires_grad"),
    *_needs("the loss", "ttml.ops.loss.cross_entropy_loss ttml.ops.ReduceType.NONE ttml.ops.unary.mean"),
    *_needs("the gradient", f"{_TENSOR}backward {_TENSOR}is_grad_initialized ttml.core.clip_grad_norm"),
    *_needs("the optimizer", f"{_OPTIMIZERS}AdamW {_OPTIMIZERS}AdamWFullPrecision"),
    *_arguments("the optimizer", f"{_OPTIMIZERS}AdamWConfig.make", "lr beta1 beta2 epsilon weight_decay"),
    *_arguments("the optimizer", f"{_OPTIMIZERS}AdamWFullPrecisionConfig.make", "lr beta1 beta2 epsilon weight_decay"),
    *_arguments("stochastic rounding", f"{_OPTIMIZERS}AdamWConfig.make", "stochastic_rounding"),
    *_needs("stochastic rounding", f"{_TENSOR}set_grad"),
    *_needs("the update", f"{_OPTIMIZERS}AdamW.zero_grad {_OPTIMIZERS}AdamW.step {_OPTIMIZERS}AdamW.set_lr"),
    *_needs("checkpoints", f"{_OPTIMIZERS}AdamW.get_state_dict {_OPTIMIZERS}AdamW.set_state_dict"),
    *_needs("the map of weights", "fc/weight ln_fc/gamma blocks/0/attention_norm/gamma blocks/0/mlp_norm/gamma"),
    *_needs("the map of weights", "blocks/0/attention/out_linear/weight blocks/0/mlp/w2/weight"),
    *_needs("the map of weights", "blocks/0/attention/q_linear/weight blocks/0/attention/kv_linear/weight", "B"),
    *_needs("the map of weights", "blocks/0/mlp/w1/weight blocks/0/mlp/w3/weight", "B"),
    *_needs("the map of weights", "blocks/0/attention/qkv_linear/weight blocks/0/mlp/w_gate_up/weight", NEW),
)


@dataclass(frozen=True)
class Build:
    """What this ttml is, found by looking. `has`: the names it has of those that not every build has.

    No one label: what distinguishes builds came one by one, and how projections are fused shows in a model's
    parameters alone (`BackendInfo.versions["ttml linears"]`).
    """

    has: frozenset[str]
    commit: str
    ttnn: str

    def versions(self) -> dict[str, str]:
        """Return what the manifest says of it."""
        return {"tt-metal": self.commit, "ttnn": self.ttnn, "ttml": self.features}

    @property
    def features(self) -> str:
        return f"with {', '.join(sorted(self.has)) or 'what every build has'}"


def contract(parameters: Iterable[str] | None = None) -> list[dict[str, Any]]:
    """Look for each line of NEEDS in the installed ttml and ttnn; return {name, kind, found, needed_for, generations}.

    `found` is None where it cannot be told: an argument of a binding without a signature, or a parameter while
    `parameters` (the names of a small Llama's) is not given, because that needs an open device.
    """
    tails = None if parameters is None else {tail_of(name) for name in parameters}
    rows = []
    for need in NEEDS:
        found = (None if tails is None else need.name in tails) if need.kind == "parameter" else _find(need.name)
        row = {"name": need.name, "kind": need.kind, "found": found}
        rows.append(row | {"needed_for": need.needed_for, "generations": need.generations})
    return rows


def _find(name: str) -> bool | None:
    path, _, argument = name.rstrip(")").partition("(")
    try:
        value = _resolve(path)
    except (ImportError, AttributeError):
        return False
    return _accepts(value, argument) if argument else True


def _resolve(path: str) -> Any:
    module, *names = path.split(".")
    value: Any = importlib.import_module(module)
    for name in names:
        module = f"{module}.{name}"
        if not hasattr(value, name) and inspect.ismodule(value):
            with contextlib.suppress(ModuleNotFoundError):
                importlib.import_module(module)
        value = getattr(value, name)
    return value


def _accepts(function: Any, argument: str) -> bool | None:
    """Return whether `function` has that argument; a nanobind one tells it in its docstring, or not at all (None)."""
    try:
        return argument in inspect.signature(function).parameters
    except (TypeError, ValueError):
        text = str(getattr(function, "__doc__", None) or "")
        return bool(re.search(rf"\b{argument}:", text)) if "(" in text else None


# --- what is fused ---------------------------------------------------------------------------------------------------


def linears_by_name() -> list[str]:
    """Return the linear layers in a block of this build's Llama, such as `attention/q_linear`, without a device.

    To make a model, even a small one, devices must be open. But its layers are attributes, which the constructors of
    ttml.models.llama assign: their names stand in the code. Empty where these do not hold each projection once, as in
    a build that is made otherwise: then the model alone can tell, which `linears_of` asks in any case.
    """
    importlib.import_module("ttml.models.llama")
    modules = [value for name, value in sys.modules.items() if f"{name}.".startswith("ttml.models.llama.")]
    kinds = {
        base for module in modules for kind in vars(module).values() if inspect.isclass(kind) for base in kind.__mro__
    }
    constructors = [made for kind in kinds if inspect.isfunction(made := vars(kind).get("__init__"))]
    assigned = {name for made in constructors for name in made.__code__.co_names}
    linears = sorted(linear for linear in LINEARS if linear.partition("/")[2] in assigned)
    held = sorted(projection for linear in linears for projection in LINEARS[linear])
    return linears if held == sorted(get_args(Projection)) else []


def ties_by_name() -> tuple[list[list[Projection]], str]:
    """Return the groups of projections that this build fuses, and what tells it. Raises MachineError where none can."""
    if linears := linears_by_name():
        return ties_of(linears), f"this build of ttml, whose layers are {', '.join(linears)}"
    raise MachineError(
        "which projections this build of ttml fuses cannot be told before a device is open",
        where="model_config.lora.tie_groups=build, ttml.models.llama",
        todo="name the groups, as in model_config.lora.tie_groups=[[k_proj,v_proj]]; recipe doctor --ttml lists layers",
    )


# --- importing ------------------------------------------------------------------------------------------------------


def probe(hw: Hardware, devices: int) -> Build:
    """Import ttml and ttnn and say what they are. Raises MachineError where they are not what the backend needs.

    Importing them touches the driver, so this is done where a run has a board to train on, and nowhere else.
    """
    with explained("importing ttml", hw):
        ttnn = _import("ttnn", hw)
        ttml = _import("ttml", hw)
    _refuse_unrelated(ttml, hw)
    rows = contract()
    required = {need.name for need in NEEDS if need.required}
    if missing := [row["name"] for row in rows if row["found"] is False and row["name"] in required]:
        more = f" and {len(missing) - 5} more" if len(missing) > 5 else ""
        raise MachineError(
            f"this build of ttml is older than the recipes need: it has no {', '.join(missing[:5])}{more}",
            where=str(getattr(ttml, "__file__", "ttml")),
            todo=f"build tt-metal v0.74 or newer with tt-train; {image_hint(hw)}",
        )
    _refuse_too_few(ttnn, devices, hw)
    has = frozenset(row["name"] for row in rows if row["found"] and row["name"] not in required)
    return Build(has, _commit(), _version("ttnn"))


def _import(name: str, hw: Hardware) -> Any:
    try:
        return importlib.import_module(name)
    except ModuleNotFoundError as error:
        lacking = error.name or name
        what = f"{name} is not in this environment" if lacking == name else f"{name} is here without its {lacking}"
        cure = "ttml is on no package index: it is built with tt-metal (build_metal.sh --build-tt-train)"
        raise MachineError(what, where=f"HW={hw.name}", todo=f"{cure}; {image_hint(hw)}") from error


def _refuse_unrelated(ttml: Any, hw: Hardware) -> None:
    if not hasattr(ttml, "autograd"):
        raise MachineError(
            "the ttml in this environment is another package of that name (PyPI's has nothing to do with tt-train)",
            where=str(getattr(ttml, "__file__", "ttml")),
            todo=f"pip uninstall ttml, and put tt-train's own on the path; {image_hint(hw)}",
        )


def _refuse_too_few(ttnn: Any, devices: int, hw: Hardware) -> None:
    count = getattr(ttnn, "get_num_devices", None)
    with explained("counting the devices", hw):
        present = devices if count is None else int(count())
    if present < devices:
        raise MachineError(
            f"the mesh asks for {devices} devices, and ttnn finds {present}",
            where=f"HW={hw.name}, device_config.mesh_shape",
            todo="check the cards (tt-smi), give the container every /dev/tenstorrent node, or set a smaller mesh",
        )


def _commit() -> str:
    """Return the commit of tt-metal's tree; package metadata freezes at installation and is not to be trusted."""
    root = os.environ.get(HOME) or os.environ.get(ROOT)
    if not root:
        return "unknown"
    command = ["git", "-C", root, "describe", "--tags", "--always", "--dirty"]
    try:
        done = subprocess.run(command, capture_output=True, text=True, check=False, timeout=30)
    except (OSError, subprocess.TimeoutExpired):
        return "unknown"
    return done.stdout.strip() or "unknown"


def _version(package: str) -> str:
    try:
        return importlib.metadata.version(package)
    except importlib.metadata.PackageNotFoundError:
        return "unknown"


# --- errors ---------------------------------------------------------------------------------------------------------


@contextlib.contextmanager
def explained(doing: str, hw: Hardware, kind: type[RecipeError] = MachineError) -> Iterator[None]:
    """Turn what ttml, ttnn or tt-metal raise within into one error with its cure, where known_errors.yaml has it."""
    try:
        yield
    except RecipeError:
        raise
    except Exception as error:
        known = known_errors.match(str(error), "ttml")
        if known is None:
            raise
        said = " ".join(str(error).split())[:200]  # tt-metal's backtraces run to pages
        cure = f"{known.answer}; {image_hint(hw)}" if known.image else known.answer
        raise kind(f"{known.means}: {said}", where=f"{doing}, HW={hw.name}", todo=cure) from error
