"""One owner per board: taken, refused with the owner's name, free when its process is gone, whatever ended it."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

from common.errors import MachineError
from common.hardware import get
from tests.doubles.machines import fake_host, write
from tools.machine import lease
from tools.machine.lease import Owner

ROOT = Path(__file__).resolve().parents[2]
KEYS = ["0000:02:00.0", "0000:01:00.0"]
HOLD = """
import sys
from tools.machine import lease
from tools.machine.lease import Owner
with lease.taken(sys.argv[1:], Owner("n300", 77, "a-run", "recipes-a-run", "2026-11-22T10:00:00Z")):
    print("taken", flush=True)
    sys.stdin.read()
"""


@pytest.fixture(autouse=True)
def root(tmp_path, monkeypatch) -> Path:
    monkeypatch.setenv("RECIPES_SYSFS_ROOT", str(tmp_path))
    return tmp_path


@pytest.fixture
def holder() -> Iterator[subprocess.Popen[str]]:
    """Another process that has both cards."""
    command = [sys.executable, "-c", HOLD, *KEYS]
    with subprocess.Popen(command, cwd=ROOT, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True) as process:
        assert process.stdout is not None
        assert process.stdout.readline() == "taken\n"
        yield process
        process.kill()


def take(*keys: str) -> None:
    with lease.taken(keys, Owner("qb2", os.getpid(), "another")):
        pass


def test_a_second_owner_is_told_who_has_the_board(holder):
    with pytest.raises(MachineError) as refused:
        take("0000:03:00.0", KEYS[0])
    said = str(refused.value)
    assert (
        "qb2 is in use by process 77 with the run a-run, in the container recipes-a-run, since 2026-11-22T10:00:00Z"
        in said
    )
    assert "recipe stop --hw qb2" in said
    assert lease.held("0000:03:00.0") is None, "what was taken before the refusal is given back"
    take("0000:03:00.0")


def test_who_has_a_card_open_without_a_lease_is_named_in_words(root):
    nodes = get("n300x2").device_nodes
    fake_host(root, "n300x2")
    write(root / "proc/driver/tenstorrent/0/pids", f"{os.getpid()}\n0\n")
    write(root / "proc/driver/tenstorrent/1/pids", f"{os.getpid()}\n{os.getpid()}\n")
    with pytest.raises(MachineError) as refused, lease.of_board(get("n300x2"), nodes, "a-run"):
        pass
    assert refused.value.what.count(f"process {os.getpid()} (") == 1
    assert "a process of another PID namespace" in refused.value.what


def test_a_run_sees_the_cards_it_has_and_no_other(root, monkeypatch):
    monkeypatch.delenv("TT_VISIBLE_DEVICES", raising=False)
    fake_host(root, "t3k")
    with lease.of_board(get("n300"), ["/dev/tenstorrent/2"], "a-run"):
        assert os.environ["TT_VISIBLE_DEVICES"] == "0000:03:00.0"
    assert "TT_VISIBLE_DEVICES" not in os.environ
    monkeypatch.setenv("TT_VISIBLE_DEVICES", "what is not here")
    with lease.of_board(get("cpu"), [], "a-run"):
        assert os.environ["TT_VISIBLE_DEVICES"] == "what is not here", "a run on the CPU asks for no card"


@pytest.mark.parametrize("number", [signal.SIGKILL, signal.SIGTERM])
def test_a_lease_ends_with_its_process(holder, number):
    assert set(lease.all_held()) == set(KEYS)
    holder.send_signal(number)
    holder.wait()
    assert lease.all_held() == {}
    take(*KEYS)


def test_a_lease_ends_with_its_block():
    with lease.taken(KEYS, Owner("n300", 1, "a-run")):
        held = lease.held(KEYS[0])
        assert held is not None
        assert (held.pid, held.run, held.container) == (1, "a-run", None)
    assert lease.held(KEYS[0]) is None
    assert lease.path_of(KEYS[0]).read_text() == ""


def test_every_user_of_the_machine_can_ask_for_it():
    before = os.umask(0o077)
    try:
        take(KEYS[0])
    finally:
        os.umask(before)
    assert lease.path_of(KEYS[0]).stat().st_mode & 0o777 == 0o666


def test_a_link_in_its_place_is_not_followed(root):
    lease.folder().mkdir(parents=True)
    (root / "precious").write_text("mine")
    lease.path_of(KEYS[0]).symlink_to(root / "precious")
    with pytest.raises(MachineError, match="lease of a card cannot be opened"):
        take(KEYS[0])
    assert (root / "precious").read_text() == "mine"


@pytest.mark.parametrize("text", ["", "{", json.dumps({"pid": 1}), "[]"])
def test_what_another_program_wrote_is_no_owner_and_still_a_lease(holder, text):
    lease.path_of(KEYS[0]).write_text(text)
    with pytest.raises(MachineError, match="in use by another process"):
        take(KEYS[0])
    assert lease.held(KEYS[0]) is None
    assert not lease.free(KEYS[0]), "`recipe stop` must not take it for ended"
