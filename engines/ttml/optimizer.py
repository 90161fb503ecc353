"""ttml's optimizer of a run, and what this build's does with seeds and fp32 weights, which is found by trying."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import numpy as np

from common.config.schema import Training
from common.errors import MachineError
from common.hardware import TILE
from engines.ttml.hf_map import Entry
from engines.ttml.tensors import Array, Tensors

ROUNDS_BY_SEED = "stochastic rounding follows seed and step in this build: a resumed run rounds as an unbroken one"
ROUNDS_BY_ITSELF = (
    "stochastic rounding: this build draws its seeds by itself, as those before August 2026 do (tt-metal 48716): no "
    "two runs are alike, and a resumed run has other bits than an unbroken one"
)


NO_FP32 = "this build's fused AdamW takes bf16 weights alone (fp32 ones since tt-metal 57863, about October 2026)"


def make_optimizer(ttml: Any, parameters: Any, training: Training) -> Any:
    """Return the optimizer that `training` names over `parameters`, a NamedParameters."""
    options, optimizers = training.optimizer, ttml.optimizers
    values: dict[str, Any] = {
        "lr": training.learning_rate,
        "beta1": options.beta1,
        "beta2": options.beta2,
        "epsilon": options.epsilon,
        "weight_decay": options.weight_decay,
    }
    full = options.type == "AdamWFullPrecision"
    if not full:
        values["stochastic_rounding"] = options.stochastic_rounding
    kind = "AdamWFullPrecision" if full else "AdamW"
    # Not by create_optimizer, which takes a misspelt key in silence.
    return getattr(optimizers, kind)(parameters, getattr(optimizers, f"{kind}Config").make(**values))


def gains_in_fp32(training: Training, trained: Mapping[str, Entry]) -> list[str]:
    """Return the names of `trained` that are to be stored in fp32: gains of norms, a few kilobytes.

    A gain of 1 does not move in bf16 while an update is below 0.002, half a step of bf16; so it stays at 1.
    """
    wanted = training.optimizer.type == "AdamWFp32Norms"
    return [name for name, entry in trained.items() if wanted and len(entry.parts[0].shape) == 1]


def refuse_without_fp32(ttml: Any, io: Tensors, training: Training) -> None:
    """Raise MachineError where this build does not update fp32 weights as such."""
    if not takes_fp32(ttml, io, training):
        raise MachineError(
            NO_FP32,
            where="training_config.optimizer.type=AdamWFp32Norms",
            todo="set AdamWFullPrecision, or AdamW with stochastic_rounding, or use a newer build",
        )


def takes_fp32(ttml: Any, io: Tensors, training: Training) -> bool:
    """Say whether the fused AdamW updates fp32 weights, by updating a tile of them.

    A build that does not refuses them, or updates a bf16 copy of theirs and says nothing.
    """
    try:
        moved = updated_tile(ttml, io, training, "FLOAT32")
    except RuntimeError:
        return False
    return bool((moved != 1).all() and (np.abs(moved - 1) < 0.002).all())  # half a step of bf16 below 1


def rounding_note(ttml: Any, io: Tensors, training: Training) -> str:
    """Say whether stochastic rounding follows the seed here: a tile of ones is updated twice with the same one.

    Each of its 1024 values takes a bf16 step down with a probability of about a quarter: never alike by chance.
    """
    one, other = (updated_tile(ttml, io, training, "BFLOAT16").tobytes() for _ in range(2))
    return ROUNDS_BY_SEED if one == other else ROUNDS_BY_ITSELF


def updated_tile(ttml: Any, io: Tensors, training: Training, dtype: str) -> Array:
    """Return a tile of ones, stored as `dtype`, after an update of 0.001 towards zero, as it is stored."""
    ttml.autograd.AutoContext.get_instance().set_seed(training.seed)
    ones = np.ones((1, 1, TILE, TILE), np.float32)
    weight = io.new(ones, dtype, None)
    weight.set_requires_grad(True)
    weight.set_grad(io.new(ones, "BFLOAT16", None).get_value())
    parameters = ttml.NamedParameters()
    parameters["one tile"] = weight
    optimizer = make_optimizer(ttml, parameters, training)
    optimizer.set_lr(1e-3)
    optimizer.step()
    return io.read_first(weight)
