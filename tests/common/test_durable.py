"""What `sync` flushes, and what there is nothing to flush of."""

from __future__ import annotations

import errno
import os
import resource
import shutil
from pathlib import Path

import pytest

from common.errors import MachineError
from common.files import disk_errors, sync


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


def test_of_a_copy_that_finds_no_room_the_file_that_it_makes_is_named(tmp_path: Path):
    (tmp_path / "from").write_bytes(bytes(9000))
    soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (5000, hard))
    try:
        with pytest.raises(MachineError) as told, disk_errors("make a copy"):
            shutil.copy(tmp_path / "from", tmp_path / "to")
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))
    assert told.value.where == str(tmp_path / "to")
