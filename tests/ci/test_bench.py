"""The bench's arithmetic and its client, and that the peers run on our versions."""

from __future__ import annotations

import json
import os
import re
import subprocess
import sys
import threading
import time
from collections.abc import Iterator
from http.server import BaseHTTPRequestHandler, HTTPServer
from pathlib import Path
from typing import Any

import pytest

from bench import loop, phases, serving, throughput
from bench.throughput import LOCK, ROOT
from common.data.chat import ChatTokenizer
from tests.doubles.tiny_recipe import make_tiny_recipe


def measured(seconds: list[float], rows: list[int], peak: float = 100.0) -> dict[str, Any]:
    steps = [
        {"seconds": s, "cpu_seconds": 2 * s, "rows": r, "tokens": 10 * r} for s, r in zip(seconds, rows, strict=True)
    ]
    return {"steps": steps, "peak_rss_mb": peak}


NAMED = re.compile(r"\.venv/bin/python ((?:-m bench\.|bench/)\w[\w.]*)")


@pytest.mark.parametrize("command", sorted(set(NAMED.findall((ROOT / "bench/README.md").read_text(encoding="utf-8")))))
def test_what_the_readme_has_people_type_starts(command: str) -> None:
    pytest.importorskip("torch", reason="the benches of training import it")
    environment = {name: value for name, value in os.environ.items() if name != "PYTHONPATH"}
    done = subprocess.run(
        [sys.executable, *command.split(), "--help"],
        cwd=ROOT,
        env=environment,
        capture_output=True,
        text=True,
    )
    assert done.returncode == 0, done.stderr


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


def test_the_peer_runs_in_the_way_with_most_rows_a_second() -> None:
    sides = {name: {"rows_per_second": rate} for name, rate in {"padding": 2.0, "packing": 3.0, "eager": 1.0}.items()}
    assert throughput.fastest(sides) == "packing"


def test_what_the_documents_say_of_training_is_the_committed_result() -> None:
    results = json.loads(throughput.RESULT.read_text(encoding="utf-8"))
    readme = throughput.README.read_text(encoding="utf-8")
    inside = readme.partition(throughput.BEGIN)[2].partition(throughput.END)[0].strip()
    assert inside == throughput.readme_table(results)
    assert throughput.QUOTE.findall(throughput.FRONT.read_text(encoding="utf-8")) == [throughput.quoted(results)]


def test_a_recorded_comparison_takes_the_place_of_the_last_of_its_kind(tmp_path: Path, monkeypatch: Any) -> None:
    for name in ("RESULT", "README", "FRONT"):
        copied = tmp_path / f"{name}.txt"
        copied.write_bytes(getattr(throughput, name).read_bytes())
        monkeypatch.setattr(throughput, name, copied)
    (known,) = (r for k, r in json.loads(throughput.RESULT.read_text()).items() if re.match("LoRA.*bf16", k))
    again = known | {"verdict": known["verdict"] | {"ratio": 1234.5}}
    throughput.record(again)
    throughput.record(again | {"job": known["job"] | {"lora": None, "precision": "fp32"}})
    kept = json.loads(throughput.RESULT.read_text())
    assert {"LoRA rank 16, bf16-mixed", "all weights, fp32"} <= set(kept)
    assert kept["LoRA rank 16, bf16-mixed"]["verdict"]["ratio"] == 1234.5
    readme = throughput.README.read_text(encoding="utf-8")
    assert readme.count("1234.50 times") == 2
    assert readme.endswith("may win; llama.cpp keeps keys and values in f16 by default.\n"), "all else stays"
    assert "trains 1234.50\ntimes as many rows" in throughput.FRONT.read_text(encoding="utf-8")


def test_each_round_has_its_ratio() -> None:
    runs = {
        "ours": [measured([1.0], [8]), measured([1.0], [8])],
        "padding": [measured([2.0], [8]), measured([3.0], [8])],
    }
    assert throughput.round_ratios(runs, 0, "padding") == pytest.approx([2.0, 3.0])


def test_a_step_is_held_against_its_matrix_products() -> None:
    runs = [measured([1.0], [8]) | {"floor": {"gflop": 300.0, "seconds": at}} for at in (2.0, 1.5)]
    assert throughput.floor(runs, seconds_per_step=1.8) == pytest.approx(
        {"gflop": 300, "gflops": 200, "seconds": 1.5, "step_over_floor": 1.2}
    )


def test_the_products_of_a_step_are_those_of_its_computed_tokens(tiny_base: Path) -> None:
    """Each weight three times: forward, for its input's gradient and its own. 22 of the row's 32 tokens have a loss."""
    from bench import floor
    from tests.support.engines import config_for, engine, make_batch

    with engine(config_for(tiny_base)) as backend:
        found = floor.gflop(floor.products_of(backend, make_batch((32,))))
    q, kv, mlp, head = 64 * 64, 2 * 64 * 32, 3 * 64 * 96, 64 * 512
    weights = 32 * (2 * q + kv + mlp) + 22 * (2 * q + mlp) + 32 * kv + 22 * head  # the last block: two thirds
    attention = 2 * 32 * 32 * (48 + 32)  # of two heads as wide as a row is long; 33 and 23 queries, filled up to 16's
    assert found == pytest.approx(2e-9 * (3 * weights + 6 * attention))


