"""`recipe serve RUN --hw BOARD`: check, stage, print; with `--yes`, have the board and start."""

from __future__ import annotations

import os
import signal
import subprocess
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from types import FrameType
from typing import Any

from common.errors import MachineError, RecipeError, UsageError
from common.files import read_json
from common.hardware import Hardware
from common.signals import handled
from tools.doctor.machine import refuse_unready
from tools.export.record import verified
from tools.machine import detect, lease
from tools.results import schema
from tools.runs.folder import RunFolder, is_run, read_run
from tools.serve.board import preflight, roads, stage
from tools.serve.board.preflight import GB
from tools.serve.board.roads import ROADS, Command, Served

Say = Callable[[str], None]
LOOPBACK = ("127.0.0.1", "localhost", "::1")
PASSED_ON = (signal.SIGINT, signal.SIGTERM, signal.SIGHUP)
PATIENCE = 3  # signals: the third kills what does not listen


@dataclass(frozen=True)
class Options:
    """What `recipe serve --hw` is told. `road` None: both are printed; `mesh` None: all chips of the board."""

    road: str | None = None
    mesh: str | None = None
    server_dir: Path | None = None
    host: str = "127.0.0.1"
    port: int = 8000
    context: int | None = None
    slots: int = 32
    yes: bool = False


def serve_on(hw: Hardware, path: Path, options: Options, show: Say, say: Say) -> int:
    """Print by `show` what would serve a run's export on a board; with `yes` start that. Return its exit code.

    Raises RecipeError for what cannot be served there, and with `yes` for what this machine lacks.
    """
    check_options(options)
    if not is_run(path):
        raise UsageError("a board serves a run's verified export", where=str(path), todo="give the run's folder")
    run, record = read_run(path), verified(path)
    merged = (path / "export" / "merged").resolve()
    architecture = read_json(merged / "config.json")
    mesh = preflight.choose_mesh(hw, options.mesh)
    preflight.check_slots(options.slots)
    context = preflight.choose_context(architecture, options.context)
    preflight.check_model(architecture, hw, mesh, options.slots)
    choice = detect.choose(hw.name, require_present=False)
    digest = stage.digest_of(record)
    name = stage.name_of(str(run.fact("recipe")), run.name, int(record["step"]), digest)
    visible = visible_devices(choice.nodes)
    served = Served(
        folder=path.resolve() / stage.FOLDER / name,
        digest=digest,
        mesh=mesh,
        host=options.host,
        port=options.port,
        context=context,
        slots=options.slots,
        sampling=sampling_of(run),
        visible=visible,
        nodes=[] if visible is None else [int(Path(node).name) for node in choice.nodes],
    )
    commands = commands_of(served, options, say)
    if options.yes:  # before anything is written
        refuse_absent(hw, choice.nodes)
        roads.check_here(str(options.road), commands[str(options.road)])
    stage.stage(merged, served.folder, say)
    for line in remarks(run, merged, architecture, served, hw):
        say(line)
    for road, command in commands.items():
        show(f"# by {road}{'' if command.folder or road != ROADS[0] else ', in a checkout of it'}")
        for line in command.lines():
            show(line)
    if not options.yes:
        say(f"nothing was started; --road {list(commands)[-1]} --yes starts it, where the board is")
        return 0
    with lease.of_board(hw, choice.nodes, f"serve {name}"):
        return follow(commands[str(options.road)], str(options.road), asked(served, path), say)


def check_options(options: Options) -> None:
    """Raise UsageError for options that no board is served with."""
    if options.host not in LOOPBACK:
        todo = f"keep 127.0.0.1, and forward the port: ssh -L {options.port}:127.0.0.1:{options.port} THIS_MACHINE"
        raise UsageError(
            "whoever reaches that host could ask: no key is set", where=f"--host {options.host}", todo=todo
        )
    if not options.port:
        raise UsageError("a board's server needs a port", where="--port 0", todo="--port 8000")
    if options.yes and options.road is None:
        raise UsageError(
            "which of the two is to be started?", where="--yes", todo=f"--road {' or --road '.join(ROADS)}"
        )


def commands_of(served: Served, options: Options, say: Say) -> dict[str, Command]:
    """Return the command of each road asked for that leads there, and say why another does not.

    Raises UsageError where none does.
    """
    found: dict[str, Command] = {}
    refused: dict[str, UsageError] = {}
    for road in [options.road] if options.road else ROADS:
        try:
            found[road] = roads.command_for(road, served, options.server_dir)
        except UsageError as error:
            refused[road] = error
    if not found:
        raise next(reversed(refused.values()))
    for road, why in refused.items():
        say(f"not by {road}: {why.what}")
    return found


