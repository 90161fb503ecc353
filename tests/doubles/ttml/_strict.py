"""nanobind's strictness: a wrong argument type is a TypeError, and a function's signature is in its docstring alone."""

from __future__ import annotations

import inspect
from typing import Any, TypeVar

import numpy as np

Owner = TypeVar("Owner")


def bound(owner: Owner) -> Owner:
    """Give a function, or those of a class or namespace, what a bound C++ one has.

    That is no signature for `inspect`, and a docstring that begins with it: `name(self, x: object, ...)`.
    """
    found = [owner] if inspect.isfunction(owner) else list(vars(owner).values())
    for member in found:
        function = getattr(member, "__func__", member)  # of static and class methods
        if inspect.isfunction(function) and not (
            function.__name__.startswith("_") or hasattr(function, "__signature__")
        ):
            names = ", ".join(f"{name}: object" for name in inspect.signature(function).parameters)
            function.__doc__ = f"{function.__name__}({names}) -> object\n\n{function.__doc__ or ''}"
            function.__signature__ = None, "nanobind has none"  # type: ignore[attr-defined]  # `inspect` raises at it
    return owner


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
