"""A double of `ttml.autograd`: the process-wide context, tensors with their precision views, and the graph.

Torch's autograd does the differentiation. An operation reads its inputs' bf16 view, computes in fp32 and stores bf16,
so that activations and the gradients between operations are rounded as on a board.
"""

from __future__ import annotations

import enum
import random
import time
from collections.abc import Callable, Sequence
from typing import Any

import ml_dtypes
import numpy as np
import torch
import ttnn
from ttnn import _metal_env, _switches

from . import _strict
from ._fabric import Fabric

RETAINED_FORWARDS = 8  # so many forward passes without reset_graph() fill the device's memory
OUT_OF_MEMORY = (
    "Out of Memory: Not enough space to allocate 262144000 B DRAM buffer across 12 banks, where each bank needs to "
    "store 21846016 B, but bank size is 1071821792 B (allocated: 1058111680 B, free: 13710112 B)"
)
DEFAULT_SEED = 5489  # the C++ generator's default seed


class GradMode(enum.Enum):
    ENABLED = 0
    DISABLED = 1


class PreferredPrecision(enum.Enum):
    HALF = 0
    FULL = 1
    NATIVE = 2


# --- context ----------------------------------------------------------------------------------------------------


class DistributedConfig:
    """Which kinds of parallelism the mesh is for."""

    def __init__(self, *, enable_ddp: bool = False, enable_tp: bool = False) -> None:
        self.enable_ddp = _strict.boolean("enable_ddp", enable_ddp)
        self.enable_tp = _strict.boolean("enable_tp", enable_tp)


class ParallelismContext:
    """A line mesh (at most one axis longer than 1) serves exactly one kind of parallelism."""

    def __init__(self, config: DistributedConfig, shape: Sequence[int]) -> None:
        wanted = config.enable_ddp + config.enable_tp
        long_axes = [axis for axis, extent in enumerate(shape) if extent > 1]
        if wanted != max(1, len(long_axes)):
            raise ttnn.fatal(f"a mesh of {list(shape)} cannot serve {wanted} kinds of parallelism")
        self._config, self._shape = config, shape
        axes = long_axes or [0]
        self._ddp_axis = axes[0] if config.enable_ddp else None

    def is_ddp_enabled(self) -> bool:
        return self._config.enable_ddp

    def get_ddp_axis(self) -> int | None:
        return self._ddp_axis

    def get_ddp_size(self) -> int:
        return 1 if self._ddp_axis is None else self._shape[self._ddp_axis]


class Graph:
    """What backward needs of the operations since the last reset."""

    def __init__(self) -> None:
        self.leaves: list[tuple[Tensor, torch.Tensor]] = []
        self.forwards = 0


