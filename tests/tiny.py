"""The tiny base of `tools.verify.tiny_base`, where tests look for it."""

from tools.verify.tiny_base import CORPUS, random_llama, write_tiny_base

__all__ = ["CORPUS", "random_llama", "write_tiny_base"]
