"""The CPU twin: PyTorch, one process or several. The functions are those of common.engine.Engine."""

from __future__ import annotations

import importlib.util
import sys
from collections.abc import Mapping
from contextlib import AbstractContextManager
from pathlib import Path
from typing import TYPE_CHECKING, Any

from common.errors import MachineError

if TYPE_CHECKING:
    from common.config import Config
    from common.engine import Backend
    from common.hardware import Hardware

# The projections that share one A unless they are named: those of the layers that tt-metal PR 52818 fuses.
TIES: list[list[Any]] = [["q_proj", "k_proj", "v_proj"], ["gate_proj", "up_proj"]]


def refuse_launch(_hw: Hardware, _config: Config) -> None:
    """Raise MachineError where there is no torch."""
    if importlib.util.find_spec("torch") is None:
        raise MachineError(
            "the CPU twin needs torch, which is not in this environment",
            where=sys.executable,
            todo="make setup PYTHON=python3.11; or, with PyTorch's index in reach, make lock and make setup",
        )


def refuse_model(architecture: Mapping[str, Any]) -> None:
    """Raise MachineError for an activation other than SiLU, whose derivative alone stands in blocks.py."""
    if (activation := architecture.get("hidden_act", "silu")) != "silu":
        raise MachineError(
            f"the CPU twin cannot train this model: hidden_act is {activation}, it knows silu",
            where="config.json of model_config.base",
            todo="choose another model",
        )


def precision_for(_hw: Hardware, cpuinfo: Path = Path("/proc/cpuinfo")) -> tuple[str, str]:
    """Return bf16-mixed where this CPU multiplies bf16 in hardware, else fp32, and the sentence that says why."""
    flags = cpuinfo.read_text(encoding="utf-8").split() if cpuinfo.is_file() else []
    found = [flag for flag in ("amx_bf16", "avx512_bf16") if flag in flags]
    if found:
        return "bf16-mixed", f"this CPU multiplies bf16 in hardware ({found[0]})"
    return "fp32", "this CPU has no bf16 matrix units"


def tie_groups_for(_hw: Hardware) -> tuple[list[list[Any]], str]:
    """Return the groups that newer builds of ttml fuse: a checkpoint can go on there."""
    return TIES, "the CPU twin, as newer builds of ttml have it"


def refuse_too_large(_hw: Hardware, _config: Config, _architecture: Mapping[str, Any], _length: int) -> None:
    """Refuse nothing: the memory is the host's, which can swap."""


def open_backend(hw: Hardware, config: Config) -> AbstractContextManager[Backend]:
    """Open the CPU engine; this imports torch, and raises MachineError where there is none."""
    refuse_launch(hw, config)
    from engines.cpu.engine import open_cpu

    return open_cpu(config)
