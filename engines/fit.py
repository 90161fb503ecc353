"""What every engine says of weights that are not those of their config.json."""

from __future__ import annotations

from collections.abc import Sequence

from common.errors import MachineError


def misfit(odd: Sequence[str]) -> MachineError:
    """Return the error of weights that are not their config.json's; `odd` says what is wrong with each tensor."""
    return MachineError(
        f"the weights do not fit the architecture: {'; '.join(odd[:5])}",
        where="model_config.base",
        todo="config.json and the safetensors files must belong together",
    )
