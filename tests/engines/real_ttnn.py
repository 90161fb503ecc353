"""What the real ttnn has of what we use, written as JSON to the file named on the command line.

Runs as `python -m tests.engines.real_ttnn` in an environment with ttnn and without torch; test_real_ttnn.py makes it.
"""

from __future__ import annotations

import ast
import importlib
import json
import re
import sys
from pathlib import Path
from typing import Any

from common import known_errors
from common.errors import MachineError, RecipeError
from common.hardware import Hardware, get, table
from engines.ttml import contract
from engines.ttml.mesh import UPSTREAM, check_descriptor, read_descriptor

BACKEND = ("engine", "contract", "limits", "mesh", "state", "tensors")
ENUMS = ("Layout", "DataType")
DOUBLE = Path(__file__).parents[1] / "doubles/ttnn/__init__.py"  # read as text: it needs torch
# What rows of known_errors.yaml look for, by the row's id: the unchanging parts of messages.
WORDS = {
    "fabric-sync": ["Fabric Router Sync: Timeout"],
    "no-descriptor": [
        "No mesh graph descriptor found for cluster type",
        "Cannot find mesh graph descriptor for fabric type",
        "Custom fabric mesh graph descriptor path must be specified for CUSTOM cluster type",
    ],
    "mesh-mismatch": ["Requested mesh shape dimensions mismatch"],
    "not-wired": [
        "intra-mesh mapping failed",
        "Cannot place target node",
        "no valid placement",
        "Unable to bind the intermesh",
    ],
    "host-storage": ["Can't get a single buffer from host storage distributed over mesh"],
    "no-chips": ["No chips detected", "no chips were detected"],
    "two-architectures": ["Chips with differing architectures detected"],
    "too-few-chips": ["Requested mesh is too big", "Requested mesh shape "],
    "held": ["CHIP_IN_USE", "Waiting for lock '", "Waiting for KMD lock "],
    "ethernet": [
        "Timed out while waiting for active ethernet core",
        "Timeout waiting for Ethernet core service remote IO request",
        "Timed out waiting for ETH heartbeat",
        "ETH training timed out",
    ],
    "card-silent": ["for ARC to respond", "Timeout waiting for ARC msg request queue", "waiting for device at BDF"],
    "firmware-old": ["is older than the minimum compatible version"],
    "huge-pages": [
        "Querying size for a host channel that does not exist",
        "Hugepages are not allocated",
        "Insufficient NumHugepages",
        "Workload will fail if it exceeds NumHostMemChannels",
        "no huge page mount found",
    ],
    "device-memory": ["Out of Memory: Not enough space to allocate"],
    "openmpi-stock": ["MPIX_Comm_revoke"],
}
MINIMUM_FIRMWARE = "Minimum tt-firmware version is "
TOOLS = {"fatal", "host", "as_numpy"}  # the double's own, which ttnn need not have


def report() -> dict[str, Any]:
    for name in BACKEND:
        importlib.import_module(f"engines.ttml.{name}")
    ttnn: Any = importlib.import_module("ttnn")
    folder = Path(ttnn.__file__).parent
    descriptors = sorted((folder / UPSTREAM).glob("*.textproto"))
    return {
        "versions": {name: contract._version(name) for name in ("ttnn", "numpy")},
        "torch": "torch" in sys.modules,
        "contract": {row["name"]: row["found"] for row in contract.contract() if row["name"].startswith("ttnn.")},
        "planted": contract._find("ttnn.no_such_name"),
        "doubled": {name: hasattr(ttnn, name) for name in _doubled()},
        "enums": {name: _members(getattr(ttnn, name)) for name in ENUMS},
        "descriptors": {path.name: _read(path.read_text(encoding="utf-8")) for path in descriptors},
        "boards": {hw.name: _fits(hw, folder / UPSTREAM) for hw in table().values() if hw.mesh_graph_descriptor},
        "words": _words(folder),
        "minimum firmware": _minimum_firmware(folder),
        "no card": _counting(ttnn),
    }


def _words(folder: Path) -> dict[str, list[str]]:
    """By the id of a row: those of its phrases that no library of the wheel has, or that another row explains."""
    libraries = [path.read_bytes() for path in sorted((folder / "build/lib").glob("*.so*"))]
    return {
        id: [
            phrase
            for phrase in phrases
            if not any(phrase.encode() in library for library in libraries)
            or getattr(known_errors.match(phrase), "id", None) != id
        ]
        for id, phrases in WORDS.items()
    }


def _minimum_firmware(folder: Path) -> str:
    """What libtt_metal.so says is the oldest firmware it wants."""
    found = re.search(MINIMUM_FIRMWARE.encode() + rb"([0-9.]+)", (folder / "build/lib/libtt_metal.so").read_bytes())
    return found[1].decode() if found else "none"


def _doubled() -> set[str]:
    """What the double of ttnn defines for others."""
    names = set()
    for node in ast.parse(DOUBLE.read_text(encoding="utf-8")).body:
        if isinstance(node, ast.ClassDef | ast.FunctionDef):
            names.add(node.name)
        elif isinstance(node, ast.Assign):
            names |= {target.id for target in node.targets if isinstance(target, ast.Name)}
    return {name for name in names - TOOLS if not name.startswith("_")}


def _members(enum: Any) -> dict[str, int]:
    return {name: getattr(enum, name).value for name in dir(enum) if name.isupper()}


def _read(text: str) -> str:
    try:
        dims, _ = read_descriptor(text)
    except ValueError as error:
        return str(error)
    return "x".join(map(str, dims))


def _fits(hw: Hardware, folder: Path) -> str:
    """Whether the wheel has the board's descriptor, with the board's mesh."""
    path = folder / f"{hw.mesh_graph_descriptor}.textproto"
    if not path.is_file():
        return "not in the wheel"
    try:
        check_descriptor(path, hw.mesh_shape)
    except MachineError as error:
        return error.what
    return "fits"


def _counting(ttnn: Any) -> str:
    """What a user is told where there is no card; nothing is opened where there may be one."""
    if Path("/dev/tenstorrent").exists():
        return "there may be one"
    try:
        with contract.explained("counting the devices", get("n150")):
            return f"{ttnn.get_num_devices()} devices"
    except RecipeError as error:
        return error.what


if __name__ == "__main__":
    Path(sys.argv[1]).write_text(json.dumps(report(), indent=1), encoding="utf-8")
