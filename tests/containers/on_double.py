"""`python -m tools.cli` in a container where a double stands for ttml: what a board's image is to its launcher.

python -m tests.containers.on_double DEVICES WORD...
"""

from __future__ import annotations

import sys
from pathlib import Path

from tests.support.boards import machine
from tools.cli import main

if __name__ == "__main__":
    devices = int(sys.argv.pop(1))
    with machine(Path("/tmp"), devices, "C"):
        main.main()
