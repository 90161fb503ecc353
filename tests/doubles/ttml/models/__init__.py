"""A double of `ttml.models`."""

from ttml._llama import (
    EmbeddingParallelType,
    EmbeddingPlacement,
    RunnerType,
    WeightTyingType,
    memory_efficient_runner,
)

from . import llama

__all__ = [
    "EmbeddingParallelType",
    "EmbeddingPlacement",
    "RunnerType",
    "WeightTyingType",
    "llama",
    "memory_efficient_runner",
]
