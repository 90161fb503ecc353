from __future__ import annotations
from common.train.run import Run


def write_card(run: Run) -> None: ...
