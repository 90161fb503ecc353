"""The folder that a board serves: an export's files under a name of their own, and nothing that upstream misreads.

tt-metal calls a model by the last part of its folder's path, keys caches of converted weights by that name and never by
content, and reads much else out of the path (models/ttt_compat/tt/model_config.py, generator_vllm.py). Every run's
export is called `merged`: a second one would be served with the first one's weights.
"""

from __future__ import annotations

import contextlib
import errno
import filecmp
import hashlib
import json
import os
import re
import shutil
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from typing import Any

from common.errors import MachineError
from common.files import clear, disk_errors, read_json, sync, try_lock, write_json
from tools.serve.board.preflight import GB

FOLDER = "serve"  # in the run's folder
GENERATION = "generation_config.json"
CAP = (
    "max_new_tokens"  # vLLM takes it as a cap on every request, silently (vllm/config/model.py); older exports have it
)
LEFT = ".tmp-"  # what a staging that was killed leaves begins with it
NO_LINKS = (errno.EXDEV, errno.EPERM, errno.EMLINK, errno.ENOTSUP)  # another file system, or one without hard links
SIZES = ("3.1-8B", "3.2-11B", "3.1-70B", "3.2-90B")  # anywhere in a path: that model's limits and settings


def digest_of(record: Mapping[str, Any]) -> str:
    """Return the sha256 of export/merged as its record has it: of the names and hashes of its files."""
    files = {name: sha256 for name, sha256 in record["sha256"].items() if name.startswith("merged/")}
    return hashlib.sha256(json.dumps(files, sort_keys=True).encode()).hexdigest()


def name_of(recipe: str, run: str, step: int, digest: str) -> str:
    """Return what the model is called there: recipe, run, step, and eight digits of its digest.

    Small letters, digits and dashes: no size such as 3.1-8B is spelled so. Words that are misread all the same are left
    out, and so is a recipe's name that the run's own has in it.
    """
    end = f"{step}-{digest[:8]}"
    words = [run, end] if recipe in run else [recipe, run, end]
    name = re.sub("[^a-z0-9]+", "-", "-".join(words).lower()).strip("-")
    return f"model-{end}" if misread(name, name) else name


def misread(path: str, name: str) -> str:
    """Return what tt-metal would take a model for by its path and its name, the last part of it; empty: for itself."""
    small = path.lower()
    if "llama" in small and "vision" in small:
        return "a Llama-Vision: its path has both 'llama' and 'vision' in it"
    if "mistral" in name.lower() and "vision" in small:
        return "a Mistral that sees: 'mistral' is in its name and 'vision' in its path"
    if size := next((size for size in SIZES if size in path), None):
        return f"a Llama of size {size}: its path has that in it"
    if "phi-4" in name.lower():
        return "a Phi-4: its name has that in it"
    return ""


def instructed(path: str) -> str:
    """Return what makes tt-metal read a path as an instruct model's; empty: nothing.

    By that it names a folder within its cache otherwise (`weight_cache_path`), and nothing else for these models.
    """
    return next((word for word in ("instruct", "it") if word in path.lower()), "")


def stage(merged: Path, folder: Path, say: Callable[[str], None]) -> None:
    """Make `folder` the export's files by hard links, with a generation_config.json of its own; keep one that is that.

    The export is only read. Raises MachineError where the folder has anything else in it: nothing is deleted there.
    """
    with disk_errors("stage the export", folder), alone_in(folder.parent):
        for left in folder.parent.glob(f"{LEFT}*"):  # of a staging that was killed: this process has the lock
            clear(left)
        settings = without_cap(merged)
        if folder.exists():
            check_staged(merged, folder, settings)
            say(f"staged already: {folder}")
            return
        temporary = folder.parent / f"{LEFT}{folder.name}"
        temporary.mkdir()
        try:
            copied = [path for path in files_of(merged) if not link_or_copy(path, temporary / path.name)]
            if settings is not None:
                write_json(temporary / GENERATION, settings)
                (temporary / GENERATION).chmod(0o644)
            temporary.chmod(0o755)  # a container reads it as another user
            temporary.rename(folder)
        finally:
            shutil.rmtree(temporary, ignore_errors=True)
        sync(folder.parent)
    how = (
        f"copies ({sum(path.stat().st_size for path in copied) / GB:.2f} GB: no hard links there)"
        if copied
        else "links"
    )
    say(f"staged: {folder}: the export's files as {how}, and its own {GENERATION}")


@contextlib.contextmanager
def alone_in(folder: Path) -> Iterator[None]:
    """Have the lock of a run's staging folder within. Raises MachineError where another process has it."""
    folder.mkdir(exist_ok=True)
    lock = try_lock(folder)
    if lock is None:
        raise MachineError("another process stages this run", where=str(folder), todo="the same command again")
    with lock:
        yield


def files_of(merged: Path) -> list[Path]:
    """Return the export's files that are staged as they are."""
    return sorted(path for path in merged.iterdir() if path.name != GENERATION)


def without_cap(merged: Path) -> dict[str, Any] | None:
    """Return the export's generation settings without the one that caps every answer; None: it has no such file."""
    if not (merged / GENERATION).is_file():
        return None
    return {key: value for key, value in read_json(merged / GENERATION).items() if key != CAP}


def link_or_copy(source: Path, target: Path) -> bool:
    """Put a file in a second place; return whether that is a hard link, else it is a copy."""
    try:
        os.link(source, target)
    except OSError as error:
        if error.errno not in NO_LINKS:
            raise
        shutil.copyfile(source, target)
        target.chmod(0o644)
        sync(target)
        return False
    return True


def check_staged(merged: Path, folder: Path, settings: Mapping[str, Any] | None) -> None:
    """Raise MachineError where a folder is not what would be staged now."""
    wanted = {path.name for path in files_of(merged)} | ({GENERATION} if settings is not None else set())
    here = {path.name for path in folder.iterdir()}
    odd = sorted(wanted ^ here) or [path.name for path in files_of(merged) if not same(path, folder / path.name)]
    if not odd and settings is not None and read_json(folder / GENERATION) != settings:
        odd = [GENERATION]
    if odd:
        todo = "move that folder away, and give the command again"
        raise MachineError(f"it is not as it was staged: {', '.join(odd)}", where=str(folder), todo=todo)


def same(one: Path, other: Path) -> bool:
    """Return whether two files have the same bytes: one file, or a copy."""
    return one.samefile(other) or filecmp.cmp(one, other, shallow=False)
