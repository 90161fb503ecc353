"""A double of `ttml`: the part of its Python API that a training backend uses, of generation B or C.

Import fails as the real one does where the switches say so.
"""

from __future__ import annotations

import os
from pathlib import Path

from ttnn import _switches

if _switches.BAD_CAST:
    raise ImportError("std::bad_cast")
if _switches.NEEDS_RUNTIME_ROOT and not Path(os.environ.get("TT_METAL_RUNTIME_ROOT", "missing")).is_dir():
    raise RuntimeError("TT_FATAL: Root directory is not set: set TT_METAL_RUNTIME_ROOT to the root of tt-metal")

from . import autograd, core, init, models, modules, ops, optimizers
from ._mesh import Mesh, close_device_mesh, maybe_mesh, mesh, open_device_mesh, reset_metal_env, sync_gradients
from ._parameters import NamedParameters
from .sharding import Sharding

__all__ = [
    "Mesh",
    "NamedParameters",
    "Sharding",
    "autograd",
    "close_device_mesh",
    "core",
    "init",
    "manual_seed",
    "maybe_mesh",
    "mesh",
    "models",
    "modules",
    "open_device_mesh",
    "ops",
    "optimizers",
    "reset_metal_env",
    "sync_gradients",
]


def manual_seed(seed: int) -> None:
    """Seeds the initial values and the context."""
    init.manual_seed(seed)
    autograd.AutoContext.get_instance().set_seed(seed)


def _leave_out(dotted: str) -> None:
    """Make this build lack a name, as an older one does."""
    owner, _, name = dotted.rpartition(".")
    target: object = globals()
    for part in owner.split(".") if owner else ():
        target = target[part] if isinstance(target, dict) else getattr(target, part)
    if isinstance(target, dict):
        del target[name]
    else:
        delattr(target, name)


_newer = ["reset_metal_env", "core.distributed.release_metal_env"]
for _name in [*_switches.WITHOUT, *(_newer if _switches.GENERATION == "B" else [])]:
    _leave_out(_name)
