"""The loop as a recipe has it; tests/recipes looks at those of the recipes themselves."""

from __future__ import annotations

from common.train.launch import Launch
from common.train.run import open_run

from .dataset import prompts, splits

AFTER_RUN = ("never_moved", "export")  # what `recipe run` does with the run's folder next


def train(launch: Launch) -> None:
    with open_run(launch, splits, prompts) as run:
        config, rows = run.config, run.dataset.train
        run.evaluate(step=0)

        for step in run.steps():
            batch = rows.batch(step, config.training.seed, config.training.batch_size)
            micro_batches = batch.split(config.accumulation)
            stats = run.backend.train_step(micro_batches, run.learning_rate(step), step)
            run.record(step, stats)
            if run.evaluation_due(step):
                run.evaluate(step)
            if run.checkpoint_due(step):
                run.save(step)

        run.finish()
