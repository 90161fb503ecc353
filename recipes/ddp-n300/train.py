"""Train one model on several devices at once, every one on its share of each batch.

    make recipe-ddp HW=n300                        two chips of one card
    make recipe-ddp HW=cpu-x2                      two processes on a CPU
    make recipe-ddp HW=cpu-x2 WORLD=4              four
    recipe verify ddp                              one device against several, step by step

Nothing below knows how many devices there are: data parallel is `device_config.mesh_shape`, [1, N], and any recipe
takes it. `batch_size` is the rows of a step of all devices together, and the loss is divided by the tokens of them all,
so the number of devices changes no gradient. How: engines/cpu/ranks.py for processes, engines/ttml/engine.py for chips.
"""

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
            batch = rows.batch(step, config.training.seed, config.training.batch_size)  # the same for 1, 2 or 32 chips
            micro_batches = batch.split(config.accumulation)
            stats = run.backend.train_step(micro_batches, run.learning_rate(step), step)
            run.record(step, stats)
            if run.evaluation_due(step):
                run.evaluate(step)
            if run.checkpoint_due(step):
                run.save(step)

        run.finish()
