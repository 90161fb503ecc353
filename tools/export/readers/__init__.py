"""A run's export, opened by other people's software: in environments of its own, and compared with our engine."""
