"""The training path: schedule, checkpoint, metrics, evaluation, generation, run.

A recipe needs two names of it, `Launch` and `open_run`. They are imported when they are asked for: the rest of this
package is also read where numpy is not installed, as on a board's host.
"""

from __future__ import annotations

import importlib
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from common.train.launch import Launch
    from common.train.run import open_run

__all__ = ["Launch", "open_run"]


def __getattr__(name: str) -> Any:
    """Import one of the two names."""
    if name not in __all__:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    return getattr(importlib.import_module(f"{__name__}.{'launch' if name == 'Launch' else 'run'}"), name)
