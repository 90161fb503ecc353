"""ttml's optimizer of a run, and what this build's does with seeds."""

from __future__ import annotations

from typing import Any

import numpy as np

from common.config.schema import Training
from engines.ttml.tensors import Tensors

ROUNDS_BY_SEED = "stochastic rounding follows seed and step in this build: a resumed run rounds as an unbroken one"
ROUNDS_BY_ITSELF = (
    "stochastic rounding: this build draws its seeds by itself, as those before August 2026 do (tt-metal 48716): no "
    "two runs are alike, and a resumed run has other bits than an unbroken one"
)


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
    if options.type == "AdamW":
        values["stochastic_rounding"] = options.stochastic_rounding
    # Not by create_optimizer, which takes a misspelt key in silence.
    config = getattr(optimizers, f"{options.type}Config").make(**values)
    return getattr(optimizers, options.type)(parameters, config)


def rounding_note(ttml: Any, io: Tensors, training: Training) -> str:
    """Say whether stochastic rounding follows the seed here: a tile of ones is updated twice with the same one.

    Each of its 1024 values takes a bf16 step down with a probability of about a quarter: never alike by chance.
    """
    moved = []
    for _ in range(2):
        ttml.autograd.AutoContext.get_instance().set_seed(training.seed)
        weight = io.new(np.ones((1, 1, 32, 32), np.float32), "BFLOAT16", None)
        weight.set_requires_grad(True)
        weight.set_grad(io.new(np.ones((1, 1, 32, 32), np.float32), "BFLOAT16", None).get_value())
        parameters = ttml.NamedParameters()
        parameters["one tile"] = weight
        optimizer = make_optimizer(ttml, parameters, training)
        optimizer.set_lr(1e-3)  # a quarter of the step of bf16 below 1
        optimizer.step()
        moved.append(io.read_first(weight).tobytes())
    return ROUNDS_BY_SEED if moved[0] == moved[1] else ROUNDS_BY_ITSELF
