"""The tiny base of `common.ops.tiny_base`, where tests look for it."""

from common.ops.tiny_base import CORPUS, random_llama, write_tiny_base

__all__ = ["CORPUS", "random_llama", "write_tiny_base"]
