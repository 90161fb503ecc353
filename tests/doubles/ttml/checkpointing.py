"""A double of `ttml.checkpointing` for those who ask whether it is there. Its files are pickles: nobody uses it."""

from __future__ import annotations

from ttnn import _switches

if _switches.GENERATION == "C":

    class CheckpointShapeError(RuntimeError):
        """Raised where a parameter and its moments have different shapes."""
