"""A process of its own in which only the doubles of ttml and ttnn may import torch, as in a board's image."""

from __future__ import annotations

import os
import subprocess
import sys

from common.paths import ROOT
from tests.doubles import environment

# Every import of torch, or of what brings it, is refused unless the doubles ask for it.
GUARD = """
import builtins, importlib, sys

HEAVY = {"torch", "transformers", "peft", "accelerate"}
plain_import, plain_import_module = builtins.__import__, importlib.import_module


def allowed(importer):
    return importer.partition(".")[0] in {"ttml", "ttnn"} | HEAVY


def checked_import(name, globals=None, *rest, **named):
    importer = (globals or {}).get("__name__", "?")
    if name.partition(".")[0] in HEAVY and not any(
        allowed(frame_name) for frame_name in (importer, *importers())
    ):
        raise ImportError(f"{importer} imports {name}")
    return plain_import(name, globals, *rest, **named)


def importers():
    frame = sys._getframe(2)
    while frame:
        yield frame.f_globals.get("__name__", "?")
        frame = frame.f_back


def checked_import_module(name, package=None):
    if name.partition(".")[0] in HEAVY and not any(map(allowed, importers())):
        raise ImportError(f"{name} is imported by its name")
    return plain_import_module(name, package)


builtins.__import__, importlib.import_module = checked_import, checked_import_module
for way in (lambda: __import__("torch"), lambda: importlib.import_module("transformers")):
    try:
        way()
    except ImportError:
        continue
    raise SystemExit("the check itself does not work")
"""


def run_without_torch(program: str, generation: str, *arguments: str) -> str:
    """Run a program on the doubles of that generation, one device; return what it printed. Fails if it does."""
    variables = environment(generation)
    path = os.pathsep.join([str(ROOT), variables["PYTHONPATH"]])
    done = subprocess.run(
        [sys.executable, "-c", GUARD + program, *arguments],
        env={**os.environ, **variables, "PYTHONPATH": path},
        capture_output=True,
        text=True,
        check=False,
        timeout=300,
    )
    assert done.returncode == 0, done.stdout[-2000:] + done.stderr[-3000:]
    return done.stdout