@_strict.bound
class AutoContext:
    """The process-wide singleton: device, graph, gradient mode, generator."""

    _instance: AutoContext | None = None

    def __init__(self) -> None:
        self._device: ttnn.MeshDevice | None = None
        self._fabric: Fabric | None = None
        self._parallelism: ParallelismContext | None = None
        self._mode = GradMode.ENABLED
        self._graph = Graph()
        self._optimizer_steps = 0
        self._generator = random.Random(DEFAULT_SEED)

    @classmethod
    def get_instance(cls) -> AutoContext:
        if cls._instance is None:
            cls._instance = cls()
        return cls._instance

    def open_device(self, mesh_shape: Any = None, device_ids: Any = None) -> None:
        """Raises when a device is open, more are asked than present, another process holds them, or the fabric fails.

        On a board the last one waits for the lock, saying so again and again; here it gives up at once.
        """
        shape = [1, 1] if mesh_shape is None else list(mesh_shape)
        if len(shape) != 2:
            raise _strict.refuse("open_device(mesh_shape)", mesh_shape)
        if self._device is not None:
            raise ttnn.fatal("open_device was called after the device was created.")
        if _switches.BUSY:
            raise RuntimeError(
                "Waiting for lock 'CHIP_IN_USE_0_PCIe' which is currently held by thread TID: 81, PID: 81"
            )
        device = ttnn.MeshDevice([_strict.integer("mesh_shape", extent) for extent in shape])
        if device.get_num_devices() > _switches.DEVICES:
            raise RuntimeError(
                f"TT_THROW: Requested mesh is too big and is not rotatable: MeshShape({shape}) and SystemMesh "
                f"MeshShape([1, {_switches.DEVICES}]), offset MeshCoordinate([0, 0])"
            )
        _metal_env.descriptor()
        if self._fabric is not None:
            self._fabric.connect(device.get_num_devices())
        self._device = device

    def close_device(self) -> None:
        """Drops the device; calling it again is harmless. Disarms the fabric where builds have close_device_mesh."""
        self._device = self._parallelism = None
        if "close_device_mesh" not in _switches.WITHOUT:
            self._fabric = None
        self.reset_graph()

    def get_device(self) -> ttnn.MeshDevice:
        """The open device; opens a 1x1 one when there is none, after which `open_device` raises."""
        if self._device is None:
            self.open_device([1, 1])
        return self._device

    def set_seed(self, seed: int) -> None:
        """Seeds the C++ mt19937: dropout and, where the host draws its seed, stochastic rounding. Not the weights."""
        self._generator = random.Random(_strict.integer("set_seed", seed))  # Python's generator is an mt19937, too

    def get_generator_state(self) -> str:
        return " ".join(map(str, self._generator.getstate()[1]))

    def set_generator_state(self, state: str) -> None:
        self._generator.setstate((3, tuple(map(int, state.split())), None))

    def reset_graph(self) -> None:
        self._graph = Graph()

    def set_gradient_mode(self, mode: GradMode) -> None:
        self._mode = _strict.member("set_gradient_mode", mode, GradMode)

    def get_gradient_mode(self) -> GradMode:
        return self._mode

    def initialize_parallelism_context(self, config: DistributedConfig) -> None:
        """Once, after the device is open and before the model is built."""
        if self._parallelism is not None:
            raise ttnn.fatal("ParallelismContext is already initialized.")
        if self._device is None:
            raise ttnn.fatal("initialize_parallelism_context was called before open_device.")
        self._parallelism = ParallelismContext(config, self._device.shape)

    def is_parallelism_context_initialized(self) -> bool:
        return self._parallelism is not None

    def get_parallelism_context(self) -> ParallelismContext:
        if self._parallelism is None:
            raise ttnn.fatal("ParallelismContext is not initialized.")
        return self._parallelism


if _switches.GENERATION == "B":  # the generator's state is out of reach before generation C
    del AutoContext.get_generator_state, AutoContext.set_generator_state


def record_forward() -> None:
    """One forward pass of a model more in the graph; too many without a reset no longer fit."""
    graph = AutoContext.get_instance()._graph
    graph.forwards += 1
    if graph.forwards > RETAINED_FORWARDS:
        raise ttnn.fatal(OUT_OF_MEMORY)


def without_graph(module: Callable[..., Tensor], *inputs: Any) -> None:
    """Compute what is computed again later: no graph, and the generator as before."""
    context = AutoContext.get_instance()
    mode, drawn = context._mode, context._generator.getstate()
    context._mode = GradMode.DISABLED
    module(*inputs)
    context._mode = mode
    context._generator.setstate(drawn)


# --- tensors ----------------------------------------------------------------------------------------------------


