"""The CPU twin: PyTorch, one process or several."""
