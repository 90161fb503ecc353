"""Rows are tokenized by several processes as by one: the same tokens, the same faults, in order."""

from __future__ import annotations

import json
import multiprocessing
import os
import resource
import signal
import struct
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import pytest

from common.data import tokens
from common.data.chat import ChatTokenizer
from common.data.rows import Message, Row
from common.data.tokens import Encoded
from common.errors import DataError, MachineError
from common.files import disk_errors
from tests.support.tool_templates import ALL_CALLS, write_tool_base
from tools.data import workers


@pytest.fixture
def tokenizer(tiny_base):
    return ChatTokenizer.load(tiny_base)


@pytest.fixture(autouse=True)
def three_processes(monkeypatch):
    monkeypatch.setattr(workers, "ALONE", 10)
    monkeypatch.setattr(workers, "CHUNK", 7)
    monkeypatch.setattr(os, "sched_getaffinity", lambda _process: {0, 1, 2})


def rows(count: int) -> list[Row]:
    """Rows of which every tenth holds a marker, and every fifteenth is long."""
    asked = [
        "<|user|>" if at % 10 == 3 else f"What is number {at}?" * (30 if at % 15 == 4 else 1) for at in range(count)
    ]
    return [
        Row((Message("user", text), Message("assistant", f"It is {at}.")), {}, f"f:{at}")
        for at, text in enumerate(asked)
    ]


def told(found: Encoded | DataError) -> object:
    return (
        (found.what, found.where, found.todo)
        if isinstance(found, DataError)
        else (list(found.ids), list(found.mask), found.cut)
    )


@pytest.mark.parametrize("count", [11, 14, 100])
def test_several_processes_yield_what_one_does(tokenizer, count):
    options = ("Be brief.", 64, False)
    wanted = [told(one) for one in tokenizer.encode_rows(rows(count), *options)]
    found = list(workers.encode_rows(tokenizer, rows(count), options))
    assert [told(one) for one in found] == wanted
    assert any(isinstance(one, DataError) for one in found)
    assert any(not isinstance(one, DataError) and one.cut for one in found)


def test_the_work_is_done_by_other_processes(tokenizer, monkeypatch):
    def work(_tokenizer, rows, chunks, file, _options, sender):
        for chunk in chunks:
            faults = {at: (str(os.getpid()), None, None) for at, _ in enumerate(workers.read(rows, chunk, file))}
            sender.send_bytes(json.dumps({"faults": faults, "sizes": [], "cut": []}).encode())
            sender.send_bytes(b"")
            sender.send_bytes(b"")

    monkeypatch.setattr(workers, "work", work)
    processes = [str(fault) for fault in workers.encode_rows(tokenizer, rows(100), (None, None, False))]
    assert len(set(processes)) == 3
    assert str(os.getpid()) not in processes


@pytest.mark.parametrize("said", [b"", struct.pack("!i", 1000) + b"{"], ids=["between messages", "within one"])
def test_a_process_that_dies_is_an_error_of_the_machine(tokenizer, monkeypatch, said):
    def work(_tokenizer, _rows, _chunks, _file, _options, sender):
        os.write(sender.fileno(), said)
        os.kill(os.getpid(), signal.SIGKILL)

    monkeypatch.setattr(workers, "work", work)
    with pytest.raises(MachineError, match="has ended"):
        list(workers.encode_rows(tokenizer, rows(100), (None, None, False)))


def test_rows_with_tools_and_templates_of_their_own_are_encoded_as_by_one(tmp_path):
    base = write_tool_base(tmp_path / "b", ALL_CALLS + "{{ 1 // (messages[0].content | length - 18) }}")
    tokenizer, tool = ChatTokenizer.load(base), {"type": "function", "function": {"name": "sky", "parameters": {}}}
    call = {"type": "function", "function": {"name": "sky", "arguments": {"at": "a"}}}
    plain = rows(40)
    called = [
        row.but(messages=[row.messages[0], Message("assistant", "", fields={"tool_calls": [call]})]) for row in plain
    ]
    mixed = [
        row for three in zip(plain, called, [row.but(tools=[tool]) for row in plain], strict=True) for row in three
    ]
    options = (None, None, False)
    found = [told(one) for one in workers.encode_rows(tokenizer, mixed, options)]
    assert found == [told(one) for one in tokenizer.encode_rows(mixed, options[0])]
    assert [one for one in found if "division" in str(one) and "'f:" in str(one)], "a row is named, not a process"


def test_processes_end_with_who_stops_asking(tokenizer):
    found = workers.encode_rows(tokenizer, rows(2000), (None, None, False))
    next(found)
    processes = multiprocessing.active_children()
    assert len(processes) == 3
    found.close()
    assert not any(process.is_alive() for process in processes)


@pytest.fixture
def full_disk() -> Iterator[None]:
    """No file grows beyond 5,000 bytes; Python ignores the signal that comes with it."""
    soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (5000, hard))
    yield
    resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))


@pytest.mark.usefixtures("full_disk")
def test_a_disk_that_is_full_of_rows_or_tokens_is_named(tokenizer, tmp_path: Path, monkeypatch):
    monkeypatch.setenv("RECIPES_HOME", str(tmp_path))
    for write in (
        lambda: list(workers.encode_rows(tokenizer, rows(1000), (None, None, False))),
        lambda: tokens.pack([Encoded(np.ones(9000, np.uint32), np.ones(9000, np.uint8))], tmp_path),
    ):
        with pytest.raises(MachineError) as told, disk_errors("read or write a file"):
            write()
        assert told.value.where == str(tmp_path)