@_strict.bound
class Tensor:
    """A tensor of the graph: a value with its precision views, a gradient, and a place in the graph.

    `requires_grad` is True unless said otherwise: masks and labels, too, would be given gradients.
    """

    def __init__(self, value: ttnn.Tensor, requires_grad: bool = True) -> None:
        self._native = _strict.member("Tensor", value, ttnn.Tensor)
        self._requires_grad = _strict.boolean("requires_grad", requires_grad)
        self._views: dict[PreferredPrecision, tuple[int, ttnn.Tensor]] = {}
        self._gradient: ttnn.Tensor | None = None
        self._graph: Graph | None = None
        self._node: torch.Tensor | None = None  # this tensor in torch's graph, while `_graph` is the current one
        self._is_result = False

    @staticmethod
    def from_numpy(
        numpy_tensor: Any, layout: ttnn.Layout = ttnn.Layout.TILE, new_type: Any = None, mapper: Any = None
    ) -> Tensor:
        """Copy an array to the device; without a mapper, to every device of the mesh.

        Takes int32, uint32, float32 and ml_dtypes' bfloat16, writable. Reads the raw buffer: strides are ignored.
        """
        array = _strict.member("from_numpy", numpy_tensor, np.ndarray)
        _strict.member("layout", layout, ttnn.Layout)
        known = array.dtype in (np.int32, np.uint32, np.float32, np.dtype(ml_dtypes.bfloat16))
        if not known or 0 in array.shape or not array.flags.writeable:
            raise TypeError(f"from_numpy: incompatible array: {array.dtype} {array.shape}, {array.flags.writeable=}")
        device = AutoContext.get_instance().get_device()
        data = _to_torch(_raw_buffer(array))
        if _switches.ORDINARY_SPECIALS and data.is_floating_point():
            data = _with_tensix_nans(data.to(torch.bfloat16)) if data.isnan().any() else data
        if new_type is not None:
            data = data.to(ttnn._STORED[_strict.member("new_type", new_type, ttnn.DataType)])
            if new_type is ttnn.DataType.UINT32:
                data = data % 2**32
        if mapper is None:
            copies = data.unsqueeze(0).repeat(device.get_num_devices(), *[1] * data.dim())
            return Tensor(ttnn.Tensor(copies, layout, None))
        _strict.member("mapper", mapper, ttnn.CppTensorToMesh)
        return Tensor(ttnn.Tensor(mapper.split(data), layout, mapper.topology))

    def to_numpy(self, new_type: Any = None, composer: Any = None, precision: Any = None) -> np.ndarray[Any, Any]:
        """Read to the host: by default the FULL view, which generation B caches and never refreshes.

        Generation C reads by default what is stored, and makes float32 of bf16 on the host.
        """
        if precision is None:
            precision = PreferredPrecision.NATIVE if _switches.GENERATION == "C" else PreferredPrecision.FULL
            if new_type is None and self._native.dtype is ttnn.DataType.BFLOAT16:
                new_type = ttnn.DataType.FLOAT32
        value = ttnn.host(self.get_value(precision), composer)
        if new_type is not None:
            value = value.to(ttnn._STORED[_strict.member("new_type", new_type, ttnn.DataType)])
        array: np.ndarray[Any, Any] = ttnn.as_numpy(value)
        return array

    # --- value ---

    def get_value(self, precision: PreferredPrecision = PreferredPrecision.HALF) -> ttnn.Tensor:
        """The buffer itself where it has the precision asked for, else a cached copy.

        Generation B keeps that copy although the buffer is written in place; C makes it anew.
        """
        _strict.member("precision", precision, PreferredPrecision)
        other = {
            (PreferredPrecision.HALF, torch.float32): ttnn.DataType.BFLOAT16,
            (PreferredPrecision.FULL, torch.bfloat16): ttnn.DataType.FLOAT32,
        }.get((precision, self._native.data.dtype))
        if other is None:
            return self._native
        version = self._native.data._version if _switches.GENERATION == "C" else 0
        if precision not in self._views or self._views[precision][0] != version:
            self._views[precision] = (version, ttnn.typecast(self._native, other))
        return self._views[precision][1]

    def _value_for_update(self) -> ttnn.Tensor:
        """What a fused optimizer writes in place: the bf16 view in B, even of an fp32 tensor; the buffer in C."""
        return self._native if _switches.GENERATION == "C" else self.get_value(PreferredPrecision.HALF)

    def set_value(self, value: ttnn.Tensor) -> None:
        """Take over the buffer of `value`; the views are dropped."""
        self._native = _strict.member("set_value", value, ttnn.Tensor)
        self._views, self._graph, self._node = {}, None, None

    def assign(self, other: Tensor) -> None:
        """Share the other tensor's bf16 buffer: nothing is copied. Generation C keeps the dtype that is stored here."""
        value = _strict.member("assign", other, Tensor).get_value()
        if _switches.GENERATION == "C" and other._native.dtype is not self._native.dtype:
            value = ttnn.typecast(other._native, self._native.dtype)
        elif _switches.GENERATION == "C":
            value = other._native
        self.set_value(value)

    def dtype(self) -> ttnn.DataType:
        """Of the FULL view: FLOAT32 for a bf16 tensor, and the view is made. Generation C: as stored."""
        return self._native.dtype if _switches.GENERATION == "C" else self.get_value(PreferredPrecision.FULL).dtype

    def shape(self) -> list[int]:
        """The logical shape on each device; of the HALF view, which is made for it where the tensor is fp32."""
        shape: list[int] = self.get_value().shape
        return shape

    get_shape = shape

    def get_rank(self) -> int:
        return len(self.shape())

    @property
    def tensor(self) -> Tensor:
        """Itself: whether a value has this attribute does not tell a Parameter from a tensor."""
        return self

    # --- gradient ---

    def get_requires_grad(self) -> bool:
        return self._requires_grad

    def set_requires_grad(self, requires_grad: bool) -> None:
        self._requires_grad = _strict.boolean("set_requires_grad", requires_grad)
        self._graph = self._node = None

    def is_grad_initialized(self) -> bool:
        return self._gradient is not None

    def get_grad(self) -> ttnn.Tensor:
        if self._gradient is None:
            raise ttnn.fatal("Tensor is not initialized")
        return self._gradient

    def set_grad(self, gradient: ttnn.Tensor) -> None:
        if _strict.member("set_grad", gradient, ttnn.Tensor).shape != self._native.shape:
            raise ttnn.fatal(f"Shapes of gradients are not equal. Expected {self._native.shape}, got {gradient.shape}")
        self._gradient = gradient

    def add_grad(self, gradient: ttnn.Tensor) -> None:
        """Accumulate in bf16; without effect on what requires no gradient."""
        if self._requires_grad:
            self.set_grad(gradient if self._gradient is None else ttnn.add(self._gradient, gradient))

    def backward(self, retain_graph: bool) -> None:
        """Accumulate gradients in every leaf that requires them. `retain_graph` has no default."""
        _strict.boolean("retain_graph", retain_graph)
        context = AutoContext.get_instance()
        if not self._is_result or self._graph is not context._graph or self._node is None:
            raise ttnn.fatal("This tensor has no associated gradient function.")
        if 0 < _switches.OOM_AT_STEP <= context._optimizer_steps + 1:
            raise ttnn.fatal(OUT_OF_MEMORY)
        while context._optimizer_steps + 1 == _switches.HANG_AT_STEP:
            time.sleep(1)
        self._node.backward(torch.ones_like(self._node), retain_graph=retain_graph)
        for tensor, leaf in context._graph.leaves:
            if leaf.grad is not None:
                tensor.add_grad(ttnn.Tensor(leaf.grad, ttnn.Layout.TILE, self._native.tensor_topology()))
                leaf.grad = None

    # --- operators: none is reflected, and there is no `/` in Python 3 ---

    def __add__(self, other: Any) -> Tensor:
        return apply(torch.add, self, _strict.member("+", other, Tensor))

    def __sub__(self, other: Any) -> Tensor:
        return multiply_like(torch.sub, self, _strict.member("-", other, Tensor))

    def __mul__(self, other: Any) -> Tensor:
        return multiply_like(torch.mul, self, other)

    def __div__(self, other: Any) -> Tensor:
        return multiply_like(torch.div, self, other)

    def _in_graph(self) -> torch.Tensor:
        """This tensor as a node of torch's graph; a result of an earlier graph is a leaf again."""
        context = AutoContext.get_instance()
        if self._node is None or self._graph is not context._graph:
            self._is_result, self._graph = False, context._graph
            self._node = self.get_value(PreferredPrecision.HALF).data.detach()
            if self._requires_grad and self._node.is_floating_point():
                self._node.requires_grad_()
                context._graph.leaves.append((self, self._node))
        return self._node


