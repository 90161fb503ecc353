"""`recipe` with a clock on the phases of a run. bench/phases.py starts it, in this tree or in an earlier commit's.

    PHASES=out.json STARTED=<time.perf_counter() of whoever starts it> python bench/phased.py run tinyllama-finetune ...

The run itself has no clock: functions are wrapped as their modules are loaded, so nothing is imported sooner for it.
"""

from __future__ import annotations

import functools
import importlib.abc
import importlib.machinery
import json
import os
import runpy
import sys
import threading
import time
import types
from collections import defaultdict
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

# By module and function, the phase that its time counts for; "" is the import of the module itself. A phase within
# another one counts for itself alone: "evaluations/generation" is no part of "evaluations".
PHASES: Mapping[str, Mapping[str, str]] = {
    "common.train.plan": {"prepare": "data"},
    "common.model.bases": {"resolve": "base"},
    "engines.cpu.engine": {
        "": "import of the engine",
        "TorchCPU.load": "base",
        "TorchCPU.train_step": "steps",
        "Objective.forward": "forward",
        "TorchCPU._update": "optimizer",
    },
    "torch._tensor": {"Tensor.backward": "backward"},
    "common.train.evaluate": {"held_out": "loss"},
    "common.train.samples": {"answers": "generation"},
    "common.train.run": {"Run.evaluate": "evaluations", "Run.save": "checkpoints"},
    "tools.export.export": {"export": "export write"},
    "tools.export.check": {"check": "export check"},
    "tools.export.before_after": {"write_card": "card"},
    "tools.runs.trained": {"read": "the run read again"},
    "tools.report.pages": {"write_at_end": "report"},
}
STEP_0 = "step-0 evaluation"  # what "evaluations" is called for the untrained model


class Clock:
    """Shares the main thread's seconds out to phases: each moment counts for the innermost one."""

    def __init__(self, started: float) -> None:
        self.started = self.since = started
        self.open: list[str] = ["start-up"]  # from the outermost phase to the innermost
        self.seconds: defaultdict[str, float] = defaultdict(float)
        self.calls: defaultdict[str, int] = defaultdict(int)
        self.first: dict[str, float] = {}  # seconds from the start until a phase began
        self.thread = threading.get_ident()

    def charge(self) -> None:
        """Add what passed since the last change to the phase that is open."""
        now = time.perf_counter()
        # What is between two phases of a run, such as fetching a batch, is called after the start, "between".
        self.seconds["/".join(self.open)] += now - self.since
        self.since = now

    def timed(self, function: Callable[..., Any], phase: str) -> Callable[..., Any]:
        """Return `function`, its time counted for `phase`; on another thread it is not counted."""

        @functools.wraps(function)
        def run(*given: Any, **named: Any) -> Any:
            if threading.get_ident() != self.thread:
                return function(*given, **named)
            self.charge()
            outer = self.open
            name = STEP_0 if phase == "evaluations" and 0 in (*given[1:], *named.values()) else phase
            self.open = [name] if outer in (["start-up"], ["between"]) else [*outer, name]
            path = "/".join(self.open)
            self.calls[path] += 1
            self.first.setdefault(path, self.since - self.started)
            try:
                return function(*given, **named)
            finally:
                self.charge()
                self.open = ["between"] if name == STEP_0 else outer

        return run


class Wrapping(importlib.abc.MetaPathFinder):
    """Loads the modules of PHASES as ever, with a clock put around what is named there."""

    def __init__(self, clock: Clock) -> None:
        self.clock = clock

    def find_spec(
        self, fullname: str, path: Sequence[str] | None, _target: types.ModuleType | None = None
    ) -> importlib.machinery.ModuleSpec | None:
        names = dict(PHASES.get(fullname, {}))
        spec = importlib.machinery.PathFinder.find_spec(fullname, path) if names else None
        if spec is None or spec.loader is None:
            return None
        load: Callable[..., None] = spec.loader.exec_module
        if phase := names.pop("", ""):
            load = self.clock.timed(load, phase)

        def load_and_wrap(module: types.ModuleType) -> None:
            load(module)
            for name, phase in names.items():
                *owners, last = name.split(".")
                owner: Any = functools.reduce(getattr, owners, module)
                setattr(owner, last, self.clock.timed(getattr(owner, last), phase))

        spec.loader.exec_module = load_and_wrap  # type: ignore[method-assign]
        return spec


def main() -> None:
    """Run `recipe` with this command line in the folder that is current, and write what its phases took."""
    clock = Clock(float(os.environ["STARTED"]))
    sys.meta_path.insert(0, Wrapping(clock))
    sys.path[0] = ""  # not this folder: the tree that is measured
    try:
        runpy.run_module("tools.cli", run_name="__main__", alter_sys=True)
    finally:
        clock.charge()
        phases = {name: {"seconds": took, "calls": clock.calls[name] or 1} for name, took in clock.seconds.items()}
        found = {"phases": phases, "first": clock.first, "until": clock.since - clock.started}
        Path(os.environ["PHASES"]).write_text(json.dumps(found), encoding="utf-8")


if __name__ == "__main__":
    main()
