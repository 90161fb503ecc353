"""Files that survive a power cut: written beside, synced, renamed; and the time as they say it."""

from __future__ import annotations

import contextlib
import errno
import fcntl
import hashlib
import json
import os
import re
import shutil
import tempfile
import time
from collections.abc import Iterator
from pathlib import Path
from typing import IO, Any

from common.errors import MachineError, RecipeError

DISK = ("ENOSPC", "EDQUOT", "EFBIG", "EIO", "EROFS", "EACCES", "ELOOP", "ENOLCK")  # a full, failing or forbidden one


def write_atomic(path: Path, text: str) -> None:
    """Replace `path` by `text`; a reader sees the old file or the new one, never a part. An OSError names a file."""
    temporary = path.with_name(f".{path.name}.{os.getpid()}")
    with named(path):
        try:
            temporary.unlink(missing_ok=True)  # of a process of the same number that was killed
            with temporary.open("x", encoding="utf-8") as file:  # new: nothing goes through a link that was put there
                file.write(text)
            sync(temporary)
            temporary.replace(path)
        finally:
            temporary.unlink(missing_ok=True)
        sync(path.parent)


def write_json(path: Path, value: Any) -> None:
    """Replace `path` by `value` as JSON, readable by people."""
    write_atomic(path, json.dumps(value, indent=1, ensure_ascii=False) + "\n")


def read_json(path: Path, version: int | None = None, error: type[RecipeError] = MachineError) -> dict[str, Any]:
    """Return the JSON object in a file; `version` is the `format` that it must have. Raises `error`, with the path."""
    try:
        value = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError, RecursionError) as fault:
        raise error(f"{path.name} cannot be read: {fault}", where=str(path)) from fault
    if not isinstance(value, dict):
        raise error(f"{path.name} holds no JSON object", where=str(path))
    if version is not None and value.get("format") != version:
        text = f"{path.name} has format {value.get('format')!r}, this version reads {version}"
        raise error(text, where=str(path))
    return value


def read_pins(path: Path, key: str) -> dict[str, dict[str, Any]]:
    """Return what a lock (models.lock.yaml, corpora.yaml) pins under `key`, by name. Raises MachineError."""
    import yaml

    try:
        lock = yaml.safe_load(path.read_text(encoding="utf-8"))
        version, pins = lock["format"], {name: dict(pin) for name, pin in lock[key].items()}
    except (OSError, yaml.YAMLError, AttributeError, LookupError, RecursionError, TypeError, ValueError) as error:
        what = " ".join((str(error) if isinstance(error, yaml.YAMLError) else repr(error)).split())
        raise MachineError(f"{path.name} cannot be read: {what}", where=str(path)) from error
    if version == 1:
        return pins
    raise MachineError(f"{path.name} has format {version}, this version reads 1", where=str(path))


def utc_now() -> str:
    """Return the time now, UTC, to the second: `2026-01-01T00:00:00Z`."""
    return time.strftime("%Y-%m-%dT%H:%M:%SZ", time.gmtime())


def sha256_file(path: Path) -> str:
    """Return the sha256 of a file's bytes, in hex."""
    digest = hashlib.sha256()
    with path.open("rb") as file:
        while block := file.read(1 << 20):  # a checkpoint is larger than memory may be
            digest.update(block)
    return digest.hexdigest()


def try_lock(folder: Path, run: str = "") -> IO[str] | None:
    """Lock a run's folder for this process; return None if another one has it. The lock of a dead process is free.

    `run`, for a process that trains, is the name of its launch: its folder is found by it.
    """
    with disk_errors("lock the run's folder", folder):
        flags = os.O_WRONLY | os.O_APPEND | os.O_CREAT | os.O_NOFOLLOW | os.O_CLOEXEC
        lock = os.fdopen(os.open(folder / ".lock", flags, 0o666), "a", encoding="utf-8")
        try:
            fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            lock.close()
            return None
        if run:
            lock.truncate(0)
            lock.write(f"{os.getpid()} {run}\n")
            lock.flush()
    return lock


def sync(path: Path) -> None:
    """Flush a file or a folder to the disk."""
    descriptor = os.open(path, os.O_RDONLY)
    try:
        with named(path):
            os.fsync(descriptor)
    except OSError as error:
        if error.errno != errno.EINVAL:  # fsync(2): nothing to flush there, as in a folder of autofs or squashfs
            raise
    finally:
        os.close(descriptor)


def sync_all(folder: Path) -> None:
    """Flush a folder, and all that is in it, to the disk: before the rename that gives it its name."""
    for path in (*folder.rglob("*"), folder):
        sync(path)


@contextlib.contextmanager
def named(path: Path) -> Iterator[None]:
    """Have an OSError of the block name `path` where it names no file: those of write and fsync do not."""
    try:
        yield
    except OSError as error:
        error.filename = error.filename or str(path)
        raise


@contextlib.contextmanager
def disk_errors(doing: str, path: Path | str = "") -> Iterator[None]:
    """Raise MachineError, with what it hindered in `doing`, for an error of a full or failing disk in the block."""
    try:
        yield
    except Exception as error:
        rust = re.search(r"\(os error (\d+)\)", str(error))  # safetensors and tokenizers say it in words alone
        number = error.errno if isinstance(error, OSError) else int(rust[1]) if rust else None
        if isinstance(error, RecipeError) or errno.errorcode.get(number or 0) not in DISK:
            raise
        what, copy = f"could not {doing}: {os.strerror(number or 0)}", getattr(error, "filename2", "")
        todo = "make room or permissions there and run the same command again; what was saved before is intact"
        raise MachineError(what, where=str(copy or getattr(error, "filename", "") or path), todo=todo) from error


def clear(path: Path) -> None:
    """Delete a file, or a folder with all that is in it, if it is there; of a link the link alone."""
    shutil.rmtree(path) if path.is_dir() and not path.is_symlink() else path.unlink(missing_ok=True)


def inside(folder: Path, name: str) -> Path:
    """Return the path of a file that a record names in its folder. Raises MachineError for any other path."""
    if name in ("", "..") or "\0" in name or Path(name).name != name:
        raise MachineError(f"{name!r} is no name of a file in this folder", where=str(folder))
    return folder / name


@contextlib.contextmanager
def made_whole(folder: Path) -> Iterator[Path]:
    """Yield an empty folder of that name, which takes its place at the end of the block, flushed to the disk.

    Where another process was first, its copy is as good. Beside the empty folder is room for what goes again.
    """
    folder.parent.mkdir(parents=True, exist_ok=True)
    scratch = tempfile.TemporaryDirectory(prefix=f".{folder.name}-", dir=folder.parent, ignore_cleanup_errors=True)
    with scratch as beside:
        made = Path(beside) / folder.name
        made.mkdir()
        yield made
        sync_all(made)  # before the rename: a name must not reach the disk before its content
        try:
            made.rename(folder)
        except OSError:
            if not folder.is_dir():
                raise
        sync(folder.parent)  # the rename itself
