"""What `recipe run` was asked for, resolved: one frozen object, which processes and containers are handed as one JSON.

tools/launch/resolve.py makes it of a command line; nothing that reads it chooses a board or loads a config again.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from pydantic import TypeAdapter

from common import hardware
from common.config import Config
from common.hardware import Hardware


@dataclass(frozen=True)
class Hosts:
    """The hosts that share a run's processes, and how they meet: at `endpoint`, HOST:PORT, within some seconds."""

    number: int = 1
    endpoint: str | None = None
    seconds_to_meet: int = 300


@dataclass(frozen=True)
class Launch:
    """One training, as it is to happen. Paths are absolute, so that they mean the same in every process."""

    recipe_dir: Path
    config: Config  # all layers merged, for the board `hw`
    engine: str  # the module of the engine that trains it; common/engine.py says what it holds
    reason: str  # the sentence that says why it is this board
    run: str  # the name of the run's folder in `out`, if the launch begins a new run; no two launches have the same
    out: Path
    nodes: tuple[str, ...] = ()  # the board's device nodes on this machine
    # Keys of the training that a CPU has of its own, so that it is another experiment than a board's.
    departures: tuple[str, ...] = ()
    warnings: tuple[str, ...] = ()  # of choices in the config that are valid and known to be bad
    stop_at: int | None = None
    resume: str = "auto"  # auto, never, or the path of a run or a checkpoint
    accept_changes: bool = False
    command: tuple[str, ...] = ()  # the words that were typed, for the manifest
    overrides: tuple[str, ...] = ()  # what --set and --world changed, as --set takes it; for the manifest
    host: Mapping[str, Any] = dataclasses.field(default_factory=dict)  # kernel, driver and cards of the machine
    git_commit: str | None = None
    git_dirty: bool | None = None
    image: Mapping[str, Any] | None = None  # the image it runs in: target, reference, source and pins_sha256
    debug: bool = False  # whether an error shows its traceback
    # What any step may take, in place of the watchdog's own rule; 0: it watches nothing.
    stall_seconds: float | None = None
    hosts: Hosts = Hosts()

    @property
    def hw(self) -> Hardware:
        """Return the board's row of hardware.yaml."""
        return hardware.get(self.config.hw)

    def to_json(self) -> str:
        """Return the launch as one line of JSON, which `from_json` reads."""
        return TypeAdapter(Launch).dump_json(self, by_alias=True).decode()

    @classmethod
    def from_json(cls, text: str) -> Launch:
        """Return the launch that `to_json` wrote."""
        return TypeAdapter(cls).validate_json(text)
