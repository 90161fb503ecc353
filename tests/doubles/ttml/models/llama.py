"""A double of `ttml.models.llama`: the Python model."""

from ttml._llama import Llama, LlamaConfig, LlamaRopeScalingConfig

__all__ = ["Llama", "LlamaConfig", "LlamaRopeScalingConfig"]
