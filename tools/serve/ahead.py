"""A start that does two things at once: the weights are read while torch is imported, which takes seconds.

Of SmolLM2-135M's start on two cores of an EPYC (torch 2.13, transformers 5.23), in seconds: 0.6 until it listens, 4.3
of importing torch and transformers (which the engine no longer does), of which 0.6 went into looking for garbage, 0.5
of reading the weights.
"""

from __future__ import annotations

import contextlib
import gc
from collections.abc import Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

from common.model.weights import Array, Weights


class ReadAhead(Weights):
    """Weights that a thread of their own begins to read at once. Each tensor can be asked for once, and is not kept."""

    def __init__(self, files: Sequence[Path]) -> None:
        super().__init__(files)
        reader = ThreadPoolExecutor(1, thread_name_prefix="weights")
        self.coming = {name: reader.submit(super(ReadAhead, self).__getitem__, name) for name in self}
        reader.shutdown(wait=False)

    def __getitem__(self, name: str) -> Array:
        """Return a tensor, as soon as it is read."""
        return self.coming.pop(name).result()


@contextlib.contextmanager
def gc_paused() -> Iterator[None]:
    """Pause garbage collection, and leave what is made within out of it for good: imports make much, and keep it."""
    gc.disable()
    try:
        yield
    finally:
        gc.freeze()
        gc.enable()
