"""Tenstorrent boards: ttml (tt-train) over ttnn. The functions are those of common.engine.Engine.

What they need is imported in them: a board's host asks this package for a descriptor, and has no numpy.
"""

from __future__ import annotations

from collections.abc import Mapping
from contextlib import AbstractContextManager
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from common.config import Config
    from common.engine import Backend
    from common.hardware import Hardware


def refuse_launch(hw: Hardware, config: Config) -> None:
    """Raise UsageError or MachineError where `config` cannot be trained on `hw`; imports ttml, opens no device."""
    from engines.ttml.engine import refuse_without_ttml

    refuse_without_ttml(hw, config)


def refuse_model(architecture: Mapping[str, Any]) -> None:
    """Raise MachineError for a Llama that ttml cannot compute."""
    from engines.ttml.limits import refuse_architecture

    refuse_architecture(architecture)


def precision_for(hw: Hardware) -> tuple[str, str]:
    """Return bf16: boards train in nothing else."""
    return "bf16", f"{hw.name} trains in bf16"


def tie_groups_for(_hw: Hardware) -> tuple[list[list[Any]], str]:
    """Return the groups that this build of ttml fuses. Raises MachineError where it cannot be told without a device."""
    from engines.ttml.contract import ties_by_name

    return ties_by_name()


def refuse_too_large(hw: Hardware, config: Config, architecture: Mapping[str, Any], length: int) -> None:
    """Raise UsageError where training cannot fit into a chip."""
    from engines.ttml import memory

    memory.refuse_too_large(hw, config, architecture, length)


def open_backend(hw: Hardware, config: Config) -> AbstractContextManager[Backend]:
    """Open the board's devices; this imports ttml."""
    from engines.ttml.engine import open_ttml

    return open_ttml(hw, config)
