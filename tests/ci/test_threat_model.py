"""docs/threat-model.md: every promise of it names a test that is there."""

from __future__ import annotations

import ast
import re
import subprocess
import sys
from pathlib import Path

import pytest

from common.paths import ROOT

PAGE = ROOT / "docs/threat-model.md"
NAMED = re.compile(r"`(tests/[\w/]+\.py)::(\w+)`")
ROW = re.compile(r"^\| (?!may not|---).*\|$", re.MULTILINE)


def gone(text: str) -> list[str]:
    """Return what is named in a page and is no test of its file."""
    return [f"{name}::{test}" for name, test in NAMED.findall(text) if test not in names_of(ROOT / name)]


def names_of(path: Path) -> set[str]:
    """Return the names of a file's test functions."""
    tree = ast.parse(path.read_text(encoding="utf-8")) if path.is_file() else ast.Module([], [])
    return {node.name for node in tree.body if isinstance(node, ast.FunctionDef) and node.name.startswith("test_")}


def test_every_test_that_is_named_is_there():
    text = PAGE.read_text(encoding="utf-8")
    assert len(NAMED.findall(text)) > 30
    assert gone(text) == []
    assert [row for row in ROW.findall(text) if not NAMED.search(row)] == [], "a promise that no test holds"


@pytest.mark.parametrize("named", ["tests/ci/test_threat_model.py::test_gone", "tests/ci/test_gone.py::test_it"])
def test_one_that_is_gone_is_seen(named: str):
    assert gone(f"| x | `{named}` |") == [named]


@pytest.mark.parametrize(
    ("code", "rule"),
    [
        ("import pickle\n\npickle.loads(b'')\n", "S301"),
        ("import yaml\n\nyaml.load('', Loader=yaml.Loader)\n", "S506"),
        ("import subprocess\n\nsubprocess.run('x', shell=True)\n", "S602"),
        ("import os\n\nos.system('x')\n", "S605"),
    ],
)
def test_the_linter_refuses_what_runs_data_as_code(code: str, rule: str):
    command = [
        sys.executable,
        "-m",
        "ruff",
        "check",
        "--stdin-filename",
        "tools/x.py",
        "--output-format",
        "concise",
        "-",
    ]
    done = subprocess.run(command, input=code, capture_output=True, text=True, cwd=ROOT, check=False)
    assert f" {rule} " in done.stdout
