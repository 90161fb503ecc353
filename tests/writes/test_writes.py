"""Every write of ours fails once: one message, the right code, what was there before is intact, and a second try works.

`trials.py` says what is expected, `pieces.py` what is tried. A new write within a piece is covered by itself; a new
piece is an entry there. The table of all that was tried is docs/durability.md, which `python -m tests.writes` makes.
"""

from __future__ import annotations

import contextlib
import os
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import IO, Any

import pytest

from common import files
from common.data import tokens
from common.paths import ROOT
from common.train import checkpoint, manifest
from tests.writes import pieces
from tests.writes.faults import SHORT, Fault, Operation, Unavailable, Watcher, run
from tests.writes.pieces import LARGE, PIECES
from tests.writes.trials import Piece, Result, Trials, fragile

NAMED = {piece.name: piece for piece in PIECES}


@pytest.fixture(scope="module", autouse=True)
def watched(tmp_path_factory: pytest.TempPathFactory) -> None:
    folder = tmp_path_factory.mktemp("watched")
    try:
        run(lambda: (folder / "a").write_bytes(bytes(2)), [folder], Fault(1, SHORT))
    except Unavailable as error:
        pytest.skip(f"no process can be watched here (Linux 5.9, or what is around a container): {error}")


def wrong(results: Iterator[Result]) -> Iterator[str]:
    for one in results:
        if one.problems:
            yield f"{one.operation}, {one.error}: {'; '.join(one.problems)}\n{one.screen}"


@pytest.mark.parametrize("piece", PIECES, ids=lambda piece: piece.name)
def test_each_write_fails_once(piece, tmp_path):
    trials = Trials(piece, tmp_path / "piece")
    assert fragile(trials.operations, piece.in_place) == []
    assert list(wrong(trials.results(every_error=False))) == []


@pytest.mark.slow
@pytest.mark.parametrize("piece", [*PIECES, *LARGE], ids=lambda piece: piece.name)
def test_each_write_fails_in_every_way(piece, tmp_path):
    trials = Trials(piece, tmp_path / "piece")
    assert fragile(trials.operations, piece.in_place) == []
    assert list(wrong(trials.results(every_error=True))) == []


# --- what the trials catch ----------------------------------------------------------------------------------------


def not_synced(_path: Path) -> None:
    pass


@contextlib.contextmanager
def renamed_first(folder: Path) -> Iterator[Path]:
    folder.parent.mkdir(parents=True, exist_ok=True)
    made = folder.with_name(f".{folder.name}")
    made.mkdir()
    yield made
    made.rename(folder)
    files.sync_all(folder)
    files.sync(folder.parent)


def written_in_place(path: Path, value: Any) -> None:
    path.write_text(str(value), encoding="utf-8")
    files.sync(path)


def lock_by_name(folder: Path, run: str = "") -> IO[str] | None:
    """A lock that is there as long as its file is, whoever made it."""
    try:
        lock = (folder / ".lock").open("x", encoding="utf-8")
    except FileExistsError:
        return None
    lock.write(f"{os.getpid()} {run}\n")
    return lock


def silent(path: Path, array: Any) -> None:
    import numpy as np

    np.save(path, array)


def problems(piece: Piece, place: Path) -> str:
    try:
        trials = Trials(piece, place)
    except AssertionError as error:  # it is not even whole when nothing fails
        return str(error)
    found = fragile(trials.operations, piece.in_place)
    return "\n".join(found) or next(wrong(trials.results(every_error=False)), "")


@pytest.mark.parametrize(
    ("module", "name", "defect", "piece", "caught"),
    [
        (files, "sync", not_synced, "results.yaml", ".results.yaml.PID is renamed before it is synced"),
        (files, "sync", not_synced, "corpus", "is not synced after a rename"),
        (checkpoint, "made_whole", renamed_first, "checkpoint", "model.safetensors is renamed before it is synced"),
        (manifest, "write_json", written_in_place, "manifest", "manifest.json is written in place"),
        (pieces, "try_lock", lock_by_name, "lock of a run", "the lock outlived its process"),
        (tokens, "save_array", silent, "token files", "not whole: cannot read token file"),
    ],
    ids=["no fsync", "no fsync of the folder", "rename first", "in place", "lock by name", "a silent writer"],
)
def test_a_planted_defect_is_caught(monkeypatch, tmp_path, module, name, defect, piece, caught):
    monkeypatch.setattr(module, name, defect)
    assert caught in problems(NAMED[piece], tmp_path / "piece")


