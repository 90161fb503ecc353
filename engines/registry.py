"""Which engine trains on which board, and what it cannot do there."""

from __future__ import annotations

import importlib.util
import sys
from collections.abc import Mapping
from contextlib import AbstractContextManager
from pathlib import Path
from typing import Any

from common.config import Config
from common.engine import Backend
from common.errors import MachineError
from common.hardware import Hardware


def open_backend(hw: Hardware, config: Config) -> AbstractContextManager[Backend]:
    """The engine for `hw`, opened; closed on leaving the context, whatever happened."""
    if hw.is_cpu:
        from engines.cpu.engine import open_cpu

        return open_cpu(config)
    from engines.ttml.engine import open_ttml

    return open_ttml(hw, config)


def refuse_without_engine(hw: Hardware, config: Config) -> None:
    """Raise where this machine cannot train `config` on `hw`; asked before data or weights are fetched.

    MachineError for what the machine lacks, UsageError for a key that the engine cannot honour.
    """
    if not hw.is_cpu:
        from engines.ttml.engine import refuse_without_ttml

        refuse_without_ttml(hw, config)
    elif importlib.util.find_spec("torch") is None:
        raise MachineError(
            "the CPU twin needs torch, which is not in this environment",
            where=sys.executable,
            todo="make setup PYTHON=python3.11; or, with PyTorch's index in reach, make lock and make setup",
        )


def refuse_model(hw: Hardware, architecture: Mapping[str, Any]) -> None:
    """Raise MachineError where the engine for `hw` cannot compute a Llama of `architecture`."""
    if not hw.is_cpu:
        from engines.ttml.limits import refuse_architecture

        refuse_architecture(architecture)


def precision_for(hw: Hardware, cpuinfo: Path = Path("/proc/cpuinfo")) -> tuple[str, str]:
    """What `precision: auto` means on `hw`, and the sentence why."""
    if hw.arch != "cpu":
        return "bf16", f"{hw.name} trains in bf16"
    flags = cpuinfo.read_text(encoding="utf-8").split() if cpuinfo.is_file() else []
    found = [flag for flag in ("amx_bf16", "avx512_bf16") if flag in flags]
    if found:
        return "bf16-mixed", f"this CPU multiplies bf16 in hardware ({found[0]})"
    return "fp32", "this CPU has no bf16 matrix units"
