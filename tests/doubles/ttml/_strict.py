"""nanobind's strictness: a wrong argument type is a TypeError, never converted."""

from __future__ import annotations

from typing import Any

import numpy as np


def refuse(what: str, value: object) -> TypeError:
    return TypeError(f"{what}: incompatible function arguments: got {type(value).__name__}")


def boolean(what: str, value: object) -> bool:
    """True or False; 0, 1 and numpy's booleans are refused."""
    if not isinstance(value, bool):
        raise refuse(what, value)
    return value


def integer(what: str, value: object) -> int:
    if isinstance(value, (bool, np.generic)) or not isinstance(value, int):
        raise refuse(what, value)
    return value


def number(what: str, value: object) -> float:
    """A Python int or float, as the C++ side stores it: in fp32."""
    if isinstance(value, bool) or not isinstance(value, (int, float)):
        raise refuse(what, value)
    return float(np.float32(value))


def member(what: str, value: Any, kind: type) -> Any:
    """An instance of `kind`; for an enum, a member and not its value or name."""
    if not isinstance(value, kind):
        raise refuse(what, value)
    return value
