"""`recipe`, in a process of its own, whose images are a folder's: its lock, its record of what was built, its logs.

    python -m tests.support.own_images FOLDER WORD...

Wheels are taken for granted: what pip collects is another test's.
"""

from __future__ import annotations

import sys
from pathlib import Path

from tools.cli import main
from tools.containers import build, images

if __name__ == "__main__":
    folder = Path(sys.argv.pop(1))
    images.LOCK, images.LOCAL = folder / "images.lock.json", folder / "images.local.json"
    build.fill_wheelhouse = lambda *_: []
    main.main()
