"""A step that does not end ends the run, with its cause and code 5; and the table that knows the cause."""

from __future__ import annotations

import json
import math
import os
import subprocess
import sys
import textwrap
from pathlib import Path
from typing import Any

import pytest

from common import config as configs
from common import known_errors
from common.errors import UsageError
from common.hardware import get
from common.paths import ROOT
from common.train.watchdog import AT_LEAST, FIRST_STEP, LOCKED_GRACE, TIMES_MEDIAN, Watchdog
from tests.doubles.tiny_recipe import FROM_SCRATCH
from tools.cli import main
from tools.launch import resolve
from tools.launch.resolve import STALL
from tools.runs import explain

PATIENCE = 60  # seconds a process of these tests may take on a busy machine


def process(code: str, **environment: str) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        [sys.executable, "-c", textwrap.dedent(code)],
        cwd=ROOT,
        env={**os.environ, **environment},
        capture_output=True,
        text=True,
        timeout=PATIENCE,
        check=False,
    )


HANG = """
    import ctypes, sys, time
    from common.train import watchdog
    watchdog.TICK, watchdog.LOCKED_GRACE = 0.1, 1.0
    dog = watchdog.Watchdog(lambda what: print(what), devices=2, fixed={fixed})
    dog.begin(1)
    dog.end(0.1)
    dog.begin(2)
    {hang}
    print("went on")
"""


def test_a_stalled_step_ends_the_process_with_code_5_and_says_which():
    done = process(HANG.format(hang="time.sleep(50)", fixed=0.5))
    assert done.returncode == 5
    assert done.stdout.startswith("stalled in step 2 (number 2 of this process, 2 devices): no end after ")
    assert "went on" not in done.stdout
    assert 'File "<string>"' in done.stderr, "where it hangs"
    found = known_errors.match(done.stdout)
    assert found is not None
    assert found.id == "stall-second-step"


def test_a_native_call_that_keeps_pythons_lock_is_left_as_well():
    done = process(HANG.format(hang="ctypes.PyDLL(None).sleep(50)", fixed=0.5))
    assert done.returncode == 5
    assert done.stdout == "", "no thread of Python ran"
    assert "Timeout (0:00:01" in done.stderr


def test_a_short_step_after_others_starts_no_thread_and_a_shorter_allowance_does(monkeypatch):
    asked: list[float] = []
    monkeypatch.setattr("faulthandler.dump_traceback_later", lambda seconds, **_: asked.append(seconds))
    monkeypatch.setattr("common.train.watchdog.TICK", 3600.0)
    dog = Watchdog(lambda what: None, devices=1)
    try:
        for step in range(1, 5):
            dog.begin(step)
            dog.end(0.1)
        assert asked == [FIRST_STEP + LOCKED_GRACE / 2, AT_LEAST + LOCKED_GRACE / 2]
        dog.end()  # an evaluation
        dog.begin(5)
        assert len(asked) == 3, "it was taken back for what may take what it takes"
    finally:
        dog.close()


def test_what_is_not_a_step_is_not_watched():
    done = process(HANG.format(hang="dog.end(); time.sleep(1.2); dog.close(); time.sleep(0.3)", fixed=0.5))
    assert (done.returncode, done.stdout) == (0, "went on\n")


def test_a_setting_of_0_watches_nothing():
    done = process(HANG.format(hang="time.sleep(1)", fixed=0))
    assert (done.returncode, done.stdout) == (0, "went on\n")


def test_a_stopped_process_does_not_age():
    """Ctrl-Z, or a laptop that sleeps: the thread's own ticks are what counts."""
    code = """
        import os, signal, subprocess, sys, time
        from common.train import watchdog
        watchdog.TICK, watchdog.LOCKED_GRACE = 0.1, 30.0
        dog = watchdog.Watchdog(lambda what: print(what), devices=1, fixed=1)
        dog.begin(1)
        subprocess.Popen(["sh", "-c", f"sleep 2; kill -CONT {os.getpid()}"])
        os.kill(os.getpid(), signal.SIGSTOP)
        dog.end()
        print("went on")
    """
    done = process(code)
    assert (done.returncode, done.stdout) == (0, "went on\n")


def test_the_allowance_is_generous_and_grows_with_the_steps():
    dog = Watchdog(lambda what: None, devices=1)
    try:
        assert dog.allowed == FIRST_STEP
        dog.end(100.0)
        assert dog.allowed == 100 * TIMES_MEDIAN, "a second step may compile once more"
        for _ in range(10):
            dog.end(0.1)
        assert dog.allowed == AT_LEAST
        for _ in range(60):
            dog.end(30.0)
        assert dog.allowed == 30 * TIMES_MEDIAN
    finally:
        dog.close()
        dog.close()


@pytest.mark.parametrize("text", ["soon", "-1", "inf", "nan"])
def test_a_setting_that_is_no_number_of_seconds_is_refused(text, monkeypatch):
    monkeypatch.setenv(STALL, text)
    with pytest.raises(UsageError, match=f"{STALL}={text} is no number of seconds"):
        resolve.stall_seconds()


# --- the table --------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("row", known_errors.table(), ids=lambda row: row.id)
def test_a_row_matches_its_sample_before_any_other(row):
    assert (row.text is None) == (row.sample is None) == (row.state is not None) == (row.where == "state")
    if row.where in ("docker", "build"):
        assert known_errors.match(row.sample, row.where) == row
    elif row.sample is not None:
        assert known_errors.match(row.sample) == row
        assert known_errors.match(f"2026-11-22T23:00:00Z {row.sample}") == row or row.text.startswith("^Timeout")
    else:
        assert row.state in explain.STATES
    assert row.means[0].islower() or row.means[0].isupper()


