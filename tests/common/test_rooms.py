"""How much a reader of a recipe has to read: the size of `common`, and of all that a train script imports."""

from __future__ import annotations

import ast
from collections.abc import Iterator
from pathlib import Path

import pytest

from tests.support.shipped import FOLDERS

ROOT = Path(__file__).resolve().parents[2]
COMMON_LINES = 4500
CLOSURE_MODULES, CLOSURE_LINES = 45, 5300


def lines_of_code(path: Path) -> int:
    """Lines of a Python file that are neither blank nor a comment alone; docstrings count."""
    stripped = (line.strip() for line in path.read_text(encoding="utf-8").splitlines())
    return sum(bool(line) and not line.startswith("#") for line in stripped)


def files_of(module: str) -> Iterator[Path]:
    """The files of this repository that `import module` runs: its packages, and itself."""
    parts = module.split(".")
    for end in range(1, len(parts) + 1):
        stem = ROOT.joinpath(*parts[:end])
        yield from (path for path in (stem.with_suffix(".py"), stem / "__init__.py") if path.is_file())


def imports(path: Path) -> Iterator[Path]:
    """The files that a file's import statements name, also those inside of functions and behind TYPE_CHECKING."""
    for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
        if isinstance(node, ast.Import):
            for name in node.names:
                yield from files_of(name.name)
        elif isinstance(node, ast.ImportFrom) and node.level:
            assert node.level == 1, f"{path}: relative imports name a file of the same folder"
            yield path.parent / f"{node.module}.py"
        elif isinstance(node, ast.ImportFrom) and node.module:
            for name in node.names:
                yield from files_of(f"{node.module}.{name.name}")


def closure(path: Path) -> set[Path]:
    """`path` and every file of this repository that it imports, directly or not."""
    found: set[Path] = set()
    waiting = [path]
    while waiting:
        if (here := waiting.pop()) not in found:
            found.add(here)
            waiting += imports(here)
    return found


def test_common_is_thin():
    sizes = {path.relative_to(ROOT): lines_of_code(path) for path in (ROOT / "common").rglob("*.py")}
    assert sum(sizes.values()) <= COMMON_LINES, sorted(sizes.items(), key=lambda item: -item[1])[:10]


@pytest.mark.parametrize("recipe", FOLDERS, ids=lambda folder: folder.name)
def test_a_train_script_is_read_in_one_sitting(recipe):
    """The engine is not among it: the launch names it, and common/engine.py imports it by that name."""
    found = closure(recipe / "train.py")
    rooms = {path.relative_to(ROOT).parts[0] for path in found}
    modules = [path for path in found if path.name != "__init__.py" or lines_of_code(path) > 1]
    assert rooms == {"common", "recipes"}
    assert len(modules) <= CLOSURE_MODULES
    assert sum(map(lines_of_code, found)) <= CLOSURE_LINES


def test_the_closure_follows_every_kind_of_import(tmp_path):
    (tmp_path / "beside.py").write_text("def later():\n    from common.train import schedule\n")
    script = tmp_path / "train.py"
    script.write_text("import common.hardware\nfrom .beside import later\n")
    names = {path.name if path.parent == tmp_path else str(path.relative_to(ROOT)) for path in closure(script)}
    assert {"train.py", "beside.py", "common/hardware.py", "common/errors.py", "common/train/schedule.py"} <= names
