"""Rows tokenized by as many processes as there are cores, in their order.

Each process is a fork, so it has the rows and the tokenizer without a copy or a word to it; what it sends back are
plain bytes. It takes every n-th chunk of rows, and waits while what it has done is not yet taken.
"""

from __future__ import annotations

import contextlib
import json
import multiprocessing
import os
from collections.abc import Generator, Iterable, Iterator, Sequence
from multiprocessing.connection import Connection
from typing import Any

import numpy as np

from common.data.build import Encode
from common.data.chat import ChatTokenizer
from common.data.rows import Row
from common.data.tokens import Encoded
from common.errors import DataError, MachineError
from tools.data.fast import FastTokenizer
from tools.progress import Watch

CHUNK = 256  # rows that are sent at once
ALONE = 4096  # rows up to which one process is as fast: a fork of a large one and its first words take a while
Options = tuple[str | None, int | None, bool]  # system, max_tokens, supervise_all: as encode_rows takes them


def encode_rows(tokenizer: ChatTokenizer, rows: Sequence[Row], options: Options) -> Generator[Encoded | DataError]:
    """Yield what `tokenizer.encode_rows(rows, *options)` does, sooner. Raises MachineError where a process dies."""
    fast, count = FastTokenizer(tokenizer), len(os.sched_getaffinity(0))
    if len(rows) <= ALONE or count < 2:
        yield from fast.encode_rows(rows, *options)
        return
    chunks = [rows[at : at + CHUNK] for at in range(0, len(rows), CHUNK)]
    context, workers = multiprocessing.get_context("fork"), []
    with contextlib.ExitStack() as stack:
        for number in range(count):
            receiver, sender = context.Pipe(duplex=False)
            worker = context.Process(target=work, args=(fast, chunks[number::count], options, sender), daemon=True)
            worker.start()
            sender.close()  # so that its end is seen here
            stack.callback(worker.join)
            stack.callback(worker.kill)
            workers.append(stack.enter_context(receiver))
        for at in range(len(chunks)):
            try:
                yield from received(workers[at % count])
            except (EOFError, OSError) as error:  # between two messages, or in the middle of one
                todo = "see whether memory ran out (dmesg); then the same command again"
                raise MachineError("a process that tokenizes rows has ended", todo=todo) from error


def shown(watch: Watch) -> Encode:
    """Return `encode_rows` as `common.data.build` takes it, which shows how far each split is."""

    def encode(tokenizer: ChatTokenizer, rows: Sequence[Row], options: Options, split: str) -> Iterable[Any]:
        return watch(encode_rows(tokenizer, rows, options), f"tokenizing {split}", len(rows))

    return encode


def work(tokenizer: ChatTokenizer, chunks: Sequence[Sequence[Row]], options: Options, sender: Connection) -> None:
    """Send the tokens of every chunk, one after the other."""
    os.environ["TOKENIZERS_PARALLELISM"] = "false"  # the other cores have processes of their own
    for rows in chunks:
        found = list(tokenizer.encode_rows(rows, *options))
        faults = {at: (one.what, one.where, one.todo) for at, one in enumerate(found) if isinstance(one, DataError)}
        whole = [one for one in found if isinstance(one, Encoded)]
        facts = {"faults": faults, "sizes": [len(one.ids) for one in whole], "cut": [one.cut for one in whole]}
        sender.send_bytes(json.dumps(facts).encode())
        sender.send_bytes(b"".join(one.ids.tobytes() for one in whole))
        sender.send_bytes(b"".join(one.mask.tobytes() for one in whole))


def received(receiver: Connection) -> Iterator[Encoded | DataError]:
    """Yield the rows of the chunk that a worker sends next. Raises EOFError or OSError where it has ended."""
    facts = json.loads(receiver.recv_bytes())
    ids, mask = np.frombuffer(receiver.recv_bytes(), np.uint32), np.frombuffer(receiver.recv_bytes(), np.uint8)
    faults, sizes, cut, end = facts["faults"], iter(facts["sizes"]), iter(facts["cut"]), 0
    for at in range(len(facts["sizes"]) + len(faults)):
        if fault := faults.get(str(at)):
            what, where, todo = fault
            yield DataError(what, where=where, todo=todo)
        else:
            begin, end = end, end + next(sizes)
            yield Encoded(ids[begin:end], mask[begin:end], next(cut))
