"""Run folders after their runs: read, compare, prune, explain."""