def test_ids_are_unique():
    ids = [row.id for row in known_errors.table()]
    assert len(ids) == len(set(ids))


def test_an_ordinary_log_means_nothing():
    for line in ("step 2/6  loss 6.0966  grad norm 0.931", "saved step 4", "run begins: process 7", "run ends: done"):
        assert known_errors.match(line) is None
    assert known_errors.match("403 Client Error: Forbidden for url") is None, "Docker's words are no run's"
    for other in (
        "both data movement processors are in use",
        "cores are in use by FD infra",
        "MeshDevice cq ID 0 is in use",
        "Semaphore id 3 already in use on core (1,1)",
        "AdamW refuses fp32 parameters in this build: bf16 it is",
        "Sub device id 0 currently in use by cq 0. Can't enqueue program from cq 1.",
    ):
        assert known_errors.match(other) is None, "no second process, and no error"


@pytest.mark.parametrize("lock", ["KMD lock 4 on /dev/tenstorrent/0, which is", "lock 'CHIP_IN_USE_0_PCIe' which is"])
def test_both_locks_of_tt_umd_mean_a_second_process(lock):
    found = known_errors.match(f"warning | Waiting for {lock} currently held by another handle")
    assert found is not None
    assert found.id == "held"


def folder_of(path: Path, records: list[dict[str, Any]], **manifest: Any) -> Path:
    path.mkdir()
    (path / "train.log").write_text("2026-11-22T23:00:00Z run begins: process 7\n2026-11-22T23:00:01Z run ends: done\n")
    (path / "metrics.jsonl").write_text("".join(json.dumps(record) + "\n" for record in records))
    (path / "manifest.json").write_text(
        json.dumps({"base": {"name": "smollm2-135m-instruct", "origin": ""}, **manifest})
    )
    return path


def ids(target: Path) -> list[str]:
    return [one.error.id for one in explain.explain(target)]


def test_states_of_a_run_are_seen(tmp_path):
    guess = math.log(49152)
    flat = [{"step": step, "loss": guess + 0.01 * (step % 3)} for step in range(1, 31)]
    falling = [{"step": step, "loss": guess - 0.1 * step} for step in range(1, 31)]
    assert ids(folder_of(tmp_path / "sound", [*falling, {"step": 30, "eval_loss": 3.0}])) == []
    assert ids(folder_of(tmp_path / "flat", flat)) == ["flat-at-guessing"]
    assert ids(folder_of(tmp_path / "young", flat[:5])) == []
    same = [*falling, {"step": 30, "eval_loss": falling[-1]["loss"]}]
    assert ids(folder_of(tmp_path / "same", same)) == ["evaluation-is-training"]
    assert ids(folder_of(tmp_path / "still", falling, never_moved=["model.norm.weight"])) == ["never-moved"]


def test_a_log_without_an_end_is_that_of_a_killed_process(tmp_path):
    folder = folder_of(tmp_path / "run", [])
    log = folder / "train.log"
    log.write_text(log.read_text() + "2026-11-22T23:00:02Z run begins: process 8\n2026-11-22T23:00:03Z step 1\n")
    assert ids(folder) == ["no-end"]
    log.write_text(log.read_text() + "2026-11-22T23:00:04Z run ends: stopped: stopped by SIGTERM\n")
    assert ids(folder) == []


TIME_OUT = (
    "TT_THROW: Fabric Router Sync: Timeout after 10000 ms on Device 0: expected status 0xa1b2c3d4. See error log\n"
)
NO_FILE = "warning | TT_MESH_GRAPH_DESC_PATH not set, using the default\n"


@pytest.mark.parametrize(
    ("board", "before", "cause"),
    [
        ("n300", "", "fabric-board"),  # a run of ours does not begin before its descriptor has the mesh's dims
        ("n300", NO_FILE, "fabric-no-file"),
        ("n150", "", "fabric-one-device"),
        (None, NO_FILE, "fabric-no-file"),  # a log alone
        (None, "ValueError: Mesh shape mismatch! descriptor (2, 2), mesh (1, 4)\n", "fabric-other-file"),
        (None, "", None),
    ],
)
def test_a_time_out_of_the_fabric_is_told_apart_by_what_can_be_seen(tmp_path, board, before, cause):
    folder = folder_of(tmp_path / "run", [])
    log = folder / "train.log"
    log.write_text(f"{before}{TIME_OUT}")
    if board:
        (folder / "config.resolved.yaml").write_text(configs.load(FROM_SCRATCH, get(board)).to_yaml())
    found = ids(folder if board else log)
    assert "fabric-sync" in found
    assert [id for id in found if id.startswith("fabric-") and id != "fabric-sync"] == ([cause] if cause else [])
    log.write_text(before)
    assert not any(id.startswith("fabric-") for id in ids(folder if board else log)), "no time-out, no cause of one"


def test_the_command_explains_any_log_once_an_error(tmp_path, monkeypatch, capsys):
    log = tmp_path / "foreign.log"
    log.write_bytes(b"\xff\n" + b"ImportError: std::bad_cast\n" * 3 + b"TT_THROW: Fabric Router Sync: Timeout\n")
    monkeypatch.setattr("sys.argv", ["recipe", "explain", str(log)])
    with pytest.raises(SystemExit) as ended:
        main.main()
    out = capsys.readouterr().out
    assert ended.value.code == 0
    assert out.count("bad-cast (foreign.log:2: ImportError: std::bad_cast)") == 1
    assert "fabric-sync (foreign.log:5" in out
    log.write_text("all is well\n")
    with pytest.raises(SystemExit):
        main.main()
    assert "nothing that is known" in capsys.readouterr().out
    with pytest.raises(UsageError, match="no log there"):
        ids(tmp_path)
