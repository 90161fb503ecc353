"""Writes the lock files of requirements/ through uv: `make lock` (UPGRADE=1 takes newer versions).

torch is the one package that is not taken from the ordinary index: its CPU builds (`2.13.0+cpu`) live on
PyTorch's own index. Where that index cannot be reached, a CPU wheel in PIP_FIND_LINKS serves; failing that,
the line that the lock already has is kept; failing that, the line is left out and the lock's head says so.
A CUDA build is never written. The lock files name no index: who installs them decides where from.
"""

from __future__ import annotations

import os
import re
import subprocess
import sys
import tempfile
import urllib.error
import urllib.request
from dataclasses import dataclass
from pathlib import Path

from tools.export.readers.environment import uv_settings

ROOT = Path(__file__).resolve().parent.parent
REQUIREMENTS = Path("requirements")
TORCH_INDEX = os.environ.get("TORCH_INDEX") or "https://download.pytorch.org/whl/cpu"

# One requirement: its first line and every continuation, hashes included, and the `# via` comments below it.
TORCH_BLOCK = re.compile(r"^torch==(?P<version>\S+)(?:.*\\\n)*.*\n(?:    #.*\n)*", re.MULTILINE)


# What packages ask for beside torch, said otherwise: one wants `2.13.0+cpu`, which no ordinary index has; and of what
# belongs to torch the ordinary index has CUDA builds alone, which a CPU build of torch cannot load (seen: torchvision
# 0.28.0). Text needs none of them.
OVERRIDE = """\
torch=={torch}
torchvision; python_version < "3"
torchaudio; python_version < "3"
torchcodec; python_version < "3"
"""


@dataclass(frozen=True)
class Lock:
    name: str
    inputs: tuple[str, ...]
    python: str
    universal: bool = False  # one file for every supported Python, with markers
    folder: Path = REQUIREMENTS
    platform: str = "x86_64-manylinux_2_28"

    @property
    def path(self) -> Path:
        return self.folder / self.name

    @property
    def has_torch(self) -> bool:
        texts = ((ROOT / self.folder / name).read_text() for name in self.inputs)
        return any(re.search(r"^torch(==|$)", text, re.MULTILINE) for text in texts)


BOARD_IMAGES = ("board", "ttml-build")
READERS = Path("requirements/readers")
# What opens an export for `recipe export --readers`. Their wheels want a newer glibc: manylinux_2_35 for MLX.
OTHERS = ("ctranslate2", "mlx-lm", "onnxruntime-genai", "openvino", "vllm")
LOCKS = (
    Lock("tools.txt", ("tools.in",), "3.10", universal=True),
    Lock("browser.txt", ("browser.in",), "3.10", universal=True),
    *(Lock(f"{name}.txt", (f"{name}.in",), "3.10", universal=True, folder=READERS) for name in ("uv", "llama.cpp")),
    Lock("launcher.txt", ("build.in", "launcher.in"), "3.10", universal=True),
    *(Lock(f"cpu-{python}.txt", ("build.in", "launcher.in", "cpu.in"), python) for python in ("3.10", "3.11", "3.12")),
    # The wheels of ttnn that `make test-all` looks into: they want a newer glibc, and there is none for 3.11.
    *(
        Lock(f"ttnn-{python}.txt", ("ttnn.in",), python, platform="x86_64-manylinux_2_34")
        for python in ("3.10", "3.12")
    ),
    # The images of boards: Ubuntu 22.04's Python.
    *(Lock(f"{name}-3.10.txt", (f"{name}.in",), "3.10", platform="x86_64-manylinux_2_34") for name in BOARD_IMAGES),
    # After the cpu locks: the bench's peers are constrained to their versions.
    Lock("requirements-trl.txt", ("requirements-trl.in",), "3.11", folder=Path("bench")),
    Lock("requirements-serving.txt", ("requirements-serving.in",), "3.11", folder=Path("bench")),
    *(
        Lock(f"{name}.txt", (f"{name}.in",), "3.11", folder=READERS, platform="x86_64-manylinux_2_36")
        for name in ("transformers-4.48", "transformers-4.57", "transformers-5", *OTHERS)
    ),
)


