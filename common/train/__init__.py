"""The training path: a launch, its plan, the life of the run, and what the run writes."""
