"""A double of `ttml.optimizers`: AdamW over bf16 weights and moments, and AdamWFullPrecision over fp32 masters."""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass, replace
from typing import Any

import torch
import ttnn
from ttnn import _switches

from . import _strict
from ._parameters import NamedParameters
from .autograd import AutoContext, PreferredPrecision, Tensor, create_tensor

# One generator per device, as each has its own; no seed of the host reaches them in generation B.
_device_generators = [torch.Generator().manual_seed(1000 + device) for device in range(_switches.DEVICES)]


@dataclass
class _Config:
    lr: float
    beta1: float
    beta2: float
    epsilon: float
    weight_decay: float
    amsgrad: bool

    def __post_init__(self) -> None:
        for name, value in vars(self).items():
            check = _strict.boolean if name in ("amsgrad", "stochastic_rounding") else _strict.number
            setattr(self, name, check(name, value))


@_strict.bound
@dataclass
class AdamWConfig(_Config):
    stochastic_rounding: bool

    @classmethod
    def make(
        cls,
        lr: float,
        beta1: float,
        beta2: float,
        epsilon: float,
        weight_decay: float,
        amsgrad: bool = False,
        stochastic_rounding: bool = False,
    ) -> AdamWConfig:
        """The keyword is `epsilon`: `eps` is refused."""
        return cls(lr, beta1, beta2, epsilon, weight_decay, amsgrad, stochastic_rounding)


@_strict.bound
@dataclass
class AdamWFullPrecisionConfig(_Config):
    @classmethod
    def make(
        cls, lr: float, beta1: float, beta2: float, epsilon: float, weight_decay: float, amsgrad: bool = False
    ) -> AdamWFullPrecisionConfig:
        return cls(lr, beta1, beta2, epsilon, weight_decay, amsgrad)


@_strict.bound
class OptimizerBase:
    """State exists for the parameters that require gradients now; `step` looks it up for all that have one then."""

    MAPS: tuple[str, ...] = ("exp_avg", "exp_avg_sq")
    STORED = ttnn.DataType.BFLOAT16

    def __init__(self, parameters: NamedParameters, config: _Config) -> None:
        self._parameters = _strict.member("parameters", parameters, NamedParameters)
        if config.amsgrad:
            raise NotImplementedError("amsgrad is not part of the double")
        self._config = replace(config)
        self._maps = {name: NamedParameters() for name in self.MAPS}
        for name, tensor in parameters.items():
            if tensor.get_requires_grad():
                stored = self._stored(name, tensor)
                for slot, state in self._maps.items():
                    value = ttnn.typecast(tensor.get_value(PreferredPrecision.NATIVE), stored)
                    if slot != "master_weights":
                        value.data.zero_()
                    state[name] = create_tensor(value, False)
        self._set_steps(0)

    def _stored(self, name: str, tensor: Tensor) -> ttnn.DataType:
        """The dtype of the state of a parameter. Generation C refuses an fp32 one that it would not update in fp32."""
        if _switches.GENERATION == "C" and tensor.get_value(PreferredPrecision.NATIVE).dtype is ttnn.DataType.FLOAT32:
            raise ttnn.fatal(f"{type(self).__name__} rejects the fp32 parameter {name}")
        return self.STORED

    def get_lr(self) -> float:
        return self._config.lr

    def set_lr(self, lr: float) -> None:
        self._config.lr = _strict.number("set_lr", lr)

    def zero_grad(self) -> None:
        """Writes zeros where there is a gradient: it stays initialized."""
        for tensor in self._parameters.values():
            if tensor.get_requires_grad() and tensor.is_grad_initialized():
                value = tensor.get_value()
                tensor.set_grad(ttnn.Tensor(torch.zeros_like(value.data), value.layout, value.tensor_topology()))

    def get_state_dict(self) -> dict[str, Any]:
        """The maps refer to the live state. Since May 2026 (tt-metal 43320) every hyper-parameter is in it."""
        return {"steps": self._steps, **vars(self._config), **self._maps}

    def set_state_dict(self, state: Mapping[str, Any]) -> None:
        """Takes maps and hyper-parameters over as they are: neither names nor shapes are checked.

        Generation B computes the powers of the betas that it had before, not of those it is given (tt-metal 53212).
        """
        steps = _strict.integer("steps", state["steps"])
        self._set_steps(steps)
        self._config = type(self._config)(**{key: state[key] for key in vars(self._config)})
        if _switches.GENERATION == "C":
            self._set_steps(steps)
        self._maps = {name: _strict.member(name, state[name], NamedParameters) for name in self.MAPS}

    def _set_steps(self, steps: int) -> None:
        self._steps = steps
        self._beta1_power, self._beta2_power = self._config.beta1**steps, self._config.beta2**steps

    def step(self) -> None:
        """Update every parameter that has a gradient; none at all is no error."""
        AutoContext.get_instance()._optimizer_steps += 1
        self._steps += 1
        self._beta1_power *= self._config.beta1
        self._beta2_power *= self._config.beta2
        if 0 < _switches.NO_UPDATE_FROM_STEP <= self._steps:
            return
        for name, tensor in self._parameters.items():
            if tensor.is_grad_initialized():
                if name not in self._maps["exp_avg"]:
                    raise IndexError("unordered_map::at")
                self._update(name, tensor)

    def _update(self, name: str, tensor: Tensor) -> None:
        raise NotImplementedError

    def _adamw(self, weight: torch.Tensor, gradient: torch.Tensor, first: Tensor, second: Tensor) -> torch.Tensor:
        """The fused kernel: moments are written in place, the new weight is returned, all computed in fp32."""
        config, native = self._config, PreferredPrecision.NATIVE
        g, m, v = gradient.float(), first.get_value(native).data, second.get_value(native).data
        new_m = m.float() * config.beta1 + g * (1 - config.beta1)
        new_v = v.float() * config.beta2 + g.square() * (1 - config.beta2)
        m.copy_(new_m)
        v.copy_(new_v)
        denominator = new_v.sqrt() / math.sqrt(1 - self._beta2_power) + config.epsilon
        decayed = weight.float() * (1 - config.lr * config.weight_decay)
        return decayed - config.lr / (1 - self._beta1_power) * new_m / denominator


