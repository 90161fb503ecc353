"""The bench's arithmetic, and that the peer runs on our versions."""

from __future__ import annotations

import re
from typing import Any

import pytest

from bench import loop, throughput
from bench.throughput import LOCK, ROOT


def measured(seconds: list[float], rows: list[int], peak: float = 100.0) -> dict[str, Any]:
    steps = [
        {"seconds": s, "cpu_seconds": 2 * s, "rows": r, "tokens": 10 * r} for s, r in zip(seconds, rows, strict=True)
    ]
    return {"steps": steps, "peak_rss_mb": peak}


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


def pins(text: str) -> dict[str, str]:
    return dict(re.findall(r"^([a-z0-9-]+)==(\S+)", text, re.MULTILINE))


def test_the_peer_runs_on_the_versions_that_ours_runs_on() -> None:
    peer, ours = pins(LOCK.read_text()), pins((ROOT / "requirements/cpu-3.11.txt").read_text())
    assert "trl" in peer
    assert {name: ours[name] for name in peer if name in ours} == {name: peer[name] for name in peer if name in ours}
    assert set(throughput.SAME_PACKAGES) <= set(peer)
    assert not [name for name in peer if re.match(r"nvidia|triton|cuda", name)]


def test_the_supply_rate_counts_whole_batches(monkeypatch: pytest.MonkeyPatch) -> None:
    ticks = iter([0.0, 0.4, 0.8, 2.0])
    monkeypatch.setattr("bench.loop.time.perf_counter", lambda: next(ticks))
    split = loop.full_rows(rows=4, length=32)
    assert loop.supply_rate(split, batch_size=2, seconds=1.0) == pytest.approx(2 * 2 * 32 / 2.0)
