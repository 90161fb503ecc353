"""What a rehearsal meets in place of a board's host: device files, a tt-smi, a double, a recipe with figures."""

from __future__ import annotations

import contextlib
import json
import math
import os
import shutil
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any
from unittest import mock

from common import hardware, recipe
from common.errors import UsageError
from common.hardware import Hardware
from engines.ttml.mesh import OURS
from tests import doubles
from tests.doubles import machines
from tests.doubles.tiny_recipe import make_tiny_recipe
from tools.launch.after_run import after_run
from tools.launch.resolve import resolve
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
        kept = {
            name: value for name, value in os.environ.items() if not name.startswith(("RECIPES_", "TT_", "GITHUB_"))
        }
        double = doubles.environment("C", math.prod(self.board.mesh_shape), **switches)
        return kept | double | self.machine() | {
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


def again(ground: Ground, folder: Path) -> Ground:
    """The same ground in another folder, as it was before a job: the machine new, recipe and figures kept."""
    for name in ("tiny", "base", "home"):
        shutil.copytree(ground.folder / name, folder / name)
    copy = Ground(folder, ground.board)
    text = (copy.recipe / "config.yaml").read_text("utf-8")
    (copy.recipe / "config.yaml").write_text(text.replace(str(ground.folder), str(folder)), "utf-8")
    write_machine(copy)
    return copy


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
    runs = ground.folder / "reference"
    first, second = (read_run(train(ground, runs / str(seed), seed), strict=True) for seed in (1, 2))
    record.write(ground.recipe, record.entry_of(first, [second], speed=False), lambda _line: None)


def train(ground: Ground, out: Path, seed: int) -> Path:
    """Train the recipe in this process, without its export; the run's folder."""
    command = ("recipe", "run", str(ground.recipe), "--steps", str(STEPS))
    changes = (f"training_config.seed={seed}",) if seed != 1 else ()
    out.mkdir(parents=True)
    with (
        mock.patch.dict(os.environ, ground.machine()),
        doubles.doubles("C", math.prod(ground.board.mesh_shape)),
        (out / "screen.txt").open("w") as screen,
        contextlib.redirect_stdout(screen),
        contextlib.redirect_stderr(screen),
    ):
        board = ground.board.name
        launch = resolve(ground.recipe, hw=board, overrides=changes, steps=STEPS, out=out, command=command)
        recipe.load(ground.recipe, "train").train(launch)
        (run,) = (manifest.parent for manifest in out.glob("*/manifest.json"))
        after_run(run, ())
    return run
