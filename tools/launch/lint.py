"""Warnings for choices that are valid and known to be bad. Each rule has a stable id; none stops a run.

What is always wrong is not here but an error of the configuration: data parallel on one device, a learning
rate under a name that nobody reads (`lr`), a length that is no multiple of 32, a tie group targeted in part.
"""

from __future__ import annotations

import math
from collections.abc import Iterator

from common.config import Config
from common.hardware import TILE, Hardware

# A run this short is a smoke test: it need not evaluate, and may save every step.
SMOKE_STEPS = 20


def lint(config: Config, hw: Hardware) -> list[str]:
    """Return `ID: key: what is doubtful` for every rule that a configuration breaks on a board, by id."""
    rules = (of_the_update, of_the_run, of_a_board, of_the_batch, of_the_surroundings)
    return sorted(line for rule in rules for line in rule(config, hw))


def of_the_update(config: Config, _hw: Hardware) -> Iterator[str]:
    """Look at learning rate, schedule and clipping."""
    training, scheduler = config.training, config.training.scheduler
    rate, steps, pretrained = training.learning_rate, training.max_steps, config.model.init == "pretrained"
    if pretrained and rate >= 1e-3:
        says = f"{rate:g} is high for fine-tuning and may destroy what the base knows; 5e-5 to 2e-4 is usual"
        yield f"L001: training_config.learning_rate: {says}"
    if rate < 1e-6:
        yield f"L002: training_config.learning_rate: {rate:g} hardly moves the weights; was 1e-4 meant?"
    if training.max_grad_norm == 0:
        yield "L003: training_config.max_grad_norm: clipping is off: one bad batch can undo the run; 1.0 is usual"
    if steps is not None and scheduler.warmup_steps >= steps:
        says = f"a warm-up of {scheduler.warmup_steps} steps in a run of {steps}: it is clamped to the run"
        yield f"L004: training_config.scheduler.warmup_steps: {says}"
    if pretrained and (scheduler.type == "constant" or scheduler.min_lr_ratio == 1.0):
        says = "the learning rate never falls: the end of a fine-tune stays noisy; cosine or linear is usual"
        yield f"L005: training_config.scheduler.type: {says}"


def of_the_run(config: Config, _hw: Hardware) -> Iterator[str]:
    """Look at what is measured and saved on the way."""
    every, steps = config.eval.every, config.training.max_steps
    smoke_run = steps is not None and steps <= SMOKE_STEPS
    if not smoke_run and (every == 0 or (steps is not None and every >= steps)):
        yield "L006: eval_config.every: no evaluation before the end: overfitting is seen too late"
    if config.data.held_out_share == 0:
        says = "no held-out rows: the run cannot show that it learned more than its rows by heart"
        yield f"L007: data_config.held_out_share: {says}"
    if config.checkpoint.every == 1 and not smoke_run:
        yield "L008: checkpoint_config.every: a checkpoint at every step: saving may take longer than training"
    if config.checkpoint.keep_best and (every == 0 or config.data.held_out_share == 0):
        says = "nothing to choose the best by: set eval_config.every and data_config.held_out_share"
        yield f"L009: checkpoint_config.keep_best: {says}"


def of_a_board(config: Config, hw: Hardware) -> Iterator[str]:
    """Look at what bf16 weights, several replicas and tiles do with the settings."""
    optimizer, departures, shape = config.training.optimizer, config.departures(), config.model.architecture
    if not hw.is_cpu and optimizer.type != "AdamWFullPrecision" and not optimizer.stochastic_rounding:
        yield (
            f"L010: training_config.optimizer.stochastic_rounding: {optimizer.type} keeps bf16 weights on a board; "
            "updates below about 1/256 of a weight are rounded away: turn stochastic rounding on, or use "
            "AdamWFullPrecision"
        )
    if config.device.enable_ddp and optimizer.stochastic_rounding:
        yield (
            "L011: training_config.optimizer.stochastic_rounding: each device rounds on its own: replicas drift apart "
            "and cannot be checked against each other; AdamWFullPrecision keeps them equal"
        )
    # The cpu overlay may change base, preset, batch and learning rate: the run says so in its first line.
    if not hw.is_cpu and departures:
        says = f"the overlay of {hw.name} changes the training, not only its split: {'; '.join(departures)}"
        yield f"L013: training_config: {says}"
    if not hw.is_cpu and shape is not None:
        sizes = {
            "hidden_size": shape.hidden_size,
            "intermediate_size": shape.intermediate_size,
            "hidden_size / num_attention_heads": shape.hidden_size // shape.num_attention_heads,
        }
        if odd := [f"{name} {size}" for name, size in sizes.items() if size % TILE]:
            says = f"not a multiple of {TILE}, the side of a board's tile: {', '.join(odd)}"
            yield f"L014: model_config.architecture: {says}"


def of_the_batch(config: Config, hw: Hardware) -> Iterator[str]:
    """Compare the batch size with the recipe's own."""
    # What the cpu overlay chooses is said in the run's first line, not warned about.
    own_choice = hw.is_cpu and any(line.startswith("training_config.batch_size") for line in config.departures())
    was, now, rate = config.recipe_batch, config.training.batch_size, config.training.learning_rate
    if was is not None and was != now and not own_choice:
        yield (
            f"L012: training_config.batch_size: the batch is {now}, the recipe's is {was}: published numbers do not "
            f"carry over, nor does its learning rate (by the square-root rule {rate:g} would become "
            f"{rate * math.sqrt(now / was):.3g})"
        )


def of_the_surroundings(config: Config, _hw: Hardware) -> Iterator[str]:
    """Look at sampling, what leaves the machine, and negative controls."""
    if config.eval.temperature == 0 and (config.eval.top_k > 0 or config.eval.top_p < 1):
        yield "L015: eval_config.temperature: 0 is greedy decoding: top_k and top_p have no effect"
    if config.logging.use_wandb and config.logging.wandb_mode == "online":
        says = "online: the run's configuration and numbers are sent to the service"
        yield f"L016: logging_config.wandb_mode: {says}"
    if (control := config.data.control) != "none":
        says = f"{control}, a negative control: rows are spoilt on purpose, and it must not improve"
        yield f"L017: data_config.control: {says}"
