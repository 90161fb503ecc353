"""What surrounds a run: export, reports, checks. Never imported by the training path."""
