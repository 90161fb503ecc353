from __future__ import annotations

import json

import pytest

from common.errors import MachineError
from common.train import metrics
from common.train.metrics import JsonLines


def written(path, *records) -> None:
    lines = JsonLines(path)
    for record in records:
        lines.write(record)
    lines.close()


def test_floats_come_back_with_every_bit(tmp_path):
    record = {"step": 1, "loss": 0.1 + 0.2, "lr": 1e-300, "seconds": 1 / 3}
    written(tmp_path / "m.jsonl", record)
    assert metrics.read(tmp_path / "m.jsonl") == [record]


def test_each_record_is_there_when_write_returns(tmp_path):
    lines = JsonLines(tmp_path / "m.jsonl")
    lines.write({"step": 1})
    assert metrics.read(tmp_path / "m.jsonl") == [{"step": 1}]
    lines.sync()
    lines.close()


def test_a_reopened_file_is_appended_to(tmp_path):
    for step in (1, 2):
        written(tmp_path / "m.jsonl", {"step": step})
    assert [record["step"] for record in metrics.read(tmp_path / "m.jsonl")] == [1, 2]


def test_no_file_is_no_record(tmp_path):
    assert metrics.read(tmp_path / "none.jsonl") == []


def test_cut_back_keeps_what_the_checkpoint_knows(tmp_path):
    path = tmp_path / "m.jsonl"
    written(path, {"step": 0, "eval_loss": 3.0}, *({"step": n, "loss": 1.0} for n in (1, 2, 3)), {"step": 3})
    assert [record["step"] for record in metrics.cut_back(path, 2, path)] == [0, 1, 2]
    assert [json.loads(line)["step"] for line in path.read_text().splitlines()] == [0, 1, 2]


def test_what_a_power_cut_left_behind_the_checkpoint_is_cut_off_and_damage_before_it_is_refused(tmp_path):
    path, lost = tmp_path / "m.jsonl", "\0" * 20
    written(path, {"step": 1}, {"step": 2})
    path.write_text(f'{path.read_text()}{lost}{{"step": 3}}\n{lost}{{"step": 3}}\n{{"step": 4}}\n{{"ste')
    assert metrics.cut_back(path, 2, path) == [{"step": 1}, {"step": 2}]
    path.write_text('{"step": 1}\n{"ste\n{"step": 2}\n')
    with pytest.raises(MachineError, match="line 2 is not JSON"):
        metrics.cut_back(path, 2, path)


ANSWER = {"step": 2, "answer": "the fox\u2028says \x85 \x0b ünïcödé 🦊"}


def test_any_text_survives_in_one_line(tmp_path):
    """Characters that Python calls line breaks and JSON does not."""
    written(tmp_path / "m.jsonl", {"step": 1}, ANSWER, {"step": 3})
    assert metrics.read(tmp_path / "m.jsonl")[1] == ANSWER
    assert metrics.cut_back(tmp_path / "m.jsonl", 2, tmp_path / "m.jsonl")[-1] == ANSWER
    assert metrics.read(tmp_path / "m.jsonl")[-1] == ANSWER


def test_a_last_line_that_a_crash_cut_at_any_byte_is_left_out(tmp_path):
    path = tmp_path / "m.jsonl"
    written(path, {"step": 1}, ANSWER)
    whole = path.read_bytes()
    first = whole.index(b"\n") + 1
    for end in range(first, len(whole) - 1):
        path.write_bytes(whole[:end])
        assert metrics.read(path) == [{"step": 1}], end


def test_damage_before_the_last_line_is_an_error_with_its_line(tmp_path):
    path = tmp_path / "m.jsonl"
    path.write_bytes(b'{"step": 1}\n{"step"\n{"step": 3}\n')
    with pytest.raises(MachineError, match="line 2 is not JSON"):
        metrics.read(path)
    path.write_bytes(b'{"step": 1}\n{"step": "\xff"}\n{"step": 3}\n')
    with pytest.raises(MachineError, match="line 2 is not JSON"):
        metrics.read(path)
