"""What the real ttnn has of what we use, written as JSON to the file named on the command line.

Runs as `python -m tests.engines.real_ttnn` in an environment with ttnn and without torch; test_real_ttnn.py makes it.
"""

from __future__ import annotations

import ast
import importlib
import json
import sys
from pathlib import Path
from typing import Any

from common.errors import MachineError, RecipeError
from common.hardware import Hardware, get, table
from engines.ttml import contract
from engines.ttml.mesh import UPSTREAM, check_descriptor, read_descriptor

BACKEND = ("engine", "contract", "limits", "mesh", "state", "tensors")
ENUMS = ("Layout", "DataType")
DOUBLE = Path(__file__).parent / "doubles/ttnn/__init__.py"  # read as text: it needs torch
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
        "no card": _counting(ttnn),
    }


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