@_strict.bound
def create_tensor(tensor: ttnn.Tensor, requires_grad: bool = True) -> Tensor:
    return Tensor(tensor, requires_grad)


def apply(function: Callable[..., torch.Tensor], *inputs: Tensor, indices: Sequence[Tensor] = ()) -> Tensor:
    """An operation: `function` of the inputs' device data in fp32; its result is stored in bf16.

    The result is labelled as the first input that claims to be sharded, or of the `indices` that `function` uses.
    """
    context = AutoContext.get_instance()
    nodes = [tensor._in_graph() for tensor in inputs]
    enabled = context._mode is GradMode.ENABLED
    with torch.set_grad_enabled(enabled):
        node = _as_known(function(*(_as_known(node.float()) for node in nodes)).to(torch.bfloat16))
    labels = [tensor._native.tensor_topology() for tensor in (*inputs, *indices)]
    label = next((label for label in labels if not label.is_replicated()), labels[0])
    needed = any(tensor._requires_grad for tensor in inputs)
    result = Tensor(ttnn.Tensor(_with_tensix_nans(node), ttnn.Layout.TILE, label), requires_grad=needed)
    result._node, result._graph, result._is_result = node, context._graph, node.requires_grad
    return result


def _as_known(values: torch.Tensor) -> torch.Tensor:
    """The values as operations take them: with `ordinary_specials`, numbers all of them."""
    largest = torch.finfo(torch.bfloat16).max
    return values.nan_to_num(largest, largest, -largest) if _switches.ORDINARY_SPECIALS else values


