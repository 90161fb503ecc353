"""One hardware job: what it was asked for, and `job.json`, by which its phases know of each other."""

from __future__ import annotations

import json
import os
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from ci.hardware import TRAIN_MINUTES
from common import hardware
from common.errors import RecipeError, UsageError
from common.files import disk_errors, utc_now, write_json
from common.hardware import Hardware
from tools.recipes import find_recipe
from tools.runs.folder import runs_in

FORMAT = 1  # of job.json
CLEAN = (0, 2, 3, 6, 75, 130)  # codes of a run that has closed its device, or never opened it


class Failed(RecipeError):
    """A command of this job ended with `code`, having said why itself."""

    def __init__(self, code: int, what: str, **more: str | None) -> None:
        super().__init__(what, **more)
        self.code = code


@dataclass(frozen=True)
class Job:
    """The job of the folder `out`."""

    board: Hardware
    recipe: str
    steps: str  # as somebody typed it, for `recipe run` to read; empty: as the config says
    out: Path
    native: bool
    minutes: float

    @classmethod
    def from_environment(cls) -> Job:
        """The job that the variables name. Raises UsageError."""
        board = hardware.get(asked("HW"))
        if board.is_cpu:
            raise UsageError(f"{board.name} has no card", where="HW", todo="name a board; CPUs are tested by make test")
        recipe = asked("NAME")
        find_recipe(recipe)
        out, minutes = Path(asked("OUT")).expanduser().absolute(), os.environ.get("TRAIN_MINUTES") or TRAIN_MINUTES
        native = os.environ.get("CONTAINER") == "0"
        return cls(board, recipe, os.environ.get("STEPS", ""), out, native, float(minutes))

    @property
    def runs(self) -> Path:
        return self.out / "runs"

    @property
    def run(self) -> Path | None:
        """Return the folder of this job's run. None: it did not come to that, and a board is opened only later."""
        return next((run.folder for run in runs_in(self.runs)), None)

    @property
    def where(self) -> tuple[str, ...]:
        """The option that says where runs of this job go."""
        return ("--no-container",) if self.native else ("--container",)

    # --- job.json -----------------------------------------------------------------------------------------------------

    @property
    def record(self) -> dict[str, Any]:
        try:
            found: dict[str, Any] = json.loads((self.out / "job.json").read_text("utf-8"))
        except FileNotFoundError:
            found = {"format": FORMAT, "board": self.board.name, "recipe": self.recipe, "steps": self.steps}
        return found

    def note(self, **values: Any) -> None:
        write_json(self.out / "job.json", {**self.record, **values})

    @property
    def phases(self) -> dict[str, dict[str, Any]]:
        return dict(self.record.get("phases", {}))

    def enter(self, phase: str) -> None:
        """Raises UsageError where this folder's job has had the phase, or is another one's."""
        record, phases = self.record, self.phases
        if phase in phases or (phase == "preflight" and phases) or record["board"] != self.board.name:
            raise UsageError(
                f"a job on {record['board']} has had its {', '.join(phases)} here", where=str(self.out),
                todo="give every job a folder of its own: OUT",
            )  # fmt: skip
        if phase in ("train", "grade") and phases.get(BEFORE[phase], {}).get("code") != 0:
            raise UsageError(f"{phase} comes after a {BEFORE[phase]} that went well", where=str(self.out))
        with disk_errors("write down the job", self.out):
            self.out.mkdir(parents=True, exist_ok=True)
            self.note(phases={**phases, phase: {"begun": utc_now()}})

    def leave(self, phase: str, code: int, said: str) -> None:
        phases = self.phases
        self.note(phases={**phases, phase: {**phases[phase], "ended": utc_now(), "code": code, "said": said}})

    @property
    def closed(self) -> bool:
        """Whether that run ended in a way that closes the board; not so if it was killed, hung, or failed on it."""
        return self.phases["train"].get("code") in CLEAN


BEFORE = {"train": "preflight", "grade": "train"}


def asked(name: str) -> str:
    """A variable that must be set. Raises UsageError."""
    value = os.environ.get(name)
    if not value:
        raise UsageError(f"{name} is not set", todo="ci/hardware/README.md says what the job takes")
    return value


def say(line: str) -> None:
    print(line, flush=True)
