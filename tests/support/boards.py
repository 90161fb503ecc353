"""The ttml backend on the doubles of ttml and ttnn, over the tiny bases that the CPU engine's tests use."""

from __future__ import annotations

import contextlib
import os
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from common.config import Config
from common.hardware import get
from common.model.bases import resolve
from tests.doubles import doubles
from tests.support.engines import config_for

DESCRIPTOR = """# a mesh graph descriptor, as far as anyone here reads it
mesh_descriptors {{
  name: "M0"
  arch: WORMHOLE_B0
  device_topology {{ dims: [ 1, {devices} ] }}
  host_topology {{ dims: [ 1, 1 ] }}
  channels {{ count: 2 policy: RELAXED }}
}}
top_level_instance {{ mesh {{ mesh_descriptor: "M0" mesh_id: 0 }} }}
"""
TIES = {"B": [["k_proj", "v_proj"]], "C": [["q_proj", "k_proj", "v_proj"], ["gate_proj", "up_proj"]]}


def board_config(base: Path, **values: Any) -> Config:
    """The config that tests train on one chip; dotted keys with __ for the dot."""
    return config_for(base, **{"hw": "n150", "training__precision": "bf16", "device__mesh_shape": (1, 1), **values})


@contextlib.contextmanager
def environment_kept() -> Iterator[None]:
    before = dict(os.environ)
    try:
        yield
    finally:
        os.environ.clear()
        os.environ.update(before)


@contextlib.contextmanager
def machine(tmp_path: Path, devices: int = 1, generation: str = "B", **switches: Any) -> Iterator[str]:
    """A machine with `devices` chips: the doubles importable and, for several chips, a descriptor named.

    Gives the name of a board with as many chips. Afterwards modules and environment are as before.
    """
    with environment_kept(), doubles(generation, devices, **switches):
        if devices > 1:
            path = tmp_path / f"line{devices}.textproto"
            path.write_text(DESCRIPTOR.format(devices=devices))
            os.environ["TT_MESH_GRAPH_DESC_PATH"] = str(path)
        yield {1: "n150", 2: "n300", 4: "qb2", 8: "t3k"}[devices]


@contextlib.contextmanager
def board(config: Config, tmp_path: Path, devices: int = 1, generation: str = "B", **switches: Any) -> Iterator[Any]:
    """The backend of `config` with its base loaded, on a machine of its own."""
    from engines.ttml.engine import open_ttml

    with machine(tmp_path, devices, generation, **switches) as name:
        config = config.with_values(**{"hw": name, "device.mesh_shape": (1, devices)})
        with open_ttml(get(name), config) as backend:
            base = resolve(str(config.model.base))
            backend.build(base.architecture)
            backend.load(base.weights())
            yield backend
