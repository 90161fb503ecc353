"""Token files: what training reads. Plain `.npy` arrays, mapped into memory, and one `dataset.json` with their hash.

For every split there are four arrays: `ids` uint32 [N], `mask` uint8 [N] (1 = supervised), and the rows as windows
`starts`/`ends` int64 [R] into them. Windows may overlap (a corpus stores each token once). Nothing is pickled.
"""

from __future__ import annotations

import hashlib
import json
from array import array
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from tempfile import TemporaryFile, gettempdir
from typing import Any

import numpy as np
import numpy.typing as npt

from common.data import order
from common.errors import DataError
from common.files import made_whole, named, read_json, write_json
from common.hardware import round_up

# Shapes: R rows of a split, N tokens of a split, B rows of a batch, T positions of a row, n tokens of one row.

FORMAT = 2  # 1 had the places of the rows in dataset.json, which then took seconds to read
ARRAYS = {"ids": np.uint32, "mask": np.uint8, "starts": np.int64, "ends": np.int64}


@dataclass(frozen=True)
class Encoded:
    """One row as tokens: ids uint32 [n], mask uint8 [n] (1 = supervised), and what was cut from it ("": nothing)."""

    ids: npt.NDArray[np.uint32]
    mask: npt.NDArray[np.uint8]
    cut: str = ""


@dataclass(frozen=True)
class Arrays:
    """One split: ids uint32 [N], mask uint8 [N], starts and ends int64 [R]; row r is ids[starts[r]:ends[r]]."""

    ids: npt.NDArray[np.uint32]
    mask: npt.NDArray[np.uint8]
    starts: npt.NDArray[np.int64]
    ends: npt.NDArray[np.int64]


