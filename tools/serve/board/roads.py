"""The two roads to a server on a board, as commands: tt-inference-server's run.py, and vLLM with Tenstorrent's plugin.

Sources: tt-inference-server pull request 4967 (--custom-weights), its run.py, and its catalog of release 0.25.0 (in the
wheel tenstorrent 1.2.1, release_model_spec.json); tenstorrent/vllm-tt-plugin, README.md, October 2026.
"""

from __future__ import annotations

import json
import os
import shlex
import shutil
import subprocess
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from common.errors import MachineError, UsageError
from common.paths import home
from tools.containers.docker import check_engine
from tools.serve.board import stage
from tools.serve.board.preflight import BLOCK, Mesh

ROADS = ("tt-inference-server", "vllm")
# Catalog models of which a Llama's settings are taken, each with its devices: the smallest first. The Galaxies' entries
# split their chips among several servers, which no Llama of ours was checked for here.
CATALOG = {
    "Llama-3.2-1B-Instruct": ("n150", "n300", "t3k"),
    "Llama-3.1-8B-Instruct": ("p150", "p150x8", "p300", "p300x2"),
}
PLUGINS = "tt,tt_model_registry"  # the plugin's entry points
TT = {"optimizations": "accuracy"}  # the default, "performance", has 4-bit weights: too few for small models
PROBE_SECONDS = 120  # an answer takes seconds; a first import of vllm from a slow disk longer
FIND = "import importlib.util as u; print(*(n for n in ('vllm', 'vllm_tt_plugin', 'ttnn') if u.find_spec(n) is None))"


@dataclass(frozen=True)
class Served:
    """A staged folder, named as the model is, and how it is served; `sampling` is for requests that name none."""

    folder: Path
    digest: str
    mesh: Mesh
    host: str
    port: int
    context: int
    slots: int
    sampling: Mapping[str, float]
    visible: str | None = None  # TT_VISIBLE_DEVICES, and the numbers of these nodes: where the machine has others, too
    nodes: Sequence[int] = ()

    @property
    def name(self) -> str:
        return self.folder.name

    @property
    def cache(self) -> Path:
        """Return where converted weights are kept: of this export alone, as upstream's cache goes by names."""
        return home() / "tt-cache" / self.digest[:16]


@dataclass(frozen=True)
class Command:
    """Words to start, with what they need in their environment, and the folder that they are started in."""

    words: Sequence[str]
    environment: Mapping[str, str] = field(default_factory=dict)
    folder: Path | None = None

    def lines(self) -> list[str]:
        """Return the command as it can be typed: an option a line."""
        start = f"cd {shlex.quote(str(self.folder))} && " if self.folder else ""
        parts = [start + " ".join(f"{name}={shlex.quote(value)}" for name, value in self.environment.items())]
        for word in self.words:
            if word.startswith("--") or not parts[1:]:
                parts.append(shlex.quote(word))
            else:
                parts[-1] += f" {shlex.quote(word)}"
        return [part + " \\" * (part is not parts[-1]) for part in parts]


def command_for(road: str, served: Served, server_dir: Path | None) -> Command:
    """Return a road's command. Raises UsageError where the road does not lead to this mesh, or misreads the path."""
    return tt_inference_server(served, server_dir) if road == ROADS[0] else vllm(served)


def tt_inference_server(served: Served, server_dir: Path | None) -> Command:
    """Return the start of run.py, which starts a container: it mounts the folder, named as the model is."""
    device = served.mesh.name.lower()
    model = next((model for model, devices in CATALOG.items() if device in devices), None)
    if model is None:
        what = f"its catalog (release 0.25.0) has no small Llama on {served.mesh.name}"
        raise UsageError(what, where=f"--road {ROADS[0]}", todo=f"--road {ROADS[1]}")
    # The catalog's entry means its own model: 131072 tokens of context, and on some boards a server for each chip. Only
    # these arguments reach the container: --override-tt-config changes a specification that stays on the host
    # (workflows/run_docker_server.py, release 0.20.0).
    arguments = {
        "max_model_len": served.context,
        "max_num_batched_tokens": served.context,
        "max_num_seqs": served.slots,
        "block_size": BLOCK,
        "data_parallel_size": 1,
        "generation_config": "vllm",
        "override_generation_config": dict(served.sampling),
        "additional_config": {"tt": TT},
    }
    words = ["python3", "run.py", "--model", model, "--tt-device", device, "--workflow", "server", "--docker-server"]
    words += ["--custom-weights", served.name, "--host-weights-dir", str(served.folder), "--no-auth"]
    words += ["--bind-host", served.host, "--service-port", str(served.port)]
    words += ["--vllm-override-args", json.dumps(arguments)]
    if served.nodes:
        words += ["--device-id", ",".join(map(str, served.nodes))]
    return Command(words, {"MODEL_SOURCE": "local"}, server_dir)


