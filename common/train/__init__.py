"""The training path: schedule, checkpoint, metrics, evaluation, generation, run."""