def sampling_of(run: RunFolder) -> dict[str, float]:
    """Return how answers are chosen where a request does not say, as vLLM has it: the recipe's way."""
    chosen = run.config.eval
    found: dict[str, float] = {"temperature": chosen.temperature}
    if chosen.temperature:
        found |= {"top_k": chosen.top_k, "top_p": chosen.top_p}
    if chosen.repetition_penalty != 1:
        found["repetition_penalty"] = chosen.repetition_penalty
    return found


def visible_devices(nodes: tuple[str, ...]) -> str | None:
    """Return the TT_VISIBLE_DEVICES that leaves these nodes alone; None where this machine has, or shows, no others."""
    if not nodes:
        return None
    with detect.alone(nodes):
        return os.environ.get(detect.VISIBLE)


def refuse_absent(hw: Hardware, nodes: tuple[str, ...]) -> None:
    """Raise MachineError, with all that is missing, where the doctor does not see the board and what it stands on."""
    try:
        refuse_unready(hw, nodes)
    except MachineError as error:
        todo = (
            f"recipe doctor --hw {hw.name} says what to do; without --yes the commands are printed for another machine"
        )
        raise MachineError(error.what, where=error.where, todo=todo) from error


def remarks(run: RunFolder, merged: Path, architecture: Mapping[str, Any], served: Served, hw: Hardware) -> list[str]:
    """Return what to know before it is started: what it takes, what is other than on the CPU, and what nobody tried."""
    mesh = served.mesh
    pool, weights = (
        preflight.pool_bytes(architecture, mesh, served.slots),
        preflight.weight_bytes(architecture, mesh),
    )
    sizes = f"keys and values {pool / GB:.1f} GB, weights up to {weights / GB:.1f} GB, of {mesh.dram / GB:.1f} GB"
    lines = [f"memory of a chip: {sizes}; as much goes to the cache of converted weights on disk"]
    if word := stage.instructed(str(served.folder)):
        lines.append(
            f"{word!r} is in the path: tt-metal calls a folder of its cache `instruct`, and does nothing else by it"
        )
    if not (merged / "chat_template.jinja").is_file():
        lines.append("no chat template: /v1/completions only")
    if run.config.data.system_prompt:
        lines.append("the recipe's system prompt is not put before a conversation there: send it with the messages")
    settings = read_json(merged / stage.GENERATION) if (merged / stage.GENERATION).is_file() else {}
    if settings.get("suppress_tokens"):
        lines.append("vLLM reads no suppress_tokens: it may answer with tokens that stand for nothing")
    return [*lines, evidence(run, hw)]


def evidence(run: RunFolder, hw: Hardware) -> str:
    """Return whether the recipe's results.yaml has a serving on the board, as an entry that says `recipe serve`."""
    try:
        entries = schema.load(run.recipe_dir).numbers
    except RecipeError:
        entries = ()
    for entry in entries:
        if entry.board == hw.name and schema.is_serving(entry):
            return f"measured on {hw.name}: {entry.what}"
    return f"UNTESTED: nobody is known to have served such a model on {hw.name}; this is read from upstream's sources"


def asked(served: Served, path: Path) -> str:
    """Return the command that tells whether it serves what the run learned."""
    host = f"[{served.host}]" if ":" in served.host else served.host
    return f"recipe serve --check http://{host}:{served.port}/v1 --against {path}"


def follow(command: Command, road: str, check: str, say: Say) -> int:
    """Start a command, hand signals on to it, wait for its end; return its exit code, as a shell has it."""
    heard: list[int] = []
    child: subprocess.Popen[bytes] | None = None

    def pass_on(number: int, _frame: FrameType | None) -> None:
        heard.append(number)
        if child is not None and child.poll() is None:
            hand_on(child, heard)

    with handled(PASSED_ON, pass_on):
        words = [roads.program(command.words[0]), *command.words[1:]]
        # A session of its own: a Ctrl-C typed here reaches it once, from us.
        child = subprocess.Popen(words, cwd=command.folder, env=roads.environment_of(command), start_new_session=True)
        if heard:  # while it was being started
            hand_on(child, heard)
        say(f"started; once it answers: {check}")
        code = child.wait()
    if road == ROADS[0] and code == 0:
        say("run.py has ended, its container goes on and has the board; docker ps shows it, docker stop ends it")
    return code if code >= 0 else 128 - code


def hand_on(child: subprocess.Popen[bytes], heard: list[int]) -> None:
    """Send a child the last signal that was heard; kill it and all that it started at the third."""
    if len(heard) < PATIENCE:
        child.send_signal(heard[-1])
    else:
        os.killpg(child.pid, signal.SIGKILL)
