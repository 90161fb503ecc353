"""Kill whole runs at chosen and at random moments, cut their power, resume them, and compare: `make torture`."""
