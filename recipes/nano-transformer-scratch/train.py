"""Train a transformer from random weights on plain text, with held-out bits per byte beside every number.

    make recipe-scratch HW=n150                                  tt-train's character model, 9.8 M parameters
    make recipe-scratch HW=cpu                                   a small one, in minutes
    make recipe-scratch SET="model_config.preset=llama_22m"      another size; presets/ has eight

Every number is in config.yaml; the corpus is read in dataset.py; what the calls below do is in common/train/run.py.
"""

from __future__ import annotations

from common.train.launch import Launch
from common.train.run import open_run

from .dataset import prompts, splits

AFTER_RUN = ("never_moved", "export")  # what `recipe run` does with the run's folder next


def train(launch: Launch) -> None:
    with open_run(launch, splits, prompts) as run:
        config, rows = run.config, run.dataset.train
        run.evaluate(step=0)  # random weights: what knowing nothing scores

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
