"""The bench's arithmetic, and what its locks and jobs promise."""

from __future__ import annotations

import argparse
import ast
import re
from typing import Any

import numpy as np
import pytest

from bench import loop, throughput
from bench.throughput import BENCH, LOCK, ROOT
from tests.doubles.tiny_recipe import FINE_TUNE


def measured(seconds: list[float], rows: list[int], peak: float = 100.0) -> dict[str, Any]:
    steps = [
        {"seconds": s, "cpu_seconds": 2 * s, "rows": r, "tokens": 10 * r} for s, r in zip(seconds, rows, strict=True)
    ]
    return {"steps": steps, "peak_rss_mb": peak}


# --- medians and ratio ------------------------------------------------------------------------------------------------


def test_warm_up_steps_do_not_count() -> None:
    got = throughput.summarise([measured([100.0, 50.0, 2.0, 4.0, 3.0], [8] * 5)], warmup=2)
    assert got["seconds_per_step"] == 3.0
    assert got["rows_per_second"] == pytest.approx(8 / 3)
    assert got["tokens_per_second"] == pytest.approx(80 / 3)
    assert (got["fastest_step"], got["slowest_step"], got["steps_measured"]) == (2.0, 4.0, 3)


def test_rounds_are_pooled_and_the_higher_peak_counts() -> None:
    got = throughput.summarise([measured([9.0, 1.0], [8, 8], 100.0), measured([9.0, 3.0], [8, 8], 200.0)], warmup=1)
    assert got["seconds_per_step"] == 2.0
    assert got["peak_rss_mb"] == 200.0


def test_a_packed_step_is_credited_with_the_rows_it_consumed() -> None:
    got = throughput.summarise([measured([1.0, 1.0, 1.0], [2, 4, 12])], warmup=0)
    assert got["rows_per_second"] == 4.0
    assert got["rows_per_step"] == 6.0
    assert got["cpu_seconds_per_row"] == pytest.approx(0.5)


def test_no_step_after_warm_up_is_an_error() -> None:
    with pytest.raises(ValueError, match="warm-up"):
        throughput.summarise([measured([1.0], [8])], warmup=1)


def test_the_ratio_is_over_the_faster_of_the_peers_modes() -> None:
    sides = {name: {"rows_per_second": rate} for name, rate in {"ours": 6.0, "padding": 2.0, "packing": 3.0}.items()}
    assert throughput.verdict(sides) == {"peer": "packing", "ratio": 2.0}


def test_each_round_has_its_ratio() -> None:
    runs = {
        "ours": [measured([1.0], [8]), measured([1.0], [8])],
        "padding": [measured([2.0], [8]), measured([3.0], [8])],
    }
    assert throughput.round_ratios(runs, 0, "padding") == pytest.approx([2.0, 3.0])


def test_the_table_has_a_line_a_side_under_its_heads() -> None:
    sides = {name: throughput.summarise([measured([2.0], [8])], 0) for name in ("ours", "padding")}
    head, *lines = throughput.table(sides)
    assert [line.split("  ")[0] for line in lines] == ["ours", "trl, padding"]
    assert len({len(line) for line in (head, *lines)}) == 1


def test_versions_that_differ_are_named() -> None:
    ours = dict.fromkeys(throughput.SAME_PACKAGES, "1.0")
    assert throughput.differing(ours, ours) == []
    assert throughput.differing(ours, {**ours, "peft": "2.0"}) == ["peft 1.0 / 2.0"]


# --- the peer's environment -------------------------------------------------------------------------------------------


def pins(text: str) -> dict[str, str]:
    return dict(re.findall(r"^([a-z0-9-]+)==(\S+)", text, re.MULTILINE))


def test_the_peer_runs_on_the_versions_that_ours_runs_on() -> None:
    peer, ours = pins(LOCK.read_text()), pins((ROOT / "requirements/cpu-3.11.txt").read_text())
    assert "trl" in peer
    assert {name: ours[name] for name in peer if name in ours} == {name: peer[name] for name in peer if name in ours}
    assert set(throughput.SAME_PACKAGES) <= set(peer)


