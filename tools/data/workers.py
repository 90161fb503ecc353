"""Rows tokenized by as many processes as there are cores, in their order.

Each process is a fork, so it has the tokenizer without a copy; what it sends back are plain bytes. It takes every n-th
chunk of rows, and waits while what it has done is not yet taken.

A fork has the rows, too, but whoever looks at one writes into its memory (Python counts who holds it), and the system
then copies that memory: each process would soon hold all rows. So they are written to an unnamed file before, and each
process reads them from there.
"""

from __future__ import annotations

import contextlib
import functools
import gc
import json
import multiprocessing
import os
import tempfile
from collections.abc import Generator, Iterable, Iterator, Sequence
from multiprocessing.connection import Connection
from pathlib import Path
from typing import IO, Any, NamedTuple

import numpy as np

from common.data.build import Encode
from common.data.chat import ChatTokenizer
from common.data.rows import Row
from common.data.tokens import Encoded
from common.errors import DataError, MachineError
from common.files import named
from common.paths import home
from tools.data.fast import FastTokenizer
from tools.progress import Watch

CHUNK = 256  # rows that are sent at once
ALONE = 4096  # rows up to which one process is as fast: a fork of a large one and its first words take a while
Options = tuple[str | None, int | None, bool]  # system, max_tokens, supervise_all: as encode_rows takes them


def encode_rows(tokenizer: ChatTokenizer, rows: Sequence[Row], options: Options) -> Generator[Encoded | DataError]:
    """Yield what `tokenizer.encode_rows(rows, *options)` does, sooner. Raises MachineError where a process dies."""
    fast, count = fast_of(tokenizer), len(os.sched_getaffinity(0))
    if len(rows) <= ALONE or count < 2:
        yield from fast.encode_rows(rows, *options)
        return
    context, workers = multiprocessing.get_context("fork"), []
    with contextlib.ExitStack() as stack:
        stack.enter_context(named(scratch()))  # the file has no name of its own
        chunks = written(rows, file := stack.enter_context(tempfile.TemporaryFile(dir=scratch())))
        # Or the collector of each process would look at all rows, and so write into their memory.
        gc.freeze()
        stack.callback(gc.unfreeze)
        for number in range(count):
            receiver, sender = context.Pipe(duplex=False)
            worker = context.Process(
                target=work, daemon=True, args=(fast, rows, chunks[number::count], file.fileno(), options, sender)
            )
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


# The rules of a tokenizer take a tenth of a second to read, and a data set has two splits.
fast_of = functools.lru_cache(maxsize=1)(FastTokenizer)


def shown(watch: Watch) -> Encode:
    """Return `encode_rows` as `common.data.build` takes it, which shows how far each split is."""

    def encode(tokenizer: ChatTokenizer, rows: Sequence[Row], options: Options, split: str) -> Iterable[Any]:
        return watch(encode_rows(tokenizer, rows, options), f"tokenizing {split}", len(rows))

    return encode


class Chunk(NamedTuple):
    """Rows from `first` on, in a file from byte `begin` on: `facts` bytes of JSON, then `words` bytes."""

    first: int
    begin: int
    facts: int
    words: int


def scratch() -> Path:
    """Return the folder in which rows are written for the processes."""
    # Ours rather than the system's own, which may be in memory, as /tmp often is.
    return folder if os.access(folder := home(), os.W_OK) else Path(tempfile.gettempdir())


def written(rows: Sequence[Row], file: IO[bytes]) -> list[Chunk]:
    """Write rows to a file in chunks; return where each is."""
    chunks = []
    for first in range(0, len(rows), CHUNK):
        part = rows[first : first + CHUNK]
        # Calls and tools are nested, and few rows have them: those are taken from memory.
        facts = json.dumps(
            [None if row.fields or row.tools else (row.roles, row.where, len(row.words)) for row in part]
        )
        words = b"".join(row.words for row in part if not (row.fields or row.tools))
        chunks.append(Chunk(first, file.tell(), len(facts), len(words)))
        file.write(facts.encode())
        file.write(words)
    file.flush()
    return chunks


def read(rows: Sequence[Row], chunk: Chunk, file: int) -> Iterator[Row]:
    """Yield the rows of a chunk; what `rows` has of them is looked at only for those with tools."""
    facts = json.loads(os.pread(file, chunk.facts, chunk.begin))
    words, end = os.pread(file, chunk.words, chunk.begin + chunk.facts), 0
    for at, fact in enumerate(facts):
        if fact is None:
            yield rows[chunk.first + at]
        else:
            roles, where, size = fact
            begin, end = end, end + size
            row = Row((), where=where)
            row.roles, row._held = roles, row._held + words[begin:end]  # made of messages it would take long
            yield row


def work(
    tokenizer: ChatTokenizer,
    rows: Sequence[Row],
    chunks: Sequence[Chunk],
    file: int,
    options: Options,
    sender: Connection,
) -> None:
    """Send the tokens of every chunk, one after the other."""
    os.environ["TOKENIZERS_PARALLELISM"] = "false"  # the other cores have processes of their own
    gc.disable()  # what is made here for a row is free as soon as it was sent
    for chunk in chunks:
        found = list(tokenizer.encode_rows(read(rows, chunk, file), *options))
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
