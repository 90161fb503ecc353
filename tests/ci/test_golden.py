"""make golden: which recorded runs it makes again, and that a figure that fails ends it."""

from __future__ import annotations

import subprocess
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import yaml

from ci import golden

EXACT: dict[str, Any] = {
    **dict.fromkeys(("lock_sha256", "tokens_sha256", "history_sha256", "weights_sha256"), "0" * 64),
    "cpu_class": "a toaster",
    "threads": 1,
    "world": 1,
    "compiled": False,
}
ENTRY: dict[str, Any] = {
    "board": "cpu",
    "evidence": "measured",
    "what": "a test",
    "overrides": ["training_config.seed=1"],
    "steps": 20,
    "date": "DATE",
    "commit": "0000000",
    "machine": "a toaster",
    "loss_at": {1: 4.5},
    "exact": EXACT,
}


def write(root: Path, name: str, *entries: dict[str, Any]) -> None:
    folder = root / "recipes" / name
    folder.mkdir(parents=True)
    (folder / "config.yaml").touch()
    text = yaml.safe_dump({"format": 1, "recipe": name, "entries": list(entries)})
    (folder / "results.yaml").write_text(text.replace("DATE", "2026-11-22"))


def test_the_short_runs_on_a_cpu_that_were_recorded_bit_for_bit(tmp_path: Path) -> None:
    others = ({"steps": 800}, {"board": "n150"}, {"steps": None}, {"exact": None})
    write(tmp_path, "a", ENTRY, *(ENTRY | change for change in others))
    write(tmp_path, "b")
    words = "--hw cpu --steps 20 --set training_config.seed=1".split()
    assert list(golden.golden_runs(tmp_path)) == [("a", words)]


def test_a_figure_that_fails_ends_it_with_its_code(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    def run(command: list[str], **_: Any) -> Any:
        (tmp_path / "00-a/20260101T000000Z-a-cpu-0000").mkdir(parents=True, exist_ok=True)
        (tmp_path / "00-a/20260101T000000Z-a-cpu-0000/manifest.json").touch()
        return SimpleNamespace(returncode=6 if "grade" in command else 0)

    monkeypatch.setattr(golden, "golden_runs", lambda root: [("a", ["--steps", "20"]), ("b", ["--steps", "20"])])
    monkeypatch.setattr(subprocess, "run", run)
    with pytest.raises(SystemExit) as ended:
        golden.grade(tmp_path)
    assert ended.value.code == 6


def test_no_such_run_is_said(monkeypatch: pytest.MonkeyPatch, tmp_path: Path, capsys: Any) -> None:
    monkeypatch.setattr(golden, "golden_runs", lambda root: [])
    golden.grade(tmp_path)
    assert "nothing to grade" in capsys.readouterr().out
