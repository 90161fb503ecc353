"""From a launch to everything a run needs before its engine starts: base, tokens, prompts, precision, steps."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

from common import recipe
from common.config import Config
from common.data import build
from common.data.chat import ChatTokenizer
from common.data.order import steps_for
from common.data.tokens import TokenDataset
from common.engine import load_engine
from common.errors import DataError, UsageError
from common.hardware import TILE, Hardware
from common.model import bases, llama
from common.model.bases import Base
from common.recipe import Prompts, Splits
from common.train.launch import Launch
from common.train.schedule import warmup_steps


@dataclass(frozen=True)
class Plan:
    """A launch with what it trains on: `config` has its precision and steps, `dataset` its tokens."""

    launch: Launch
    config: Config
    base: Base
    tokenizer: ChatTokenizer
    dataset: TokenDataset
    prompts: list[str]
    reasons: dict[str, str] = field(default_factory=dict)

    @property
    def hw(self) -> Hardware:
        """Return the board's row of hardware.yaml."""
        return self.launch.hw

    @property
    def training_digest(self) -> str:
        """Return the sha256 that, with `dataset.tokens_sha256` and a step, fixes the next update."""
        return self.config.training_digest({"base": self.base.identity})


def make_plan(
    launch: Launch, splits: Splits, prompts_of: Prompts, say: Callable[[str], None], warn: Callable[[str], None]
) -> Plan:
    """Return the plan of `launch` on the recipe's data, saying each decision as it falls; no device is opened."""
    hw, config, engine = launch.hw, launch.config, load_engine(launch.engine)
    say(f"{launch.recipe_dir.name} on {launch.reason}")
    engine.refuse_launch(hw, config)
    if config.model.lora and config.model.lora.tie_groups == "build":
        groups, why = engine.tie_groups_for(hw)
        config = config.with_values(**{"model.lora.tie_groups": groups})
        say(f"model_config.lora.tie_groups: build is {groups}, of {why}")
    if launch.departures:
        say(f"{hw.name} is another experiment than a board's: it has its own {', '.join(launch.departures)}")
    for line in launch.warnings:
        warn(line)
    # Refusals come in the order of their cost: what the board and its libraries say before tokens are made.
    base, tokenizer, dataset = prepare(launch, splits)
    for line in dataset.report.lines():
        say(line)
    refuse_too_long(dataset, base.architecture)
    if not len(dataset.held_out):
        what = "no row is held out, so nothing could be said about the result"
        raise DataError(what, where="data_config.held_out_share", todo="raise it, or leave data_config.split_by out")
    prompts = list(recipe.call(prompts_of, config, launch.recipe_dir))
    check_prompts(prompts, config, tokenizer, base.architecture, warn)
    precision, why = engine.precision_for(hw)
    if config.training.precision == "auto":
        config = config.with_values(**{"training.precision": precision})
    else:
        why = "as configured"
    # After the tokens: epochs become steps by the number of rows that were made of them.
    config = with_steps(config, len(dataset.train), say)
    engine.refuse_too_large(hw, config, base.architecture, dataset.length)
    if launch.stop_at is not None and not 1 <= launch.stop_at <= (config.training.max_steps or 0):
        raise UsageError(f"--stop-at {launch.stop_at} is not a step of this run of {config.training.max_steps}")
    reasons = {"hw": launch.reason, "precision": why}
    return Plan(launch, config, base, tokenizer, dataset, prompts, reasons)


def prepare(
    launch: Launch, splits: Splits, encode: build.Encode | None = None
) -> tuple[Base, ChatTokenizer, TokenDataset]:
    """Return what a launch starts from, its tokenizer and tokens: a base and rows, or random weights and a corpus."""
    config, recipe_dir, engine = launch.config, launch.recipe_dir, load_engine(launch.engine)
    parts = build.read_splits(splits, config, recipe_dir)
    if config.model.architecture is not None:
        engine.refuse_model(llama.hf_config(config.model.architecture.model_dump()))
        folder = build.corpus_tokenizer(config, parts["train"], bases.home())
        base = bases.random_base(config.model, config.training.seed, folder)
    else:
        assert config.model.base is not None, "a pretrained base has a name"
        base = bases.resolve(config.model.base, recipe_dir=recipe_dir)
        engine.refuse_model(base.architecture)
    tokenizer = ChatTokenizer.load(base.folder)
    return base, tokenizer, build.build(config, parts, tokenizer, base.folder, bases.home(), encode)


def with_steps(config: Config, rows: int, say: Callable[[str], None]) -> Config:
    """Return the config with max_steps set for so many training rows; say steps, epochs and the batch equation."""
    training = config.training
    steps = training.max_steps or steps_for(training.num_epochs or 0, rows, training.batch_size)
    say(f"{config.batch_equation}; {steps} steps = {steps * training.batch_size / rows:.2f} epochs of {rows} rows")
    config = config.with_values(**{"training.max_steps": steps}) if training.max_steps is None else config
    if warmup_steps(config.training) < training.scheduler.warmup_steps:
        say(f"warm-up clamped from {training.scheduler.warmup_steps} to the run's {steps} steps")
    return config


def refuse_too_long(dataset: TokenDataset, architecture: dict[str, Any]) -> None:
    """Raise DataError where rows have more tokens than the model has positions."""
    context = architecture["max_position_embeddings"]
    if dataset.length > context:
        what = f"the longest row needs {dataset.length} tokens, the model has positions for {context}"
        todo = f"shorten the row (recipe data stats), or set data_config.max_length={context // TILE * TILE}"
        raise DataError(what, where="data_config.max_length", todo=todo)


def check_prompts(
    prompts: Sequence[str],
    config: Config,
    tokenizer: ChatTokenizer,
    architecture: Mapping[str, Any],
    warn: Callable[[str], None],
) -> None:
    """Warn of a prompt with characters that no training text has.

    Raises DataError where a prompt and its longest answer are more than the model has positions for.
    """
    context, answer = architecture["max_position_embeddings"], config.eval.max_new_tokens
    for prompt in prompts:
        ids = tokenizer.prompt_ids(prompt, config.data.system_prompt)
        if len(ids) + answer > context:
            what = (
                f"the evaluation prompt {prompt[:40]!r} has {len(ids)} tokens; with an answer of {answer} that is more"
            )
            todo = f"shorten it, or set eval_config.max_new_tokens to at most {context - len(ids)}"
            raise DataError(f"{what} than the model's {context} positions", where="eval_config.prompts", todo=todo)
        if set(ids) & set(tokenizer.never_ids):
            warn(f"the evaluation prompt {prompt[:40]!r} has characters that no training text has")