def test_the_peers_lock_pins_by_hash_names_no_index_and_brings_no_cuda() -> None:
    text = LOCK.read_text()
    blocks = re.findall(r"^[a-z0-9-]+==\S+(?:.*\\\n)*.*\n", text, re.MULTILINE)
    assert len(blocks) == len(pins(text))
    assert all("--hash=sha256:" in block for block in blocks)
    assert not re.search(r"\w+://|^\s*-(?:i|f|-index|-find)|[\s=@](?:/|~)", text, re.MULTILINE)
    assert not [name for name in pins(text) if re.match(r"nvidia|triton|cuda|torch.+", name)]


def test_torch_is_taken_out_of_the_lock_with_its_hashes_and_nothing_else() -> None:
    torch = "torch==2+cpu \\\n    --hash=sha256:b \\\n    --hash=sha256:c\n"
    lock = f"sympy==1 \\\n    --hash=sha256:a\n{torch}    # via peft\ntqdm==4\n"
    assert throughput.torch_requirement(lock) == torch
    with pytest.raises(SystemExit):
        throughput.torch_requirement("sympy==1\n")


def test_the_peers_environment_is_made_again_when_lock_or_python_changes() -> None:
    stamps = {
        throughput.stamp_of("a", "3.11.1"),
        throughput.stamp_of("b", "3.11.1"),
        throughput.stamp_of("a", "3.11.2"),
    }
    assert len(stamps) == 3


def test_the_peers_script_uses_nothing_of_ours() -> None:
    tree = ast.parse((BENCH / "peer_trl.py").read_text())
    imported = {n.module for n in ast.walk(tree) if isinstance(n, ast.ImportFrom)}
    imported |= {alias.name for n in ast.walk(tree) if isinstance(n, ast.Import) for alias in n.names}
    assert not {name for name in imported if name and name.split(".")[0] in {"common", "bench", "recipes", "ci"}}


# --- the loop's bench -------------------------------------------------------------------------------------------------


def test_every_position_of_a_full_split_is_a_real_token() -> None:
    batch = loop.full_rows(rows=16, length=32, vocab_size=100).batch(1, 0, 4)
    assert batch.input_ids.shape == (4, 32)
    assert batch.loss_mask.all()
    assert int(batch.input_ids.max()) < 100
    assert (batch.input_ids[:, 1:] == batch.labels[:, :-1]).all()


def test_the_supply_rate_counts_whole_batches(monkeypatch: pytest.MonkeyPatch) -> None:
    ticks = iter([0.0, 0.4, 0.8, 2.0])
    monkeypatch.setattr("bench.loop.time.perf_counter", lambda: next(ticks))
    split = loop.full_rows(rows=4, length=32)
    assert loop.supply_rate(split, batch_size=2, seconds=1.0) == pytest.approx(2 * 2 * 32 / 2.0)


def test_the_idle_engine_ends_every_answer_at_once() -> None:
    engine = loop.IdleEngine(end_token=7)
    engine.build({"vocab_size": 10})
    logits, _ = engine.next_token_logits(np.zeros((3, 5), np.int64), np.full(3, 5))
    assert logits.argmax(axis=1).tolist() == [7, 7, 7]


def test_a_job_of_full_fine_tuning_is_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    class Plan:
        base = None

        class config:
            class model:
                lora = None

        class dataset:
            train = None

    monkeypatch.setattr("common.train.plan.make_plan", lambda *_: Plan)
    monkeypatch.setattr("tools.data.fetch.fetch_pinned", lambda *_: None)
    with pytest.raises(SystemExit, match="LoRA"):
        throughput.make_job(argparse.Namespace(warmup=1, steps=1, recipe=str(FINE_TUNE), set=[]))
