"""From a command line to everything a run needs before its engine starts: board, config, base, tokens, digests."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

from common import config as configs
from common import hardware, lint, models
from common.backends.base import precision_for, refuse_without_engine
from common.config import Config
from common.data import build
from common.data.order import steps_for
from common.data.text import ChatTokenizer
from common.data.tokens import TokenDataset
from common.errors import DataError, UsageError
from common.hardware import Hardware
from common.train.schedule import warmup_steps


@dataclass(frozen=True)
class Launch:
    """A `recipe run` command: what was typed."""

    recipe_dir: Path
    hw: str | None = None
    overrides: tuple[str, ...] = ()
    steps: int | None = None
    stop_at: int | None = None
    resume: str = "auto"
    accept_changes: bool = False
    out: Path = Path("runs")
    command: tuple[str, ...] = ()


@dataclass(frozen=True)
class Plan:
    """A launch, resolved: `config` has its precision and steps, `dataset` its tokens."""

    launch: Launch
    hw: Hardware
    config: Config
    base: models.Base | None
    architecture: dict[str, Any]
    tokenizer: ChatTokenizer
    dataset: TokenDataset
    prompts: list[str]
    reasons: dict[str, str] = field(default_factory=dict)

    @property
    def training_digest(self) -> str:
        """Fixes the next update, together with `dataset.tokens_sha256`."""
        return self.config.training_digest({"base": self.base.identity if self.base else "random"})


def make_plan(launch: Launch, say: Callable[[str], None], warn: Callable[[str], None]) -> Plan:
    """Resolve `launch`, saying each decision as it falls; nothing of an engine is imported."""
    choice = hardware.choose(launch.hw)
    say(f"{launch.recipe_dir.name} on {choice.reason}")
    refuse_without_engine(choice.hardware)
    config = configs.load(launch.recipe_dir, choice.hardware, launch.overrides, launch.steps)
    if departures := config.departures():
        own = ", ".join(map(key_of, departures))
        say(f"{choice.hardware.name} is another experiment than a board's: it has its own {own}")
    for finding in lint.lint(config, choice.hardware):
        warn(f"{finding.id}: {finding.message}")
    if config.model.init == "random" or config.model.base is None:
        raise UsageError(
            "this version trains from pretrained weights only",
            where="model_config.init",
            todo="set model_config.init=pretrained and name a model_config.base",
        )
    base = models.resolve(config.model.base, recipe_dir=launch.recipe_dir, say=say)
    tokenizer = ChatTokenizer.load(base.folder)
    dataset = build.build(config, launch.recipe_dir, tokenizer, models.home())
    for line in dataset.report.lines():
        say(line)
    refuse_too_long(dataset, base.architecture)
    if not len(dataset.held_out):
        raise DataError(
            "no row is held out, so nothing could be said about the result",
            where="data_config.held_out_share",
            todo="raise it, or leave data_config.split_by out",
        )
    prompts = build.Builder(config, launch.recipe_dir).prompts()
    precision, why = precision_for(choice.hardware)
    if config.training.precision == "auto":
        config = config.with_values(**{"training.precision": precision})
    else:
        why = "as configured"
    config = with_steps(config, len(dataset.train), say)
    if launch.stop_at is not None and not 1 <= launch.stop_at <= (config.training.max_steps or 0):
        raise UsageError(f"--stop-at {launch.stop_at} is not a step of this run of {config.training.max_steps}")
    reasons = {"hw": choice.reason, "precision": why}
    return Plan(launch, choice.hardware, config, base, base.architecture, tokenizer, dataset, prompts, reasons)


def with_steps(config: Config, rows: int, say: Callable[[str], None]) -> Config:
    """The config with max_steps fixed; says steps, epochs and the batch equation."""
    training, effective = config.training, config.effective_batch
    steps = training.max_steps or steps_for(training.num_epochs or 0, rows, effective)
    say(
        f"effective batch {effective} = batch_size {training.batch_size} x {training.gradient_accumulation_steps} "
        f"accumulated; {steps} steps = {steps * effective / rows:.2f} epochs of {rows} rows"
    )
    config = config.with_values(**{"training.max_steps": steps}) if training.max_steps is None else config
    if warmup_steps(config.training) < training.scheduler.warmup_steps:
        say(f"warm-up clamped from {training.scheduler.warmup_steps} to the run's {steps} steps")
    return config


def refuse_too_long(dataset: TokenDataset, architecture: dict[str, Any]) -> None:
    context = architecture["max_position_embeddings"]
    if dataset.length > context:
        raise DataError(
            f"the longest row needs {dataset.length} tokens, the model has positions for {context}",
            where="data_config.max_length",
            todo=f"shorten the row (recipe data stats), or set data_config.max_length={context // 32 * 32}",
        )


def key_of(departure: str) -> str:
    return departure.split(":", 1)[0].rpartition(".")[2]


def with_launch(plan: Plan, **values: Any) -> Plan:
    return replace(plan, config=plan.config.with_values(**values))
