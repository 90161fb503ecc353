"""`recipe`, in a process of its own, with a given image and with what this engine may not do left out.

    python -m tests.containers.launch IMAGE PINS WORD...

An engine that runs in a container itself may not lift the limit of locked memory; the fake boards of the tests lock
none, so they are given the limit that there is.
"""

from __future__ import annotations

import resource
import sys

from tools.cli import main
from tools.containers import launcher, spec
from tools.containers.images import Image

if __name__ == "__main__":
    reference, pins = sys.argv.pop(1), sys.argv.pop(1)
    spec.MEMLOCK = resource.getrlimit(resource.RLIMIT_MEMLOCK)[1]
    launcher.find_image = lambda hw: Image(hw.image, reference, "local", pins)  # type: ignore[attr-defined]
    main.main()
