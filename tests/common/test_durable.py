"""What `sync` flushes, and what there is nothing to flush of."""

from __future__ import annotations

import errno
import os
from pathlib import Path

import pytest

from common.files import sync


def test_a_folder_that_has_nothing_to_flush_is_passed_over():
    # A run's folder may be below an automounted /home, whose kernel refuses fsync as that of /proc does.
    proc = os.open("/proc", os.O_RDONLY)
    with pytest.raises(OSError) as refused:
        os.fsync(proc)
    os.close(proc)
    assert refused.value.errno == errno.EINVAL, "else this test is of nothing"
    sync(Path("/proc"))


def test_a_disk_that_fails_is_told_with_the_name_of_the_file(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    def fails(_descriptor: int) -> None:
        raise OSError(errno.EIO, os.strerror(errno.EIO))

    monkeypatch.setattr(os, "fsync", fails)
    with pytest.raises(OSError, match=tmp_path.name) as told:
        sync(tmp_path)
    assert told.value.errno == errno.EIO