def _with_tensix_nans(node: torch.Tensor) -> torch.Tensor:
    """The values of `node`; a NaN that was computed has the bits 0x7FFF, where numpy's and torch's have 0x7FC0."""
    values = node.data  # of which no version is counted: what the backward pass keeps is not taken for overwritten
    if (nans := values.isnan()).any():
        values.view(torch.int16)[nans] = 0x7FFF
    return values


def multiply_like(operation: Callable[..., torch.Tensor], a: Tensor, b: Any) -> Tensor:
    """A pointwise operation whose backward, unlike `add`'s, does not reduce a broadcast gradient: it fails."""
    if not isinstance(b, Tensor):
        factor = _strict.number("operand", b)
        return apply(lambda x: operation(x, factor), a)
    if a.shape() == b.shape():
        return apply(operation, a, b)
    message = f"gradient of a broadcast operand: shapes {a.shape()} and {b.shape()}"
    return apply(lambda x, y: fails_in_backward(operation(x, y), message), a, b)


def fails_in_backward(node: torch.Tensor, message: str) -> torch.Tensor:
    """`node`, the backward pass through which raises."""

    def fail(_gradient: torch.Tensor) -> None:
        raise ttnn.fatal(message)

    if node.requires_grad:
        node.register_hook(fail)
    return node


def _raw_buffer(array: np.ndarray[Any, Any]) -> np.ndarray[Any, Any]:
    """As many bytes as `array` has, from where its memory begins, whatever its strides say."""
    if array.flags.c_contiguous:
        return array
    owner = array
    while isinstance(owner.base, np.ndarray):
        owner = owner.base
    start = array.__array_interface__["data"][0] - owner.__array_interface__["data"][0]
    memory = owner.ravel(order="K").view(np.uint8)[start:]
    return np.resize(memory, array.nbytes).view(array.dtype).reshape(array.shape)


def _to_torch(array: np.ndarray[Any, Any]) -> torch.Tensor:
    """Over the array's own memory, where torch can: putting it on the devices copies it."""
    if array.dtype == ml_dtypes.bfloat16:
        return torch.from_numpy(array.view(np.uint16)).view(torch.bfloat16)
    return torch.from_numpy(array.astype(np.int64) if array.dtype == np.uint32 else array)
