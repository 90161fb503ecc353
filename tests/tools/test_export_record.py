"""export.json: which of the export's files are as it has them."""

from __future__ import annotations

import hashlib
from pathlib import Path

import pytest

from common.errors import MachineError
from tools.export.record import damaged


def record(**files: bytes) -> dict[str, dict[str, str]]:
    return {"sha256": {name: hashlib.sha256(content).hexdigest() for name, content in files.items()}}


def test_files_of_the_folders_of_an_export_are_compared(tmp_path: Path) -> None:
    (tmp_path / "merged").mkdir()
    (tmp_path / "merged/a").write_bytes(b"a")
    assert damaged(tmp_path, record(**{"merged/a": b"a"})) == ""
    assert damaged(tmp_path, record(**{"merged/a": b"b"})) == "merged/a is damaged"
    assert damaged(tmp_path, record(**{"adapter/a": b"a"})) == "adapter/a is missing"


@pytest.mark.parametrize("name", ["merged/../../a", "/etc/hostname", "..", "merged//a"])
def test_a_name_that_leads_out_is_refused(tmp_path: Path, name: str) -> None:
    with pytest.raises(MachineError, match="no name of a file"):
        damaged(tmp_path / "export", record(**{name: b"a"}))
