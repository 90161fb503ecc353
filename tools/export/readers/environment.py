"""Environments of other software: one for each lock in requirements/readers/, made on demand below RECIPES_HOME.

They are made by uv, which is fetched by hash first. Its cache lies beside them, and a package that several of them
have is on the disk once.
"""

from __future__ import annotations

import hashlib
import os
import re
import shutil
import subprocess
import sys
import tempfile
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path

from common.errors import MachineError
from common.paths import ROOT, home

LOCKS = ROOT / "requirements" / "readers"
# As in ci/setup.sh: where CPU builds of torch are found, unless pip is told of another place that has the pinned file.
TORCH_INDEX = os.environ.get("TORCH_INDEX", "https://download.pytorch.org/whl/cpu")
# One requirement: its first line and the lines with its hashes.
TORCH = re.compile(r"^torch==\S+(?:.*\\\n)*.*\n", re.MULTILINE)
SECONDS = 3600  # that one step of the set-up may take; the largest environment is a gigabyte of downloads
Say = Callable[[str], None]


def version_of(lock: str, package: str) -> str:
    """Return the version of a package that the lock of that name pins."""
    found = re.search(rf"^{re.escape(package)}==(\S+)", text_of(lock), re.MULTILINE)
    assert found, f"{lock}.txt has {package}"
    return found[1]


def python_of(lock: str, say: Say) -> Path:
    """Return the Python of the environment of a lock, made now where there is none for it and this Python.

    Raises MachineError where it cannot be made: for want of the network, of the Python that the lock is for, of room.
    """
    wanted = re.search(r" for Python (3\.\d+) on ", text_of(lock))
    folder = folder_of(lock)
    python = folder / "bin" / "python"
    if python.is_file():
        return python
    uv, env = uv_of(say), {**uv_settings(os.environ), "UV_CACHE_DIR": str(folder.parent / "cache")}
    say(f"fetching what requirements/readers/{lock}.txt names, into {folder}")
    with tempfile.TemporaryDirectory(prefix=f".{lock}-", dir=folder.parent) as scratch:
        made = Path(scratch) / "venv"
        version = wanted[1] if wanted else sys.executable
        run([uv, "venv", "--quiet", "--relocatable", "--no-python-downloads", "--python", version, made], env, scratch)
        install: list[str | Path] = [uv, "pip", "install", "--quiet", "--python", made / "bin" / "python"]
        install += ["--no-deps", "--require-hashes", "--only-binary", ":all:"]
        if torch := TORCH.search(text_of(lock)):
            # Alone, by its local version, which the ordinary index has not: never a CUDA build.
            named = Path(scratch) / "torch.txt"
            named.write_text(torch[0], encoding="utf-8")
            try:
                run([*install, "-r", named], env, scratch)
            except MachineError:
                run([*install, "--index", TORCH_INDEX, "-r", named], env, scratch)
        run([*install, "-r", LOCKS / f"{lock}.txt"], env, scratch)
        place(made, folder)
    return python


def uv_of(say: Say) -> Path:
    """Return uv, installed by hash into an environment of its own. Raises MachineError where it cannot be had."""
    folder = folder_of("uv")
    if not (folder / "bin" / "uv").is_file():
        folder.parent.mkdir(parents=True, exist_ok=True)
        say(f"fetching uv {version_of('uv', 'uv')}, which makes environments, into {folder}")
        with tempfile.TemporaryDirectory(prefix=".uv-", dir=folder.parent) as scratch:
            made = Path(scratch) / "venv"
            run([sys.executable, "-m", "venv", made], os.environ, scratch)
            pip: list[str | Path] = [made / "bin" / "python", "-m", "pip", "install", "--quiet"]
            pip += ["--no-deps", "--require-hashes", "--only-binary", ":all:", "--disable-pip-version-check"]
            run([*pip, "-r", LOCKS / "uv.txt"], os.environ, scratch)
            place(made, folder)
    return folder / "bin" / "uv"


def uv_settings(environment: Mapping[str, str]) -> dict[str, str]:
    """Return an environment with pip's settings said again to uv, which reads only its own."""
    env = dict(environment)
    for pip_name, uv_name in {
        "PIP_FIND_LINKS": "UV_FIND_LINKS",
        "PIP_INDEX_URL": "UV_DEFAULT_INDEX",
        "PIP_EXTRA_INDEX_URL": "UV_INDEX",
        "PIP_CERT": "SSL_CERT_FILE",
    }.items():
        if env.get(pip_name) and not env.get(uv_name):
            separator = "," if uv_name == "UV_FIND_LINKS" else " "
            env[uv_name] = separator.join(env[pip_name].split())
    return env


def run(command: Sequence[str | Path], env: Mapping[str, str], folder: str) -> None:
    """Run a step of the set-up in `folder`. Raises MachineError with the last line that it said."""
    try:
        done = subprocess.run(command, env=dict(env), cwd=folder, capture_output=True, text=True, timeout=SECONDS)
    except subprocess.TimeoutExpired:
        raise MachineError(f"could not be set up within {SECONDS // 60} minutes") from None
    if done.returncode:
        raise MachineError(f"could not be set up: {last_line(done.stderr or done.stdout)}")


def last_line(text: str) -> str:
    """Return the last line that is not empty."""
    return (text.strip().splitlines() or ["it said nothing"])[-1].strip()


def place(made: Path, folder: Path) -> None:
    """Put a finished environment in its place, from which one that lost its Python is taken away first."""
    if folder.is_dir() and not (folder / "bin" / "python").is_file():
        shutil.rmtree(folder)
    try:
        made.rename(folder)
    except OSError:
        if not folder.is_dir():  # else another process was first, and its copy is as good
            raise


def folder_of(lock: str) -> Path:
    """Return the folder of a lock's environment: another one for each content of the lock, and each Python of ours."""
    made_from = hashlib.sha256(f"{text_of(lock)}{sys.version}".encode()).hexdigest()
    return home() / "readers" / f"{lock}-{made_from[:12]}"


def text_of(lock: str) -> str:
    """Return the text of requirements/readers/LOCK.txt."""
    return (LOCKS / f"{lock}.txt").read_text(encoding="utf-8")
