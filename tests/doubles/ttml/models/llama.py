"""A double of `ttml.models.llama`: the Python model."""

from ttml._llama import GroupedQueryAttention, Llama, LlamaConfig, LlamaMLP, LlamaRopeScalingConfig

__all__ = ["GroupedQueryAttention", "Llama", "LlamaConfig", "LlamaMLP", "LlamaRopeScalingConfig"]
