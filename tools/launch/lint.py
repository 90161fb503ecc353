"""Warnings for choices that are valid and known to be bad. Each rule has a stable id; none stops a run.

What is always wrong is not here but an error of the configuration: data parallel on one device, a learning
rate under a name that nobody reads (`lr`), a length that is no multiple of 32, a tie group targeted in part.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator
from dataclasses import dataclass

from common.config import Config
from common.hardware import TILE, Hardware


@dataclass(frozen=True)
class Finding:
    """One warning: its id, what is doubtful and what to do, and the file:line or option that set it."""

    id: str
    message: str
    where: str


Rule = Callable[[Config, Hardware], "str | None"]
RULES: dict[str, tuple[str, Rule]] = {}  # id: (the key it looks at, the rule)

# A run this short is a smoke test: it need not evaluate, and may save every step.
SMOKE_STEPS = 20


def lint(config: Config, hw: Hardware) -> list[Finding]:
    """All findings for a configuration on a board, in the order of their ids."""
    return list(_findings(config, hw))


def _findings(config: Config, hw: Hardware) -> Iterator[Finding]:
    for name, (key, rule) in RULES.items():
        message = rule(config, hw)
        if message:
            yield Finding(name, f"{key}: {message}", config.where(key))


def _rule(name: str, key: str) -> Callable[[Rule], Rule]:
    def register(rule: Rule) -> Rule:
        assert name not in RULES, f"{name} is taken"
        RULES[name] = (key, rule)
        return rule

    return register


def _is_smoke_run(config: Config) -> bool:
    return config.training.max_steps is not None and config.training.max_steps <= SMOKE_STEPS


@_rule("L001", "training_config.learning_rate")
def fine_tune_rate_is_high(config: Config, _hw: Hardware) -> str | None:
    rate = config.training.learning_rate
    if config.model.init == "pretrained" and rate >= 1e-3:
        return f"{rate:g} is high for fine-tuning and may destroy what the base knows; 5e-5 to 2e-4 is usual"
    return None


@_rule("L002", "training_config.learning_rate")
def rate_is_tiny(config: Config, _hw: Hardware) -> str | None:
    rate = config.training.learning_rate
    return f"{rate:g} hardly moves the weights; was 1e-4 meant?" if rate < 1e-6 else None


@_rule("L003", "training_config.max_grad_norm")
def clipping_is_off(config: Config, _hw: Hardware) -> str | None:
    if config.training.max_grad_norm == 0:
        return "clipping is off: one bad batch can undo the run; 1.0 is usual"
    return None


@_rule("L004", "training_config.scheduler.warmup_steps")
def warmup_outlasts_run(config: Config, _hw: Hardware) -> str | None:
    warmup, steps = config.training.scheduler.warmup_steps, config.training.max_steps
    if steps is not None and warmup >= steps:
        return f"a warm-up of {warmup} steps in a run of {steps}: it is clamped to the run"
    return None


@_rule("L005", "training_config.scheduler.type")
def fine_tune_rate_never_falls(config: Config, _hw: Hardware) -> str | None:
    scheduler = config.training.scheduler
    flat = scheduler.type == "constant" or scheduler.min_lr_ratio == 1.0
    if config.model.init == "pretrained" and flat:
        return "the learning rate never falls: the end of a fine-tune stays noisy; cosine or linear is usual"
    return None


@_rule("L006", "eval_config.every")
def never_evaluates_on_the_way(config: Config, _hw: Hardware) -> str | None:
    every, steps = config.eval.every, config.training.max_steps
    if not _is_smoke_run(config) and (every == 0 or (steps is not None and every >= steps)):
        return "no evaluation before the end: overfitting is seen too late"
    return None


@_rule("L007", "data_config.held_out_share")
def holds_nothing_out(config: Config, _hw: Hardware) -> str | None:
    if config.data.held_out_share == 0:
        return "no held-out rows: the run cannot show that it learned more than its rows by heart"
    return None


@_rule("L008", "checkpoint_config.every")
def saves_every_step(config: Config, _hw: Hardware) -> str | None:
    if config.checkpoint.every == 1 and not _is_smoke_run(config):
        return "a checkpoint at every step: saving may take longer than training"
    return None


@_rule("L009", "checkpoint_config.keep_best")
def best_is_never_measured(config: Config, _hw: Hardware) -> str | None:
    if config.checkpoint.keep_best and (config.eval.every == 0 or config.data.held_out_share == 0):
        return "nothing to choose the best by: set eval_config.every and data_config.held_out_share"
    return None


@_rule("L010", "training_config.optimizer.stochastic_rounding")
def small_updates_are_lost(config: Config, hw: Hardware) -> str | None:
    optimizer = config.training.optimizer
    if not hw.is_cpu and optimizer.type == "AdamW" and not optimizer.stochastic_rounding:
        return (
            "AdamW keeps bf16 weights on a board; updates below about 1/256 of a weight are rounded away: "
            "turn stochastic rounding on, or use AdamWFullPrecision"
        )
    return None


@_rule("L011", "training_config.optimizer.stochastic_rounding")
def replicas_drift_apart(config: Config, _hw: Hardware) -> str | None:
    if config.device.enable_ddp and config.training.optimizer.stochastic_rounding:
        return (
            "each device rounds on its own: replicas drift apart and cannot be checked against each other; "
            "AdamWFullPrecision keeps them equal"
        )
    return None


@_rule("L012", "training_config.batch_size")
def batch_changed(config: Config, hw: Hardware) -> str | None:
    # What the cpu overlay chooses is said in the run's first line, not warned about.
    own_choice = hw.is_cpu and any(line.startswith("training_config.batch_size") for line in config.departures())
    if config.recipe_batch is None or config.recipe_batch == config.training.batch_size or own_choice:
        return None
    rate = config.training.learning_rate * math.sqrt(config.training.batch_size / config.recipe_batch)
    return (
        f"the batch is {config.training.batch_size}, the recipe's is {config.recipe_batch}: published numbers do "
        f"not carry over, nor does its learning rate (by the square-root rule {config.training.learning_rate:g} would "
        f"become {rate:.3g})"
    )


@_rule("L013", "training_config")
def board_changes_the_training(config: Config, hw: Hardware) -> str | None:
    # The cpu overlay may change base, preset, batch and learning rate: the run says so in its first line.
    departures = config.departures()
    if not hw.is_cpu and departures:
        return f"the overlay of {hw.name} changes the training, not only its split: {'; '.join(departures)}"
    return None


@_rule("L014", "model_config.architecture")
def shape_is_padded(config: Config, hw: Hardware) -> str | None:
    shape = config.model.architecture
    if hw.is_cpu or shape is None:
        return None
    sizes = {
        "hidden_size": shape.hidden_size,
        "intermediate_size": shape.intermediate_size,
        "hidden_size / num_attention_heads": shape.hidden_size // shape.num_attention_heads,
    }
    odd = [f"{name} {size}" for name, size in sizes.items() if size % TILE]
    return f"not a multiple of {TILE}, the side of a board's tile: {', '.join(odd)}" if odd else None


@_rule("L015", "eval_config.temperature")
def sampling_keys_have_no_effect(config: Config, _hw: Hardware) -> str | None:
    if config.eval.temperature == 0 and (config.eval.top_k > 0 or config.eval.top_p < 1):
        return "0 is greedy decoding: top_k and top_p have no effect"
    return None


@_rule("L016", "logging_config.wandb_mode")
def numbers_leave_the_machine(config: Config, _hw: Hardware) -> str | None:
    if config.logging.use_wandb and config.logging.wandb_mode == "online":
        return "online: the run's configuration and numbers are sent to the service"
    return None


@_rule("L017", "data_config.control")
def is_a_control(config: Config, _hw: Hardware) -> str | None:
    if config.data.control != "none":
        return f"{config.data.control}, a negative control: rows are spoilt on purpose, and it must not improve"
    return None
