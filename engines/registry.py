"""Which engine trains on which board."""

from __future__ import annotations

from common.engine import Engine, load_engine
from common.hardware import Hardware


def name_for(hw: Hardware) -> str:
    """Return the module of the engine that trains on `hw`, as a launch names it."""
    return "engines.cpu" if hw.is_cpu else "engines.ttml"


def engine_for(hw: Hardware) -> Engine:
    """Return the engine that trains on `hw`."""
    return load_engine(name_for(hw))
