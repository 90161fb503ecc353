"""Where this repository is, and where what it fetches and makes is kept."""

from __future__ import annotations

import os
from pathlib import Path

ROOT = Path(__file__).resolve().parents[1]


def home() -> Path:
    """Where bases, corpora, token files and compiled kernels live: `RECIPES_HOME`, else ~/.cache/recipes."""
    return Path(os.environ.get("RECIPES_HOME") or Path.home() / ".cache" / "recipes").expanduser().absolute()
