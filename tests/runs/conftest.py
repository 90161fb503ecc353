from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import pytest


@pytest.fixture(scope="module")
def home(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Path]:
    """RECIPES_HOME of a module's commands, and none of the caller's own settings."""
    with pytest.MonkeyPatch.context() as patch:
        folder = tmp_path_factory.mktemp("home")
        patch.setenv("RECIPES_HOME", str(folder))
        for name in ("HW", "RECIPES_DEBUG", "RECIPES_SYSFS_ROOT"):
            patch.delenv(name, raising=False)
        yield folder
