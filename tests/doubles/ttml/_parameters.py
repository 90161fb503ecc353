"""A double of `ttml.NamedParameters`, a C++ unordered_map."""

from __future__ import annotations

import itertools
import random
from collections.abc import Iterator

from . import _strict
from .autograd import Tensor

_maps = itertools.count()


@_strict.bound
class NamedParameters:
    """Name to tensor, in no particular order: two maps of the same names are walked in different orders.

    No dict: no `get`, `pop` or `setdefault`, and no Mapping. It holds references, as the C++ map holds pointers.
    """

    def __init__(self) -> None:
        self._tensors: dict[str, Tensor] = {}
        self._order = next(_maps)

    def __setitem__(self, name: str, tensor: Tensor) -> None:
        self._tensors[_strict.member("name", name, str)] = _strict.member("value", tensor, Tensor)

    def __getitem__(self, name: str) -> Tensor:
        return self._tensors[name]

    def __contains__(self, name: object) -> bool:
        return name in self._tensors

    def __len__(self) -> int:
        return len(self._tensors)

    def __iter__(self) -> Iterator[str]:
        names = sorted(self._tensors)
        random.Random(self._order).shuffle(names)
        return iter(names)

    def keys(self) -> list[str]:
        return list(self)

    def values(self) -> list[Tensor]:
        return [self._tensors[name] for name in self]

    def items(self) -> list[tuple[str, Tensor]]:
        return [(name, self._tensors[name]) for name in self]
