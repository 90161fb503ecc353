"""The environment a mesh of Tenstorrent devices needs, checked before ttml is imported: importing it reads it.

A mesh graph descriptor tells tt-metal's fabric how the chips are wired. One whose dims are not the mesh's makes the
second training step hang, and ttml itself only warns where the file is missing or cannot be read; so we refuse.
"""

from __future__ import annotations

import os
import re
import sys
from pathlib import Path

from common.errors import MachineError
from common.hardware import Hardware

DESCRIPTOR, ROOT, HOME = "TT_MESH_GRAPH_DESC_PATH", "TT_METAL_RUNTIME_ROOT", "TT_METAL_HOME"
OURS = Path(__file__).resolve().parents[2] / "docker" / "mgd"  # descriptors that upstream does not ship
UPSTREAM = Path("tt_metal/fabric/mesh_graph_descriptors")  # under tt-metal's folder


def prepare_environment(hw: Hardware, mesh: tuple[int, int]) -> None:
    """Set the variables that `mesh` on `hw` needs and that are not set. Raises MachineError where one is wrong.

    tt-metal copies the descriptor when the process first touches the cluster, which counting the devices does, and
    never looks again; a mesh whose descriptor is named later waits 10 s for its routers and fails ("Fabric Router
    Sync: Timeout"). So what opens one device first and several later calls this with the larger mesh before either.
    """
    root = os.environ.get(ROOT) or os.environ.get(HOME)
    if root:
        if not Path(root).is_dir():
            raise MachineError(
                f"there is no tt-metal in {root}",
                where=ROOT if os.environ.get(ROOT) else HOME,
                todo=f"export {ROOT} and {HOME} with the folder of tt-metal; {image_hint(hw)}",
            )
        os.environ[ROOT] = root
    if mesh != (1, 1):
        path = find_descriptor(hw, mesh)
        check_descriptor(path, mesh)
        if os.environ.get(DESCRIPTOR) != str(path):
            os.environ[DESCRIPTOR] = str(path)
            # Of tt-metal since about October 2026 (docstring of reset_metal_env in tt-train's _mesh.py): the next touch
            # of the cluster reads the variable again. It closes what is open, and nothing is: a mesh is opened later.
            if reset := getattr(sys.modules.get("ttml"), "reset_metal_env", None):
                reset()


def find_descriptor(hw: Hardware, mesh: tuple[int, int]) -> Path:
    """Return the descriptor that the user named, else the board's: ours, or the one tt-metal ships."""
    if named := os.environ.get(DESCRIPTOR):
        return Path(named)
    file = f"{hw.mesh_graph_descriptor}.textproto"
    folders = [OURS] + ([Path(os.environ[ROOT]) / UPSTREAM] if os.environ.get(ROOT) else [])
    found = [folder / file for folder in folders if (folder / file).is_file()]
    if mesh != hw.mesh_shape or not found:
        raise MachineError(
            f"a mesh of {list(mesh)} needs a mesh graph descriptor, and none was found for it",
            where=f"{DESCRIPTOR} is not set; looked for {file} in {' and '.join(map(str, folders))}",
            todo=f"export {DESCRIPTOR} with a descriptor whose dims are {list(mesh)}; {image_hint(hw)}",
        )
    return found[0]


def check_descriptor(path: Path, mesh: tuple[int, int]) -> None:
    """Raise MachineError unless the file describes exactly `mesh`."""
    try:
        dims, types = read_descriptor(path.read_text(encoding="utf-8"))
    except (OSError, ValueError) as error:
        raise MachineError(
            f"the mesh graph descriptor cannot be read: {error}",
            where=f"{DESCRIPTOR}={path}",
            todo=f"name a textproto with one mesh_descriptors block and dims {list(mesh)}",
        ) from error
    if dims != mesh or (types and len(types) != len(dims)):
        wrong = f"dims {list(dims)}" if dims != mesh else f"{len(types)} dim_types for {len(dims)} dims"
        raise MachineError(
            f"the mesh graph descriptor has {wrong}, the mesh is {list(mesh)}: training would hang",
            where=f"{DESCRIPTOR}={path}",
            todo=f"name a descriptor whose dims are {list(mesh)}, or set device_config.mesh_shape to its dims",
        )


def read_descriptor(text: str) -> tuple[tuple[int, ...], tuple[str, ...]]:
    """Return dims and dim_types of the one mesh of a mesh graph descriptor. Raises ValueError saying what it lacks."""
    text = re.sub(r"#[^\n]*", "", text)
    if (meshes := len(re.findall(r"\bmesh_descriptors\s*:?\s*\{", text))) != 1:
        raise ValueError(f"it has {meshes} mesh_descriptors blocks, expected one")
    block = re.search(r"\bdevice_topology\s*:?\s*\{([^{}]*)\}", text)
    dims = _values("dims", block[1]) if block else []
    if not dims or not all(dim.isdecimal() for dim in dims):
        raise ValueError("it has no device_topology with dims")
    return tuple(map(int, dims)), tuple(_values("dim_types", block[1]) if block else ())


def _values(key: str, block: str) -> list[str]:
    """Return a repeated field, in either of protobuf's two spellings: `key: [a, b]` or `key: a key: b`."""
    found = re.findall(rf"\b{key}\s*:\s*(\[[^\]]*\]|\w+)", block)
    return [value.strip() for item in found for value in item.strip("[]").split(",") if value.strip()]


def image_hint(hw: Hardware) -> str:
    return f"the pinned image for {hw.name} has it: make image HW={hw.name}, then run without --no-container"
