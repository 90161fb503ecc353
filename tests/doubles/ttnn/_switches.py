"""How this double is set: read once, at import, from the variables that `tests.doubles.environment` documents."""

from __future__ import annotations

import os

_PREFIX = "TTML_DOUBLE_"


def _value(name: str, default: str) -> str:
    return os.environ.get(_PREFIX + name, default)


GENERATION = _value("GENERATION", "B")
assert GENERATION in ("B", "C"), GENERATION
DEVICES = int(_value("DEVICES", "1"))
_fused = _value("FUSED", "default")
FUSED = {"B": [], "C": ["qkv", "gate_up"]}[GENERATION] if _fused == "default" else _fused.split()
CALLS_MLP_LAYERS = _value("CALLS_MLP_LAYERS", "0") == "1"
WITHOUT = _value("WITHOUT", "").split()
BAD_CAST = _value("BAD_CAST", "0") == "1"
NEEDS_RUNTIME_ROOT = _value("NEEDS_RUNTIME_ROOT", "0") == "1"
BUSY = _value("BUSY", "0") == "1"
OOM_AT_STEP = int(_value("OOM_AT_STEP", "0"))
HANG_AT_STEP = int(_value("HANG_AT_STEP", "0"))
NO_UPDATE_FROM_STEP = int(_value("NO_UPDATE_FROM_STEP", "0"))
KERNEL_FAULTS = _value("KERNEL_FAULTS", "").split()
ORDINARY_SPECIALS = _value("ORDINARY_SPECIALS", "0") == "1"
