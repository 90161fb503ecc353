"""Where a run starts: a new folder, or the newest verified checkpoint of an unfinished one."""

from __future__ import annotations

import contextlib
import os
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import IO

from common.config import load_resolved
from common.errors import DataError, MachineError, UsageError
from common.files import sync, try_lock
from common.train import checkpoint
from common.train.checkpoint import Checkpoint
from common.train.manifest import Manifest
from common.train.plan import Plan

INEXACT = (  # keys that change the order of floating-point sums, and so the last bits, but not the training
    "training_config.micro_batch_size",
    "model_config.gradient_checkpointing",
    "device_config.threads",
    "device_config.mesh_shape",
    "hw",
)


SECTIONS = ("training", "model", "data")  # what a training digest covers


@dataclass
class Start:
    """A run folder, locked by this process, and the state it starts from (None: the base's weights)."""

    folder: Path
    lock: IO[str]
    checkpoint: Checkpoint | None = None
    parent: str | None = None
    manifest: Manifest | None = None
    notes: list[str] = field(default_factory=list)

    @property
    def step(self) -> int:
        return self.checkpoint.step if self.checkpoint else 0


def find_start(plan: Plan, say: Callable[[str], None]) -> Start:
    """Follow `--resume`: auto (an unfinished run of the same training), never, or a path."""
    asked = plan.launch.resume
    if asked in ("auto", "never") and plan.launch.accept_changes:
        todo = "name the run or the checkpoint to start from: --resume PATH"
        raise UsageError(f"--accept-changes has no meaning with --resume {asked}", where="--accept-changes", todo=todo)
    if asked == "never":
        return new_run(plan)
    if asked != "auto":
        return branch(plan, Path(asked).expanduser().resolve(), say)
    for folder, manifest in unfinished(plan, say):
        lock = try_lock(folder, plan.launch.run)  # before its checkpoints are read: two resumptions may look at once
        if lock is None:
            say(f"{folder.name} has the same training and is running: not touched")
            continue
        found = checkpoint.newest(folder / "checkpoints", say)
        if found is None:
            lock.truncate(0)  # the folder of this launch will be another one
            lock.close()
            continue
        refuse_other_tokens(plan, found, "--resume never starts a new run on the data as they are now")
        say(f"resuming {folder.name} after step {found.step}; --resume never would start a new run")
        return Start(folder, lock, found, manifest=manifest, notes=changes(plan, folder, found))
    return new_run(plan)


def unfinished(plan: Plan, say: Callable[[str], None]) -> Iterator[tuple[Path, Manifest]]:
    """Yield run folders of this training whose manifest is not `done`, newest first; of this user, or of `out`'s."""
    for path in sorted(plan.launch.out.glob("*/manifest.json"), reverse=True):  # names begin with the time of the start
        try:
            manifest = Manifest.load(path.parent)
        except MachineError as error:
            say(f"{path.parent.name} is not looked at: {error.what}")
            continue
        if manifest.exit_reason == "done" or manifest.training_digest != plan.training_digest:
            continue
        if path.parent.is_symlink() or path.parent.stat().st_uid not in (os.getuid(), plan.launch.out.stat().st_uid):
            say(f"{path.parent.name} is a link or another user's: --resume {path.parent} would start from it")
            continue
        yield path.parent, manifest


def branch(plan: Plan, path: Path, say: Callable[[str], None]) -> Start:
    """Return a new run that starts from the checkpoint `path`, or from the newest one of the run `path`."""
    if (path / "state.json").is_file():
        found: Checkpoint | None = checkpoint.verify(path)
        parent = path.parent.parent
    elif (path / "checkpoints").is_dir():
        found, parent = checkpoint.newest(path / "checkpoints", say), path
    else:
        todo = "give a folder of runs/, or auto, or never"
        raise UsageError("no run and no checkpoint there", where=str(path), todo=todo)
    if found is None:
        raise MachineError("no checkpoint there verifies", where=str(path), todo="start anew with --resume never")
    accepted = refuse_changes(plan, found, parent)
    start = new_run(plan)
    start.checkpoint, start.parent = found, f"{parent.name}/{found.folder.name}"
    start.notes = accepted + changes(plan, parent, found)
    say(f"starting from {start.parent}")
    return start


def refuse_changes(plan: Plan, found: Checkpoint, parent: Path) -> list[str]:
    """Refuse another training or other tokens, unless --accept-changes; then return what to record."""
    accepted = []
    if found.state["training_digest"] != plan.training_digest:
        lines = [line for line in config_changes(plan, parent) if line.split("_config.")[0] in SECTIONS]
        accepted = ["another training: " + "; ".join(lines or ["the base model"])]
    if found.state["tokens_sha256"] != plan.dataset.tokens_sha256:
        accepted.append("other tokens")
    if accepted and not plan.launch.accept_changes:
        if len(accepted) == 1 and accepted[0] == "other tokens":
            refuse_other_tokens(plan, found, "undo the change of the data, or add --accept-changes (it is recorded)")
        todo = "undo the change, or add --accept-changes (it is recorded), or start anew with --resume never"
        raise UsageError(f"the checkpoint is of {', and '.join(accepted)}", where=str(found.folder), todo=todo)
    return [f"accepted: {line}" for line in accepted]


def refuse_other_tokens(plan: Plan, found: Checkpoint, todo: str) -> None:
    """Raise DataError, advising `todo`, where the checkpoint was trained on other tokens than the plan's."""
    if found.state["tokens_sha256"] != plan.dataset.tokens_sha256:
        then, now = found.state["tokens_sha256"][:12], plan.dataset.tokens_sha256[:12]
        what = f"the data changed since step {found.step} of this run: its tokens had sha256 {then}..., now {now}..."
        raise DataError(what, where=str(found.folder), todo=todo)


def changes(plan: Plan, folder: Path, found: Checkpoint) -> list[str]:
    """Return, as lines, what differs from the run in `folder`, and whether its bits end here."""
    lines = {line.split(":", 1)[0]: line for line in config_changes(plan, folder)}
    notes = []
    if lines.pop("device_config.compile", None) and plan.config.device.compile != "auto":
        compiled = "compiled" if found.state.get("compiled") else "eager"
        notes = [f"device_config.compile is decided once in a run: it goes on {compiled}"]
    # Decisions of the run until now that `opening.keep_decisions` takes over: no change, where nobody asks for another.
    if plan.config.device.threads in (None, found.state.get("threads")):
        lines.pop("device_config.threads", None)
    notes += [f"changed: {line}" for line in lines.values()]
    return notes + (["not bit-exact from here"] if set(lines) & set(INEXACT) else [])


def config_changes(plan: Plan, folder: Path) -> list[str]:
    """Return a line for each key in which a run's config differs from the plan's; none where it has no config."""
    path = folder / "config.resolved.yaml"
    return load_resolved(path).changes(plan.config) if path.is_file() else []


def new_run(plan: Plan) -> Start:
    """Make a new, locked folder for the run; a launcher may have made it for this user."""
    folder = plan.launch.out / plan.launch.run
    folder.mkdir(parents=True, exist_ok=True)
    for above in folder.parents:  # else a power cut takes the folder, with all that will be saved in it
        with contextlib.suppress(PermissionError):  # one that this user may not read was not made by this user
            sync(above)
    lock = try_lock(folder, plan.launch.run)
    assert lock is not None, "the folder is ours alone"
    return Start(folder, lock)
