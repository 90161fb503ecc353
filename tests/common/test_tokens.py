from __future__ import annotations

import json
import multiprocessing
import time
from pathlib import Path

import numpy as np
import pytest

from common import files
from common.data import order, tokens
from common.data.tokens import Encoded, TokenDataset
from common.errors import DataError


def encoded(*ids: int, supervised: int = 1) -> Encoded:
    """A row whose last `supervised` tokens count."""
    mask = np.arange(len(ids)) >= len(ids) - supervised
    return Encoded(np.array(ids, np.uint32), mask.astype(np.uint8))


def some_rows(count: int, seed: int = 0) -> list[Encoded]:
    rng = np.random.default_rng(seed)
    return [encoded(*rng.integers(1, 30000, n), supervised=n // 2) for n in rng.integers(4, 60, count)]


def written(folder: Path, rows: list[Encoded], **options) -> TokenDataset:
    return tokens.write(folder / "set", {"train": tokens.pack(rows)}, source_key="key", info={}, **options)


def test_rows_become_inputs_shifted_labels_and_mask(tmp_path):
    dataset = written(tmp_path, [encoded(5, 6, 7, 8, supervised=2), encoded(9, 10)])
    batch = next(dataset.train.batches(2))
    assert dataset.length == 32
    assert batch.input_ids[:, :4].tolist() == [[5, 6, 7, 0], [9, 0, 0, 0]]
    assert batch.labels[:, :4].tolist() == [[6, 7, 8, 0], [10, 0, 0, 0]]
    assert batch.loss_mask[:, :4].tolist() == [[0, 1, 1, 0], [1, 0, 0, 0]]
    assert not batch.input_ids[:, 4:].any()
    assert not batch.loss_mask[:, 4:].any()


def test_every_file_is_on_the_disk_before_the_folder_has_its_name(tmp_path, monkeypatch):
    synced, sync = set(), files.sync

    def noted(path: Path) -> None:
        synced.add(path.name)
        sync(path)

    monkeypatch.setattr(files, "sync", noted)
    rows = {"train": tokens.pack(some_rows(3))}
    folder = tokens.write(tmp_path / "set", rows, source_key="key", info={"places": {"train": ["f:1"] * 3}}).folder
    assert {path.name for path in folder.iterdir()} <= synced


def test_batch_is_uint32_float32_and_contiguous_whole_and_cut(tmp_path):
    batch = written(tmp_path, some_rows(40)).train.batch(3, 0, 8)
    for part in (batch, *batch.split(4)):
        arrays: list[np.ndarray] = [part.input_ids, part.labels, part.loss_mask]
        assert [str(array.dtype) for array in arrays] == ["uint32", "uint32", "float32"]
        assert all(array.flags.c_contiguous for array in arrays)
    assert np.array_equal(np.concatenate([part.labels for part in batch.split(4)]), batch.labels)
    with pytest.raises(ValueError, match="8 rows"):
        batch.split(3)


def test_batch_follows_the_order_of_the_step(tmp_path):
    dataset = written(tmp_path, some_rows(10))
    for step in (1, 2, 3):
        batch = dataset.train.batch(step, seed=5, batch_size=4)
        assert batch.rows.tolist() == order.rows_of_step(step, 5, 4, 10).tolist()
        assert batch.input_ids[0, 0] == dataset.train.row(int(batch.rows[0])).ids[0]


def test_the_last_evaluation_batch_is_filled_with_zero_mask(tmp_path):
    batches = list(written(tmp_path, some_rows(5)).train.batches(4))
    assert [batch.rows.tolist() for batch in batches] == [[0, 1, 2, 3], [4, -1, -1, -1]]
    assert batches[1].loss_mask[0].any()
    assert not batches[1].loss_mask[1:].any()
    assert all(len(batch.rows) == 4 for batch in batches)


@pytest.mark.parametrize(("longest", "length"), [(2, 32), (33, 32), (34, 64), (65, 64)])
def test_length_is_the_smallest_multiple_of_32_that_holds_the_predictions(tmp_path, longest, length):
    assert written(tmp_path, [encoded(*range(1, longest + 1))]).length == length


def test_a_given_length_is_kept(tmp_path):
    assert written(tmp_path, [encoded(1, 2)], length=64).length == 64


def test_no_held_out_rows_is_an_empty_split(tmp_path):
    dataset = written(tmp_path, some_rows(3))
    assert len(dataset.held_out) == 0
    assert list(dataset.held_out.batches(4)) == []


def test_hash_is_of_the_content(tmp_path):
    one = written(tmp_path / "a", some_rows(4)).tokens_sha256
    assert (
        one
        == tokens.write(
            tmp_path / "b", {"train": tokens.pack(some_rows(4))}, source_key="other", info={"x": 1}
        ).tokens_sha256
    )
    assert one != written(tmp_path / "c", some_rows(4, seed=1)).tokens_sha256
    changed = some_rows(4)
    changed[2].mask[-1] ^= 1
    assert one != written(tmp_path / "d", changed).tokens_sha256


def test_golden_hash(tmp_path):
    dataset = tokens.write(
        tmp_path / "x",
        {"train": tokens.pack([encoded(1, 2, 3)]), "held_out": tokens.pack([encoded(4, 5)])},
        source_key="k",
        info={},
    )
    assert dataset.tokens_sha256[:16] == "a3faf7dee129068d"


def damage(path: Path) -> None:
    data = bytearray(path.read_bytes())
    data[-1] ^= 1
    path.write_bytes(data)


@pytest.mark.parametrize("name", ["train.ids.npy", "train.mask.npy", "train.starts.npy", "train.ends.npy"])
def test_damage_is_found(tmp_path, name):
    folder = written(tmp_path, some_rows(4)).folder
    damage(folder / name)
    with pytest.raises(DataError):
        TokenDataset.open(folder)


@pytest.mark.parametrize("name", ["train.ids.npy", "dataset.json"])
def test_missing_and_cut_files_are_errors_of_the_data(tmp_path, name):
    folder = written(tmp_path, some_rows(4)).folder
    whole = (folder / name).read_bytes()
    (folder / name).write_bytes(whole[:50])
    with pytest.raises(DataError):
        TokenDataset.open(folder)
    (folder / name).unlink()
    with pytest.raises(DataError):
        TokenDataset.open(folder)


def test_an_unknown_format_is_refused_by_name(tmp_path):
    folder = written(tmp_path, some_rows(2)).folder
    header = json.loads((folder / "dataset.json").read_text())
    (folder / "dataset.json").write_text(json.dumps({**header, "format": 9}))
    with pytest.raises(DataError, match="format 9"):
        TokenDataset.open(folder)


def test_files_hold_no_pickle(tmp_path):
    folder = tmp_path / "set"
    written(tmp_path, some_rows(2))
    np.save(folder / "train.ids.npy", np.array([{"a": 1}], dtype=object), allow_pickle=True)
    with pytest.raises(DataError, match="Python objects"):
        TokenDataset.open(folder)


def write_many(folder: str) -> None:
    for _ in range(10):
        dataset = written(Path(folder), some_rows(20))
        assert len(TokenDataset.open(dataset.folder).train) == 20


def test_writers_at_once_leave_one_whole_data_set(tmp_path):
    context = multiprocessing.get_context("spawn")
    writers = [context.Process(target=write_many, args=(str(tmp_path),)) for _ in range(3)]
    for writer in writers:
        writer.start()
    for writer in writers:
        writer.join(60)
    assert [writer.exitcode for writer in writers] == [0, 0, 0]
    assert len(TokenDataset.open(tmp_path / "set").train) == 20
    assert {path.name for path in tmp_path.iterdir()} == {"set"}


def test_batches_come_at_five_million_tokens_a_second(tmp_path):
    rng = np.random.default_rng(0)
    rows = [encoded(*rng.integers(1, 30000, n), supervised=n // 2) for n in rng.integers(20, 129, 500)]
    split = written(tmp_path, rows).train
    best = 0.0
    for _ in range(5):  # the best of five: other processes may be using the machine
        start = time.perf_counter()
        for step in range(1, 51):
            split.batch(step, 0, 32)
        best = max(best, 50 * 32 * split.length / (time.perf_counter() - start))
    assert best > 5e6
