"""Fine-tune an instruction model on the recipe's rows: LoRA by default, all weights with model_config.lora=null.

    make recipe-finetune HW=n150          the base is TinyLlama-1.1B-Chat
    make recipe-finetune HW=cpu           the CPU twin, with SmolLM2-135M-Instruct

Every number is in config.yaml; the data set is made in dataset.py; what the calls below do is in common/train/run.py.
"""

from __future__ import annotations

from common.train.launch import Launch
from common.train.run import open_run

from .dataset import prompts, splits

AFTER_RUN = ("never_moved", "export", "before_after")  # what `recipe run` does with the run's folder next


def train(launch: Launch) -> None:
    with open_run(launch, splits, prompts) as run:
        config, rows = run.config, run.dataset.train
        run.evaluate(step=0)  # the base, to measure against

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
