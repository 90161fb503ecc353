"""What is asked of docker/images.lock.json, wherever it was written."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any


def unexplained(value: Any, path: str = "lock") -> Iterator[str]:
    """Yield the place of every null that does not stand beside `"built": false` and a reason."""
    if isinstance(value, dict):
        for key, inner in value.items():
            if inner is None and not (value.get("built") is False and value.get("reason")):
                yield f"{path}.{key}"
            yield from unexplained(inner, f"{path}.{key}")