def one_fault(action: Callable[[Path], object], folder: Path, fault: Fault) -> tuple[int, str, list[str]]:
    folder.mkdir(exist_ok=True)
    done = run(lambda: action(folder), [folder], fault)
    return done.code, done.screen, [str(operation) for operation in done.operations]


def test_whoever_writes_is_seen(tmp_path):
    """Python, C's stdio, Rust, and another process."""

    def write(folder: Path) -> None:
        import subprocess

        import numpy as np
        from safetensors.numpy import save_file

        (folder / "python").write_text("a")
        np.save(folder / "c.npy", np.arange(9))
        save_file({"a": np.arange(9)}, folder / "rust")  # which renames a file of its own
        subprocess.run(["sh", "-c", f"echo a > {folder}/shell"], check=True)

    code, _, seen = one_fault(write, tmp_path / "here", Fault(999, "EIO"))
    assert code == 0
    assert {"write python", "write c.npy", "write shell", "write .tmp*", "rename .tmp* -> rust"} <= set(seen)


@pytest.mark.parametrize("library", ["safetensors", "tokenizers"])
def test_an_error_of_a_library_in_rust_is_one_of_the_disk_too(tmp_path, library):
    def write(folder: Path) -> None:
        import numpy as np
        import tokenizers
        from safetensors.numpy import save_file

        if library == "tokenizers":
            tokenizers.Tokenizer(tokenizers.models.WordLevel({"a": 0}, unk_token="a")).save(str(folder / "a"))
        else:
            save_file({"a": np.arange(9)}, folder / "a")

    for error in ("ENOSPC", "EIO", "EDQUOT"):
        code, screen, _ = one_fault(write, tmp_path / error, Fault(0, error))
        assert (code, screen.startswith("error: could not read or write a file")) == (4, True), screen


@pytest.mark.parametrize(
    ("error", "length", "code"), [("short", 1000, 0), ("full", 500, 4), ("EIO", 0, 4), ("ENOSPC", 0, 4)]
)
def test_what_a_failing_disk_does_with_a_write(tmp_path, error, length, code):
    def write(folder: Path) -> None:
        (folder / "a").write_bytes(bytes(1000))

    assert one_fault(write, tmp_path / "here", Fault(1, error))[0] == code
    assert (tmp_path / "here" / "a").stat().st_size == length


def test_what_differs_from_process_to_process_is_left_out_of_names():
    watcher = Watcher(-1, 10, ["/here"], None)
    names = ["/here/step-00000010/.state.json.10", "/here/.10", "/here/.a-x1y2z3_4/b.10.json", "/tmp/#10 (deleted)"]
    assert list(map(watcher.short, names)) == ["step-N/.state.json.PID", ".PID", ".a-*/b.10.json", ".unnamed"]


def test_the_order_of_what_is_synced_and_renamed():
    def operations(*words: str) -> list[Operation]:
        return [Operation(*word.split(" ", 1)) for word in words]

    whole = ["write .a/b", "fsync .a/b", "rename .a -> a"]
    folder = Operation("fsync folder", ".")
    assert fragile([*operations(*whole), folder]) == []
    assert fragile(operations(*whole)) == ["the folder . is not synced after a rename"]
    assert fragile([*operations("write .a/b", "rename .a -> a"), folder]) == [".a/b is renamed before it is synced"]
    assert fragile(operations("write log"), in_place=("log",)) == []


# --- whole runs, and the page -------------------------------------------------------------------------------------


@pytest.mark.slow
@pytest.mark.parametrize("hw", ["cpu", "n150"])
def test_each_write_of_a_whole_run_fails_once(hw, tmp_path):
    """Every fifth operation of those that are unlike: a run and the one that goes on take seconds each time."""
    pytest.importorskip("torch", reason="a run's export is checked by torch")
    from tests.writes.whole import RUNS

    (piece,) = [piece for piece in RUNS if piece.name.endswith({"cpu": "the CPU", "n150": "n150"}[hw])]
    trials = Trials(piece, tmp_path / "piece")
    assert fragile(trials.operations, piece.in_place) == []
    assert list(wrong(trials.results(every_error=False, every=5))) == []


@pytest.mark.parametrize("piece", PIECES, ids=lambda piece: piece.name)
def test_the_page_has_every_operation(piece, tmp_path):
    page = (ROOT / "docs" / "durability.md").read_text(encoding="utf-8")
    operations = Trials(piece, tmp_path / "piece").operations
    lines = {f"| {piece.name} | {operation.kind} | `{operation.path}` | " for operation in operations}
    assert [line for line in sorted(lines) if line not in page] == [], ".venv/bin/python -m tests.writes mends the page"
