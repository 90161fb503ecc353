"""A double of `ttml.models`."""

from ttml._llama import (
    EmbeddingParallelType,
    EmbeddingPlacement,
    RunnerType,
    WeightTyingType,
)

from . import llama

__all__ = [
    "EmbeddingParallelType",
    "EmbeddingPlacement",
    "RunnerType",
    "WeightTyingType",
    "llama",
]
