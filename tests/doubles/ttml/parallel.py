"""A double of `ttml.parallel`: the name of the tensor-parallel strategy that a Llama is told. Only NONE is modelled."""

from __future__ import annotations

import enum


class TPStrategy(enum.Enum):
    NONE = 0
    TENSOR = 1
    TENSOR_SEQUENCE = 2