def pins(text: str) -> dict[str, str]:
    return dict(re.findall(r"^([a-z0-9-]+)==(\S+)", text, re.MULTILINE))


@pytest.mark.parametrize(
    ("lock", "packages"),
    [(LOCK, {"trl", *throughput.SAME_PACKAGES}), (serving.LOCK, {"xllamacpp", "torch", "transformers", "fastapi"})],
)
def test_a_peer_runs_on_the_versions_that_ours_runs_on(lock: Path, packages: set[str]) -> None:
    peer, ours = pins(lock.read_text()), pins((ROOT / "requirements/cpu-3.11.txt").read_text())
    assert packages <= set(peer)
    assert {name: ours[name] for name in peer if name in ours} == {name: peer[name] for name in peer if name in ours}
    assert not [name for name in peer if re.match(r"nvidia|triton|cuda", name)]


def test_the_supply_rate_counts_whole_batches(monkeypatch: pytest.MonkeyPatch) -> None:
    ticks = iter([0.0, 0.4, 0.8, 2.0])
    monkeypatch.setattr("bench.loop.time.perf_counter", lambda: next(ticks))
    split = loop.full_rows(rows=4, length=32)
    assert loop.supply_rate(split, batch_size=2, seconds=1.0) == pytest.approx(2 * 2 * 32 / 2.0)


def test_the_loop_is_told_by_its_median_and_its_slow_steps() -> None:
    found = loop.of_loop([0.0001] * 980 + [0.002] * 20)
    assert found == pytest.approx({"mean": 0.138, "median": 0.1, "p99": 2.0})


def test_an_idle_step_has_the_seconds_between_its_calls(monkeypatch: pytest.MonkeyPatch) -> None:
    ticks = iter([1.0, 1.5, 3.5])
    monkeypatch.setattr("bench.loop.time.perf_counter", lambda: next(ticks))
    step = loop.IdleStep()
    for number in range(1, 4):
        step.train_step([], 1e-3, number)
    assert step.gaps == [0.5, 2.0]


# --- serving ----------------------------------------------------------------------------------------------------------

GOOD = {"first": 0.2, "one": 10.0, "four": 25.0, "ready": 4.0, "resident_bytes": 0.9e9}
SIDES = {
    "generate": {"first": 0.2, "one": 10.0},
    "ours": GOOD,
    "transformers": {**GOOD, "first": 0.3, "four": 10.0},
    "llama": {**GOOD, "one": 20.0},
}
ASKED = [
    ("first token, over `generate`'s", {"first": 0.25}),
    ("one stream, over `generate`'s", {"one": 8.9}),
    ("four streams, over one", {"four": 19.0}),
    ("first token: `transformers serve`'s over ours", {"first": 0.31}),
    ("one stream: ours over `transformers serve`'s", {"one": 9.9}),
    ("four streams: ours over `transformers serve`'s", {"four": 9.9}),
    ("seconds from the command until /health is 200", {"ready": 5.1}),
    ("MB resident after 20 answers; 1.3 x the weights + the printed cache", {"resident_bytes": 1.16e9}),
]
PRINTED = (500_000_000, 500_000_000)  # bytes of weights and cache: 1.15 GB are allowed


@pytest.mark.parametrize(("what", "change"), ASKED)
def test_serving_that_misses_a_figure_is_told_so(what: str, change: dict[str, float]) -> None:
    good = {check["what"]: check for check in serving.checks(SIDES, PRINTED, imports=300_000_000)}
    bad = {check["what"]: check for check in serving.checks({**SIDES, "ours": {**GOOD, **change}}, PRINTED, imports=0)}
    assert good[what]["met"] is True
    assert bad[what]["met"] is False
    assert {name for name, check in good.items() if check["met"] is not None} == {name for name, _ in ASKED}


def test_llama_cpp_is_told_and_asked_for_nothing() -> None:
    told = {check["what"]: check for check in serving.checks(SIDES, PRINTED, imports=300_000_000)}
    assert told["one stream: ours over llama.cpp's"]["value"] == 0.5
    assert told["the same without what the imports take, over the weights"]["value"] == pytest.approx(1.2)
    assert told["one stream: ours over llama.cpp's"]["met"] is None


@pytest.fixture
def streamed() -> Iterator[tuple[int, list[dict[str, Any]]]]:
    """A server that says two words a little apart, then that the answer was cut off; and what it was asked."""
    asked: list[dict[str, Any]] = []

    class Handler(BaseHTTPRequestHandler):
        def do_POST(self) -> None:
            asked.append(json.loads(self.rfile.read(int(self.headers["Content-Length"]))))
            self.send_response(200)
            self.end_headers()
            for choice in ({"text": ""}, {"text": "two "}, {"text": "words"}, {"text": "", "finish_reason": "length"}):
                self.wfile.write(b"data: " + json.dumps({"choices": [choice]}).encode() + b"\n\n")
                self.wfile.flush()
                time.sleep(0.05)
            self.wfile.write(b"data: [DONE]\n\n")

        def log_message(self, *_: Any) -> None: ...

    with HTTPServer(("127.0.0.1", 0), Handler) as server:
        threading.Thread(target=server.serve_forever, daemon=True).start()
        yield server.server_port, asked
        server.shutdown()