def wanted_torch() -> str:
    """The version that cpu.in pins, as PyTorch names its CPU build."""
    pin = re.search(r"^torch==(\S+)", (REQUIREMENTS / "cpu.in").read_text(), re.MULTILINE)
    if pin is None:
        raise SystemExit("requirements/cpu.in: torch must be pinned as torch==X.Y.Z")
    return f"{pin[1]}+cpu"


def torch_block(text: str) -> str | None:
    """The lock's torch requirement with its hashes, if it is the wanted CPU build."""
    found = TORCH_BLOCK.search(text)
    return found[0] if found and found["version"] == wanted_torch() else None


def cpu_index_answers() -> bool:
    try:
        with urllib.request.urlopen(f"{TORCH_INDEX.rstrip('/')}/torch/", timeout=10):
            return True
    except (urllib.error.URLError, OSError, ValueError):
        return False


def compile_lock(lock: Lock, old: str, cpu_index: bool) -> str:
    """What uv resolves for one lock, keeping the versions of `old` unless UPGRADE is set."""
    command = [sys.executable, "-m", "uv", "pip", "compile", "--quiet", "--no-header", "--generate-hashes"]
    # Wheels only: nothing is built on a user's machine, and no compiler is needed.
    command += ["--only-binary", ":all:", "--no-python-downloads", "--python-version", lock.python]
    command += ["--universal"] if lock.universal else ["--python-platform", lock.platform]
    if lock.has_torch and cpu_index:
        command += ["--torch-backend", "cpu"]
    if os.environ.get("UPGRADE"):
        command += ["--upgrade"]
    with tempfile.TemporaryDirectory() as folder:
        output = Path(folder) / lock.name
        if old:
            output.write_text(old)
        if lock.has_torch:
            override = Path(folder) / "override.txt"
            override.write_text(OVERRIDE.format(torch=wanted_torch().removesuffix("+cpu")))
            command += ["--override", str(override)]
        command += ["--output-file", str(output), *(str(lock.folder / name) for name in lock.inputs)]
        if subprocess.run(command, env=uv_settings(os.environ), stdout=subprocess.DEVNULL).returncode != 0:
            raise SystemExit(f"{lock.path}: uv could not resolve it (its message is above); nothing was written")
        return re.sub(r"^    #   --override .*\n", "", output.read_text(), flags=re.MULTILINE)


def header(lock: Lock, torch_missing: bool) -> str:
    python = "Python 3.10 to 3.12" if lock.universal else f"Python {lock.python}"
    lines = [f"Made by `make lock` from {', '.join(lock.inputs)} for {python} on Linux x86-64. Do not edit."]
    if torch_missing:
        lines += [
            f"torch=={wanted_torch()} is left out: no CPU build for this Python was in sight.",
            "`make lock` adds it where PyTorch's CPU index can be reached; until then set-up goes without.",
        ]
    return "".join(f"# {line}\n" for line in lines)


def make(lock: Lock, old: str, cpu_index: bool) -> str:
    """The whole text of one lock file, which was `old`."""
    body = compile_lock(lock, old, cpu_index)
    if not lock.has_torch:
        return header(lock, torch_missing=False) + body
    # The old line first: the index lists the hashes of more platforms than a folder of wheels does, and a
    # lock must not change with the machine that it is made on.
    block = torch_block(old) or torch_block(body)
    body = TORCH_BLOCK.sub(lambda _: block or "", body)
    return header(lock, torch_missing=block is None) + body


def main() -> None:
    os.chdir(ROOT)
    before = {lock: lock.path.read_text() if lock.path.exists() else "" for lock in LOCKS}
    missing = [lock for lock, old in before.items() if lock.has_torch and torch_block(old) is None]
    cpu_index = bool(missing) and cpu_index_answers()
    if missing and not cpu_index:
        print(f"PyTorch's CPU index does not answer ({TORCH_INDEX}); going on without it", flush=True)
    for lock, old in before.items():
        text = make(lock, old, cpu_index)
        lock.path.write_text(text)
        count = len(re.findall(r"^[a-z0-9].*==", text, re.MULTILINE))
        torch = ", torch left out" if lock.has_torch and torch_block(text) is None else ""
        print(f"{lock.path}: {count} packages{torch}, {'unchanged' if text == old else 'written'}", flush=True)


if __name__ == "__main__":
    main()