@dataclass(frozen=True)
class Batch:
    """input_ids and labels uint32 [B,T] (labels already shifted by one), loss_mask float32 [B,T] in {0,1}.

    `rows` int64 [B] says which row of the split each line is; -1 is a line that only fills the last batch.
    All arrays are C-contiguous; padding is id 0 with mask 0. The rectangle is what ttml needs: one
    shape for every step, in whole tiles, or its kernels are compiled anew. The CPU engine lays the same rows end to
    end again (engines/cpu/ragged.py), and so computes next to none of the padding.
    """

    input_ids: npt.NDArray[np.uint32]
    labels: npt.NDArray[np.uint32]
    loss_mask: npt.NDArray[np.float32]
    rows: npt.NDArray[np.int64]

    def lengths(self) -> npt.NDArray[np.int64]:
        """Return the tokens of each row up to its last supervised one, int64 [B]."""
        supervised = self.loss_mask > 0  # [B, T]
        # argmax finds the first true place, from the right here; where none is true it says 0, which `where` mends.
        last = supervised.shape[1] - supervised[:, ::-1].argmax(axis=1)
        return np.where(supervised.any(axis=1), last, 0)

    def split(self, parts: int) -> list[Batch]:
        """Return `parts` equal batches along the rows, in order. Raises ValueError if B is no multiple of it."""
        if len(self.rows) % parts:
            raise ValueError(f"a batch of {len(self.rows)} rows cannot be cut into {parts} equal parts")
        return [self.cut(part, parts) for part in range(parts)]

    def cut(self, part: int, parts: int) -> Batch:
        """Return part `part` (from 0) of `parts` along the rows; where B is no multiple, some have a row more."""
        # The engine for CPUs takes the same part (eval_nll), so the two rules must stay alike.
        at = slice(part * len(self.rows) // parts, (part + 1) * len(self.rows) // parts)
        return Batch(self.input_ids[at], self.labels[at], self.loss_mask[at], self.rows[at])


class TokenSplit:
    """The rows of one split, ready to be batched at a fixed length T."""

    def __init__(self, arrays: Arrays, length: int) -> None:
        self.arrays = arrays
        self.length = length

    def __len__(self) -> int:
        return len(self.arrays.starts)

    @property
    def tokens(self) -> int:
        """Return the number of tokens in all rows together."""
        return int((self.arrays.ends - self.arrays.starts).sum())

    def row(self, index: int) -> Encoded:
        """Return row `index` as it was stored."""
        at = slice(int(self.arrays.starts[index]), int(self.arrays.ends[index]))
        return Encoded(self.arrays.ids[at], self.arrays.mask[at])

    def spread(self, limit: int | None) -> TokenSplit:
        """Return at most `limit` of the rows, evenly spread and in order; all of them for None."""
        rows = spread(len(self), limit)
        arrays = Arrays(self.arrays.ids, self.arrays.mask, self.arrays.starts[rows], self.arrays.ends[rows])
        return self if len(rows) == len(self) else TokenSplit(arrays, self.length)

    def batch(self, step: int, seed: int, batch_size: int) -> Batch:
        """Return the whole batch of optimizer step `step` (from 1): a pure function of its arguments."""
        return self.gather(order.rows_of_step(step, seed, batch_size, len(self)))

    def batches(self, batch_size: int) -> Iterator[Batch]:
        """Yield every row once, in order; the last batch is filled with rows of zero mask (`rows` = -1)."""
        for first in range(0, len(self), batch_size):
            rows = np.arange(first, first + batch_size, dtype=np.int64)
            yield self.gather(np.where(rows < len(self), rows, -1))

    def gather(self, rows: npt.NDArray[np.int64]) -> Batch:
        """Return the batch of these rows (int64 [B], -1 = a line of padding).

        A row of n tokens becomes input tok[:-1] and labels tok[1:] with mask[1:]: the last token is only a label.
        """
        arrays = self.arrays
        starts = arrays.starts[rows]  # [B]; a line of padding, -1, looks at the last row, and is masked below
        predicted = np.where(rows < 0, 0, arrays.ends[rows] - starts - 1)
        columns = np.arange(self.length + 1, dtype=np.int64)
        inside = columns[:-1] < predicted[:, None]  # [B, T]
        at = starts[:, None] + columns  # [B, T + 1] into N; past a row's end it reads what follows, times 0 below
        ids = arrays.ids.take(at, mode="clip")  # 1.3 times as fast as to index by `inside` and twice (bench/loop.py)
        mask = (arrays.mask.take(at[:, 1:], mode="clip") * inside).astype(np.float32)
        return Batch(input_ids=ids[:, :-1] * inside, labels=ids[:, 1:] * inside, loss_mask=mask, rows=rows)


def spread(count: int, limit: int | None) -> npt.NDArray[np.int64]:
    """Return at most `limit` of the indices 0 to count - 1, evenly spread; all of them for None."""
    wanted = count if limit is None else min(count, limit)
    return np.arange(wanted, dtype=np.int64) * count // max(wanted, 1)


@dataclass
class TokenDataset:
    """A folder of token files. `report` says how it came about when `common.data.build` made it."""

    folder: Path
    splits: Mapping[str, TokenSplit]
    length: int
    source_key: str
    tokens_sha256: str
    info: Mapping[str, Any]
    report: Any = field(default=None)

    @property
    def train(self) -> TokenSplit:
        """Return the rows that are trained on."""
        return self.splits["train"]

    @property
    def held_out(self) -> TokenSplit:
        """Return the rows that are only evaluated (none when the recipe holds none out)."""
        return self.splits["held_out"]

    def places(self, split: str) -> list[str]:
        """Return where each row of a split stands, as "file:line"."""
        return [*map(json.loads, (self.folder / f"{split}.places.jsonl").read_text(encoding="utf-8").splitlines())]

    @classmethod
    def open(cls, folder: Path) -> TokenDataset:
        """Map the files of `folder`. Raises DataError where one is missing, or they do not match their hash."""
        header = read_json(folder / "dataset.json", FORMAT, DataError)
        length = int(header["length"])
        stored = {name: load_arrays(folder, name) for name in header["splits"]}
        found = content_sha256(stored)
        if found != header["tokens_sha256"]:
            raise DataError(f"the token files do not match their hash ({found[:16]} found)", where=str(folder))
        splits = {name: TokenSplit(arrays, length) for name, arrays in stored.items()}
        return cls(folder, splits, length, str(header["source_key"]), found, header["info"])


def write(
    folder: Path, splits: Mapping[str, Arrays], *, source_key: str, info: Mapping[str, Any], length: int | None = None
) -> TokenDataset:
    """Store `splits` in `folder`, whole or not at all, and open it.

    T is `length`, which every row must fit, or the smallest multiple of 32 that holds them all. `info` is stored beside
    them and must be JSON, its `places` (where each row of a split stands) in files of their own. Where the folder is
    there, another process was first, and its content is as good.
    """
    splits = {"train": EMPTY, "held_out": EMPTY, **splits}
    if length is None:
        sizes = np.concatenate([arrays.ends - arrays.starts for arrays in splits.values()])
        length = round_up(int(sizes.max(initial=2)) - 1)  # n tokens are n - 1 predictions
    header = {
        "format": FORMAT,
        "source_key": source_key,
        "tokens_sha256": content_sha256(splits),
        "length": length,
        "splits": list(splits),
        "info": {key: value for key, value in info.items() if key != "places"},
    }
    with made_whole(folder) as made:
        for name, arrays in splits.items():
            for key in ARRAYS:
                save_array(made / f"{name}.{key}.npy", getattr(arrays, key))
        for name, where in info.get("places", {}).items():
            with (made / f"{name}.places.jsonl").open("w", encoding="utf-8") as file:
                file.writelines(f"{json.dumps(place)}\n" for place in where)
        write_json(made / "dataset.json", header)
    return TokenDataset.open(folder)


def save_array(path: Path, array: npt.NDArray[Any]) -> None:
    """Write an array [n] as numpy.save does, which by itself says nothing where the disk has no room for its end."""
    with named(path), path.open("wb") as file:
        np.lib.format.write_array_header_1_0(file, np.lib.format.header_data_from_array_1_0(array))
        file.write(np.ascontiguousarray(array).data)


def load_arrays(folder: Path, name: str) -> Arrays:
    """Map the four arrays of split `name`. Raises DataError for a missing or damaged file."""
    found = {}
    for key in ARRAYS:
        path = folder / f"{name}.{key}.npy"
        try:
            found[key] = np.asarray(np.load(path, mmap_mode="r", allow_pickle=False))
        except (OSError, ValueError, EOFError) as error:
            raise DataError(f"cannot read token file: {error}", where=str(path)) from error
    return Arrays(**found)


def pack(rows: Iterable[Encoded], folder: Path | None = None) -> Arrays:
    """Return the arrays of a split with these rows one after the other, kept in unnamed files in `folder`."""
    ends = array("q", [0])
    with named(Path(folder or gettempdir())), TemporaryFile(dir=folder) as ids, TemporaryFile(dir=folder) as mask:
        for row in rows:
            ids.write(row.ids.astype(np.uint32, copy=False).data)
            mask.write(row.mask.astype(np.uint8, copy=False).data)
            ends.append(ends[-1] + len(row.ids))
        bounds = np.frombuffer(ends, dtype=np.int64)
        if not ends[-1]:
            return EMPTY
        # A map outlives its file's name, and reads what it is asked for.
        return Arrays(np.memmap(ids, np.uint32, "r"), np.memmap(mask, np.uint8, "r"), bounds[:-1], bounds[1:])


EMPTY = Arrays(np.zeros(0, np.uint32), np.zeros(0, np.uint8), np.zeros(0, np.int64), np.zeros(0, np.int64))


def content_sha256(splits: Mapping[str, Arrays]) -> str:
    """Return the sha256 over what the arrays hold: names, dtypes, counts, little-endian values, no file format."""
    digest = hashlib.sha256()
    for name in sorted(splits):
        for key, dtype in ARRAYS.items():
            values = np.ascontiguousarray(getattr(splits[name], key), dtype=np.dtype(dtype).newbyteorder("<"))
            digest.update(f"{name}.{key} {values.dtype.str} {len(values)}\n".encode())
            digest.update(values.data)
    return digest.hexdigest()
