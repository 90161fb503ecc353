"""What a person at a terminal sees of long work, and that nobody else does."""

from __future__ import annotations

import json
import os
import pty
import subprocess
import sys
from pathlib import Path

import pytest

from common.errors import UsageError
from tests.support.data_recipe import make_recipe
from tools import progress
from tools.data import files

ROOT = Path(__file__).resolve().parents[2]


def at_a_terminal(environment: dict[str, str], *words: object) -> tuple[str, str]:
    """Run `recipe data`, its stderr a terminal and its stdout a pipe; return what each got."""
    screen, theirs = pty.openpty()
    command = [sys.executable, "-m", "tools.cli", "data", *map(str, words)]
    found = {**os.environ, "PYTHONPATH": str(ROOT), "TERM": "xterm", "COLUMNS": "100", **environment}
    process = subprocess.Popen(command, cwd=ROOT, env=found, stdout=subprocess.PIPE, stderr=theirs, text=True)
    os.close(theirs)
    seen = b""
    while True:
        try:
            part = os.read(screen, 65536)
        except OSError:  # the other end is closed
            break
        if not part:
            break
        seen += part
    os.close(screen)
    said = process.communicate()[0]
    assert process.returncode == 0, seen.decode()
    return seen.decode(), said


def rows_file(path: Path) -> Path:
    rows = [{"prompt": f"What is number {at}?", "response": f"It is a {at}."} for at in range(300)]
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return path


def test_a_terminal_gets_bars_and_what_is_piped_gets_the_report_alone(tmp_path):
    path = rows_file(tmp_path / "rows.jsonl")
    seen, said = at_a_terminal({}, "check", path)
    for piece in ("reading", "looking for private data", "comparing prompts", "300/300"):
        assert piece in seen
    assert said.startswith("read as ")
    assert said.rstrip().endswith("warnings: 1")
    assert "300/300" not in said
    seen, said = at_a_terminal({}, "convert", path, tmp_path / "out.jsonl")
    assert "writing" in seen
    assert said.startswith("300 rows from")
    done = subprocess.run(
        [sys.executable, "-m", "tools.cli", "data", "check", str(path)], cwd=ROOT, capture_output=True, text=True
    )
    assert (done.returncode, done.stderr) == (0, ""), "no bar in a log"


def test_token_files_are_watched_while_they_are_made(tmp_path, tiny_base):
    folder = make_recipe(tmp_path / "foxes")
    config = folder / "config.yaml"
    config.write_text(config.read_text().replace("/nowhere", str(tiny_base)))
    home = {"RECIPES_HOME": str(tmp_path / "home"), "RECIPES_SYSFS_ROOT": str(tmp_path / "none"), "HW": "cpu"}
    seen, said = at_a_terminal(home, "build", folder)
    assert "tokenizing train" in seen
    assert said.startswith("data built")
    seen, said = at_a_terminal(home, "stats", folder)
    assert "reading" in seen
    assert "tokenizing" in seen
    assert said.startswith("rows: ")


def test_off_a_terminal_items_are_handed_on_as_they_are():
    with progress.bars() as watch:
        items = [1, 2]
        assert watch(items, "counting", 2) is items


def fail_at_the_first_item() -> None:
    with progress.bars() as watch:
        kept = iter(watch(range(5), "counting", 5))
        next(kept)
        raise UsageError("no")


def test_an_error_leaves_no_bar_behind(monkeypatch, capsys):
    """The line of a bar is wiped, and the cursor is back (ESC [?25h), before the error is printed."""
    monkeypatch.setenv("FORCE_COLOR", "1")
    monkeypatch.setenv("TERM", "xterm")
    with pytest.raises(UsageError):
        fail_at_the_first_item()
    seen = capsys.readouterr().err
    assert "counting" in seen
    assert "\x1b[?25h" in seen
    assert seen.rstrip().endswith("\x1b[2K")


def test_about_how_many_records_a_file_has(tmp_path):
    from pyarrow import Table, parquet

    path = rows_file(tmp_path / "rows.jsonl")
    assert files.about(path, "jsonl") == 300
    parquet.write_table(Table.from_pydict({"prompt": ["a", "b"]}), tmp_path / "rows.parquet")
    assert files.about(tmp_path / "rows.parquet", "parquet") == 2
    assert files.about(path, "parquet") is None, "no Parquet: its reader says so"
    assert files.about(tmp_path, "folder") is None
