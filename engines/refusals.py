"""Errors that every engine words alike: weights that do not fit, and a step that is not finite."""

from __future__ import annotations

from collections.abc import Sequence

from common.errors import MachineError, TrainingError


def misfit(odd: Sequence[str]) -> MachineError:
    """Return the error of weights that are not their config.json's; `odd` says what is wrong with each tensor."""
    return MachineError(
        f"the weights do not fit the architecture: {'; '.join(odd[:5])}",
        where="model_config.base",
        todo="config.json and the safetensors files must belong together",
    )


def not_finite(loss: float, norm: float, learning_rate: float, step: int) -> TrainingError:
    """Return the error of a step whose update was refused."""
    return TrainingError(
        f"step {step} is not finite: loss {loss}, gradient norm {norm}; the update was refused",
        where=f"step {step}, learning rate {learning_rate:.3g}",
        todo="resume with a lower learning rate, or look at the batch: recipe data show --step",
    )