def vllm(served: Served) -> Command:
    """Return the start of vLLM, in the plugin's environment. Raises UsageError for a path that is misread."""
    if wrong := stage.misread(str(served.folder), served.name):
        todo = f"move or rename the folder in it; {ROADS[0]} sees the folder's own name alone"
        raise UsageError(f"tt-metal would take it for {wrong}", where=str(served.folder), todo=todo)
    if served.visible is not None and (count := len(served.visible.split(","))) != served.mesh.chips:
        # The plugin takes a chip for each word (worker.py, _resolve_mesh_grid): one for an n300, which has two.
        mesh = f"{served.mesh.name} of {served.mesh.chips} chips"
        what = f"vllm-tt-plugin makes no mesh {mesh} where the devices that it may see are {count} in number"
        todo = (
            f"a machine without other cards, TT_VISIBLE_DEVICES unset; or --road {ROADS[0]}, or a mesh of {count} chips"
        )
        raise UsageError(what, where=f"TT_VISIBLE_DEVICES={served.visible}", todo=todo)
    environment = {
        "HF_MODEL": str(served.folder),  # the model reads it, the plugin does not: it must be --model's
        "TT_CACHE_PATH": str(served.cache),
        "MESH_DEVICE": served.mesh.name,
        "VLLM_PLUGINS": PLUGINS,
        "HF_HUB_OFFLINE": "1",  # all it needs is in the folder
    }
    if served.visible is not None:
        environment["TT_VISIBLE_DEVICES"] = served.visible
    words = ["vllm", "serve", str(served.folder), "--served-model-name", served.name]
    words += ["--host", served.host, "--port", str(served.port), "--max-model-len", str(served.context)]
    words += ["--max-num-batched-tokens", str(served.context), "--max-num-seqs", str(served.slots)]
    words += ["--block-size", str(BLOCK), "--generation-config", "vllm"]
    words += ["--override-generation-config", json.dumps(dict(served.sampling))]
    words += ["--additional-config", json.dumps({"tt": TT})]
    return Command(words, environment)


# --- is it here? ----------------------------------------------------------------------------------------------------


def check_here(road: str, command: Command) -> None:
    """Raise MachineError, with what is missing, where a road's programs are not on this machine."""
    if road == ROADS[0]:
        check_server(command)
    else:
        check_vllm()


def check_server(command: Command) -> None:
    """Look for Docker, the checkout of tt-inference-server, and every option of the command in its help."""
    if command.folder is None:
        todo = "git clone https://github.com/tenstorrent/tt-inference-server, then --server-dir its folder"
        raise UsageError("where is tt-inference-server?", where=f"--road {ROADS[0]}", todo=todo)
    if not (command.folder / "run.py").is_file():
        raise UsageError("no run.py there", where=str(command.folder), todo="give a checkout of tt-inference-server")
    check_engine()
    told = ask([program("python3"), "run.py", "--help"], command.folder)
    if lacks := [word for word in command.words if word.startswith("--") and word not in told]:
        todo = "a release with pull request 4967 (--custom-weights); or --road vllm"
        raise MachineError(f"its run.py knows no {', '.join(lacks)}", where=str(command.folder), todo=todo)


def check_vllm() -> None:
    """Look for the command `vllm`, and for the plugin and ttnn in its environment."""
    python = Path(program("vllm")).parent / "python"
    lacks = ask([str(python), "-c", FIND]).split() if python.is_file() else ["python beside it"]
    if lacks:
        todo = "in tt-metal's environment: source docs/install-vllm-tt.sh of github.com/tenstorrent/vllm-tt-plugin"
        raise MachineError(f"the environment of vllm has no {', '.join(lacks)}", where=str(python), todo=todo)


def program(name: str) -> str:
    """Return the path of a program. Raises MachineError where none is on PATH."""
    found = shutil.which(name)
    if found is None:
        raise MachineError(f"no {name} on PATH", where=name, todo="activate the environment that has it")
    return found


def ask(words: Sequence[str], folder: Path | None = None) -> str:
    """Return what a program prints. Raises MachineError where it fails or does not end."""
    try:
        said: Any = subprocess.run(
            words,
            cwd=folder,
            capture_output=True,
            text=True,
            errors="replace",
            timeout=PROBE_SECONDS,
            stdin=subprocess.DEVNULL,
        )
    except (OSError, subprocess.TimeoutExpired) as error:
        raise MachineError(f"it does not answer: {type(error).__name__}", where=shlex.join(words)) from error
    if said.returncode:
        last = (said.stderr.strip().splitlines() or ["without a word"])[-1]
        raise MachineError(f"it ended with {said.returncode}: {last}", where=shlex.join(words))
    return str(said.stdout)


def environment_of(command: Command) -> dict[str, str]:
    """Return the environment to start a command in: this process's, with the command's own."""
    return {**os.environ, **command.environment}
