"""A double of `ttml.modules`: modules, linear layers, LoRA."""

from __future__ import annotations

import enum
import math
import re
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from typing import Any

import numpy as np
import ttnn

from . import _ops, init
from ._parameters import NamedParameters
from .autograd import Tensor


class RunMode(enum.Enum):
    TRAIN = 0
    EVAL = 1


class Parameter:
    """Registers a tensor with the module it is an attribute of."""

    def __init__(self, tensor: Tensor) -> None:
        self.tensor = tensor


class AbstractModuleBase:
    """Children and parameters are the attributes that are modules and Parameters."""

    def __init__(self) -> None:
        self._name = type(self).__name__
        self._mode = RunMode.TRAIN

    def __call__(self, *args: Any, **kwargs: Any) -> Tensor:
        result: Tensor = self.forward(*args, **kwargs)  # type: ignore[attr-defined]
        return result

    def create_name(self, name: str) -> None:
        """The first word of every parameter's name; the class's name unless set."""
        self._name = name

    def train(self) -> None:
        self._set_mode(RunMode.TRAIN)

    def eval(self) -> None:
        """Turns dropout off, and nothing else: gradients are recorded as before."""
        self._set_mode(RunMode.EVAL)

    def get_run_mode(self) -> RunMode:
        return self._mode

    def _set_mode(self, mode: RunMode) -> None:
        self._mode = mode
        for _, child in self.named_children():
            child._set_mode(mode)

    def named_children(self) -> Iterator[tuple[str, AbstractModuleBase]]:
        """In alphabetical order, whatever the order of registration."""
        yield from sorted((k, v) for k, v in vars(self).items() if isinstance(v, AbstractModuleBase))

    def named_parameters(self) -> Iterator[tuple[str, Tensor]]:
        """Dotted paths, without the root's name."""
        for name, tensor in self.parameters().items():
            yield name.split("/", 1)[1].replace("/", "."), tensor

    def parameters(self) -> NamedParameters:
        """`Root/child/.../name` to tensor, breadth first; of a shared tensor only the first name is kept."""
        found, seen = NamedParameters(), set()
        level: list[tuple[str, AbstractModuleBase]] = [(self._name, self)]
        while level:
            for path, module in level:
                for name, value in sorted(vars(module).items(), key=lambda item: item[0]):
                    if isinstance(value, Parameter) and id(value.tensor) not in seen:
                        seen.add(id(value.tensor))
                        found[f"{path}/{name}"] = value.tensor
            level = [(f"{path}/{name}", child) for path, module in level for name, child in module.named_children()]
        return found


class ModuleList(AbstractModuleBase):
    """Its children are called 0, 1, 2, ..."""

    def __init__(self, modules: Sequence[AbstractModuleBase]) -> None:
        super().__init__()
        for index, module in enumerate(modules):
            setattr(self, str(index), module)

    def __iter__(self) -> Iterator[AbstractModuleBase]:
        for index in range(len(list(self.named_children()))):
            yield getattr(self, str(index))


class LinearLayer(AbstractModuleBase):
    """weight (1,1,out,in), uniform in +-1/sqrt(in); bias (1,1,1,out)."""

    def __init__(self, in_features: int, out_features: int, has_bias: bool = True) -> None:
        super().__init__()
        self.in_features, self.out_features = in_features, out_features
        bound = 1.0 / math.sqrt(in_features)
        self.weight = Parameter(init.uniform(-bound, bound)((1, 1, out_features, in_features)))
        self.bias = Parameter(init.uniform(-bound, bound)((1, 1, 1, out_features))) if has_bias else None

    def forward(self, x: Tensor) -> Tensor:
        return _ops.linear(x, self.weight.tensor, self.bias.tensor if self.bias else None)


class Embedding(AbstractModuleBase):
    """weight (1,1,rows,features), N(0, 0.02)."""

    def __init__(self, rows: int, features: int) -> None:
        super().__init__()
        self.weight = Parameter(init.normal(0.0, 0.02)((1, 1, rows, features)))

    def forward(self, ids: Tensor) -> Tensor:
        return _ops.embedding(ids, self.weight.tensor)


# --- LoRA -------------------------------------------------------------------------------------------------------


@dataclass
class LoraConfig:
    rank: int = 8
    alpha: float = 16.0
    target_modules: list[str] = field(default_factory=list)
    use_rslora: bool = False
    is_bias_trainable: bool = False
    trainable_modules: list[str] = field(default_factory=list)
    lora_dropout: float = 0.0


class LoraLinear(AbstractModuleBase):
    """A frozen linear layer plus scale * B A. lora_A comes from numpy's global generator, lora_B is zero."""

    def __init__(self, base: LinearLayer, config: LoraConfig) -> None:
        super().__init__()
        self.in_features, self.out_features = base.in_features, base.out_features
        self.weight, self.bias = base.weight, base.bias
        if self.bias:
            self.bias.tensor.set_requires_grad(config.is_bias_trainable)
        self.scaling = config.alpha / (math.sqrt(config.rank) if config.use_rslora else config.rank)
        self.dropout_prob = config.lora_dropout
        bound = 1.0 / math.sqrt(self.in_features)
        down = np.random.uniform(-bound, bound, (1, 1, config.rank, self.in_features))
        self.lora_A = Parameter(_bf16(down))
        self.lora_B = Parameter(_bf16(np.zeros((1, 1, self.out_features, config.rank))))

    def forward(self, x: Tensor) -> Tensor:
        base = _ops.linear(x, self.weight.tensor, self.bias.tensor if self.bias else None)
        if self._mode is RunMode.TRAIN and self.dropout_prob > 0:
            x = _ops.dropout(x, self.dropout_prob)
        return base + _ops.linear(_ops.linear(x, self.lora_A.tensor), self.lora_B.tensor) * self.scaling


def _bf16(values: np.ndarray[tuple[int, ...], np.dtype[np.float64]]) -> Tensor:
    return Tensor.from_numpy(values.astype(np.float32), ttnn.Layout.TILE, ttnn.DataType.BFLOAT16)


class LoraModel(AbstractModuleBase):
    """Freezes `model` and replaces, in place, every linear layer that a target pattern is found in the path of.

    Patterns are searched in dotted paths ("blocks.0.attention.q_linear"). A pattern that matches nothing is ignored;
    one that also hits anything but a plain linear layer raises. `trainable_modules` are substrings of slash paths.
    """

    def __init__(self, model: AbstractModuleBase, config: LoraConfig) -> None:
        super().__init__()
        self.model = model
        for _, tensor in model.named_parameters():
            tensor.set_requires_grad(False)
        self._inject(model, "", [re.compile(pattern) for pattern in config.target_modules], config)
        for path, tensor in model.parameters().items():
            if any(part in path for part in config.trainable_modules):
                tensor.set_requires_grad(True)

    def _inject(
        self, module: AbstractModuleBase, prefix: str, patterns: list[re.Pattern[str]], config: LoraConfig
    ) -> None:
        for name, child in list(module.named_children()):
            path = f"{prefix}.{name}" if prefix else name
            if not any(pattern.search(path) for pattern in patterns):
                self._inject(child, path, patterns, config)
            elif type(child) is LinearLayer:
                setattr(module, name, LoraLinear(child, config))
            else:
                raise RuntimeError(f"Cannot apply LoRA to '{path}': '{type(child).__name__}' is not a supported type")

    def forward(self, *args: Any, **kwargs: Any) -> Tensor:
        return self.model(*args, **kwargs)
