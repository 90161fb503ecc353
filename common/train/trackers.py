"""Hand the numbers that go to metrics.jsonl on to TensorBoard and Weights & Biases, where a config asks for them."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

from common.config import Config

Record = Mapping[str, Any]


class Trackers:
    """The trackers a config asks for. One that is not installed costs one line, and the run goes on."""

    def __init__(self, config: Config, folder: Path, say: Callable[[str], None]) -> None:
        self.sinks: list[Callable[[Record], None]] = []
        self.closers: list[Callable[[], None]] = []
        for name, start in (("tensorboard", self._tensorboard), ("wandb", self._wandb)):
            if getattr(config.logging, f"use_{name}"):
                try:
                    start(config, folder)
                except ImportError:
                    say(f"{name} is not installed here: no {name} records (metrics.jsonl has every number)")
                except Exception as error:  # no key, no network: a tracker must not end the run
                    say(f"{name} did not start ({type(error).__name__}: {error}): no {name} records")

    def _tensorboard(self, _config: Config, folder: Path) -> None:
        from torch.utils.tensorboard import SummaryWriter

        writer = SummaryWriter(str(folder / "tensorboard"))

        def sink(record: Record) -> None:
            for name, value in record.items():
                if name != "step" and isinstance(value, int | float):
                    writer.add_scalar(name, value, record["step"])

        self.sinks.append(sink)
        self.closers.append(writer.close)

    def _wandb(self, config: Config, folder: Path) -> None:
        import wandb

        # One run there for one of ours: a run that goes on here goes on there.
        one = {"id": folder.name, "name": folder.name, "resume": "allow", "dir": str(folder)}
        run = wandb.init(project=config.recipe, mode=config.logging.wandb_mode, config=config.dump(), **one)
        self.sinks.append(lambda record: run.log({k: v for k, v in record.items() if k != "step"}, step=record["step"]))
        self.closers.append(run.finish)

    def write(self, record: Record) -> None:
        """Hand on one record of metrics.jsonl."""
        for sink in self.sinks:
            sink(record)

    def close(self) -> None:
        """Close every tracker, so that what it still holds is written. Closing twice is harmless."""
        while self.closers:
            self.closers.pop()()