def test_an_answer_is_timed_by_its_text_and_cut_off_has_all_its_tokens(streamed: tuple[int, list[Any]]) -> None:
    port, asked = streamed
    found = serving.ask(port, "m", "a prompt", 7)
    assert (found.text, found.tokens) == ("two words", 7)
    assert 0.05 <= found.first < found.last, "the empty piece before the first word is no token"
    assert asked == [{"model": "m", "prompt": "a prompt", "max_tokens": 7, "temperature": 0, "stream": True}]


def test_prompts_have_one_length_and_no_common_begin(tiny_base: Path) -> None:
    tokenizer = ChatTokenizer.load(tiny_base)
    prompts = serving.prompts_for(tiny_base, 8)
    assert [len(tokenizer.encode_text(prompt)) for prompt in prompts] == [serving.PROMPT] * 8
    assert len({prompt.split()[0] for prompt in prompts}) == 8


def test_the_table_is_that_of_the_committed_result() -> None:
    inside = serving.README.read_text(encoding="utf-8").partition(serving.BEGIN)[2].partition(serving.END)[0].strip()
    if serving.RESULT.exists():
        assert inside == serving.table(json.loads(serving.RESULT.read_text(encoding="utf-8")))
    else:
        assert inside.startswith("Not measured yet")


def test_the_phases_of_a_run_are_all_of_its_time(tiny_base: Path, tmp_path: Path) -> None:
    tiny, home = make_tiny_recipe(tmp_path / "tiny", tiny_base), {"RECIPES_HOME": str(tmp_path / "home")}
    found = phases.measured(ROOT, [str(tiny), "--hw", "cpu"], home, tmp_path)
    evaluation = ("step-0 evaluation", "evaluations")
    named = {f"{outer}/{inner}" for outer in evaluation for inner in ("loss", "generation")}
    named |= {f"steps/{part}" for part in ("forward", "backward", "optimizer")}
    named |= {"start-up", "data", "data/base", "base", "steps", "checkpoints", "report", "end of the process"}
    named |= {"export write", "export write/export check", "card", "the run read again"}
    assert named <= set(found["phases"])
    assert sum(phase["seconds"] for phase in found["phases"].values()) == pytest.approx(found["seconds"], abs=1e-3)
    calls = {name: phase["calls"] for name, phase in found["phases"].items()}
    assert (calls["steps"], calls["steps/forward"], calls["steps/optimizer"]) == (6, 6, 6)
    assert (calls["step-0 evaluation/loss"], calls["evaluations/loss"]) == (1, 2)
    assert 0 < found["seconds_to_the_first_evaluation"] < found["seconds_to_the_first_step"] < found["seconds"]
    assert [record["step"] for record in found["held_out"]] == [0, 3, 6]


def test_phases_are_compared_by_their_medians() -> None:
    def of(seconds: float, loss: float, *answers: str) -> dict[str, Any]:
        keys = ("seconds", "seconds_to_the_first_evaluation", "seconds_to_the_first_step", "peak_memory_mib")
        held_out = [{"step": 0, "eval_loss": loss}]
        return {
            **dict.fromkeys(keys, seconds),
            "phases": {"steps": {"seconds": seconds / 2}},
            "held_out": held_out,
            "answers": [answers],
        }

    found = phases.summary(
        {"before": [of(10, 2.0, "a", "b"), of(30, 2.0, "a", "b")], "now": [of(10, 2.5, "a", "c")] * 2}
    )
    assert found["now_over_before"]["seconds"] == 0.5
    assert found["sides"]["before"]["phases"] == {"steps": 10}
    assert (found["held_out_moved_by"], found["answers_alike"]) == (0.5, [1, 2])
    assert any(line.split() == ["steps", "10.00", "5.00"] for line in phases.table(found))


def test_the_prefix_bench_computes_a_beginning_once_on_one_side_only(tmp_path, monkeypatch):
    pytest.importorskip("torch", reason="the CPU engine is torch")
    from bench import prefix
    from tests.support.engines import config_for, engine
    from tools.verify.tiny_base import write_tiny_base

    monkeypatch.setattr(prefix, "WARM_UP", 0)
    batch = prefix.with_system_prompt(4, 300, prompt=64, own=32).batch(1, 0, 4)
    with engine(config_for(write_tiny_base(tmp_path / "tiny"))) as backend:
        found = prefix.measure(backend, [batch], rate=0.0)
        assert backend.objective.lengths == {192, 384}, "64 + 4 x 31 and 4 x 95 tokens, filled up"
    shared, alone = (found["losses"][side][0] for side in prefix.SIDES)
    assert shared == pytest.approx(alone, rel=1e-6)
