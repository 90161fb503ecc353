"""`python -m tools.launch.rank FOLDER`: one of the several processes of a launch, which is described in FOLDER.

Rank 0 leads: it trains. The others, once it is sure that they were started alike, follow its engine.
"""

from __future__ import annotations

import contextlib
import ctypes
import hashlib
import importlib
import importlib.metadata
import json
import os
import signal
import sys
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

from common.config.layers import dotted, flatten
from common.errors import RankLost, RecipeError
from common.paths import ROOT
from common.train.launch import Launch
from tools.launch.exit_codes import INTERRUPTED, OUR_BUG, exit_code_of
from tools.launch.processes import CODE, JOB, PID

if TYPE_CHECKING:
    from engines.cpu.ranks import Ranks

PR_SET_PDEATHSIG = 1  # linux/prctl.h
# The code that trains and that brings its processes together; the recipe's folder is hashed beside it.
ROOMS = (ROOT / "common", ROOT / "engines", ROOT / "tools" / "launch")


def main() -> None:
    """Take part, leave the exit code in the folder and end with 0: any other end is that of a rank that died."""
    folder = Path(sys.argv[1])
    job = json.loads((folder / JOB).read_text(encoding="utf-8"))
    launch = Launch.from_json(job["launch"])
    module, name = job["lead"]
    first_here = os.environ["LOCAL_RANK"] == "0"
    if first_here:
        (folder / PID).write_text(str(os.getpid()), encoding="ascii")

    def lead() -> None:
        getattr(importlib.import_module(module), name)(launch, **job["options"])

    code = exit_code_of(lambda: take_part(launch, lead, job["agent"]), launch.debug)
    if first_here:
        (folder / CODE).write_text(str(code), encoding="ascii")
    elif code == OUR_BUG:
        sys.exit(code)


def take_part(launch: Launch, lead: Callable[[], None], agent: int) -> int:
    """Join the other ranks of this run; call `lead` on rank 0, follow on every other. Return rank 0's exit code.

    `agent` is the process id of the command that has started this one.
    """
    from engines.cpu import ranks
    from engines.cpu.engine import follow

    first_here = os.environ["LOCAL_RANK"] == "0"
    try:
        with ranks.process_group() as found:
            host = found.assert_same_on_all_ranks(facts(launch))
            if found.rank and first_here:
                print(f"rank {found.rank} of {found.world} works here; rank 0, with the run's folder, is on {host}")
            if found.rank:
                code = follow(found)
                return code if first_here else 0
            stop_with(agent)
            with ending(found):
                lead()
            return 0
    except RecipeError as error:
        if first_here:
            raise
        return error.code  # one message a host is enough


def stop_with(parent: int) -> None:
    """Save and stop by a SIGTERM once `parent`, which has started this process, is gone.

    Raises KeyboardInterrupt where it went before the kernel was asked for that signal, which then never comes.
    """
    ctypes.CDLL(None).prctl(PR_SET_PDEATHSIG, signal.SIGTERM)
    if os.getppid() != parent:
        raise KeyboardInterrupt


@contextlib.contextmanager
def ending(found: Ranks) -> Iterator[None]:
    """Tell the other ranks, however rank 0 ends, that it ends and with which code."""
    code = OUR_BUG
    try:
        yield
        code = 0
    except RecipeError as error:
        code = error.code
        raise
    except KeyboardInterrupt:
        code = INTERRUPTED
        raise
    finally:
        with contextlib.suppress(RankLost):
            found.broadcast_command("end", code)


def facts(launch: Launch) -> Mapping[str, Any]:
    """Return what has to be the same on every host: config, files, versions."""
    packages = ("torch", "transformers", "numpy")
    return {
        **{dotted(key): value for key, value in flatten(launch.config.dump())},
        **{f"the files of {folder.name}/": sha256_of(folder) for folder in (*ROOMS, launch.recipe_dir)},
        **{package: importlib.metadata.version(package) for package in packages},
    }


def sha256_of(folder: Path) -> str:
    """Over names and bytes of the files below `folder`, compiled Python left out."""
    digest = hashlib.sha256()
    for path in sorted(folder.rglob("*")):
        if path.is_file() and path.suffix != ".pyc":
            digest.update(f"{path.relative_to(folder)} {path.stat().st_size}\n".encode() + path.read_bytes())
    return digest.hexdigest()


if __name__ == "__main__":
    main()
