"""Which engine trains on which board."""

from __future__ import annotations

from common.engine import Engine
from common.hardware import Hardware
from engines import cpu, ttml


def engine_for(hw: Hardware) -> Engine:
    """Return the engine that trains on `hw`; the type checker holds its module to the protocol here."""
    if hw.is_cpu:
        return cpu
    return ttml


def name_for(hw: Hardware) -> str:
    """Return the module of the engine that trains on `hw`, as a launch names it."""
    return (cpu if hw.is_cpu else ttml).__name__
