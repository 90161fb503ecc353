"""What a rehearsal meets in place of a board's host: device files, a tt-smi, a double, a recipe with figures."""

from __future__ import annotations

import json
import math
import os
import subprocess
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from ci.hardware.commands import recipe
from common import hardware
from common.errors import TrainingError, UsageError
from common.hardware import Hardware
from common.paths import ROOT
from engines.ttml.mesh import OURS
from tests import doubles
from tests.doubles import machines
from tests.doubles.tiny_recipe import make_tiny_recipe
from tools.results import record
from tools.runs.folder import read_run
from tools.verify.tiny_base import write_tiny_base

STEPS = 6
DEVICES = 8  # more than that would have the tiny recipe's rows fill no batch
TT_SMI = """#!/bin/sh
# Stands for tt-smi: writes down what it is asked; resets end with the code in `reset-code`.
echo "$*" >>{ground}/tt-smi.log
case $1 in
-s) printf '{{"device_info": []}}\\n' ;;
*) exit "$(cat {ground}/reset-code)" ;;
esac
"""
NO_ENTRIES = "format: 1\nrecipe: tiny\nentries: []\n"


@dataclass(frozen=True)
class Ground:
    """A machine with one board, below `folder`."""

    folder: Path
    board: Hardware

    @property
    def root(self) -> Path:
        return self.folder / "machine"

    @property
    def recipe(self) -> Path:
        return self.folder / "tiny"

    @property
    def out(self) -> Path:
        return self.folder / "out"

    @property
    def quarantine(self) -> Path:
        return self.folder / "quarantine"

    @property
    def resets(self) -> list[str]:
        """What tt-smi was asked to reset, one line a time."""
        log = self.folder / "tt-smi.log"
        return [line for line in log.read_text().splitlines() if line != "-s"] if log.is_file() else []

    def environment(self, switches: Mapping[str, Any], **more: str) -> dict[str, str]:
        """Of every process of the job; `switches` are the double's."""
        double = doubles.environment("C", math.prod(self.board.mesh_shape), **switches)
        return machines.bare_environment() | double | self.machine() | {
            "PATH": f"{self.folder / 'bin'}{os.pathsep}{os.environ['PATH']}",
            "RECIPES_QUARANTINE": str(self.quarantine),
            "HW": self.board.name,
            "NAME": str(self.recipe),
            "STEPS": str(STEPS),
            "OUT": str(self.out),
            "CONTAINER": "0",
            **more,
        }  # fmt: skip

    def machine(self) -> dict[str, str]:
        """Where the machine's files are, and its mesh graph descriptor where that would be tt-metal's own."""
        values = {"RECIPES_SYSFS_ROOT": str(self.root), "RECIPES_HOME": str(self.folder / "home")}
        name = self.board.mesh_graph_descriptor
        if name and not (OURS / f"{name}.textproto").is_file():
            values["TT_MESH_GRAPH_DESC_PATH"] = str(self.root / "mesh.textproto")
        return values


def prepare(folder: Path, board: str) -> Ground:
    """Make the ground in a folder, with a recipe of which nothing is recorded. Raises UsageError for some boards."""
    ground = Ground(folder, suitable(board))
    write_machine(ground)
    write_recipe(ground)
    (folder / "home").mkdir()
    return ground


def write_machine(ground: Ground) -> None:
    machines.fake_host(ground.root, ground.board.name)
    machines.descriptor(ground.root, ground.board.name)
    program = ground.folder / "bin/tt-smi"
    machines.write(program, TT_SMI.format(ground=ground.folder))
    program.chmod(0o755)
    machines.write(ground.folder / "reset-code", "0")


def suitable(name: str) -> Hardware:
    """The board of that name. Raises UsageError where the job cannot be rehearsed on it."""
    board = hardware.get(name)
    if board.is_cpu or board.chips > DEVICES:
        why = (
            "has no card" if board.is_cpu else f"has {board.chips} devices, and the tiny recipe's rows do for {DEVICES}"
        )
        fit = [hw.name for hw in hardware.table().values() if not hw.is_cpu and hw.chips <= DEVICES]
        raise UsageError(f"{name} {why}", where="HW", todo=f"rehearse on one of {', '.join(fit)}")
    return board


def write_recipe(ground: Ground) -> None:
    """A recipe of seconds, in the precision of boards and with a batch that all devices share."""
    make_tiny_recipe(ground.recipe, write_tiny_base(ground.folder / "base"))
    path = ground.recipe / "config.yaml"
    settings = json.loads(path.read_text("utf-8"))
    settings["training_config"] |= {"precision": "bf16", "max_steps": STEPS, "batch_size": max(4, ground.board.chips)}
    path.write_text(json.dumps(settings, indent=1) + "\n", encoding="utf-8")
    machines.write(ground.recipe / "results.yaml", NO_ENTRIES)


def record_figures(ground: Ground) -> None:
    """Two trainings by the double: the recipe's own, and one of another seed, which says how far figures may stray."""
    own, other = train(ground, "own"), train(ground, "other", "--set", "training_config.seed=2")
    entry = record.entry_of(read_run(own, strict=True), [read_run(other, strict=True)], speed=False)
    record.write(ground.recipe, entry, lambda _line: None)


def train(ground: Ground, name: str, *changes: str) -> Path:
    """Train the recipe by the double; the run's folder. Raises TrainingError with the run's own words."""
    out = ground.folder / "reference" / name
    words = ["run", str(ground.recipe), "--hw", ground.board.name, "--no-container", "--steps", str(STEPS)]
    command = recipe(*words, "--resume", "never", "--out", str(out), *changes)
    done = subprocess.run(command, cwd=ROOT, env=ground.environment({}), capture_output=True, text=True, check=False)
    if done.returncode:
        raise TrainingError(f"the training whose figures are recorded failed: {done.stderr}", where=str(out))
    (run,) = (manifest.parent for manifest in out.glob("*/manifest.json"))
    return run