@_strict.bound
class AdamW(OptimizerBase):
    """bf16 weights, written in place behind the back of their cached fp32 views; bf16 moments.

    An update below half a bf16 step is lost, unless stochastic rounding is on. Generation C takes fp32 weights as well
    (tt-metal 57863): their moments are fp32, and they are not rounded.
    """

    _config: AdamWConfig

    def __init__(self, parameters: NamedParameters, config: AdamWConfig) -> None:
        super().__init__(parameters, _strict.member("config", config, AdamWConfig))

    def _stored(self, name: str, tensor: Tensor) -> ttnn.DataType:
        native = tensor.get_value(PreferredPrecision.NATIVE).dtype
        return native if _switches.GENERATION == "C" else super()._stored(name, tensor)

    def step(self) -> None:
        if self._config.stochastic_rounding and _switches.GENERATION == "C":  # one seed from the host for every device
            seed = AutoContext.get_instance()._generator.getrandbits(32)
            self._generators = [torch.Generator().manual_seed(seed) for _ in _device_generators]
        else:
            self._generators = _device_generators
        super().step()

    def _update(self, name: str, tensor: Tensor) -> None:
        weight, gradient = tensor._value_for_update(), tensor.get_grad()
        updated = self._adamw(weight.data, gradient.data, self._maps["exp_avg"][name], self._maps["exp_avg_sq"][name])
        rounded = self._config.stochastic_rounding and weight.dtype is ttnn.DataType.BFLOAT16
        weight.data.copy_(self._stochastically_rounded(updated) if rounded else updated)
        weight.update_tensor_topology(gradient.tensor_topology())

    def _stochastically_rounded(self, values: torch.Tensor) -> torch.Tensor:
        """To the bf16 above or below, with the probability of the distance; each device draws for itself."""
        noise = [
            torch.randint(0, 1 << 16, part.shape, generator=generator, dtype=torch.int32)
            for part, generator in zip(values, self._generators, strict=False)
        ]
        return ((values.view(torch.int32) + torch.stack(noise)) & ~0xFFFF).view(torch.float32)


@_strict.bound
class AdamWFullPrecision(OptimizerBase):
    """fp32 masters and moments; parameters are replaced by the rounded masters at every step, views and all."""

    MAPS = ("master_weights", "exp_avg", "exp_avg_sq")
    STORED = ttnn.DataType.FLOAT32

    def __init__(self, parameters: NamedParameters, config: AdamWFullPrecisionConfig) -> None:
        super().__init__(parameters, _strict.member("config", config, AdamWFullPrecisionConfig))

    def _update(self, name: str, tensor: Tensor) -> None:
        gradient = tensor.get_grad()
        master = self._maps["master_weights"][name].get_value(PreferredPrecision.FULL)
        updated = self._adamw(master.data, gradient.data, self._maps["exp_avg"][name], self._maps["exp_avg_sq"][name])
        master.data.copy_(updated)
        visible = ttnn.typecast(master, ttnn.DataType.BFLOAT16)
        visible.update_tensor_topology(gradient.tensor_topology())
        tensor.set_value(visible)


def create_optimizer(config: Mapping[str, Any], parameters: NamedParameters) -> OptimizerBase:
    """By `type`; keys have defaults, and one that nobody knows (`eps`, `learning_rate`) is ignored."""
    defaults = {"lr": 1e-3, "beta1": 0.9, "beta2": 0.999, "epsilon": 1e-8, "weight_decay": 1e-2, "amsgrad": False}
    values: dict[str, Any] = {key: config.get(key, default) for key, default in defaults.items()}
    if config["type"] == "AdamW":
        rounding = config.get("stochastic_rounding", False)
        return AdamW(parameters, AdamWConfig.make(**values, stochastic_rounding=rounding))
    if config["type"] == "AdamWFullPrecision":
        return AdamWFullPrecision(parameters, AdamWFullPrecisionConfig.make(**values))
    raise RuntimeError(f"Unknown optimizer type: {config['type']}")
