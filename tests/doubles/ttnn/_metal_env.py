"""A double of tt-metal's `MetalEnv`: what the process knows of the cluster, from the first touch of it on.

It copies TT_MESH_GRAPH_DESC_PATH when it is made and never looks again (docstring of `reset_metal_env` in tt-train's
`_mesh.py`); whatever asks for it first makes it, even a bare `ttnn.get_num_devices()`.
"""

from __future__ import annotations

import os

_known: list[str | None] = []  # the descriptor, once the cluster was touched


def descriptor() -> str | None:
    """The descriptor that was named when the cluster was touched first, which may be now."""
    if not _known:
        _known.append(os.environ.get("TT_MESH_GRAPH_DESC_PATH"))
    return _known[0]


def release() -> None:
    """Forget the cluster: the next touch reads the environment again."""
    _known.clear()
